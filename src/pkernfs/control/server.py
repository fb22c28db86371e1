"""The daemon's end of the control socket: requests are checked, handlers answer them.

Only root and the owner of the mount are served. The lines are those of :mod:`pkernfs.control.wire`.

A handler is an async function that gets the request and returns the reply, or an async generator
function that yields the items. It runs beside the session loop, on the same thread: what takes more
than a millisecond belongs into a thread. It is cancelled at its next await when the client goes
away or the mount ends.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

import trio

from pkernfs.control import codec, wire
from pkernfs.control.sockets import Listener, peer_user
from pkernfs.control.wire import Done, Request
from pkernfs.errors import (
    BusyError,
    CorruptionError,
    InvalidError,
    PermissionDeniedError,
    PkernfsError,
)

log = logging.getLogger(__name__)

Handler = Callable[[Any], AsyncIterator[Any] | Awaitable[Any]]
Handlers = Mapping[type[Request[Any]], Handler]

#: Bytes of a request at most.
MAX_REQUEST_BYTES = 1 << 20
#: How long (seconds) a client may take for its request, and for reading each line of the answer.
REQUEST_TIMEOUT_SECONDS = 10.0

MAX_CLIENTS = 32

#: Who waits for the mount comes first, and then the annotations of messages are read.
_SECONDS_TO_PREPARE = 0.05


class Server:
    """Serves the clients of a :class:`Listener`.

    ``fail`` is called with the reason when a handler has found the file system corrupt.
    """

    def __init__(self, handlers: Handlers, *, fail: Callable[[str], None]) -> None:
        self._fail = fail
        self._handlers = handlers
        self._known = {request.op: request for request in handlers}
        self._clients = 0
        self._allowed = {0, os.geteuid()}

    async def run(self, listener: Listener) -> None:
        """Accept clients until cancelled; no client, and no handler, can end it."""
        listener.socket.setblocking(False)
        accepting = trio.SocketListener(trio.socket.from_stdlib_socket(listener.socket.dup()))
        async with accepting, trio.open_nursery() as nursery:
            nursery.start_soon(self._prepare)
            await trio.serve_listeners(self._serve, [accepting], handler_nursery=nursery)

    async def _prepare(self) -> None:
        """Have all messages ready, one after the other: a handover need not wait for them."""
        await trio.sleep(_SECONDS_TO_PREPARE)
        for request in self._handlers:
            for kind in (request, *request.answers):
                codec.prepare(kind)
                await trio.lowlevel.checkpoint()

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
            request = wire.parse_request(await _read_line(stream), self._known)
            done = await self._run(stream, request)
            last = None if done is None else wire.done_line(done.reply)
        except PkernfsError as e:
            if isinstance(e, CorruptionError):
                self._fail(str(e))
            last = wire.error_line(e)
        if last is not None:
            await _send(stream, last)

    def _admit(self, stream: trio.SocketStream) -> None:
        if peer_user(stream.socket.getsockopt) not in self._allowed:
            raise PermissionDeniedError("control: only root and the owner of the mount may ask")
        if self._clients > MAX_CLIENTS:
            raise BusyError("control: too many clients at once")

    async def _run(self, stream: trio.SocketStream, request: Request[Any]) -> Done | None:
        """Run a handler and send its items; None if the client has gone."""
        done: Done | None = None
        failure: PkernfsError | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_cancel_at_end, stream, nursery.cancel_scope)
            try:
                running = self._handlers[type(request)](request)
                if isinstance(running, AsyncIterator):
                    await _send_items(stream, running)
                    done = Done(None)
                else:
                    done = Done(await running)
            except PkernfsError as e:
                failure = e
            except (trio.BrokenResourceError, trio.TooSlowError) as e:
                log.debug("control: %s: the client went away: %r", request.op, e)
            except Exception as e:
                log.error("control: %s: unexpected error", request.op, exc_info=e)
                failure = PkernfsError(f"{request.op}: the daemon failed: {e!r}")
            nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure
        return done


async def _send_items(stream: trio.SocketStream, items: AsyncIterator[Any]) -> None:
    try:
        async for item in items:
            await _send(stream, wire.item_line(item))
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
    with trio.fail_after(REQUEST_TIMEOUT_SECONDS):
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


async def _send(stream: trio.SocketStream, line: bytes) -> None:
    with trio.fail_after(REQUEST_TIMEOUT_SECONDS):
        await stream.send_all(line)
