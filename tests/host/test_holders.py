"""Who has a file or a device open or mapped, on a made-up /proc and for real."""

from __future__ import annotations

import mmap
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from pkernfs.host.holders import Holding, Target, is_mapped_by, look
from pkernfs.host.mappings import maps_device
from support.made_up_host import Machine

MIB = 1 << 20
DEVICE = os.makedev(0, 99)
FILE = Target(DEVICE, 7, "segment-3")


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    made = Machine(str(tmp_path))
    for pid, namespace in ((9, "mnt:[1]"), (12, "mnt:[1]"), (13, "mnt:[2]")):
        add_process(made, pid, namespace)
    made.write("proc/9/mountinfo", f"30 1 0:99 / {tmp_path} rw - tmpfs t rw\n")
    made.write("proc/13/mountinfo", "41 1 0:99 / /else rw - tmpfs t rw\n42 1 0:1 / / rw - x y z\n")
    return made


def add_process(machine: Machine, pid: int, namespace: str) -> None:
    machine.write(f"proc/{pid}/comm", f"program-{pid}\n")
    machine.write(f"proc/{pid}/maps", "7f0000000000-7f0000200000 rw-p 00000000 00:00 0\n")
    Path(machine.path(f"proc/{pid}/ns")).mkdir()
    Path(machine.path(f"proc/{pid}/ns/mnt")).symlink_to(namespace)
    for name in ("fd", "fdinfo", "map_files"):
        Path(machine.path(f"proc/{pid}/{name}")).mkdir()


def add_descriptor(machine: Machine, pid: int, fd: int, link: str, mount: int, ino: int) -> None:
    Path(machine.path(f"proc/{pid}/fd/{fd}")).symlink_to(link)
    text = f"pos:\t0\nflags:\t0100002\nmnt_id:\t{mount}\nino:\t{ino}\n"
    machine.write(f"proc/{pid}/fdinfo/{fd}", text)


def line(ino: int, name: str, device: int = DEVICE) -> str:
    return f"00400000-00600000 rw-s 00000000 {maps_device(device)} {ino}    {name}\n"


def test_processes_that_map_a_file_or_have_it_open(machine: Machine) -> None:
    assert look([FILE], machine) == ([], 0)
    machine.write(
        "proc/9/maps", line(8, f"/x {maps_device(DEVICE)} 7 /y") + line(7, "/a/segment-3")
    )
    add_descriptor(machine, 9, 3, "/a/segment-3", 30, 7)
    add_descriptor(machine, 12, 3, "/b (deleted)", 30, 7)
    add_descriptor(machine, 12, 4, "/a/segment-4", 30, 8)
    add_descriptor(machine, 13, 3, "/c", 30, 7)  # a mount that it does not see
    add_descriptor(machine, 13, 4, "/d", 41, 8)
    other = Target(DEVICE, 8, "segment-4")
    assert look([FILE, other], machine).found == [
        Holding(FILE, 9, "program-9", maps=True),
        Holding(other, 9, "program-9", maps=True),
        Holding(FILE, 12, "program-12", maps=False),
        Holding(other, 12, "program-12", maps=False),
        Holding(FILE, 13, "program-13", maps=False),
        Holding(other, 13, "program-13", maps=False),
    ]
    assert is_mapped_by(9, FILE, machine)
    assert not is_mapped_by(12, FILE, machine)
    assert not is_mapped_by(1000, FILE, machine)


def test_what_only_looks_like_it(machine: Machine) -> None:
    text = f"/x {maps_device(DEVICE)} 7 /y"
    machine.write("proc/9/maps", line(8, text) + line(7, "/a/segment-3", os.makedev(0, 98)))
    add_descriptor(machine, 9, 3, "/a/segment-3", 42, 7)  # on another device
    add_descriptor(machine, 9, 4, "/a/segment-3", 30, 6)
    add_descriptor(machine, 9, 5, "socket:[7]", 30, 7)
    Path(machine.path("proc/9/fd/6")).symlink_to("/closed/meanwhile")
    assert look([FILE], machine) == ([], 0)


def test_who_lets_nobody_look_is_counted(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    read = os.listdir

    def refuse(path: str) -> list[str]:
        if path == machine.path("proc/12/fd"):
            raise PermissionError
        return read(path)

    monkeypatch.setattr(os, "listdir", refuse)
    Path(machine.path("proc/13/maps")).unlink()  # it has ended
    add_process(machine, os.getpid(), "mnt:[1]")
    machine.write(f"proc/{os.getpid()}/maps", line(7, "/a/segment-3"))
    assert look([FILE], machine) == ([], 1)


def test_nodes_of_a_device(machine: Machine, tmp_path: Path) -> None:
    """By inode, or by name and number; as /dev/null, for a test need not be root."""
    node = os.stat("/dev/null")
    dax = Target.of(node, "null")
    assert dax.rdev == node.st_rdev
    machine.write("proc/9/maps", line(5, "/dev/null"))  # of a /dev of its own
    Path(machine.path("proc/9/map_files/400000-600000")).symlink_to("/dev/null")
    machine.write("proc/12/maps", line(5, "/dev/zero") + line(5, "/tmp/null"))
    Path(machine.path("proc/12/map_files/400000-600000")).symlink_to("/dev/zero")
    add_descriptor(machine, 13, 3, "/dev/null", 41, 5)
    add_descriptor(machine, 12, 3, "/dev/zero", 41, 5)
    (tmp_path / "null").touch()
    add_descriptor(machine, 12, 4, f"{tmp_path}/null", 41, 5)
    found = look([dax], machine).found
    assert [(one.pid, one.maps) for one in found] == [(9, True), (13, False)]
    machine.write("proc/12/maps", line(node.st_ino, "/any/name", node.st_dev))
    assert [one.pid for one in look([dax], machine).found] == [9, 12, 13]


_HOLD = """
import mmap, os, socket, sys
fd = os.open(sys.argv[1], os.O_RDONLY)
if sys.argv[2] == "map":
    mapped = mmap.mmap(fd, 0, prot=mmap.PROT_READ)
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("how", ["map", "open"])
def test_a_real_process(how: str) -> None:
    with tempfile.NamedTemporaryFile(dir="/dev/shm") as file:
        os.ftruncate(file.fileno(), MIB)
        target = Target.of(os.fstat(file.fileno()), os.path.basename(file.name))
        arguments = [sys.executable, "-c", _HOLD, file.name, how]
        with (
            mmap.mmap(file.fileno(), MIB),
            subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder,
        ):
            assert holder.stdout
            holder.stdout.readline()
            [found] = look([target]).found
            holder.communicate()
        assert (found.target, found.pid, found.maps) == (target, holder.pid, how == "map")
        assert found.command.startswith("python")
        assert look([target]).found == []


def test_a_descriptor_on_its_way_is_not_seen() -> None:
    """Whoever must know asks the kernel for a lease."""
    with tempfile.NamedTemporaryFile(dir="/dev/shm") as file:
        target = Target.of(os.fstat(file.fileno()), "")
        left, right = socket.socketpair()
        with left, right:
            socket.send_fds(left, [b"x"], [file.fileno()])
            file.close()
            assert look([target]).found == []
