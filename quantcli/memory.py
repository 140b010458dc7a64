"""Memory of large models: what is not needed any more goes back to the system."""

from __future__ import annotations

import ctypes
import gc
import sys

# Below this nobody notices, and collecting costs time.
WORTH_RETURNING = 1 << 28


def give_back(size: int) -> None:
    """Collect what lies in cycles, as graphs do, and return free memory to the system, where that is much.

    Args:
        size: About how many bytes there are to return.
    """
    if size < WORTH_RETURNING:
        return
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # the GNU C library keeps freed blocks otherwise
        if trim is not None:
            trim(0)
