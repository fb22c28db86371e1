"""A dax device as the memory of a region, with a file in the place of the device."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pkernfs.dma.mount import mount_filesystem
from pkernfs.errors import LockedError
from pkernfs.fs.mkfs import make_filesystem
from pkernfs.host.iomem import Span
from pkernfs.layout import BLOCK, ROOT_INO
from pkernfs.quantities import PhysAddr, RegionOff
from pkernfs.region.dax import device_names, read_device
from pkernfs.region.region import Region
from support.made_up_host import Machine, add_dax
from support.made_up_regions import G, M, dax_machine, refusal


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return dax_machine(tmp_path)


def test_a_device_of_two_ranges(machine: Machine) -> None:
    path = add_dax(machine, "dax0.1", (G + 8 * M, 4 * M), (G, 6 * M))
    assert device_names(machine) == ["dax0.1"]
    device = read_device("dax0.1", machine)
    assert device.pieces == (Span(PhysAddr(G + 8 * M), 4 * M), Span(PhysAddr(G), 6 * M))
    assert (device.size, device.align, device.node) == (10 * M, BLOCK, 1)
    assert (device.driver, device.region) == ("device_dax", "sys/devices/platform/hmem.0")
    with Region.open(str(path), write=True, host=machine) as region:
        assert (region.size, region.node, region.phys_base) == (10 * M, 1, None)
        assert (region.has_pages, region.needs_sync, region.untouched) == (True, False, False)
        assert region.known_zero() == []
        assert region.physical(RegionOff(0)) == G + 8 * M
        assert region.physical(RegionOff(4 * M - 1)) == G + 12 * M - 1
        assert region.physical(RegionOff(4 * M)) == G
        assert region.physical(RegionOff(10 * M)) is None
        assert region.physical_runs(RegionOff(2 * M), 6 * M) == [
            (2 * M, 2 * M, G + 10 * M),
            (4 * M, 4 * M, G),
        ]
        make_filesystem(region)
        fs = mount_filesystem(region)
        ino = fs.create(ROOT_INO, b"f", 0o100600, 0, 0).ino
        fs.run(lambda: fs.write(ino, 0, b"x" * 4096))
        assert bytes(fs.read(ino, 0, 4096)) == b"x" * 4096
        fs.unmount()


@pytest.mark.usefixtures("impatient")
def test_one_lock_for_dax_and_dev_mem(machine: Machine) -> None:
    machine.write("proc/cmdline", "memmap=512M%1G")
    machine.write("dev/mem", b"")
    os.truncate(machine.path("dev/mem"), 2 * G)
    path = str(add_dax(machine, "dax0.0", (G + 64 * M, 8 * M), (G, 8 * M)))
    with Region.open(path, write=True, host=machine) as region:
        region.serving(True)
        for spec in ("16M!1G", "64M!1032M"):
            with pytest.raises(LockedError, match="in use"):
                Region.open(spec, write=True, host=machine)
        Region.open("56M!1032M", write=True, host=machine).close()
    with Region.open("16M!1G", write=True, host=machine) as region:
        region.serving(True)
        with pytest.raises(LockedError, match="overlaps 16M!1G"):
            Region.open(path, write=False, host=machine)


def test_mappings_that_make_no_sense(machine: Machine) -> None:
    add_dax(machine, "dax0.0", (G, 8 * M), size=10 * M)
    add_dax(machine, "dax0.1", (G + 4096, 8 * M))
    add_dax(machine, "dax0.2", (0x100000, 8 * M), (G, 2 * M))
    add_dax(machine, "dax0.3", (512 * M, 8 * M), (G, 2 * M))
    assert refusal(machine) == "/dev/dax0.0: its mappings are not of its size: got 10485760"
    for name in ("dax0.1", "dax0.2"):
        assert "bad mapping" in refusal(machine, name)
    assert refusal(machine, "dax0.3") == "/dev/dax0.3: 0x100000-0x3fffffff is System RAM"


def test_an_uncached_device(machine: Machine) -> None:
    add_dax(machine, "dax0.0", (G, 8 * M), (G + 64 * M, 8 * M))
    machine.write(
        "sys/kernel/debug/x86/pat_memtype_list",
        "PAT: [mem 0x0000000044000000-0x0000000044800000] uncached-minus\n",
    )
    assert "maps it uncached-minus, not write-back" in refusal(machine)
