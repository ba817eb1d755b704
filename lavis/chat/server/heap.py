"""A long-lived process' freed memory: glibc keeps most of it, more in each thread's own heap.

Where the C library has no such calls, these do nothing.
"""

from __future__ import annotations

import ctypes
import sys

_M_ARENA_MAX = -8  # of glibc's malloc.h


def share_heap() -> None:
    """Have threads that start from now on use one heap, so that what one frees, others take."""
    _call("mallopt", _M_ARENA_MAX, 1)


def give_back() -> None:
    """Return to the system what is free, also between what is in use. Takes milliseconds."""
    _call("malloc_trim", 0)


def _call(name: str, *values: int) -> None:
    function = getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
    if function is not None:
        function(*values)
