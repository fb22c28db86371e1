"""How much of a file is in the page cache. Standard library only."""

import ctypes
import os

_CACHESTAT = 451  # of every architecture, from Linux 6.5 on

_libc = ctypes.CDLL(None, use_errno=True)


class _CacheStat(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("cache", "dirty", "back", "evicted", "recent")]


def cached_pages(fd: int) -> int:
    """How many pages of a file the page cache has; pages of tmpfs are in it.

    :raises OSError: the kernel does not tell.
    """
    span = (ctypes.c_uint64 * 2)(0, 0)  # to the end
    found = _CacheStat()
    if _libc.syscall(_CACHESTAT, fd, span, ctypes.byref(found), 0):
        raise OSError(ctypes.get_errno(), f"cachestat: {os.strerror(ctypes.get_errno())}")
    return int(found.cache)
