"""Locks on regions: open-file-description locks on ranges of a file's offsets.

A holder has its *owner* ranges as long as the region is open, and its *server* ranges from the
first request to the last, so that a contender can tell "in use" (refuse) from "about to be let go"
(wait). A file region is locked on its own file. All physical memory shares one file, in which an
offset is a physical address: however a range is reached, the ranges of two holders do not overlap.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import struct
import time
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from pkernfs.errors import LockedError, RegionError
from pkernfs.host.iomem import Span
from pkernfs.host.mount_table import FSTYPE, mounts_of
from pkernfs.host.sysroot import HOST, Host
from pkernfs.quantities import PhysAddr

_FLOCK = struct.Struct("hhqqi4x")
_CLOSING_WAIT_SECONDS = 10.0
_SERVED_WAIT_SECONDS = 0.5  # a daemon may learn later than umount(8) that it serves no more
_FILE_SERVER_SHIFT = 1
_PHYSICAL_SERVER_SHIFT = 1 << 60  # beyond any address
_PHYSICAL_LOCKS = "run/pkernfs/physical.lock"


class LockRange(NamedTuple):
    """Offsets in the file that is locked; in the one of all physical memory they are addresses."""

    start: int
    size: int


_FILE_OWNER = LockRange(0x7FFF_FFFF_0000_0000, 1)  # far beyond any data


class RegionLock:
    """The lock of one open region. It ends when its descriptor, :attr:`fd`, is closed."""

    def __init__(self, fd: int, spec: str, owned: list[LockRange], server_shift: int) -> None:
        self.fd = fd
        self._spec = spec
        self._owned = owned
        self._server_shift = server_shift

    def take(self, exclusive: bool) -> None:
        """Lock, waiting for one who is about to let go.

        :raises LockedError: it is in use.
        :raises RegionError: the kernel refuses.
        """
        served = time.monotonic() + _SERVED_WAIT_SECONDS
        deadline = time.monotonic() + _CLOSING_WAIT_SECONDS
        kind = fcntl.F_WRLCK if exclusive else fcntl.F_RDLCK
        for owned in self._owned:
            while not self._try(kind, owned):
                limit = served if self._is_served(owned) else deadline
                if time.monotonic() > limit:
                    raise LockedError(f"{self._spec}: {self._in_use(kind, owned)}")
                time.sleep(0.01)

    def let_go(self) -> None:
        """Unlock; the descriptor, which other locks may share, stays open."""
        self.serving(False)
        for owned in self._owned:
            with contextlib.suppress(OSError):
                self._set(fcntl.F_UNLCK, owned)

    def serving(self, on: bool) -> None:
        """Tell contenders whether requests are being served."""
        kind = fcntl.F_WRLCK if on else fcntl.F_UNLCK
        for owned in self._owned:
            with contextlib.suppress(OSError):
                self._set(kind, self._server(owned))

    def _server(self, owned: LockRange) -> LockRange:
        return LockRange(owned.start + self._server_shift, owned.size)

    def _try(self, kind: int, wanted: LockRange) -> bool:
        try:
            self._set(kind, wanted)
        except OSError as e:
            if e.errno in (errno.EAGAIN, errno.EACCES):
                return False
            raise RegionError(f"{self._spec}: cannot lock: {e.strerror}", e.errno or 0) from e
        return True

    def _set(self, kind: int, wanted: LockRange) -> None:
        request = _FLOCK.pack(kind, os.SEEK_SET, wanted.start, wanted.size, 0)
        fcntl.fcntl(self.fd, fcntl.F_OFD_SETLK, request)

    def _holder(self, kind: int, wanted: LockRange) -> LockRange | None:
        """The range of a lock that is in the way of ``wanted``."""
        request = _FLOCK.pack(kind, os.SEEK_SET, wanted.start, wanted.size, 0)
        answer = fcntl.fcntl(self.fd, fcntl.F_OFD_GETLK, request)
        assert isinstance(answer, bytes)
        found, _, start, size, _ = _FLOCK.unpack(answer)
        return None if found == fcntl.F_UNLCK else LockRange(start, size)

    def _is_served(self, owned: LockRange) -> bool:
        return self._holder(fcntl.F_WRLCK, self._server(owned)) is not None

    def _in_use(self, kind: int, owned: LockRange) -> str:
        holder = self._holder(kind, owned)
        user = next(self._users(holder), None)
        by = "" if user is None else f": by {user}"
        if self._server_shift == _FILE_SERVER_SHIFT or holder is None or holder == owned:
            return f"in use: it is mounted or being checked{by}"
        other = Span(PhysAddr(holder.start), holder.size)
        return f"in use: it overlaps {other}, which is mounted or being checked{by}"

    def _source(self) -> str:
        """The region as a table of mounts has it."""
        is_file = self._server_shift == _FILE_SERVER_SHIFT
        return os.path.realpath(self._spec) if is_file else self._spec

    def _users(self, held: LockRange | None) -> Iterator[str]:
        """Yield the processes that have a lock from an offset on, of the file that is locked.

        As far as /proc shows them: those of other users it shows to root only. A lock belongs to an
        open file description, so the kernel tells no process (fcntl(2)); each descriptor's fdinfo
        has its locks (proc(5)).
        """
        if held is None:
            return
        ino = str(os.fstat(self.fd).st_ino)
        for pid in HOST.list("proc"):
            for fd in HOST.list(f"proc/{pid}/fdinfo") if pid.isdigit() else []:
                lines = (HOST.find(f"proc/{pid}/fdinfo/{fd}") or "").splitlines()
                locks = [line.split()[-3:-1] for line in lines if line.startswith("lock:")]
                if any(p.split(":")[-1] == ino and s == str(held.start) for p, s in locks):
                    yield _user(pid) + _elsewhere(self._source(), pid)
                    break


def _user(pid: str) -> str:
    """Return a process for a message, with its mount namespace if it is another one than ours."""
    text = f"process {pid} ({HOST.find(f'proc/{pid}/comm') or '?'})"
    theirs, ours = (_mount_namespace(who) for who in (pid, "self"))
    return text if theirs in (ours, "") else f"{text}, in the mount namespace {theirs}"


def _elsewhere(source: str, daemon: str) -> str:
    """Tell of a mount that umount(8) has not ended: a mount namespace has a copy of it.

    Whoever makes a namespace (a container, unshare(1), a service) gets copies of all mounts, and
    the daemon serves until the last of them has gone (mount_namespaces(7)). Empty if the daemon
    sees the mount itself, or nobody is seen to have it.
    """
    seen = {_mount_namespace(daemon)}
    if _where_mounted(source, daemon) is not None:
        return ""
    for pid in HOST.list("proc"):
        namespace = _mount_namespace(pid) if pid.isdigit() else ""
        if namespace and namespace not in seen:
            seen.add(namespace)
            where = _where_mounted(source, pid)
            if where is not None:
                return f": unmounted, but a copy of the mount is at {where} for {_user(pid)}"
    return ""


def _where_mounted(source: str, pid: str) -> str | None:
    mounts = mounts_of(HOST, pid)
    return next((m.mount_point for m in mounts if (m.fstype, m.source) == (FSTYPE, source)), None)


def _mount_namespace(pid: str) -> str:
    """Return the name of a process' mount namespace; empty if it has ended, or is not ours."""
    try:
        return os.readlink(f"/proc/{pid}/ns/mnt")
    except OSError:
        return ""


def lock_file(fd: int, spec: str, *, exclusive: bool) -> RegionLock:
    """Lock a file region, on its own file.

    :raises LockedError: it is in use.
    """
    lock = RegionLock(fd, spec, [_FILE_OWNER], _FILE_SERVER_SHIFT)
    lock.take(exclusive)
    return lock


def lock_physical(spec: str, spans: list[Span], host: Host, *, exclusive: bool) -> RegionLock:
    """Lock ranges of physical memory. The caller closes the lock's descriptor.

    :raises LockedError: another region has a part of them.
    """
    fd = _open_physical_locks(spec, host)
    try:
        owned = [LockRange(span.start, span.size) for span in spans]
        lock = RegionLock(fd, spec, owned, _PHYSICAL_SERVER_SHIFT)
        lock.take(exclusive)
    except BaseException:
        os.close(fd)
        raise
    return lock


class PhysicalLocks:
    """Locks on ranges of physical memory that come and go: those of one mount's segments.

    They have one descriptor, so ranges that were taken together can be let go apart.
    """

    def __init__(self, spec: str, host: Host, *, exclusive: bool) -> None:
        self._spec = spec
        self._exclusive = exclusive
        self._fd = _open_physical_locks(spec, host)

    def take(self, spans: Iterable[Span]) -> None:
        """Lock ranges; those that are locked by this already stay so.

        :raises LockedError: a region, or another mount, has a part of them.
        """
        lock = self._lock(spans)
        try:
            lock.take(self._exclusive)
        except BaseException:
            lock.let_go()
            raise
        if self._exclusive:
            lock.serving(True)

    def let_go(self, spans: Iterable[Span]) -> None:
        """Unlock ranges."""
        self._lock(spans).let_go()

    def close(self) -> None:
        """Unlock everything. A second call does nothing."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _lock(self, spans: Iterable[Span]) -> RegionLock:
        owned = [LockRange(span.start, span.size) for span in spans]
        return RegionLock(self._fd, self._spec, owned, _PHYSICAL_SERVER_SHIFT)


class NoPhysicalLocks(PhysicalLocks):
    """For one who only reads what the daemon of a mount has locked."""

    def __init__(self) -> None:
        self._fd = -1

    def take(self, spans: Iterable[Span]) -> None:
        """Lock nothing."""

    def let_go(self, spans: Iterable[Span]) -> None:
        """Unlock nothing."""


def _open_physical_locks(spec: str, host: Host) -> int:
    """The file whose offsets are physical addresses, made if it is not there.

    :raises RegionError: not allowed, or somebody else can write where it is.
    """
    path = host.path(_PHYSICAL_LOCKS)
    directory = os.path.dirname(path)
    try:
        with contextlib.suppress(FileExistsError):
            os.mkdir(directory, 0o755)
            os.chmod(directory, 0o755)  # whatever the umask
        found = os.lstat(directory)
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
            raise RegionError(
                f"{spec}: cannot lock: {directory} is not a directory that only this user can "
                "write to",
                errno.EPERM,
            )
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        return os.open(path, flags, 0o600)
    except OSError as e:
        raise RegionError(f"{spec}: cannot lock: {path}: {e.strerror}", e.errno or 0) from e
