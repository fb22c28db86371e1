"""Tables that the running kernel has adopted: what may change of them, and when."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pkernfs.dma.kernel_adopted import KernelAdopted, KernelEntry
from pkernfs.errors import BusyError
from pkernfs.host.bars import Bar
from pkernfs.host.dmar import UnitStructure
from pkernfs.iommu import Memory
from pkernfs.iommu.context_walk import Mode
from pkernfs.layout import IOMMU_INO, PAGE, ROOT_INO
from pkernfs.quantities import Ino, Iova, PhysAddr, RegionOff, RegionRun, SourceId
from pkernfs.units.discovery import FoundUnit
from pkernfs.units.mmio import MemoryWindow
from pkernfs.units.unit import Unit
from support.checking import assert_clean
from support.made_up_kernel import EDU, NIC, Kernel
from support.table_files import DEVICE, MIB, RW, Host

OTHER = SourceId(0x30)
BAR = Bar(SourceId(0x38), 0, PhysAddr(0xFC00_0000), MIB)


# ---------------------------------------------------------------------- what the unit walks


@pytest.fixture(params=[Mode.LEGACY, Mode.SCALABLE], ids=["legacy", "scalable"])
def kernel(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Kernel]:
    """Its first two domains are in a region, the third is of its own."""
    made = Kernel(tmp_path, request.param)
    yield made
    made.close()


def adopted(kernel: Kernel, *, seen: bool = True) -> KernelAdopted:
    """What it has adopted; ``seen``: the unit's registers can be read."""
    kernel.save()
    unit = Unit("dmar0", MemoryWindow(kernel.window)) if seen else None
    found = FoundUnit(UnitStructure(0, 0, PhysAddr(0), PAGE, True, ()), True, unit, "no /dev/mem")
    region = Memory(kernel.region, [RegionRun(RegionOff(MIB), 128 * PAGE)])
    return KernelAdopted(kernel.ram.host, region, lambda: [found])


def test_entries_that_lead_into_the_region(kernel: Kernel) -> None:
    first, _second, third = (d.root for d in kernel.domains)
    kernel.root.attach(EDU, first, 2)
    kernel.root.attach(NIC, third, 4)
    assert adopted(kernel).entries() == [KernelEntry("dmar0", EDU, first)]


def test_they_are_read_anew(kernel: Kernel) -> None:
    first, second, third = (d.root for d in kernel.domains)
    kernel.root.attach(EDU, first, 2)
    kernel.root.attach(NIC, second, 3)
    found = adopted(kernel)
    assert len(found.entries()) == 2
    kernel.root.detach(EDU)
    kernel.root.attach(EDU, third, 4)
    kernel.save()
    assert [e.source_id for e in found.entries()] == [NIC]
    with pytest.raises(BusyError, match=r"dom-1: dmar0 walks it for device 0000:03:00\.0"):
        found.check("dom-1", [second])
    found.check("dom-0", [first])
    found.check("device", [second], EDU)
    kernel.root.detach(NIC)
    kernel.save()
    assert found.entries() == []


def test_a_unit_that_translates_nothing(kernel: Kernel) -> None:
    kernel.root.attach(EDU, kernel.domains[0].root, 2)
    kernel.enable_translation(status=0)
    assert adopted(kernel).entries() == []


def test_a_unit_that_cannot_be_looked_at(kernel: Kernel) -> None:
    """It matters only for a kernel that may have adopted something."""
    assert adopted(kernel, seen=False).entries() == []
    command_line = Path(kernel.ram.host.path("proc/cmdline"))
    command_line.write_text("quiet elfcorehdr=0x1000000\n")
    with pytest.raises(BusyError, match="may have adopted these tables, and dmar0 cannot be"):
        adopted(kernel, seen=False).entries()


# ---------------------------------------------------------------------- what may change


class Told(KernelAdopted):
    """The entries that a test says there are."""

    def __init__(self, *entries: KernelEntry) -> None:
        self.told = list(entries)

    def entries(self) -> list[KernelEntry]:
        return self.told


class Blind(Told):
    """A kernel that does not let its tables be read."""

    def entries(self) -> list[KernelEntry]:
        raise BusyError("not to be seen")


@pytest.fixture
def host() -> Iterator[Host]:
    """guest is mapped in dom-0, which the kernel has adopted for DEVICE, and in dom-1."""
    made = Host()
    for number, device in enumerate((DEVICE, OTHER)):
        made.dom(number)
        made.map(number, Iova(0), guest(made))
        made.attach(number, device)
    top = made.tables.domain(0).root
    made.tables.kernel_adopted = Told(KernelEntry("dmar0", DEVICE, top))
    yield made
    assert_clean(made.region)
    made.fs.unmount()
    made.close()


def guest(host: Host) -> Ino:
    """The file, made if it is not there."""
    found = [ino for name, ino, _kind, _at in host.fs.readdir(ROOT_INO, 0) if name == b"guest"]
    return found[0] if found else host.file_of("guest", 4 * MIB)


def test_what_is_walked_stays(host: Host) -> None:
    before = host.mappings(0)
    tables = host.tables
    for change in (
        lambda: tables.map_file(0, Iova(8 * MIB), guest(host), 0, None, RW),
        lambda: tables.map_bar(0, Iova(8 * MIB), BAR, 0, None, RW),
        lambda: tables.unmap(0, Iova(0), PAGE),
        lambda: tables.replace(0, [], [], 1),
    ):
        with pytest.raises(BusyError) as refused:
            host.run(change)
        assert str(refused.value) == (
            "dom-0: dmar0 walks it for device 0000:00:05.0, and the kernel has that unit: it "
            "cannot be told of changes: take the device over first (scripts/take-over)"
        )
    with pytest.raises(BusyError, match=r"^device 0000:00:05\.0: dmar0 walks it for"):
        host.run(lambda: tables.detach(DEVICE))
    assert host.mappings(0) == before
    assert [d.source_id for d in tables.devices()] == [DEVICE, OTHER]


def test_other_tables_may_change(host: Host) -> None:
    host.run(lambda: host.tables.unmap(1, Iova(0), PAGE))
    host.map(1, Iova(8 * MIB), guest(host))
    host.run(lambda: host.tables.detach(OTHER))
    host.attach(1, OTHER)


def test_a_device_that_was_taken_over(host: Host) -> None:
    """Its entry leads elsewhere; one that has the same domain may be walking it still."""
    neighbour = SourceId(DEVICE + 1)
    host.attach(0, neighbour)
    top = host.tables.domain(0).root
    host.tables.kernel_adopted = Told(KernelEntry("dmar0", neighbour, top))
    host.run(lambda: host.tables.detach(DEVICE))
    with pytest.raises(BusyError, match=r"0000:00:05\.1"):
        host.run(lambda: host.tables.unmap(0, Iova(0), PAGE))
    host.tables.kernel_adopted = Told()
    host.run(lambda: host.tables.detach(neighbour))
    host.run(lambda: host.tables.unmap(0, Iova(0), 4 * MIB))


def test_the_export_says_who_is_walked(host: Host) -> None:
    _text, whole, _status = host.answer("export")
    assert [d["adopted_by"] for d in whole["devices"]] == ["dmar0", None]
    host.tables.kernel_adopted = Blind()
    _text, whole, _status = host.answer("export")
    assert [d["adopted_by"] for d in whole["devices"]] == [None, None]


def test_a_file_that_is_walked_is_not_removed(host: Host, caplog: pytest.LogCaptureFixture) -> None:
    """Not even if no device is attached in the region."""
    told = host.tables.kernel_adopted
    host.tables.kernel_adopted = None
    host.run(lambda: host.tables.detach(DEVICE))
    host.tables.kernel_adopted = told
    with pytest.raises(BusyError):
        host.run(lambda: host.fs.unlink(IOMMU_INO, b"dom-0"))
    assert "iommu/dom-0: in use: dmar0 walks it for device 0000:00:05.0" in caplog.text
    host.run(lambda: host.tables.detach(OTHER))
    host.run(lambda: host.fs.unlink(IOMMU_INO, b"root-pgtables"))
    with pytest.raises(BusyError):
        host.run(lambda: host.fs.unlink(IOMMU_INO, b"dom-0"))
    host.tables.kernel_adopted = Told()
    host.run(lambda: host.fs.unlink(IOMMU_INO, b"dom-0"))
