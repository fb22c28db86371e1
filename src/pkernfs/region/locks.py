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

from pkernfs.errors import LockedError, RegionError
from pkernfs.host.iomem import Span
from pkernfs.host.sysroot import Host

_FLOCK = struct.Struct("hhqqi4x")
_CLOSING_WAIT_SECONDS = 10.0
_SERVED_WAIT_SECONDS = 0.5  # a daemon may learn later than umount(8) that it serves no more
_FILE_OWNER = Span(0x7FFF_FFFF_0000_0000, 1)  # far beyond any data
_FILE_SERVER_SHIFT = 1
_PHYSICAL_SERVER_SHIFT = 1 << 60  # beyond any address
_PHYSICAL_LOCKS = "run/pkernfs/physical.lock"


class RegionLock:
    """The lock of one open region. It ends when its descriptor, :attr:`fd`, is closed."""

    def __init__(self, fd: int, spec: str, owned: list[Span], server_shift: int) -> None:
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
        for span in self._owned:
            while not self._try(kind, span):
                limit = served if self._is_served(span) else deadline
                if time.monotonic() > limit:
                    raise LockedError(f"{self._spec}: {self._in_use(kind, span)}")
                time.sleep(0.01)

    def serving(self, on: bool) -> None:
        """Tell contenders whether requests are being served."""
        kind = fcntl.F_WRLCK if on else fcntl.F_UNLCK
        for span in self._owned:
            with contextlib.suppress(OSError):
                self._set(kind, Span(span.start + self._server_shift, span.size))

    def _try(self, kind: int, span: Span) -> bool:
        try:
            self._set(kind, span)
        except OSError as e:
            if e.errno in (errno.EAGAIN, errno.EACCES):
                return False
            raise RegionError(f"{self._spec}: cannot lock: {e.strerror}", e.errno or 0) from e
        return True

    def _set(self, kind: int, span: Span) -> None:
        request = _FLOCK.pack(kind, os.SEEK_SET, span.start, span.size, 0)
        fcntl.fcntl(self.fd, fcntl.F_OFD_SETLK, request)

    def _holder(self, kind: int, span: Span) -> Span | None:
        """The range of a lock that is in the way of ``span``."""
        request = _FLOCK.pack(kind, os.SEEK_SET, span.start, span.size, 0)
        answer = fcntl.fcntl(self.fd, fcntl.F_OFD_GETLK, request)
        assert isinstance(answer, bytes)
        found, _, start, size, _ = _FLOCK.unpack(answer)
        return None if found == fcntl.F_UNLCK else Span(start, size)

    def _is_served(self, span: Span) -> bool:
        server = Span(span.start + self._server_shift, span.size)
        return self._holder(fcntl.F_WRLCK, server) is not None

    def _in_use(self, kind: int, span: Span) -> str:
        holder = self._holder(kind, span)
        if self._server_shift == _FILE_SERVER_SHIFT or holder in (None, span):
            return "in use: it is mounted or being checked"
        return f"in use: it overlaps {holder}, which is mounted or being checked"


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
        lock = RegionLock(fd, spec, spans, _PHYSICAL_SERVER_SHIFT)
        lock.take(exclusive)
    except BaseException:
        os.close(fd)
        raise
    return lock


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
