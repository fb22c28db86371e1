"""What a handover and a kexec ask of the daemon, and what they make of its answers."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest

from pkernfs.control import client, protocol
from pkernfs.control.mounts import Mount
from pkernfs.control.wire import Call, Request, Stream
from pkernfs.errors import BusyError, NoSpaceError
from pkernfs.kexec import users as users_module
from pkernfs.kexec.daemon import Daemon
from pkernfs.kexec.needs import Needs
from pkernfs.kexec.users import Process
from pkernfs.quantities import Ino, PageNo

MOUNT = Mount(62, "/mnt/a", "fuse.pkernfs", "/dev/shm/region")


class Socket:
    """The daemon's end: answers by operation, and what was asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.answers: dict[type[Request[Any]], Any] = {}
        self.asked: list[Request[Any]] = []
        self.lease = "none"
        monkeypatch.setattr(client, "call", self.call)
        monkeypatch.setattr(client, "stream", self.stream)
        monkeypatch.setattr(client, "find_mount", lambda path: MOUNT)

    def call(self, path: str, request: Call[Any], mount: Mount | None = None) -> Any:
        assert path == "/mnt/a/x"
        assert mount in (None, MOUNT)
        self.asked.append(request)
        answer = self.answers.get(type(request))
        if isinstance(answer, Exception):
            raise answer
        return answer

    def stream(
        self, path: str, request: Stream[Any], mount: Mount | None = None
    ) -> Generator[Any, None, None]:
        assert mount in (None, MOUNT)
        assert (path, request) == ("/mnt/a/x", protocol.Freeze())
        self.lease = "held"
        try:
            yield self.answers[type(request)]
            self.lease = "ended by the daemon"
        finally:
            if self.lease == "held":
                self.lease = "closed"


@pytest.fixture
def socket(monkeypatch: pytest.MonkeyPatch) -> Socket:
    return Socket(monkeypatch)


@pytest.fixture
def daemon(socket: Socket) -> Daemon:
    return Daemon("/mnt/a/x")


def test_the_lease_is_held_to_its_end(socket: Socket, daemon: Daemon) -> None:
    socket.answers[protocol.Freeze] = protocol.Frozen(3, b"\xab" * 16)
    with daemon.frozen() as frozen:
        assert socket.lease == "held"
        assert (frozen.number, frozen.uuid) == (3, b"\xab" * 16)
    assert socket.lease == "ended by the daemon"
    with pytest.raises(KeyboardInterrupt), daemon.frozen():
        raise KeyboardInterrupt
    assert socket.lease == "closed"


def test_who_is_in_the_way(socket: Socket, daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    users = [f"/mnt/a/f{i} by process {i} (p)" for i in range(10)]
    monkeypatch.setattr(users_module, "users_of", lambda mount, inos: users[: len(inos)])
    socket.answers[protocol.Freeze] = protocol.OpenForWriting((Ino(7), Ino(5)))
    with pytest.raises(BusyError) as caught, daemon.frozen():
        pass
    assert str(caught.value) == f"/mnt/a/x: open for writing: {users[0]}; {users[1]}"
    assert socket.lease == "closed"
    socket.answers[protocol.Freeze] = protocol.OpenForWriting(tuple(map(Ino, range(10))))
    with pytest.raises(BusyError, match=r"process 7 \(p\) and 2 more$"), daemon.frozen():
        pass
    users.clear()
    with pytest.raises(BusyError) as caught, daemon.frozen():
        pass
    assert str(caught.value) == (
        "/mnt/a/x: open for writing: inode 0, inode 1, inode 2, inode 3, inode 4, inode 5, "
        "inode 6, inode 7 by a process that cannot be seen from here"
    )


def test_the_daemon_itself_maps_the_region(
    socket: Socket, daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    socket.answers[protocol.Ping] = protocol.Pong(6, "", False)
    mappers: list[Process] = []
    monkeypatch.setattr(users_module, "mappers_of", lambda source: iter(mappers))
    assert list(daemon.other_mappers()) == []
    assert socket.asked == []
    mappers += [Process(5, "a"), Process(6, "pkernfs"), Process(7, "b")]
    assert list(daemon.other_mappers()) == ["process 5 (a)", "process 7 (b)"]
    assert len(socket.asked) == 1


def test_a_manifest_is_sent_in_pieces(socket: Socket, daemon: Daemon) -> None:
    socket.answers[protocol.MakeManifest] = protocol.ManifestFile(Ino(9), (PageNo(4), PageNo(5)))
    made = daemon.make_manifest(100)
    assert (made.ino, made.pages) == (9, {4, 5})
    data = bytes(range(256)) * 5000
    daemon.write_manifest(Ino(9), data)
    pieces = [asked for asked in socket.asked if isinstance(asked, protocol.WriteManifest)]
    assert [piece.offset for piece in pieces] == [0, 512 << 10, 1024 << 10]
    assert b"".join(piece.data for piece in pieces) == data
    socket.answers[protocol.MakeManifest] = NoSpaceError("full")
    with pytest.raises(NoSpaceError):
        daemon.make_manifest(100)


def test_the_record(socket: Socket, daemon: Daemon) -> None:
    socket.answers[protocol.Commit] = protocol.Committed(4)
    assert daemon.commit(Ino(9), 1234, 1) == 4
    daemon.abort()
    assert socket.asked == [protocol.Commit(ino=Ino(9), digest=1234, flags=1), protocol.Abort()]


def test_a_handover_waits_for_no_message(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that are sent while the file system is frozen are known before."""
    prepared: list[type[Request[Any]]] = []
    monkeypatch.setattr(client, "prepare", lambda *kinds: prepared.extend(kinds))
    Daemon.prepare_handover()
    assert prepared == [
        protocol.Freeze, protocol.MakeManifest, protocol.WriteManifest, protocol.Commit,
    ]  # fmt: skip


def test_the_kexec(socket: Socket, daemon: Daemon) -> None:
    socket.answers[protocol.FindKexecNeeds] = protocol.KexecNeeds(
        ("0000:00:05.0",), ("0000:00:06.0",), True, ("dmar0",)
    )
    assert daemon.needs() == Needs(["0000:00:05.0"], ["0000:00:06.0"], True, ["dmar0"])
    daemon.crash_jump(panic=True)
    daemon.undo_crash_jump()
    assert socket.asked[1:] == [protocol.CrashJump(panic=True), protocol.UndoCrashJump()]


def test_the_mount_is_looked_for_once(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    assert daemon.name == "/mnt/a/x"
    assert daemon.mount is MOUNT
    monkeypatch.setattr(client, "find_mount", lambda path: pytest.fail("again"))
    assert daemon.mount is MOUNT
