"""The sockets of daemons: where they are, and which of them go."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from pkernfs.control import client
from pkernfs.control.protocol import Ping
from pkernfs.control.sockets import Listener, Server, servers
from pkernfs.errors import InvalidError
from pkernfs.host.sysroot import Host
from support.control import short_directory, socket_of, which, with_own_run
from support.mounting import Mounted

fuse = pytest.mark.fuse


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """A directory with a short name."""
    with short_directory() as path:
        yield path


@fuse
def test_the_socket_goes_with_the_mount() -> None:
    with Mounted(16 << 20) as m:
        found = socket_of(m.path)
        assert found.is_socket()
        ours = which(found)
        m.unmount()
        assert which(found) != ours
        with pytest.raises(InvalidError, match="not on a pkernfs mount"):
            client.call(str(m.path), Ping())


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
                client.call(str(m.path), Ping())
            m.unmount()
            assert "no control socket" in m.words()

    with_own_run(work, options)


def test_sockets_of_the_living_stay(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as other, socket.socket(socket.AF_UNIX) as dead:
        alive, stale, file = (tmp_path / name for name in ("1:1.sock", "1:2.sock", "1:3.sock"))
        other.bind(str(alive))
        other.listen()
        dead.bind(str(stale))
        file.touch()
        tmp_path.chmod(0o755)
        listener = Listener(os.makedev(0, 77), str(tmp_path))
        assert alive.exists()
        assert file.exists()
        assert not stale.exists()
        assert Path(listener.path).name == "0:77.sock"
        # Another mount has got the number: its socket is not this one's to remove.
        second = Listener(os.makedev(0, 77), str(tmp_path))
        listener.close()
        assert Path(second.path).exists()
        second.close()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["1:1.sock", "1:3.sock"]


def test_who_listens(tmp_path: Path) -> None:
    root, user = tmp_path / "run/pkernfs", tmp_path / "run/user/1000/pkernfs"
    root.mkdir(parents=True)
    user.mkdir(parents=True)
    host = Host(str(tmp_path))
    assert list(servers(host)) == []
    listener = Listener(os.makedev(0, 77), str(root))
    full, dead = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
    with full, dead, socket.socket(socket.AF_UNIX) as waiting:
        dead.bind(str(root / "0:78.sock"))
        (root / "0:79.sock").touch()
        (root / "physical.lock").touch()
        full.bind(str(user / "0:80.sock"))
        full.listen(0)
        waiting.connect(str(user / "0:80.sock"))
        assert list(servers(host)) == [
            Server(listener.path, os.makedev(0, 77), os.getpid()),
            Server(str(user / "0:80.sock"), os.makedev(0, 80), 0),
        ]
    listener.close()
