"""The C library's heap, which keeps what was freed unless it is told not to."""

from __future__ import annotations

import ctypes
import sys


def return_freed_memory() -> None:
    """Give freed blocks back to the system, where the C library can (glibc).

    The codes that stay are small and lie between the large temporaries of every layer, so that the holes are not used
    again: without this, packing takes more memory than the student did, and keeps it.
    """
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)
