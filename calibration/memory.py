"""Memory: what is not needed any more is kept for what comes next, or goes back to the system."""

from __future__ import annotations

import ctypes
import gc
import sys

# Below this nobody notices, and collecting costs time.
WORTH_RETURNING = 1 << 28
# mallopt's parameters by number (malloc.h of the GNU C library), and what each becomes: blocks of up to so many bytes come from
# the heap (more is refused), which grows by so many at once and keeps so many at its end.
HEAP_KEEPS = {-3: 1 << 25, -2: 1 << 26, -1: 1 << 30}


def keep_freed() -> None:
    """Let this process keep what it frees and use it again, in place of asking the system for fresh pages every time.

    For a process that makes and drops arrays of megabytes over and over, and ends soon; the GNU C library alone is told.
    """
    tell = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if tell is not None:
        for parameter, value in HEAP_KEEPS.items():
            tell(parameter, value)


def give_back(size: int) -> None:
    """Collect what lies in cycles, as graphs do, and return free memory to the system, where that is much.

    Args:
        size: About how many bytes there are to return.
    """
    if size < WORTH_RETURNING:
        return
    gc.collect()
    trim()


def trim() -> None:
    """Return free memory to the system, in place of keeping it for what comes next; the GNU C library alone keeps it."""
    returned = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if returned is not None:
        returned(0)
