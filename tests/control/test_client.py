"""The client of the control socket: whom it asks, and what it says if nobody answers."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pkernfs.control import client, codec
from pkernfs.control.protocol import Freeze, Frozen, OpenForWriting, Ping, Pong
from pkernfs.errors import InvalidError, PermissionDeniedError
from support.control import socket_of, which, with_own_run
from support.mounting import Mounted, child, is_mounted, run_as

fuse = pytest.mark.fuse


@pytest.fixture
def mounted() -> Iterator[Mounted]:
    with Mounted(16 << 20, "allow_other") as m:
        yield m


@fuse
def test_any_path_of_the_mount_will_do(mounted: Mounted) -> None:
    (mounted.path / "dir").mkdir()
    file = mounted.path / "dir" / "file"
    file.write_bytes(b"x")
    for path in (mounted.path, mounted.path / "dir", file):
        pong = client.call(str(path), Ping())
        assert mounted.daemon is not None
        assert pong == Pong(mounted.daemon.pid, str(mounted.region), False)
    found = socket_of(mounted.path)
    assert found.stat().st_mode & 0o777 == 0o600
    assert found.parent.stat().st_mode & 0o777 == 0o755


@fuse
def test_a_mount_that_is_known_is_not_looked_for(
    mounted: Mounted, monkeypatch: pytest.MonkeyPatch
) -> None:
    mount = client.find_mount(str(mounted.path))
    monkeypatch.setattr(client, "find_mount", lambda path: pytest.fail("again"))
    assert client.call(str(mounted.path), Ping(), mount)
    lease = client.stream(str(mounted.path), Freeze(), mount)
    assert isinstance(next(lease), Frozen)
    lease.close()


def test_what_is_prepared_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    prepared: list[type[Any]] = []
    monkeypatch.setattr(codec, "prepare", prepared.append)
    client.prepare(Ping, Freeze)
    assert prepared == [Ping, Pong, Freeze, *Freeze.answers]
    assert set(Freeze.answers) == {OpenForWriting, Frozen}


@fuse
def test_a_killed_daemon_is_said_and_its_socket_swept() -> None:
    with Mounted(16 << 20) as m:
        found = socket_of(m.path)
        ours = which(found)
        assert m.daemon is not None
        m.daemon.kill()
        m.daemon.wait()
        with pytest.raises(client.NoDaemonError, match="its daemon has died"):
            client.call(str(m.path), Ping())
        subprocess.run(["umount", "-l", str(m.path)], check=True)
        assert which(found) == ours
        with Mounted(16 << 20) as other:  # which may or may not get the same device number
            assert which(found) != ours
            assert client.call(str(other.path), Ping())
        m.start()


@fuse
def test_a_daemon_that_does_not_listen_is_said(mounted: Mounted) -> None:
    socket_of(mounted.path).unlink()
    with pytest.raises(client.NoDaemonError, match="does not listen at /run/pkernfs/"):
        client.call(str(mounted.path), Ping())


@fuse
def test_another_user_is_refused(mounted: Mounted) -> None:
    path = str(mounted.path)

    def ask() -> None:
        with pytest.raises(PermissionDeniedError, match="only root and the owner"):
            client.call(path, Ping())

    run_as(1234, ask)
    socket_of(mounted.path).chmod(0o666)  # then the daemon itself has to look who asks
    run_as(1234, ask)
    assert client.call(path, Ping())


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
                    client.call(str(m.path), Ping())

    with_own_run(work)


@fuse
def test_a_path_elsewhere_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidError, match="not on a pkernfs mount"):
        client.call(str(tmp_path), Ping())
    with pytest.raises(FileNotFoundError):
        client.call(str(tmp_path / "missing"), Ping())
    assert not is_mounted(tmp_path)
