"""Who maps a file, on a made-up /proc and for real."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import pytest

from pkernfs.host.mappings import Mapping, mappings_of, maps_device
from support.made_up_host import Machine

MIB = 1 << 20


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(str(tmp_path))


def test_what_processes_map(machine: Machine, tmp_path: Path) -> None:
    file = tmp_path / "a region"
    file.touch()
    status = file.stat()
    device = maps_device(status.st_dev)
    lines = (
        f"7f0000000000-7f0000200000 rw-s 00600000 {device} {status.st_ino}        {file}",
        f"7f0000200000-7f0000300000 r--s 00100000 {device} {status.st_ino}        {file} (deleted)",
        f"7f0000300000-7f0000400000 rw-s 00000000 {device} {status.st_ino + 1}    /another file",
        f"7f0000400000-7f0000500000 rw-s 00000000 ff:ff {status.st_ino}           /another device",
        "7f0000500000-7f0000600000 rw-p 00000000 00:00 0                          [heap]",
        f"7f0000600000-7f0000700000 rw-p 00200000 {device} {status.st_ino}        {file}",
    )
    machine.write("proc/12/maps", "\n".join(lines) + "\n")
    machine.write("proc/12/comm", "qemu-system-x86\n")
    machine.write("proc/9/maps", lines[0] + "\n")
    machine.write("proc/7/maps", lines[2] + "\n")
    machine.write(f"proc/{os.getpid()}/maps", lines[0] + "\n")
    machine.write("proc/maps/maps", lines[0] + "\n")
    found = list(mappings_of(str(file), machine))
    assert found == [
        Mapping(9, "?", 6 * MIB, 8 * MIB),
        Mapping(12, "qemu-system-x86", 6 * MIB, 8 * MIB),
        Mapping(12, "qemu-system-x86", MIB, 2 * MIB, writable=False),
        Mapping(12, "qemu-system-x86", 2 * MIB, 3 * MIB, writable=False),  # a private copy
    ]
    assert found[1].process == "process 12 (qemu-system-x86)"
    assert list(mappings_of(str(file), machine, pids=[7, 9, 1000])) == found[:1]
    assert list(mappings_of(str(tmp_path / "absent"), machine)) == []


@pytest.mark.parametrize("end", ["\r", "\x1c", "\u2028", ""])
def test_a_name_that_looks_like_a_line(machine: Machine, tmp_path: Path, end: str) -> None:
    """The kernel escapes nothing but line feeds there."""
    file = tmp_path / "region"
    file.touch()
    status = file.stat()
    entry = f"00000000 {maps_device(status.st_dev)} {status.st_ino} "
    name = f"/tmp/x{end}7f0000000000-7f0000200000 rw-s {entry}/y"
    line = f"7f0000400000-7f0000500000 rw-s 00000000 ff:ff 77             {name}\n"
    machine.write("proc/9/maps", line)
    assert list(mappings_of(str(file), machine)) == []
    machine.write("proc/9/maps", f"{line}7f0000600000-7f0000700000 rw-s {entry}  {file}\n")
    assert list(mappings_of(str(file), machine)) == [Mapping(9, "?", 0, MIB)]


def test_a_file_system_whose_subvolumes_have_numbers_of_their_own(
    machine: Machine, tmp_path: Path
) -> None:
    """btrfs: maps has the device of the mount, which stat(2) does not tell."""
    file = tmp_path / "a b" / "region"
    file.parent.mkdir()
    file.touch()
    ino, device = file.stat().st_ino, maps_device(file.stat().st_dev)
    for pid, shown in ((12, "00:63"), (13, device), (14, "00:61")):
        line = f"7f0000000000-7f0000200000 rw-s 00000000 {shown} {ino} {file}"
        machine.write(f"proc/{pid}/maps", line)
    root = "20 1 0:98 / / rw - btrfs /dev/vda rw\n"
    near = f"21 20 0:99 / {tmp_path}/a\\040b rw - btrfs /dev/vdb rw\n"
    other = f"22 20 0:97 / {tmp_path}/a rw - btrfs /dev/vdc rw\n"
    machine.write("proc/self/mountinfo", root + near + other)
    assert [m.pid for m in mappings_of(str(file), machine)] == [12, 13]
    machine.write("proc/self/mountinfo", root + other)
    assert [m.pid for m in mappings_of(str(file), machine)] == [13]


def test_what_this_process_maps(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(3 * MIB))
    pid = os.getpid()
    with path.open("r+b") as file, mmap.mmap(file.fileno(), MIB, offset=2 * MIB):
        [found] = mappings_of(str(path), pids=[pid])
        assert (found.pid, found.start, found.end) == (pid, 2 * MIB, 3 * MIB)
        assert list(mappings_of(str(path))) == [], "others do not"
    assert list(mappings_of(str(path), pids=[pid])) == []
