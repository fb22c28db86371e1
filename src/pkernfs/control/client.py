"""The client's end of the control socket: asking the daemon of a mount for something.

The requests are in :mod:`pkernfs.control.protocol`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import Generator, Iterator
from typing import IO, Any, TypeVar

from pkernfs import errors
from pkernfs.control import codec, wire
from pkernfs.control.mounts import DEAD, Mount, mount_at, mount_of
from pkernfs.control.sockets import peer_user, runtime_directory, socket_name
from pkernfs.control.wire import Call, Done, Item, Request, Stream, VersionError
from pkernfs.errors import InvalidError, PermissionDeniedError, PkernfsError, RegionError

_CONNECT_SECONDS = 10.0

A = TypeVar("A")


class NoDaemonError(PkernfsError):
    """Nobody answers for the mount."""

    errno = errno.ENOTCONN


def prepare(*kinds: type[Request[Any]]) -> None:
    """Have requests and their answers ready: the first of a kind takes ten times as long."""
    for kind in kinds:
        for message in (kind, *kind.answers):
            codec.prepare(message)


def call(path: str, request: Call[A], mount: Mount | None = None) -> A:
    """Have the daemon of the mount that ``path`` is in do what is asked; return its reply.

    :param mount: that mount, if it is known: to find it takes as long as a short request.
    :raises PkernfsError: what the daemon failed with, or why it cannot be asked.
    """
    *_, last = _answers(path, request, mount)
    assert isinstance(last, Done)
    reply: A = last.reply
    return reply


def stream(path: str, request: Stream[A], mount: Mount | None = None) -> Generator[A, None, None]:
    """Ask for a stream, and yield its items as they come. Ending early cancels it.

    :param mount: as for :func:`call`.
    :raises PkernfsError: as :func:`call`, also between items.
    """
    for answer in _answers(path, request, mount):
        if isinstance(answer, Item):
            yield answer.value


def _answers(path: str, request: Request[Any], mount: Mount | None) -> Iterator[Item | Done]:
    """Yield each line of the answer; the last one is :class:`Done`."""
    with _connect(path) if mount is None else _connect_to(path, mount) as connection:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it may have said why
            connection.sendall(wire.request_line(request))
        with connection.makefile("rb") as lines:
            yield from _read_answers(path, request, lines)


def _read_answers(path: str, request: Request[Any], lines: IO[bytes]) -> Iterator[Item | Done]:
    with contextlib.suppress(ConnectionResetError):
        for line in lines:
            answer = _parse(path, request, line)
            if isinstance(answer, PkernfsError):
                raise _as_exception(str(answer), answer.errno)
            yield answer
            if isinstance(answer, Done):
                return
    raise NoDaemonError(f"{path}: the daemon ended before it had answered")


def _parse(path: str, request: Request[Any], line: bytes) -> Item | Done | PkernfsError:
    try:
        return wire.parse_answer(line, request)
    except VersionError as e:
        raise e.at(path) from None
    except (InvalidError, ValueError, RecursionError):
        raise NoDaemonError(f"{path}: the daemon's answer makes no sense") from None


def find_mount(path: str) -> Mount:
    """Return the pkernfs mount that ``path`` is in.

    :raises InvalidError: it is in none.
    :raises NoDaemonError: its daemon has died.
    """
    try:
        mount = mount_of(path)
    except OSError as e:
        if e.errno not in DEAD:
            raise
        mount = mount_at(path)
        if mount is None:
            raise NoDaemonError(f"{path}: its daemon has died") from None
    if mount is None:
        raise InvalidError(f"{path}: not on a pkernfs mount")
    return mount


def _connect(path: str) -> socket.socket:
    """Connect to the daemon of the mount that ``path`` is in.

    :raises PkernfsError: there is none, it does not listen, or it is somebody else's.
    """
    return _connect_to(path, find_mount(path))


def _connect_to(path: str, mount: Mount) -> socket.socket:
    owner = mount.owner or 0
    address = os.path.join(runtime_directory(owner), socket_name(mount.device))
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(_CONNECT_SECONDS)
        connection.connect(address)
        connection.settimeout(None)
        if peer_user(connection.getsockopt) not in (0, owner):
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
        if e.errno in DEAD:
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


def _as_exception(message: str, number: int) -> PkernfsError:
    """Make the error that the daemon had."""
    kind = _CLASSES.get(number)
    return RegionError(message, number) if kind is None else kind(message)
