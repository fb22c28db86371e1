"""What a stopped system call asks for: open, openat and openat2 as one thing.

Only what a supervisor can do exactly as the kernel is understood; all else is left to the kernel.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from typing import NamedTuple

from pkernfs.plain.seccomp import OPEN, OPENAT, OPENAT2, Call, is_left_to_kernel

AT_FDCWD = -100

# linux/openat2.h
RESOLVE_NO_XDEV, RESOLVE_NO_MAGICLINKS, RESOLVE_NO_SYMLINKS = 1, 2, 4
RESOLVE_BENEATH, RESOLVE_IN_ROOT = 8, 16
#: What openat2 can be asked for on a caller's behalf: not RESOLVE_CACHED, nor what is unknown here.
_RESOLVE = (
    RESOLVE_NO_XDEV | RESOLVE_NO_MAGICLINKS | RESOLVE_NO_SYMLINKS
    | RESOLVE_BENEATH | RESOLVE_IN_ROOT
)  # fmt: skip
_HOW = struct.Struct("=QQQ")

_O_LARGEFILE = 0o100000
#: Flags that the descriptor of a native file is opened with as well.
KEPT = (
    os.O_ACCMODE | os.O_APPEND | os.O_NONBLOCK | os.O_SYNC | os.O_DSYNC | os.O_DIRECT
    | os.O_NOATIME | os.O_NOCTTY | _O_LARGEFILE
)  # fmt: skip
_KNOWN = KEPT | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW

#: Reads so many bytes of the caller's memory at an address, or fewer.
Read = Callable[[int, int], bytes]


class Opening(NamedTuple):
    """An open that may be answered.

    :ivar directory: the caller's descriptor that a relative path starts at, or :data:`AT_FDCWD`
    :ivar path: the address of the path in the caller's memory
    :ivar resolve: flags of openat2
    """

    directory: int
    path: int
    flags: int
    resolve: int = 0

    @property
    def access(self) -> int:
        """What the caller must have the right to do, as access(2) names it."""
        return {os.O_RDONLY: os.R_OK, os.O_WRONLY: os.W_OK}.get(
            self.flags & os.O_ACCMODE, os.R_OK | os.W_OK
        )


def opening_of(call: Call, read: Read) -> Opening | None:
    """Return what a call asks for; None: the kernel is to do it.

    :raises OSError: the caller's memory cannot be read.
    """
    args = call.args
    match call.number:
        case n if n == OPEN:
            found = Opening(AT_FDCWD, args[0], args[1] & 0xFFFFFFFF)
        case n if n == OPENAT:
            found = Opening(_int(args[0]), args[1], args[2] & 0xFFFFFFFF)
        case n if n == OPENAT2 and args[3] == _HOW.size:
            how = read(args[2], _HOW.size)
            if len(how) < _HOW.size:
                return None
            flags, mode, resolve = _HOW.unpack(how)
            if mode and not flags & os.O_CREAT:  # EINVAL
                return None
            found = Opening(_int(args[0]), args[1], flags, resolve)
        case _:
            return None
    is_known = not found.flags & ~_KNOWN and not found.resolve & ~_RESOLVE
    can_use = found.flags & os.O_ACCMODE != os.O_ACCMODE  # 3: only ioctls
    return found if is_known and can_use and not is_left_to_kernel(found.flags) else None


def _int(register: int) -> int:
    """Return an argument of type int; the upper half of its register may be anything."""
    return (register & 0xFFFFFFFF ^ 0x80000000) - 0x80000000
