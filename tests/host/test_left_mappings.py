"""Who maps a file of a mount that is gone, on a made-up /proc and for real."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from pkernfs.host.left_mappings import LeftMapping, left_mappings
from pkernfs.host.same_memory import Area
from pkernfs.quantities import Ino
from support.made_up_host import Machine
from support.mounting import MIB, Mapper, Mounted

FILE, OTHER = Ino(7), Ino(8)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """Process 9 maps file 7 of device 0:42, which is FUSE's and mounted nowhere."""
    made = Machine(str(tmp_path))
    for pid in (9, 12):
        made.write(f"proc/{pid}/comm", f"program-{pid}\n")
        made.write(f"proc/{pid}/maps", "")
        made.write(f"proc/{pid}/mountinfo", "30 1 0:41 / /a rw - fuse x rw\n")
        Path(made.path(f"proc/{pid}/ns")).mkdir()
        Path(made.path(f"proc/{pid}/ns/mnt")).symlink_to(f"mnt:[{pid}]")
    made.write("proc/9/maps", line("00:2a", FILE))
    for device in ("0:41", "0:42"):
        made.write(f"sys/class/bdi/{device}/max_ratio", "1")
    return made


def line(device: str, ino: int) -> str:
    return f"00400000-00600000 rw-s 00001000 {device} {ino}    /a\n"


def test_a_mount_that_is_gone(machine: Machine) -> None:
    area = Area(0x400000, 0x600000, 0x1000)
    found = LeftMapping(FILE, 9, "program-9", (area,))
    assert left_mappings([FILE, OTHER], machine) == [found]
    assert left_mappings([OTHER], machine) == []
    machine.write("proc/9/maps", line("00:2a", FILE) * 2 + line("00:2a", OTHER))
    twice = found._replace(areas=(area, area))
    assert left_mappings([OTHER, FILE], machine) == [twice, found._replace(ino=OTHER)]


def test_two_mounts_that_are_gone(machine: Machine) -> None:
    """Files of one number, of either: what is mapped of one is told apart from the other's."""
    machine.write("proc/9/maps", line("00:2a", FILE) + line("00:2b", FILE))
    machine.write("sys/class/bdi/0:43/max_ratio", "1")
    found = left_mappings([FILE], machine)
    assert [len(one.areas) for one in found] == [1, 1]


def test_a_mount_that_some_process_sees(machine: Machine) -> None:
    machine.write("proc/9/maps", line("00:29", FILE))
    assert left_mappings([FILE], machine) == []
    machine.write("proc/9/maps", line("00:2a", FILE))
    machine.write("proc/12/mountinfo", "31 1 0:42 / /b rw - fuse x rw\n")
    assert left_mappings([FILE], machine) == []


def test_what_is_no_mount_at_all(machine: Machine) -> None:
    """Memory without a name, as of memfd_create, has a device, too, and any inode number."""
    machine.write("proc/12/maps", line("00:01", FILE) + "not a line\n")
    assert [found.pid for found in left_mappings([FILE], machine)] == [9]


@pytest.mark.fuse
def test_a_real_one() -> None:
    with Mounted() as mounted:
        file = mounted.path / "f"
        file.write_bytes(bytes(MIB))
        ino = Ino(file.stat().st_ino)
        with Mapper(file, MIB) as client:
            client.store(0, b"x")
            assert client.pid not in [found.pid for found in left_mappings([ino])]
            subprocess.run(["umount", "-l", str(mounted.path)], check=True)
            assert (ino, client.pid) in [found[:2] for found in left_mappings([ino])]
            client.end()
        mounted.wait()
