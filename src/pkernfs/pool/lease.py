"""Whether a file is nobody else's, asked of the kernel and kept so for a moment.

The kernel gives a lease to write (fcntl(2), F_SETLEASE) only while no other open file description
has the file: none that a process has open or mapped, none on its way in a message, none inside the
kernel. Whoever opens the file during the lease waits. Since Linux 7.0 each file system decides
whether it has leases: tmpfs does, hugetlbfs does not. There, /proc is searched; what opens the
file after that is not seen.
"""

from __future__ import annotations

import enum
import errno
import fcntl
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from pkernfs.host.holders import Target, is_mapped_by, look
from pkernfs.host.left_mappings import left_mappings
from pkernfs.host.same_memory import may_map
from pkernfs.host.sysroot import HOST
from pkernfs.pool.pool import Holder, refuse_holders
from pkernfs.quantities import Ino

_MAPS = "maps"
_MAPS_LEFT = "by a mount that is gone maps"
_OPENED = "has opened"


class _Answer(enum.Enum):
    LEASED = enum.auto()
    HELD = enum.auto()
    UNKNOWN = enum.auto()  # there are no leases here


@contextmanager
def nobody_else(
    fd: int, name: str, passed: Target | None = None, ino: Ino | None = None
) -> Iterator[None]:
    """Have the file ``fd`` to oneself while the context lasts.

    ``fd`` is open for writing, and was opened for this. A mapping of this process is as bad as that
    of another one, unless it was made by ``fd``.

    :param passed: the file of a mount whose mappings the kernel passes through to this file. Then
        the kernel has the file open and gives no lease; /proc is searched, for that file too.
    :param ino: the number of that file, which earlier mounts have passed through as well.
    :raises BusyError: somebody has it open or mapped; the message says who.
    """
    holders = [] if _ask(fd) is _Answer.LEASED else _find(fd, name, passed, ino)
    refuse_holders(name, holders)
    try:
        yield
    finally:
        _give_back(fd)


@contextmanager
def leased(fd: int) -> Iterator[bool]:
    """Tell if the kernel itself says that nobody else has the file, and keep it so for a while.

    On hugetlbfs since Linux 7.0 it never does.
    """
    try:
        yield _ask(fd) is _Answer.LEASED
    finally:
        _give_back(fd)


def holders_of(
    fd: int, name: str, passed: Target | None = None, ino: Ino | None = None
) -> list[Holder]:
    """Return who has the file ``fd`` open or mapped, but for this process.

    With a descriptor that is open for writing, those are found that /proc does not show. One of
    O_PATH will do otherwise.
    """
    found = _find(fd, name, passed, ino)
    _give_back(fd)
    return [holder for holder in found if holder.pid != os.getpid()]


def _ask(fd: int) -> _Answer:
    try:
        # Whoever opens the file has the kernel send a signal. SIGIO would end this process.
        fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    except OSError as e:
        return _Answer.HELD if e.errno == errno.EAGAIN else _Answer.UNKNOWN
    return _Answer.LEASED


def _give_back(fd: int) -> None:
    with suppress(OSError):
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)


def _find(fd: int, name: str, passed: Target | None, ino: Ino | None) -> list[Holder]:
    """Return who keeps the lease from us, or who might have the file where there are no leases.

    If it is nobody, the lease has been taken. A child of this process between fork() and exec() has
    all its descriptors; after the search it has them no more.
    """
    target = Target.of(os.fstat(fd), name)
    seen = look([target] if passed is None else [target, passed])
    found = [p for p in seen.found if p.maps or p.target == target]
    if found:
        return [Holder.of(process) for process in found]
    answer = _ask(fd)
    if answer is _Answer.LEASED:
        return []
    if is_mapped_by(os.getpid(), target):
        return [Holder(os.getpid(), HOST.find("proc/self/comm") or "?", _MAPS)]
    left = [] if ino is None else [p for p in left_mappings([ino]) if may_map(p.pid, p.areas, fd)]
    if left:
        return [Holder(p.pid, p.command, _MAPS_LEFT) for p in left]
    if passed is not None:
        return []  # it is the kernel who has it
    if answer is _Answer.HELD:  # a descriptor on its way in a message, or FUSE
        return [Holder(0, "somebody whom /proc does not show", _OPENED)]
    if seen.hidden:
        return [Holder(0, f"one of the processes that let nobody look ({seen.hidden})", "may have")]
    return []
