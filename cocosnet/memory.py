"""How a process asks the system for memory."""

from __future__ import annotations

import ctypes
import os

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4  # glibc's <malloc.h>
STEP = 2**26  # bytes by which the process grows
NEVER = 2**31 - 1


def keep_freed_memory() -> None:
    """Have this process use again what it has freed, where its C library is glibc; elsewhere nothing happens.

    glibc asks the system anew for every large map, and the system fills each of its pages with zeros first: a fifth of
    a translation's time on a CPU. Afterwards the process keeps the most that it has needed. Where the environment sets
    glibc's options (MALLOC_..., GLIBC_TUNABLES), they stay.
    """
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return
    option = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if option is not None:
        for name, value in ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, NEVER), (_TOP_PAD, STEP)):
            option(name, value)
