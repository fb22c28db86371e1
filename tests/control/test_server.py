"""The control socket: who is served, what a client may do to it, and what is left behind."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import tempfile
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from pkernfs.control import client
from pkernfs.control import server as server_side
from pkernfs.errors import (
    BusyError,
    CorruptionError,
    InvalidError,
    NoSpaceError,
    PermissionDeniedError,
    PkernfsError,
)
from pkernfs.fs.filesystem import FileSystem
from support.mounting import Mounted, child, is_mounted, libc, run_as, wait_until

fuse = pytest.mark.fuse


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """A directory with a short name: that of a socket has room for 107 bytes."""
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:
        yield Path(directory)


def socket_of(path: Path) -> Path:
    return Path("/run/pkernfs", client.socket_name(os.stat(path).st_dev))


@pytest.fixture
def mounted() -> Iterator[Mounted]:
    with Mounted(16 << 20, "allow_other") as m:
        yield m


def connect(path: Path) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(10)
    connection.connect(str(path))
    return connection


def answer_to(path: Path, request: bytes) -> dict[str, Any]:
    """What the daemon answers to these bytes, sent as far as it takes them."""
    with connect(path) as connection:
        try:
            connection.sendall(request)
            connection.shutdown(socket.SHUT_WR)
        except OSError:
            pass
        answer: dict[str, Any] = json.loads(connection.makefile("rb").readline())
    return answer


# ---------------------------------------------------------------------- a real daemon


@fuse
def test_any_path_of_the_mount_will_do(mounted: Mounted) -> None:
    (mounted.path / "dir").mkdir()
    file = mounted.path / "dir" / "file"
    file.write_bytes(b"x")
    for path in (mounted.path, mounted.path / "dir", file):
        pong = client.call(str(path), "ping")
        assert mounted.daemon is not None
        assert pong == {
            "pid": mounted.daemon.pid,
            "region": str(mounted.region),
            "read_only": False,
        }
    found = socket_of(mounted.path)
    assert found.stat().st_mode & 0o777 == 0o600
    assert found.parent.stat().st_mode & 0o777 == 0o755


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
            assert client.call(str(mounted.path), "ping")
    finally:
        end.set()
        for worker in workers:
            worker.join()


@fuse
def test_the_socket_goes_with_the_mount() -> None:
    with Mounted(16 << 20) as m:
        found = socket_of(m.path)
        assert found.is_socket()
        m.unmount()
        assert not found.exists()
        with pytest.raises(InvalidError, match="not on a pkernfs mount"):
            client.call(str(m.path), "ping")


@fuse
def test_a_killed_daemon_is_said_and_its_socket_swept() -> None:
    with Mounted(16 << 20) as m:
        found = socket_of(m.path)
        assert m.daemon is not None
        m.daemon.kill()
        m.daemon.wait()
        with pytest.raises(client.NoDaemonError, match="its daemon has died"):
            client.call(str(m.path), "ping")
        subprocess.run(["umount", "-l", str(m.path)], check=True)
        assert found.is_socket()
        with Mounted(16 << 20) as other:  # which may or may not get the same device number
            now = socket_of(other.path)
            assert now == found or not found.exists()
            assert client.call(str(other.path), "ping")
        assert not found.exists()
        m.start()


@fuse
def test_a_daemon_that_does_not_listen_is_said(mounted: Mounted) -> None:
    socket_of(mounted.path).unlink()
    with pytest.raises(client.NoDaemonError, match="does not listen at /run/pkernfs/"):
        client.call(str(mounted.path), "ping")


@fuse
def test_another_user_is_refused(mounted: Mounted) -> None:
    path = str(mounted.path)

    def ask() -> None:
        with pytest.raises(PermissionDeniedError, match="only root and the owner"):
            client.call(path, "ping")

    run_as(1234, ask)
    socket_of(mounted.path).chmod(0o666)  # then the daemon itself has to look who asks
    run_as(1234, ask)
    assert client.call(path, "ping")


def with_own_run(work: Callable[[], None], options: str = "") -> None:
    """Run ``work`` in a process that sees a /run of its own, so that others' daemons do not."""

    def first() -> None:
        assert libc.unshare(0x20000) == 0  # CLONE_NEWNS
        subprocess.run(["mount", "--make-rprivate", "/"], check=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", options or "rw", "none", "/run"], check=True)
        work()

    run_as(0, first)


@fuse
def test_somebody_else_s_socket_is_not_believed() -> None:
    def work() -> None:
        with Mounted(16 << 20) as m:
            path = socket_of(m.path)
            path.unlink()
            path.parent.chmod(0o777)
            read_end, write_end = os.pipe()

            def pretend() -> None:
                with socket.socket(socket.AF_UNIX) as listening:
                    listening.bind(str(path))
                    listening.listen()
                    os.write(write_end, b"1")
                    listening.accept()[0].recv(1)

            with child(pretend, 1234):
                os.read(read_end, 1)
                with pytest.raises(PermissionDeniedError, match="is not its daemon"):
                    client.call(str(m.path), "ping")

    with_own_run(work)


@fuse
@pytest.mark.parametrize(
    ("request_bytes", "reason"),
    [
        (b"\n", "not JSON"),
        (b"\xff\xfe\x00\n", "not JSON"),
        (b"[" * 500_000 + b"\n", "not JSON"),
        (b"[]\n", "OP"),
        (b'{"op": 3}\n', "OP"),
        (b'{"op": "no\\nsuch"}\n', "does not know 'no"),
        (b'{"op": "ping"', "not a whole line"),
        (b"", "not a whole line"),
        (b"x" * (server_side.MAX_REQUEST_BYTES + 1), "longer than"),
        (b"x" * (4 * server_side.MAX_REQUEST_BYTES) + b"\n", "longer than"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_nonsense_is_an_error(mounted: Mounted, request_bytes: bytes, reason: str) -> None:
    answer = answer_to(socket_of(mounted.path), request_bytes)
    assert reason.replace("OP", '{"op": NAME') in answer["error"]
    assert answer["errno"] == InvalidError.errno
    assert client.call(str(mounted.path), "ping")


@fuse
def test_clients_that_stall_hold_nobody_up(mounted: Mounted) -> None:
    path = socket_of(mounted.path)
    stalled = [connect(path) for _ in range(server_side.MAX_CLIENTS - 1)]
    for connection in stalled:
        connection.sendall(b'{"op"')
    assert client.call(str(mounted.path), "ping")
    stalled += [connect(path) for _ in range(8)]
    wait_until(lambda: _refused(mounted), "too many clients")
    (mounted.path / "file").write_bytes(b"x")
    for connection in stalled:
        connection.close()
    wait_until(lambda: not _refused(mounted), "those that are gone do not count")


def _refused(mounted: Mounted) -> bool:
    try:
        client.call(str(mounted.path), "ping")
    except BusyError:
        return True
    return False


@fuse
def test_unmounting_waits_for_no_client() -> None:
    with Mounted(16 << 20) as m, connect(socket_of(m.path)) as connection:
        m.unmount()
        with contextlib.suppress(ConnectionResetError):  # it had not been accepted yet
            assert connection.recv(1) == b""


@fuse
@pytest.mark.parametrize("options", ["ro", "mode=0777"])
def test_without_a_directory_the_mount_works(options: str) -> None:
    """Where others can write, somebody could stand in for the daemon: no socket there."""

    def work() -> None:
        if options != "ro":
            Path("/run/pkernfs").mkdir()
            Path("/run/pkernfs").chmod(0o777)
        with Mounted(16 << 20) as m:
            (m.path / "file").write_bytes(b"x")
            with pytest.raises(client.NoDaemonError, match="does not listen"):
                client.call(str(m.path), "ping")
            m.unmount()
            assert "no control socket" in m.words()

    with_own_run(work, options)


@fuse
def test_a_path_elsewhere_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidError, match="not on a pkernfs mount"):
        client.call(str(tmp_path), "ping")
    with pytest.raises(FileNotFoundError):
        client.call(str(tmp_path / "missing"), "ping")
    assert not is_mounted(tmp_path)


# ---------------------------------------------------------------------- handlers


class Serving:
    """A server of its own, in a thread, for the handlers of a test."""

    def __init__(self, fs: FileSystem, handlers: dict[str, server_side.Handler], at: Path) -> None:
        self.listener = server_side.Listener(os.makedev(7, 9), str(at))
        self.path = Path(self.listener.path)
        self._server = server_side.Server(fs, handlers)
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


def ask(path: Path, op: str, **args: object) -> list[tuple[str, Any]]:
    """All of an answer, by the client's own reader."""
    with connect(path) as connection:
        connection.sendall(json.dumps({"op": op, **args}).encode() + b"\n")
        with connection.makefile("rb") as lines:
            return list(client._read_answers("MNT", lines))


async def _count(args: dict[str, Any]) -> AsyncIterator[int]:
    for i in range(args["to"]):
        yield i


async def _no_space(args: dict[str, Any]) -> None:
    raise NoSpaceError("no space: says the test")


async def _fails_later(args: dict[str, Any]) -> AsyncIterator[str]:
    yield "one"
    raise BusyError("busy: says the test")


async def _bug(args: dict[str, Any]) -> None:
    raise KeyError("oops")


async def _not_json(args: dict[str, Any]) -> object:
    return object()


async def _corrupt(args: dict[str, Any]) -> None:
    raise CorruptionError("page 7: says the test")


def test_values_items_and_errors(
    fs: FileSystem, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def echo(args: dict[str, Any]) -> object:
        return args

    handlers: dict[str, server_side.Handler] = {
        "echo": echo,
        "count": _count,
        "no_space": _no_space,
        "fails_later": _fails_later,
        "bug": _bug,
        "not_json": _not_json,
    }
    with Serving(fs, handlers, tmp_path / "sockets") as serving:
        assert ask(serving.path, "echo", a=1, b="ü\n") == [("done", {"a": 1, "b": "ü\n"})]
        assert ask(serving.path, "count", to=3) == [
            *(("item", i) for i in range(3)),
            ("done", None),
        ]
        with pytest.raises(NoSpaceError, match="says the test"):
            ask(serving.path, "no_space")
        with pytest.raises(BusyError, match="says the test"):
            ask(serving.path, "fails_later")
        with pytest.raises(PkernfsError, match=r"the daemon failed: KeyError\('oops'\)"):
            ask(serving.path, "bug")
        with pytest.raises(client.NoDaemonError, match="before it had answered"):
            ask(serving.path, "not_json")
        assert ask(serving.path, "echo") == [("done", {})]
    assert "oops" in caplog.text


def test_corruption_ends_writing(fs: FileSystem, tmp_path: Path) -> None:
    with Serving(fs, {"corrupt": _corrupt}, tmp_path / "sockets") as serving:
        with pytest.raises(CorruptionError):
            ask(serving.path, "corrupt")
        assert fs.read_only


def test_a_client_that_goes_cancels(fs: FileSystem, tmp_path: Path) -> None:
    cancelled = threading.Event()

    async def forever(args: dict[str, Any]) -> AsyncIterator[str]:
        try:
            yield "started"
            await trio.sleep_forever()
        finally:
            cancelled.set()

    with Serving(fs, {"forever": forever}, tmp_path / "sockets") as serving:
        with connect(serving.path) as connection:
            connection.sendall(b'{"op": "forever"}\n')
            assert b"started" in connection.recv(100)
        assert cancelled.wait(10)


def test_a_client_that_never_reads_is_dropped(
    fs: FileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dropped = threading.Event()

    async def flood(args: dict[str, Any]) -> AsyncIterator[str]:
        try:
            while True:
                yield "x" * 10_000
        finally:
            dropped.set()

    monkeypatch.setattr(server_side, "PATIENCE_SECONDS", 0.3)
    handlers: dict[str, server_side.Handler] = {"flood": flood, "count": _count}
    with (
        Serving(fs, handlers, tmp_path / "sockets") as serving,
        connect(serving.path) as connection,
        connect(serving.path) as silent,
    ):
        connection.sendall(b'{"op": "flood"}\n')
        assert ask(serving.path, "count", to=1)
        assert dropped.wait(10)
        assert silent.recv(1) == b"", "nor does one that never asks stay"


def test_sockets_of_the_living_stay(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as other, socket.socket(socket.AF_UNIX) as dead:
        alive, stale, file = (tmp_path / name for name in ("1:1.sock", "1:2.sock", "1:3.sock"))
        other.bind(str(alive))
        other.listen()
        dead.bind(str(stale))
        file.touch()
        tmp_path.chmod(0o755)
        listener = server_side.Listener(os.makedev(0, 77), str(tmp_path))
        assert alive.exists()
        assert file.exists()
        assert not stale.exists()
        assert Path(listener.path).name == "0:77.sock"
        # Another mount has got the number: its socket is not this one's to remove.
        second = server_side.Listener(os.makedev(0, 77), str(tmp_path))
        listener.close()
        assert Path(second.path).exists()
        second.close()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["1:1.sock", "1:3.sock"]
