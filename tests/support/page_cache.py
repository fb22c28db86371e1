"""How much of a file is in the page cache, and whether this kernel can map one without it."""

from __future__ import annotations

import ctypes

import pytest

from pkernfs.host import kernel_image, plain_paths
from pkernfs.host.sysroot import HOST
from support.mounting import libc

_CACHESTAT = 451  # of every architecture, from Linux 6.5 on


class _CacheStat(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("cache", "dirty", "back", "evicted", "recent")]


def cached_pages(fd: int) -> int:
    """How many pages of a file the page cache has; pages of tmpfs are in it."""
    span = (ctypes.c_uint64 * 2)(0, 0)  # to the end
    found = _CacheStat()
    if libc.syscall(_CACHESTAT, fd, span, ctypes.byref(found), 0):
        raise OSError(ctypes.get_errno(), "cachestat")
    return int(found.cache)


def needs_passthrough() -> None:
    """Skip the test where this kernel does not pass mappings of a mount through to a segment."""
    way = plain_paths.passthrough(HOST, kernel_image.running_config(HOST))
    if way.offered is False:
        pytest.skip(f"{way.name}: {way.why}")
