"""One setting of the C library that training on a CPU needs.

Every step of a training frees and allocates the same large buffers. By default glibc gives
such memory back to the system and asks for it again, which the system fills with zeros page
by page: on a two-core virtual machine that took half of a convolutional network's step.
"""

from __future__ import annotations

import ctypes
from functools import cache

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGEST_TRIM, _LARGEST_MMAP = 2**31 - 1, 2**30


@cache
def keep_freed_memory() -> bool:
    """Let this process keep what it frees, for its next allocation; return whether it will.

    Other C libraries than glibc have no such setting and are left alone.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _LARGEST_MMAP) and mallopt(_TRIM_THRESHOLD, _LARGEST_TRIM))
