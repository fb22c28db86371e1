"""A daemon as a process: what it has open once it is up, and when it ends."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.fuse

from pkernfs.control import client  # noqa: E402
from pkernfs.control.protocol import Ping  # noqa: E402
from pkernfs.errors import LockedError  # noqa: E402
from pkernfs.region.region import Region  # noqa: E402
from support.mounting import (  # noqa: E402
    _PROGRAM,
    Mounted,
    child,
    is_mounted,
    own_mount_namespace,
    run_pkernfs,
    wait_until,
)


@pytest.fixture
def mounted() -> Iterator[Mounted]:
    with Mounted() as mount:
        yield mount


def open_files(pid: int, *, streams: bool) -> Counter[str]:
    """What a process has open, by kind; ``streams``: with the three standard ones."""
    found: Counter[str] = Counter()
    for fd in os.listdir(f"/proc/{pid}/fd"):
        if int(fd) > 2 or streams:
            with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                found[re.sub(r":\[\d+\]$", "", os.readlink(f"/proc/{pid}/fd/{fd}"))] += 1
    return found


def of_its_own(mounted: Mounted) -> Counter[str]:
    """What a daemon opens: region, device, control socket, the ends by which trio is woken."""
    own = {str(mounted.region): 1, "/dev/fuse": 1, "anon_inode:[eventpoll]": 1, "socket": 6}
    if os.path.exists("/dev/log"):
        own["socket"] += 1
    return Counter(own)


@contextlib.contextmanager
def callers_files(directory: Path) -> Iterator[list[int]]:
    """A lock, a pipe's both ends, a socket, a directory, a file that is gone, and high numbers."""
    (directory / "lock").touch()
    (directory / "gone").touch()
    near, far = socket.socketpair()
    given = [
        os.open(directory / "lock", os.O_RDWR),
        *os.pipe(),
        near.detach(),
        os.open(directory, os.O_RDONLY),
        os.open(directory / "gone", os.O_RDWR),
    ]
    given += [os.dup2(given[0], 400), os.dup2(given[1], 900)]
    (directory / "gone").unlink()
    try:
        yield given
    finally:
        far.close()
        for fd in given:
            os.close(fd)


def test_the_daemon_has_open_what_it_opened(mounted: Mounted, tmp_path: Path) -> None:
    mounted.unmount()
    command = [sys.executable, "-c", _PROGRAM, "mount", str(mounted.region), str(mounted.path)]
    with callers_files(tmp_path) as given:
        subprocess.run(command, pass_fds=given, check=True, timeout=20)
    pid = client.call(str(mounted.path), Ping()).pid
    expected = of_its_own(mounted) + Counter({"/dev/null": 3})
    # The control socket's own end for trio, and for a moment that of the question, come later.
    wait_until(lambda: open_files(pid, streams=True) == expected, f"the files of {pid}")
    assert os.readlink(f"/proc/{pid}/cwd") == "/"
    subprocess.run(["umount", mounted.path], check=True)


def test_a_daemon_in_the_foreground_keeps_the_streams_only(
    mounted: Mounted, tmp_path: Path
) -> None:
    mounted.unmount()
    with callers_files(tmp_path) as given:
        mounted.start(given)
    client.call(str(mounted.path), Ping())
    assert mounted.daemon
    pid, expected = mounted.daemon.pid, of_its_own(mounted)
    wait_until(lambda: open_files(pid, streams=False) == expected, f"the files of {pid}")
    assert os.readlink(f"/proc/{pid}/fd/2").startswith("pipe:")


def test_a_daemon_that_serves_a_copy_of_its_mount_is_explained(mounted: Mounted) -> None:
    """umount(8) ends the mount here; a copy of it, in a namespace made meanwhile, goes on."""
    read_end, write_end = os.pipe()

    def copy() -> None:
        own_mount_namespace(keep=mounted.path)
        os.write(write_end, b"1")
        signal.pause()

    assert mounted.daemon
    with child(copy) as pid:
        os.read(read_end, 1)
        subprocess.run(["umount", mounted.path], check=True)
        assert not is_mounted(mounted.path)
        namespace = os.readlink(f"/proc/{pid}/ns/mnt")
        done = run_pkernfs("mount", str(mounted.region), str(mounted.path))
        link = mounted.directory / "link"
        link.symlink_to(mounted.region)
        with pytest.raises(LockedError, match="unmounted, but a copy of the mount is at"):
            Region.open(str(link), write=True)
        assert mounted.daemon.poll() is None
        assert f"its mount is seen by processes ['{pid}']" in mounted._doing()
    os.close(read_end)
    os.close(write_end)
    assert done.returncode == 32
    assert re.fullmatch(
        rf"pkernfs: {mounted.region}: in use: it is mounted or being checked: by process "
        rf"{mounted.daemon.pid} \(python[\d.]*\): unmounted, but a copy of the mount is at "
        rf"{mounted.path} for process {pid} \((pytest|python)[\d.]*\), in the mount namespace "
        rf"{re.escape(namespace)}\n",
        done.stderr,
    ), done.stderr
    assert mounted.wait() == 0, "the copy was all that it served"


def test_sigterm_ends_a_daemon_whose_caller_had_blocked_it(mounted: Mounted) -> None:
    """A mask of signals outlives fork and exec, as descriptors do."""
    mounted.unmount()
    program = "import os, signal, sys; signal.pthread_sigmask(signal.SIG_BLOCK, {15}); "
    program += "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    mount = ["-c", _PROGRAM, "mount", str(mounted.region), str(mounted.path)]
    subprocess.run([sys.executable, "-c", program, *mount], check=True, timeout=20)
    os.kill(client.call(str(mounted.path), Ping()).pid, signal.SIGTERM)
    wait_until(lambda: not is_mounted(mounted.path), "the end of the mount")


def test_sigterm_leaves_another_mount_in_its_place_alone(mounted: Mounted) -> None:
    """A daemon that serves what is still open ends, and unmounts nothing that is not its own."""
    assert mounted.daemon
    (mounted.path / "f").write_bytes(b"open")
    with (mounted.path / "f").open("rb"):
        subprocess.run(["umount", "-l", mounted.path], check=True)
        subprocess.run(["mount", "-t", "tmpfs", "none", mounted.path], check=True)
        try:
            mounted.daemon.terminate()
            assert mounted.wait() == 0
            assert is_mounted(mounted.path), "that is the tmpfs"
        finally:
            subprocess.run(["umount", mounted.path], check=True)
    says = "still in use: unmounted or covered here, but open or mounted elsewhere: detached"
    assert says in mounted.words()
