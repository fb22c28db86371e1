"""Regions in physical memory, with a file in the place of /dev/mem.

What only a real kernel can show (its refusals, its memory types) is in tests/lab.
"""

from __future__ import annotations

import errno
import os
import struct
from pathlib import Path

import pytest

from pkernfs.dma.mount import mount_filesystem
from pkernfs.errors import LockedError, RegionError
from pkernfs.fs.mkfs import make_filesystem
from pkernfs.fs.superblock import describe
from pkernfs.layout import BLOCK, ROOT_INO
from pkernfs.quantities import PhysAddr, RegionOff
from pkernfs.region import locks
from pkernfs.region.devmem import peek
from pkernfs.region.opening import open_backing
from support.made_up_host import Machine
from support.made_up_regions import G, M, dev_mem_machine, open_region


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return dev_mem_machine(tmp_path)


def test_a_file_system_in_physical_memory(machine: Machine) -> None:
    (Path(machine.root) / "sys/devices/system/node/node0").mkdir(parents=True)
    with open_region("none", machine) as region:
        assert (region.name, region.size) == ("512M!1G", 512 * M)
        assert (region.phys_base, region.node) == (G, 0)
        assert region.physical(RegionOff(5 * BLOCK + 3)) == G + 5 * BLOCK + 3
        assert region.physical(RegionOff(512 * M)) is None
        assert region.physical_runs(RegionOff(BLOCK), 2 * BLOCK) == [(BLOCK, 2 * BLOCK, G + BLOCK)]
        assert not region.has_pages
        assert not region.needs_sync
        assert not region.untouched
        assert region.known_zero() == []
        start, end = RegionOff(BLOCK), RegionOff(3 * BLOCK)
        assert list(region.data_ranges(start, end)) == [(start, end)]
        make_filesystem(region)
        fs = mount_filesystem(region)
        ino = fs.create(ROOT_INO, b"guest-ram", 0o100600, 0, 0).ino
        fs.run(lambda: fs.write(ino, 0, b"physical" * 512))
        extent = next(iter(fs.extents(ino)))
        fs.unmount()
        (described,) = describe(region)["ranges"]
        assert described["physical"] == described["physical_at_mkfs"] == G
        assert described["node"] == 0
    with open(machine.path("dev/mem"), "rb") as memory:
        memory.seek(G + extent.region_offset)
        assert memory.read(4096) == b"physical" * 512
        # Nothing before the region was stored to, not even a zero.
        assert os.lseek(memory.fileno(), 0, os.SEEK_DATA) == G


def test_a_region_in_two_nodes_is_warned_of(
    machine: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    """1.25 GiB of memory are node 0's, the rest node 1's."""
    table = bytes(48)
    for domain, start, size in ((0, 0, 1280 * M), (1, 1280 * M, G)):
        table += struct.pack("<BBIHQQIIQ", 1, 40, domain, 0, start, size, 0, 1, 0)
    machine.write("sys/firmware/acpi/tables/SRAT", table)
    with open_region("256M!1G", machine) as region:
        assert region.node == 0
    with open_region("256M!1280M", machine) as region:
        assert region.node == 1
    assert caplog.messages == []
    with open_region("512M!1G", machine) as region:
        assert region.node is None
    assert caplog.messages == ["512M!1G: lies in NUMA nodes 0 and 1"]


@pytest.mark.usefixtures("impatient")
def test_ranges_exclude_each_other(machine: Machine) -> None:
    with open_region("512M!1G", machine) as region:
        region.serving(True)
        for spec in ("512M!1G", "0x200000!0x40000000", "256M!1280M"):
            with pytest.raises(LockedError):
                open_region(spec, machine)
            open_region(spec, machine, write=False, lock=False).close()
        with pytest.raises(LockedError, match="overlaps 512M!1G"):
            open_region("256M!1280M", machine, write=False)
    with open_region("256M!1G", machine), open_region("256M!1280M", machine):
        pass


@pytest.mark.parametrize(
    ("files", "error", "message"),
    [
        (
            {},
            errno.ENOENT,
            "No such file or directory: a kernel without CONFIG_DEVMEM, or a container; "
            "use device-dax",
        ),
        ({}, errno.EPERM, "Operation not permitted: root is needed (CAP_SYS_RAWIO)"),
        (
            {"sys/kernel/security/lockdown": "none [integrity] confidentiality\n"},
            errno.EPERM,
            "Operation not permitted: kernel lockdown (integrity, by Secure Boot or lockdown=): "
            "use device-dax",
        ),
        (
            {"sys/kernel/security/lockdown": "[none] integrity confidentiality\n"},
            errno.EACCES,
            "Permission denied: root is needed (CAP_SYS_RAWIO)",
        ),
        ({}, errno.EIO, "Input/output error"),
    ],
)
def test_dev_mem_refused(
    machine: Machine,
    files: dict[str, str],
    error: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, text in files.items():
        machine.write(name, text)
    path = machine.path("dev/mem")
    really_open = os.open

    def refuse(name: str, *args: int) -> int:
        if name == path:
            raise OSError(error, os.strerror(error), name)
        return really_open(name, *args)

    with monkeypatch.context() as patched:
        patched.setattr(os, "open", refuse)
        with pytest.raises(RegionError) as caught:
            open_region("512M!1G", machine)
    assert str(caught.value) == f"512M!1G: cannot open {path}: {message}"
    assert caught.value.errno == error
    open_region("512M!1G", machine).close()  # the lock went with it


def test_nothing_is_opened_before_it_is_known_to_be_free(machine: Machine) -> None:
    os.unlink(machine.path("dev/mem"))
    with pytest.raises(RegionError, match="is System RAM at 0x20000000"):
        open_region("512M!512M", machine)
    assert not os.path.exists(machine.path("run/pkernfs"))


def test_a_refused_mapping_lets_the_lock_go(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "_CLOSING_WAIT_SECONDS", 0.0)
    with open(machine.path("dev/mem"), "r+b") as memory:
        memory.truncate(0)
    backing = open_backing("512M!1G", write=True, phys_base=None, lock=True, host=machine)
    assert backing.refused(errno.EPERM) == " (STRICT_DEVMEM): boot with iomem=relaxed"
    assert backing.refused(errno.ENOMEM) == ""
    backing.close()
    open_backing("256M!1280M", write=True, phys_base=None, lock=True, host=machine).close()
    odd = open_backing("32M!1056M", write=True, phys_base=None, lock=True, host=machine)
    assert odd.refused(errno.EPERM) == (
        " (STRICT_DEVMEM): choose a START that is a multiple of 64M"
    )
    odd.close()


def test_a_few_bytes_that_no_driver_has(machine: Machine) -> None:
    """Who cannot have them has another way, so nothing is said."""
    path = Path(machine.path("dev/mem"))
    path.unlink(missing_ok=True)
    assert peek(PhysAddr(4096), 3, machine) == b""
    path.write_bytes(bytes(4096) + b"abcdef")
    assert peek(PhysAddr(4096), 3, machine) == b"abc"
    assert peek(PhysAddr(4100), 9, machine) == b"ef"
