"""Asking the daemon of a mount for something: the client of its control socket.

The protocol is in :mod:`pkernfs.control.server`, which is the other end. Here are also the names
of the sockets: ``MAJOR:MINOR.sock``, after the device number of the mount, in a directory of the
user who mounted it.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import struct
from collections.abc import Generator, Iterator
from typing import IO, Any

from pkernfs import errors
from pkernfs.control.mounts import Mount, mount_at, mount_of
from pkernfs.errors import InvalidError, PermissionDeniedError, PkernfsError, RegionError

_CONNECT_SECONDS = 10.0
_CREDENTIALS = struct.Struct("3i")
_DEAD = (errno.ENOTCONN, errno.ECONNABORTED)


class NoDaemonError(PkernfsError):
    """Nobody answers for the mount."""

    errno = errno.ENOTCONN


def runtime_directory(uid: int) -> str:
    """Where the sockets of a user's daemons are."""
    if not uid:
        return "/run/pkernfs"
    own = os.environ.get("XDG_RUNTIME_DIR") if uid == os.geteuid() else None
    return os.path.join(own or f"/run/user/{uid}", "pkernfs")


def socket_name(device: int) -> str:
    """The file name of a mount's socket; ``device`` is its ``st_dev``."""
    return f"{os.major(device)}:{os.minor(device)}.sock"


def call(path: str, op: str, **args: Any) -> Any:
    """Have the daemon of the mount that ``path`` is in do ``op``; its result.

    :raises PkernfsError: what the daemon failed with, or why it cannot be asked.
    """
    result = None
    for kind, value in _answers(path, op, args):
        if kind == "done":
            result = value
    return result


def stream(path: str, op: str, **args: Any) -> Generator[Any, None, None]:
    """The same for an operation that yields items, as they come. Ending early cancels it.

    :raises PkernfsError: as :func:`call`, also between items.
    """
    for kind, value in _answers(path, op, args):
        if kind == "item":
            yield value


def _answers(path: str, op: str, args: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Kind and value of each line of the answer: ``item`` ..., ``done``."""
    with _connect(path) as connection:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it may have said why
            connection.sendall(json.dumps({**args, "op": op}).encode() + b"\n")
        with connection.makefile("rb") as lines:
            yield from _read_answers(path, lines)


def _read_answers(path: str, lines: IO[bytes]) -> Iterator[tuple[str, Any]]:
    try:
        for line in lines:
            answer = json.loads(line)
            if "error" in answer:
                raise _as_exception(answer["error"], answer["errno"])
            if "done" in answer:
                yield "done", answer["done"]
                return
            yield "item", answer["item"]
    except ConnectionResetError:
        pass
    except (ValueError, KeyError, TypeError):
        raise NoDaemonError(f"{path}: the daemon's answer makes no sense") from None
    raise NoDaemonError(f"{path}: the daemon ended before it had answered")


def find_mount(path: str) -> Mount:
    """The pkernfs mount that ``path`` is in.

    :raises InvalidError: it is in none.
    :raises NoDaemonError: its daemon has died.
    """
    try:
        mount = mount_of(path)
    except OSError as e:
        if e.errno not in _DEAD:
            raise
        mount = mount_at(path)
        if mount is None:
            raise NoDaemonError(f"{path}: its daemon has died") from None
    if mount is None:
        raise InvalidError(f"{path}: not on a pkernfs mount")
    return mount


def _connect(path: str) -> socket.socket:
    """A connection to the daemon of the mount that ``path`` is in.

    :raises PkernfsError: there is none, it does not listen, or it is somebody else's.
    """
    mount = find_mount(path)
    owner = mount.owner or 0
    address = os.path.join(runtime_directory(owner), socket_name(mount.device))
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(_CONNECT_SECONDS)
        connection.connect(address)
        connection.settimeout(None)
        credentials = connection.getsockopt(
            socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size
        )
        if _CREDENTIALS.unpack(credentials)[1] not in (0, owner):
            raise PermissionDeniedError(f"{path}: who listens at {address} is not its daemon")
    except BaseException as e:
        connection.close()
        if isinstance(e, OSError):
            raise _why_not(path, mount, address, e) from None
        raise
    return connection


def _why_not(path: str, mount: Mount, address: str, error: OSError) -> PkernfsError:
    if isinstance(error, PermissionError):
        return PermissionDeniedError(
            f"{path}: not permitted: only root and the owner of the mount may ask its daemon"
        )
    if isinstance(error, TimeoutError):
        return NoDaemonError(f"{path}: its daemon does not answer")
    try:
        os.statvfs(mount.mount_point)
    except OSError as e:
        if e.errno in _DEAD:
            return NoDaemonError(f"{path}: its daemon has died: mount the region again")
    return NoDaemonError(
        f"{path}: its daemon does not listen at {address} ({error.strerror or error})"
    )


def _every(kind: type[PkernfsError]) -> Iterator[type[PkernfsError]]:
    yield kind
    for one in kind.__subclasses__():
        yield from _every(one)


#: The class for an errno: that of a system call first, since several stand for EINVAL.
_CLASSES: dict[int, type[PkernfsError]] = {errors.InvalidError.errno: errors.InvalidError}
for _kind in _every(PkernfsError):
    if _kind.__module__ == errors.__name__ and not issubclass(_kind, RegionError):
        _CLASSES.setdefault(_kind.errno, _kind)


def _as_exception(message: object, number: object) -> PkernfsError:
    """The error that the daemon had."""
    assert isinstance(number, int)
    kind = _CLASSES.get(number)
    if kind is None:
        return RegionError(str(message), number)
    return kind(str(message))
