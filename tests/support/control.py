"""The control socket in tests: connections, raw requests, a server of made-up handlers."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import trio

from pkernfs.control import client
from pkernfs.control.server import Handlers, Server
from pkernfs.control.sockets import Listener, socket_name
from pkernfs.control.wire import Done, Item, Request, request_line
from support.mounting import own_mount_namespace, run_as


@contextmanager
def short_directory() -> Iterator[Path]:
    """A directory with a short name: that of a socket has room for 107 bytes."""
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:
        yield Path(directory)


def socket_of(path: Path) -> Path:
    """The socket of root's mount at ``path``."""
    return Path("/run/pkernfs", socket_name(os.stat(path).st_dev))


def which(path: Path) -> str | None:
    """Tell sockets of one name apart, for another mount may get it; None: it has gone."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return f"inode {found.st_ino} of {found.st_ctime_ns}"


def connect(path: Path) -> socket.socket:
    """A connection to a socket, which gives up after 10 seconds."""
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(10)
    connection.connect(str(path))
    return connection


def answer_to(path: Path, request: bytes) -> dict[str, Any]:
    """The daemon's answer to these bytes, sent as far as it takes them."""
    with connect(path) as connection:
        try:
            connection.sendall(request)
            connection.shutdown(socket.SHUT_WR)
        except OSError:
            pass
        answer: dict[str, Any] = json.loads(connection.makefile("rb").readline())
    return answer


def with_own_run(work: Callable[[], None], options: str = "") -> None:
    """Run ``work`` in a process that sees a /run of its own, so that others' daemons do not."""

    def first() -> None:
        own_mount_namespace()
        subprocess.run(["mount", "-t", "tmpfs", "-o", options or "rw", "none", "/run"], check=True)
        work()

    run_as(0, first)


class Serving:
    """A server of its own, in a thread, for the handlers of a test."""

    def __init__(
        self, handlers: Handlers, at: Path, fail: Callable[[str], None] = lambda reason: None
    ) -> None:
        self.listener = Listener(os.makedev(7, 9), str(at))
        self.path = Path(self.listener.path)
        self._server = Server(handlers, fail=fail)
        self._started = threading.Event()
        self._thread = threading.Thread(target=trio.run, args=(self._main,))

    async def _main(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        with trio.CancelScope() as self._scope:
            self._started.set()
            await self._server.run(self.listener)

    def __enter__(self) -> Serving:
        self._thread.start()
        self._started.wait()
        return self

    def __exit__(self, *exc: object) -> None:
        self._token.run_sync_soon(self._scope.cancel)
        self._thread.join()
        self.listener.close()
        assert not self.path.exists()


def ask(path: Path, request: Request[Any]) -> list[Item | Done]:
    """All of an answer, by the client's own reader.

    :raises PkernfsError: that of the answer.
    """
    with connect(path) as connection:
        connection.sendall(request_line(request))
        with connection.makefile("rb") as lines:
            return list(client._read_answers("MNT", request, lines))
