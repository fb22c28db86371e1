"""Who uses files and regions, on a made-up /proc."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pkernfs.control.mounts import Mount
from pkernfs.errors import RegionError
from pkernfs.kexec.users import Process, mappers_of, mappers_of_segments, users_of
from pkernfs.pool.pool import Segment
from pkernfs.quantities import Ino, SegmentNo
from support.made_up_host import Machine
from support.memory_pool import MemoryPool

MOUNT = Mount(os.makedev(0, 0x3E), "/mnt/a", "fuse.pkernfs", "512M!1G")
#: The inodes whose users are asked for.
WANTED = {Ino(7)}
MOUNTINFO = "{id} 1 0:{minor} / /mnt/a rw - fuse.pkernfs 512M!1G rw\n"


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    machine = Machine(str(tmp_path))
    machine.write("proc/cpuinfo", "")
    return machine


def process(machine: Machine, pid: int, *, mount_id: int = 50, namespace: str = "1") -> None:
    """A process that sees the mount under a number, in a mount namespace."""
    machine.write(f"proc/{pid}/comm", f"program{pid}\n")
    ids = MOUNTINFO.format(id=1, minor=25) + MOUNTINFO.format(id=mount_id, minor=62)
    machine.write(f"proc/{pid}/mountinfo", ids)
    for name in ("ns", "fd"):
        Path(machine.path(f"proc/{pid}/{name}")).mkdir()
    Path(machine.path(f"proc/{pid}/ns/mnt")).symlink_to(f"mnt:[{namespace}]")


def open_file(machine: Machine, pid: int, fd: int, path: str, ino: int, flags: int, **more: int):  # type: ignore[no-untyped-def]
    mount_id = more.get("mount_id", 50)
    machine.write(
        f"proc/{pid}/fdinfo/{fd}",
        f"pos:\t0\nflags:\t0{flags | 0o100000:o}\nmnt_id:\t{mount_id}\nino:\t{ino}\n",
    )
    Path(machine.path(f"proc/{pid}/fd/{fd}")).symlink_to(path)


def test_open_for_writing(machine: Machine) -> None:
    for pid in (9, 10, 2):
        process(machine, pid, namespace=str(pid), mount_id=50 + pid)
    open_file(machine, 2, 3, "/mnt/a/x", 7, os.O_RDWR, mount_id=52)
    open_file(machine, 2, 4, "/mnt/a/x", 7, os.O_WRONLY, mount_id=52)  # told once
    open_file(machine, 9, 3, "/mnt/a/x", 7, os.O_RDONLY, mount_id=59)
    open_file(machine, 9, 4, "/mnt/a/y", 8, os.O_WRONLY, mount_id=59)  # another inode
    open_file(machine, 9, 5, "/srv/x", 7, os.O_WRONLY, mount_id=1)  # another mount
    open_file(machine, 10, 3, "/chroot/x", 7, os.O_WRONLY, mount_id=60)
    assert list(users_of(MOUNT, WANTED, machine)) == [
        "/mnt/a/x by process 2 (program2)",
        "/chroot/x by process 10 (program10)",
    ]


def test_descriptors_that_go_meanwhile(machine: Machine) -> None:
    process(machine, 5)
    open_file(machine, 5, 3, "/mnt/a/x", 7, os.O_RDWR)
    Path(machine.path("proc/5/fd/3")).unlink()
    for fd, text in ((4, ""), (5, "flags:\tno\nmnt_id:\t50\nino:\t7\n"), (6, "mnt_id:\t50\n")):
        machine.write(f"proc/5/fdinfo/{fd}", text)
    assert list(users_of(MOUNT, WANTED, machine)) == []
    Path(machine.path("proc/5/ns/mnt")).unlink()
    assert list(users_of(MOUNT, WANTED, machine)) == []


def test_mapped(machine: Machine) -> None:
    process(machine, 5)
    machine.write(
        "proc/5/maps",
        "7f00-7f01 rw-s 00000000 00:3e 7                          /mnt/a/with a space\n"
        "7f01-7f02 rw-s 00000000 00:3e 8                          /mnt/a/other\n"
        "7f02-7f03 rw-s 00000000 00:3f 7                          /srv/x\n"
        "7f03-7f04 rw-p 00000000 00:00 0 \n",
    )
    assert list(users_of(MOUNT, WANTED, machine)) == ["/mnt/a/with a space by process 5 (program5)"]


def test_loop_devices(machine: Machine) -> None:
    machine.write("sys/block/loop0/loop/backing_file", "/mnt/a/disk\n")
    machine.write("sys/block/loop1/loop/backing_file", "/mnt/ab/disk\n")
    machine.write("sys/block/loop2/size", "0\n")
    machine.write("sys/block/vda/loop/backing_file", "/mnt/a/disk\n")
    assert list(users_of(MOUNT, WANTED, machine)) == ["/mnt/a/disk by /dev/loop0"]


def test_nobody(machine: Machine, tmp_path: Path) -> None:
    assert list(users_of(MOUNT, WANTED, machine)) == []
    assert list(users_of(MOUNT, WANTED, Machine(str(tmp_path / "empty")))) == []


def test_who_maps_a_region(machine: Machine, tmp_path: Path) -> None:
    region = tmp_path / "region"
    region.touch()
    status = region.stat()
    number = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}"
    line = f"7f00-7f01 {{}} 00000000 {number} {{}}   {region}\n"
    for pid, access, ino in (
        (5, "rw-s", status.st_ino), (6, "r--s", status.st_ino), (7, "rw-s", status.st_ino + 1),
        (os.getpid(), "rw-s", status.st_ino), (11, "rw-s", status.st_ino),
    ):  # fmt: skip
        machine.write(f"proc/{pid}/comm", f"program{pid}\n")
        machine.write(f"proc/{pid}/maps", line.format(access, ino) * 2)
    Path(machine.path("proc/11/comm")).unlink()
    found = list(mappers_of(str(region), machine))
    assert found == [Process(5, "program5"), Process(11, "?")]
    assert str(found[0]) == "process 5 (program5)"
    assert list(mappers_of("512M!1G", machine)) == []


def test_who_maps_segments(machine: Machine, tmp_path: Path) -> None:
    """One look for all of them; one that is lost is mapped by nobody."""
    for number in (1, 2):
        (tmp_path / f"segment-{number}").touch()

    class Pool(MemoryPool):
        def native_path(self, segment: Segment) -> str:
            if segment.number == 4:
                raise RegionError("segment 4: its device is not there")
            return str(tmp_path / f"segment-{segment.number}")

    rows = [Segment(SegmentNo(n), Ino(n + 10), 1, 2 << 20) for n in (1, 2, 3, 4)]
    found = os.stat(tmp_path / "segment-2")
    process(machine, 9)
    device = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}"
    machine.write("proc/9/maps", f"7f00-7f10 rw-s 00000000 {device} {found.st_ino} /x\n")
    pool = Pool()
    assert list(mappers_of_segments(pool, rows, machine)) == [(Process(9, "program9"), rows[1])]
