"""The sockets of daemons: their names, who is at the other end, and the one that listens.

A socket is ``MAJOR:MINOR.sock``, after the device number of the mount, in a directory of the user
who mounted it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import socket
import stat
import struct
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from pkernfs.host.sysroot import HOST, Host

_BACKLOG = 64
_HALF_MADE_SECONDS = 60.0  # a socket that was never given its name is its maker's no longer
_CREDENTIALS = struct.Struct("3i")
_NAME = re.compile(r"(\d+):(\d+)\.sock", re.ASCII)


class Server(NamedTuple):
    """A daemon that listens.

    :ivar path: of its socket
    :ivar device: the ``st_dev`` of its mount
    :ivar pid: 0: its process is not seen from here (another PID namespace)
    """

    path: str
    device: int
    pid: int


def runtime_directory(uid: int) -> str:
    """Return the directory of the sockets of a user's daemons."""
    if not uid:
        return "/run/pkernfs"
    own = os.environ.get("XDG_RUNTIME_DIR") if uid == os.geteuid() else None
    return os.path.join(own or f"/run/user/{uid}", "pkernfs")


def socket_name(device: int) -> str:
    """Return the file name of a mount's socket; ``device`` is the mount's ``st_dev``."""
    return f"{os.major(device)}:{os.minor(device)}.sock"


def peer_user(getsockopt: Callable[[int, int, int], bytes]) -> int:
    """Return the user at the other end of the socket that has this method.

    :raises OSError: the socket is not connected.
    """
    told = getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    _pid, uid, _gid = _CREDENTIALS.unpack(told)
    return int(uid)


def servers(host: Host = HOST) -> Iterator[Server]:
    """Yield the daemons of all users that listen now, whatever mount namespace they are in.

    Those of others are seen by root only.
    """
    users = [f"run/user/{uid}/pkernfs" for uid in host.list("run/user")]
    for directory in ("run/pkernfs", *users):
        for name in host.list(directory):
            match = _NAME.fullmatch(name)
            if match is None:
                continue
            path = host.path(f"{directory}/{name}")
            pid = _listening_process(path)
            if pid is not None:
                yield Server(path, os.makedev(int(match[1]), int(match[2])), pid)


def _listening_process(path: str) -> int | None:
    """Return the process that listens; 0: one that is not known; None: there is none."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except BlockingIOError:  # a full queue is somebody
            return 0
        except OSError:
            return None
        told = probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        pid, _uid, _gid = _CREDENTIALS.unpack(told)
        return int(pid)


class Listener:
    """The listening socket of one mount, and its name in the file system.

    Making one removes the sockets that killed daemons have left in the directory.

    :raises OSError: the directory or the socket cannot be made.
    """

    def __init__(self, device: int, directory: str | None = None) -> None:
        self.directory = directory or runtime_directory(os.geteuid())
        _make_directory(self.directory)
        _remove_stale(self.directory)
        self.path = os.path.join(self.directory, socket_name(device))
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        # Nobody sees it under its name before it listens: it would look like a stale one.
        half_made = os.path.join(self.directory, f".{socket_name(device)}.{os.getpid()}")
        try:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(half_made)
            self.socket.bind(half_made)
            os.chmod(half_made, 0o600)
            self.socket.listen(_BACKLOG)
            self._inode = os.stat(half_made).st_ino
            os.rename(half_made, self.path)
        except BaseException:
            self.socket.close()
            with contextlib.suppress(OSError):
                os.unlink(half_made)
            raise

    def close(self) -> None:
        """Stop listening; the name goes unless another mount has got the number meanwhile."""
        self.socket.close()
        with contextlib.suppress(OSError):
            if os.stat(self.path).st_ino == self._inode:
                os.unlink(self.path)


def _make_directory(path: str) -> None:
    with contextlib.suppress(FileExistsError):
        os.mkdir(path, 0o755)
        os.chmod(path, 0o755)  # whatever the umask
    found = os.lstat(path)
    if not stat.S_ISDIR(found.st_mode):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)
    if found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise PermissionError(errno.EPERM, "somebody else can write there", path)


def _remove_stale(directory: str) -> None:
    for name in os.listdir(directory):
        path = os.path.join(directory, name)
        with contextlib.suppress(OSError):
            found = os.lstat(path)
            young = time.time() - found.st_mtime < _HALF_MADE_SECONDS
            if not stat.S_ISSOCK(found.st_mode) or (name.startswith(".") and young):
                continue
            if _nobody_listens(path):
                os.unlink(path)


def _nobody_listens(path: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)  # a full queue is somebody
        return probe.connect_ex(path) == errno.ECONNREFUSED
