"""``python -m quantcli``."""

import sys

from quantcli.cli import run

if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
