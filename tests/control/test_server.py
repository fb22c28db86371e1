"""The server of the control socket: who is served, and what a client may do to it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import trio

from pkernfs.control import client, codec, server
from pkernfs.control.protocol import Ping
from pkernfs.control.wire import Call, Done, Item, Request, Stream, request_line
from pkernfs.errors import (
    BusyError,
    CorruptionError,
    InvalidError,
    NoSpaceError,
    PkernfsError,
)
from pkernfs.fs.filesystem import FileSystem
from support.control import Serving, answer_to, ask, connect, short_directory, socket_of
from support.mounting import Mounted, wait_until

fuse = pytest.mark.fuse


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """A directory with a short name."""
    with short_directory() as path:
        yield path


@pytest.fixture
def mounted() -> Iterator[Mounted]:
    with Mounted(16 << 20, "allow_other") as m:
        yield m


# ---------------------------------------------------------------------- a real daemon


@fuse
def test_answers_while_the_mount_is_busy(mounted: Mounted) -> None:
    end = threading.Event()

    def work(name: str) -> None:
        file = mounted.path / name
        while not end.is_set():
            file.write_bytes(b"x" * 100)
            file.unlink()

    workers = [threading.Thread(target=work, args=(name,)) for name in ("a", "b")]
    for worker in workers:
        worker.start()
    try:
        for _ in range(50):
            assert client.call(str(mounted.path), Ping())
    finally:
        end.set()
        for worker in workers:
            worker.join()


@fuse
@pytest.mark.parametrize(
    ("request_bytes", "reason"),
    [
        (b"\n", "not JSON"),
        (b"\xff\xfe\x00\n", "not JSON"),
        (b"[" * 500_000 + b"\n", "not JSON"),
        (b"[]\n", "FORM"),
        (b'{"op": 3}\n', "FORM"),
        (b'{"protocol": 2}\n', "FORM"),
        (b'{"protocol": 2, "request": 3, "arguments": {}}\n', "FORM"),
        (b'{"protocol": 2, "request": "ping", "arguments": {}, "op": "ping"}\n', "FORM"),
        (b'{"protocol": 2, "request": "ping", "arguments": []}\n', "ping: bad fields: got []"),
        (b'{"protocol": 2, "request": "no\\nsuch", "arguments": {}}\n', "does not know 'no"),
        (b'{"protocol": 2, "request": "ping"', "not a whole line"),
        (b"", "not a whole line"),
        (b"x" * (server.MAX_REQUEST_BYTES + 1), "longer than"),
        (b"x" * (4 * server.MAX_REQUEST_BYTES) + b"\n", "longer than"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_nonsense_is_an_error(mounted: Mounted, request_bytes: bytes, reason: str) -> None:
    answer = answer_to(socket_of(mounted.path), request_bytes)
    assert reason.replace("FORM", '{"protocol": 2, "request": OP') in answer["error"]
    assert answer["errno"] == InvalidError.errno
    assert client.call(str(mounted.path), Ping())


@fuse
def test_clients_that_stall_hold_nobody_up(mounted: Mounted) -> None:
    path = socket_of(mounted.path)
    stalled = [connect(path) for _ in range(server.MAX_CLIENTS - 1)]
    for connection in stalled:
        connection.sendall(b'{"op"')
    assert client.call(str(mounted.path), Ping())
    stalled += [connect(path) for _ in range(8)]
    wait_until(lambda: refused(mounted), "too many clients")
    (mounted.path / "file").write_bytes(b"x")
    for connection in stalled:
        connection.close()
    wait_until(lambda: not refused(mounted), "those that are gone do not count")


def refused(mounted: Mounted) -> bool:
    try:
        client.call(str(mounted.path), Ping())
    except BusyError:
        return True
    return False


@fuse
def test_unmounting_waits_for_no_client() -> None:
    with Mounted(16 << 20) as m, connect(socket_of(m.path)) as connection:
        m.unmount()
        with contextlib.suppress(ConnectionResetError):  # it had not been accepted yet
            assert connection.recv(1) == b""


# ---------------------------------------------------------------------- made-up handlers


@dataclass(frozen=True)
class Word:
    """An item."""

    word: str


@dataclass(frozen=True)
class Number:
    """An item."""

    number: int


@dataclass(frozen=True)
class Anything:
    """A reply that JSON may not be able to have."""

    value: dict[str, Any]


@dataclass(frozen=True)
class Echoed:
    """A reply."""

    a: int
    b: str


@dataclass(frozen=True)
class Echo(Call[Echoed], op="echo"):
    """Asks for its fields."""

    a: int = 0
    b: str = ""


@dataclass(frozen=True)
class Count(Stream[Number], op="count"):
    """Asks for the numbers below ``to``."""

    to: int


@dataclass(frozen=True)
class NoSpace(Call[Anything], op="no_space"):
    """Fails."""


@dataclass(frozen=True)
class FailsLater(Stream[Word], op="fails_later"):
    """Fails after an item."""


@dataclass(frozen=True)
class Bug(Call[Anything], op="bug"):
    """Fails in another way."""


@dataclass(frozen=True)
class NotJson(Call[Anything], op="not_json"):
    """Gets a reply that cannot be sent."""


@dataclass(frozen=True)
class Corrupt(Call[Anything], op="corrupt"):
    """Finds the file system corrupt."""


@dataclass(frozen=True)
class Forever(Stream[Word], op="forever"):
    """Is answered for as long as anybody listens."""


async def _echo(request: Echo) -> Echoed:
    return Echoed(request.a, request.b)


async def _count(request: Count) -> AsyncIterator[Number]:
    for i in range(request.to):
        yield Number(i)


async def _no_space(request: NoSpace) -> Anything:
    raise NoSpaceError("no space: says the test")


async def _fails_later(request: FailsLater) -> AsyncIterator[Word]:
    yield Word("one")
    raise BusyError("busy: says the test")


async def _bug(request: Bug) -> Anything:
    raise KeyError("oops")


async def _not_json(request: NotJson) -> Anything:
    return Anything({"object": object()})


async def _corrupt(request: Corrupt) -> Anything:
    raise CorruptionError("page 7: says the test")


def test_values_items_and_errors(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    handlers: dict[type[Request[Any]], server.Handler] = {
        Echo: _echo,
        Count: _count,
        NoSpace: _no_space,
        FailsLater: _fails_later,
        Bug: _bug,
        NotJson: _not_json,
    }
    with Serving(handlers, tmp_path / "sockets") as serving:
        assert ask(serving.path, Echo(1, "ü\n")) == [Done(Echoed(1, "ü\n"))]
        assert ask(serving.path, Count(3)) == [
            *(Item(Number(i)) for i in range(3)),
            Done(None),
        ]
        with pytest.raises(NoSpaceError, match="says the test"):
            ask(serving.path, NoSpace())
        with pytest.raises(BusyError, match="says the test"):
            ask(serving.path, FailsLater())
        with pytest.raises(PkernfsError, match=r"the daemon failed: KeyError\('oops'\)"):
            ask(serving.path, Bug())
        with pytest.raises(client.NoDaemonError, match="before it had answered"):
            ask(serving.path, NotJson())
        assert ask(serving.path, Echo()) == [Done(Echoed(0, ""))]
    assert "oops" in caplog.text


def test_messages_are_ready_before_they_are_asked_for(tmp_path: Path) -> None:
    with Serving({NoSpace: _no_space, Echo: _echo}, tmp_path / "sockets"):
        wait_until(lambda: {NoSpace, Anything, Echo, Echoed} <= codec._known.keys(), "not ready")


def test_corruption_ends_writing(fs: FileSystem, tmp_path: Path) -> None:
    with Serving({Corrupt: _corrupt}, tmp_path / "sockets", fs.fail) as serving:
        with pytest.raises(CorruptionError):
            ask(serving.path, Corrupt())
        assert fs.read_only


def test_a_client_that_goes_cancels(tmp_path: Path) -> None:
    cancelled = threading.Event()

    async def forever(request: Forever) -> AsyncIterator[Word]:
        try:
            yield Word("started")
            await trio.sleep_forever()
        finally:
            cancelled.set()

    with Serving({Forever: forever}, tmp_path / "sockets") as serving:
        with connect(serving.path) as connection:
            connection.sendall(request_line(Forever()))
            assert b"started" in connection.recv(100)
        assert cancelled.wait(10)


def test_a_client_that_never_reads_is_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dropped = threading.Event()

    async def flood(request: Forever) -> AsyncIterator[Word]:
        try:
            while True:
                yield Word("x" * 10_000)
        finally:
            dropped.set()

    monkeypatch.setattr(server, "REQUEST_TIMEOUT_SECONDS", 0.3)
    handlers: dict[type[Request[Any]], server.Handler] = {Forever: flood, Count: _count}
    with (
        Serving(handlers, tmp_path / "sockets") as serving,
        connect(serving.path) as connection,
        connect(serving.path) as silent,
    ):
        connection.sendall(request_line(Forever()))
        assert ask(serving.path, Count(1))
        assert dropped.wait(10)
        assert silent.recv(1) == b"", "nor does one that never asks stay"
