"""Opens files on behalf of a caller: where its path leads, with its permissions.

A path starts at the caller's root, working directory or descriptor, whatever its mount namespace.
Magic links (/proc/self/fd/N) are not followed: they would lead to files of the supervisor.
"""

from __future__ import annotations

import os
from functools import cache
from typing import NamedTuple

from pkernfs.native._native import ffi, lib
from pkernfs.plain.caller import Caller, Identity
from pkernfs.plain.opens import (
    AT_FDCWD,
    KEPT,
    RESOLVE_BENEATH,
    RESOLVE_IN_ROOT,
    RESOLVE_NO_MAGICLINKS,
    Opening,
)

_SCOPED = RESOLVE_BENEATH | RESOLVE_IN_ROOT


class _Place(NamedTuple):
    """A file, and the mount in which a path led to it; mounts of two namespaces differ."""

    mount: int
    device: int
    ino: int


def find(caller: Caller, opening: Opening, path: bytes, who: Identity | None = None) -> int:
    """Return a descriptor (O_PATH) of what a caller's path leads to.

    :param who: whose permissions count; None: our own
    :raises OSError: nothing is there, it is not for us, or only the kernel can tell.
    """
    flags = os.O_PATH | opening.flags & os.O_NOFOLLOW
    resolve = opening.resolve | RESOLVE_NO_MAGICLINKS
    is_absolute = path.startswith(b"/")
    if not opening.resolve & _SCOPED:
        has_our_root = _place_of(caller.root) == _own_root()
        if is_absolute:
            if has_our_root:
                return _open(who, AT_FDCWD, path, flags, resolve)
            return _open_at(who, caller.root, path, flags, resolve | RESOLVE_IN_ROOT)
        if not has_our_root:  # .. and absolute symlinks would lead past the caller's root
            resolve |= RESOLVE_BENEATH
    number = None if opening.directory == AT_FDCWD else opening.directory
    directory = caller.directory(number)
    try:
        return _open(who, directory, path, flags, resolve)
    finally:
        os.close(directory)


def may_access(who: Identity | None, fd: int, access: int) -> bool:
    """Tell if ``who`` (None: we) may read or write a found file, also by its mount."""
    return not lib.pk_may_access(_as_caller(who).struct, fd, access)


def open_native(who: Identity | None, path: str, opening: Opening) -> int:
    """Open a segment's native file with the flags that the caller gave.

    :param path: as this process sees it
    :raises OSError: it is gone, or ``who`` may not.
    """
    flags = opening.flags & KEPT | os.O_NOFOLLOW
    return _open(who, AT_FDCWD, os.fsencode(path), flags, RESOLVE_NO_MAGICLINKS)


class _AsCaller(NamedTuple):
    """An identity for C; ``groups`` keeps the memory that ``struct`` points to."""

    struct: object
    groups: object = None


def _as_caller(who: Identity | None) -> _AsCaller:
    if who is None:
        return _AsCaller(ffi.NULL)
    groups = ffi.new("uint32_t[]", sorted(who.groups))
    fields = (who.uid, who.gid, groups, len(who.groups), who.capabilities)
    return _AsCaller(ffi.new("struct pk_caller *", fields), groups)


def _open(who: Identity | None, directory: int, path: bytes, flags: int, resolve: int) -> int:
    fd: int = lib.pk_open(_as_caller(who).struct, directory, path, flags, resolve)
    if fd < 0:
        raise OSError(-fd, os.strerror(-fd))
    return fd


def _open_at(who: Identity | None, start: str, path: bytes, flags: int, resolve: int) -> int:
    directory = os.open(start, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return _open(who, directory, path, flags, resolve)
    finally:
        os.close(directory)


def _place_of(path: str) -> _Place:
    place = ffi.new("struct pk_place *")
    error = lib.pk_place_of(os.fsencode(path), place)
    if error:
        raise OSError(-error, os.strerror(-error))
    return _Place(place.mount, place.device, place.ino)


@cache
def _own_root() -> _Place:
    return _place_of("/")
