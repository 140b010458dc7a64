"""``python -m quantcli``, and the command ``quantcli``."""

import sys


def main() -> None:
    """Run the command line and exit with its code; Ctrl-C while it is still being imported ends it quietly."""
    try:
        from quantcli import cli
        from quantcli.lazily import import_late

        import_late()
        cli.main()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
