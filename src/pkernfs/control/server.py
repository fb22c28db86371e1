"""The daemon's control socket: what commands ask of a mount beside the file system itself.

A client (:mod:`pkernfs.control.client`) sends a line of JSON, ``{"op": NAME, ARGUMENT: VALUE}``.
The answer is a line ``{"item": VALUE}`` for each thing that the handler yields, and at the end
``{"done": VALUE}`` or ``{"error": MESSAGE, "errno": NUMBER}``. Only root and the owner of the
mount are served.

A handler is an async function that returns the value, or an async generator function that yields
the items; it gets the arguments. It runs beside the session loop, on the same thread: what takes
more than a millisecond belongs into a thread. It is cancelled at its next await when the client
goes away or the mount ends.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import socket
import stat
import struct
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any

import trio

from pkernfs.control.client import runtime_directory, socket_name
from pkernfs.control.mounts import FSTYPE, Mount, read_mounts
from pkernfs.errors import (
    BusyError,
    CorruptionError,
    InvalidError,
    PermissionDeniedError,
    PkernfsError,
    one_line,
)

if TYPE_CHECKING:
    from pkernfs.fs.filesystem import FileSystem

log = logging.getLogger(__name__)

Handler = Callable[[dict[str, Any]], AsyncIterator[Any] | Awaitable[Any]]

#: Bytes of a request at most.
MAX_REQUEST_BYTES = 1 << 20
#: How long (seconds) a client may take for its request, and for reading each line of the answer.
PATIENCE_SECONDS = 10.0

MAX_CLIENTS = 32
_BACKLOG = 64
_HALF_MADE_SECONDS = 60.0  # a socket that was never given its name is its maker's no longer
_CREDENTIALS = struct.Struct("3i")


def own_mount(mountpoint: str, source: str) -> Mount | None:
    """This daemon's mount. Nothing is asked of the file system, so nobody has to answer."""
    found = (m for m in reversed(read_mounts()) if m.mount_point == mountpoint)
    return next((m for m in found if (m.fstype, m.source) == (FSTYPE, source)), None)


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


class Server:
    """Serves the clients of a :class:`Listener` with ``handlers``."""

    def __init__(self, fs: FileSystem, handlers: Mapping[str, Handler]) -> None:
        self._fs = fs
        self._handlers = handlers
        self._clients = 0
        self._allowed = {0, os.geteuid()}

    async def run(self, listener: Listener) -> None:
        """Accept clients until cancelled; no client, and no handler, can end it."""
        listener.socket.setblocking(False)
        accepting = trio.SocketListener(trio.socket.from_stdlib_socket(listener.socket.dup()))
        async with accepting, trio.open_nursery() as nursery:
            await trio.serve_listeners(self._serve, [accepting], handler_nursery=nursery)

    async def _serve(self, stream: trio.SocketStream) -> None:
        self._clients += 1
        try:
            async with stream:
                await self._answer(stream)
        except (trio.BrokenResourceError, trio.TooSlowError) as e:
            log.debug("control: the client went away: %r", e)
        except Exception as e:
            log.error("control: unexpected error", exc_info=e)
        finally:
            self._clients -= 1

    async def _answer(self, stream: trio.SocketStream) -> None:
        try:
            self._admit(stream)
            op, args = _parse(await _read_line(stream))
            handler = self._handlers.get(op)
            if handler is None:
                raise InvalidError(f"control: the daemon does not know {one_line(op)!r}")
            last = await self._run(stream, op, handler, args)
        except PkernfsError as e:
            if isinstance(e, CorruptionError):
                self._fs.fail(str(e))
            last = {"error": one_line(str(e)), "errno": e.errno}
        if last is not None:
            await _send(stream, last)

    def _admit(self, stream: trio.SocketStream) -> None:
        _, uid, _ = _CREDENTIALS.unpack(
            stream.socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        )
        if uid not in self._allowed:
            raise PermissionDeniedError("control: only root and the owner of the mount may ask")
        if self._clients > MAX_CLIENTS:
            raise BusyError("control: too many clients at once")

    async def _run(
        self, stream: trio.SocketStream, op: str, handler: Handler, args: dict[str, Any]
    ) -> dict[str, Any] | None:
        """Run a handler and send its items; the last line, or None if the client has gone."""
        last: dict[str, Any] | None = None
        failure: PkernfsError | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_cancel_at_end, stream, nursery.cancel_scope)
            try:
                running = handler(args)
                if isinstance(running, AsyncIterator):
                    await _send_items(stream, running)
                    last = {"done": None}
                else:
                    last = {"done": await running}
            except PkernfsError as e:
                failure = e
            except (trio.BrokenResourceError, trio.TooSlowError) as e:
                log.debug("control: %s: the client went away: %r", op, e)
            except Exception as e:
                log.error("control: %s: unexpected error", op, exc_info=e)
                failure = PkernfsError(f"{op}: the daemon failed: {e!r}")
            nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure
        return last


async def _send_items(stream: trio.SocketStream, items: AsyncIterator[Any]) -> None:
    try:
        async for item in items:
            await _send(stream, {"item": item})
    finally:
        close = getattr(items, "aclose", None)
        if close is not None:
            with trio.CancelScope(shield=True):
                await close()


async def _cancel_at_end(stream: trio.SocketStream, scope: trio.CancelScope) -> None:
    """Cancel ``scope`` when the client closes its end; what it sends more is not for us."""
    with contextlib.suppress(trio.BrokenResourceError):
        while await stream.receive_some(4096):
            pass
    scope.cancel()


async def _read_line(stream: trio.SocketStream) -> bytes:
    """The request, without its end of line.

    :raises PkernfsError: too long, or no whole line.
    :raises trio.TooSlowError: it does not come.
    """
    received = bytearray()
    with trio.fail_after(PATIENCE_SECONDS):
        while True:
            chunk = await stream.receive_some(65536)
            if not chunk:
                raise InvalidError("control: the request is not a whole line")
            end = chunk.find(b"\n")
            received += chunk if end < 0 else chunk[:end]
            if len(received) > MAX_REQUEST_BYTES:
                raise InvalidError(f"control: the request is longer than {MAX_REQUEST_BYTES} bytes")
            if end >= 0:
                return bytes(received)


def _parse(line: bytes) -> tuple[str, dict[str, Any]]:
    try:
        request = json.loads(line)
    except (ValueError, RecursionError):
        raise InvalidError("control: the request is not JSON") from None
    if not isinstance(request, dict) or not isinstance(request.get("op"), str):
        raise InvalidError('control: the request is not {"op": NAME, ...}')
    return request.pop("op"), request


async def _send(stream: trio.SocketStream, line: dict[str, Any]) -> None:
    with trio.fail_after(PATIENCE_SECONDS):
        await stream.send_all(json.dumps(line).encode() + b"\n")
