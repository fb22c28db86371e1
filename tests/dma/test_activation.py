"""Tables of a file system in force in QEMU's unit: changes are obeyed when they return.

QEMU runs without a guest and has the region's file as its memory. What sysfs and ACPI would say is
made here; the unit's registers are reached through qtest.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from pkernfs.dma.mount import tables_of
from pkernfs.errors import (
    BusyError,
    InvalidError,
    NotFoundError,
    NotSupportedError,
    PermissionDeniedError,
    PkernfsError,
    ReadOnlyError,
    UnitError,
)
from pkernfs.host.dmar import ENDPOINT
from pkernfs.iommu.config import Config
from pkernfs.iommu.context_walk import Mode
from pkernfs.layout import IOMMU_INO, PAGE, ROOT_INO
from pkernfs.quantities import Iova, SourceId
from pkernfs.region.region import Region
from pkernfs.vtd.registers import Command, Step, StepKind
from support.dmar_tables import add_device, config, drhd, rmrr, scope
from support.kernel_queue import Kernel
from support.mounting import Mounted, run_pkernfs
from support.qtest_machine import MIB
from support.qtest_window import UNIT, QtestWindow
from support.unit_rig import (
    AT,
    BUS_MASTER,
    FIRST,
    SCRATCH,
    SECOND,
    Rig,
)

pytestmark = pytest.mark.vm


@pytest.fixture(params=[Mode.LEGACY, Mode.SCALABLE], ids=["legacy", "scalable"])
def rig(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Rig]:
    made = Rig(tmp_path, request.param)
    yield made
    made.close()


@pytest.fixture
def legacy(tmp_path: Path) -> Iterator[Rig]:
    made = Rig(tmp_path, Mode.LEGACY)
    yield made
    made.close()


def test_changes_are_obeyed_when_they_return(rig: Rig) -> None:
    tables = tables_of(rig.fs)
    ram, inside = rig.file("ram", 8 * MIB), Iova(AT + 5 * MIB)
    tables.map_file(0, AT, ram, 0, None, 3)
    rig.activate()
    rig.put(ram, 5 * MIB, 0x55)
    assert rig.load(FIRST, inside) == 0x55
    tables.unmap(0, inside, PAGE)  # splits a superpage that is cached
    assert rig.load(FIRST, inside) is None
    rig.put(ram, 5 * MIB + PAGE, 0x66)
    assert rig.load(FIRST, Iova(inside + PAGE)) == 0x66
    tables.map_file(0, inside, ram, 5 * MIB, PAGE, 3)  # makes it one again
    assert rig.load(FIRST, inside) == 0x55
    tables.unmap(0, AT, 8 * MIB)
    assert rig.load(FIRST, inside) is None
    rig.fs.unlink(ROOT_INO, b"ram")
    # What was aside while the unit might have had it is free again: all but the scratch's tables.
    assert tables.domain(0).used_pages == 4
    assert tables.domain(0).free_pages == 512 - 4


def test_devices_come_and_go(rig: Rig) -> None:
    tables = tables_of(rig.fs)
    rig.activate()
    first = rig.file("first", PAGE)
    rig.put(first, 0, 0x11)
    tables.map_file(0, AT, first, 0, None, 3)
    assert rig.load(FIRST, AT) == 0x11
    assert rig.load(SECOND, AT) is None
    tables.detach(SECOND)
    assert rig.load(SECOND, SCRATCH) is None
    tables.unmap(0, SCRATCH, PAGE)
    tables.map_file(0, SCRATCH, rig.fs.find(ROOT_INO, b"scratch-1"), 0, None, 3)
    tables.attach(0, SECOND)
    assert rig.load(SECOND, AT) == 0x11
    tables.detach(SECOND)
    tables.detach(FIRST)  # the context table goes, and a root entry with it
    assert rig.load(FIRST, AT) is None
    assert rig.load(SECOND, AT) is None


@pytest.mark.parametrize("laps", [0, 128, 129])
def test_with_a_kernel_that_remaps_interrupts(rig: Rig, laps: int) -> None:
    """Its queue is in force before, meanwhile and afterwards, and it goes on in it."""
    queue = rig.fs.extents(rig.file("queue", 2 * MIB))[0].region_offset
    kernel = Kernel(rig.region, rig.window, queue, wide=rig.mode is Mode.SCALABLE)
    kernel.submit()
    for _ in range(laps):
        kernel.submit()
    ram = rig.file("ram", 2 * MIB)
    rig.put(ram, 0, 0x77)
    tables = tables_of(rig.fs)
    tables.map_file(0, AT, ram, 0, None, 3)
    rig.activate()
    assert rig.unit().state().queue_on
    assert rig.load(FIRST, AT) == 0x77
    kernel.submit()
    tables.unmap(0, AT, 2 * MIB)
    assert rig.load(FIRST, AT) is None
    kernel.submit()
    tables.detach(FIRST)
    kernel.submit()
    rig.activation().deactivate([], forced=True)
    kernel.submit()
    assert rig.unit().state().queue_on


def test_the_next_daemon_finds_them_in_force(rig: Rig) -> None:
    ram = rig.file("ram", 2 * MIB)
    rig.put(ram, 0, 0x88)
    tables_of(rig.fs).map_file(0, AT, ram, 0, None, 3)
    rig.activate()
    assert rig.load(FIRST, AT) == 0x88
    # Killed after the commit of an unmap, before the unit was told.
    tables_of(rig.fs).domain(0).unmap(AT, 2 * MIB)
    assert rig.load(FIRST, AT) == 0x88, "nothing was cached: nothing is shown"
    rig.remount()
    assert tables_of(rig.fs).active_units is None
    rig.activation().resume_units()
    assert tables_of(rig.fs).active_units is not None
    assert rig.load(FIRST, AT) is None
    tables_of(rig.fs).map_file(0, AT, rig.fs.find(ROOT_INO, b"ram"), 0, None, 3)
    assert rig.load(FIRST, AT) == 0x88
    tables_of(rig.fs).unmap(0, AT, 2 * MIB)
    assert rig.load(FIRST, AT) is None


def test_a_mount_of_which_nothing_is_in_force(rig: Rig) -> None:
    rig.remount()
    rig.activation().resume_units()
    assert tables_of(rig.fs).active_units is None
    with pytest.raises(NotFoundError, match="no unit walks the tables"):
        rig.activation().deactivate([], forced=True)


def test_off_again(rig: Rig) -> None:
    rig.activate()
    rig.activate()  # once more is as good
    with pytest.raises(BusyError, match=r"0000:00:05.0: attached, and a bus master"):
        rig.activation().deactivate([], forced=False)
    with pytest.raises(NotFoundError, match="dmar7: does not walk them: dmar0 does"):
        rig.activation().deactivate(["dmar7"], forced=True)
    for name in ("0000:00:05.0", "0000:00:06.0"):
        Path(rig.host.path(f"sys/bus/pci/devices/{name}/config")).write_bytes(config())
    assert rig.activation().deactivate(["all"], forced=False) == ["dmar0"]
    assert not rig.unit().state().translating
    assert tables_of(rig.fs).active_units is None
    rig.activate()
    assert rig.load(FIRST, AT) is None


def test_what_a_walking_unit_keeps_in_place(legacy: Rig) -> None:
    tables = tables_of(legacy.fs)
    legacy.activate()
    for device in (FIRST, SECOND):
        tables.detach(device)
    with pytest.raises(BusyError):
        legacy.fs.unlink(IOMMU_INO, b"root-pgtables")
    with pytest.raises(BusyError, match="dmar0 walks it"):
        tables.create_root(Config(Mode.SCALABLE, 4))
    grown = legacy.fs.find(IOMMU_INO, b"dom-0")
    legacy.fs.setattr(grown, size=4 * MIB)
    tables.attach(0, FIRST)
    ram = legacy.file("ram", PAGE)
    legacy.put(ram, 0, 9)
    tables.map_file(0, AT, ram, 0, None, 3)
    assert legacy.load(FIRST, AT) == 9
    tables.unmap(0, AT, PAGE)
    assert legacy.load(FIRST, AT) is None


def test_devices_that_must_not_be_attached_meanwhile(legacy: Rig) -> None:
    legacy.activate()
    root = Path(legacy.host.root)
    add_device(root, "0000:00:1c.0", config(kind=6, express=4))
    add_device(root, "0000:00:1c.0/0000:01:00.0", config(express=0))
    with pytest.raises(InvalidError, match=r"0000:01:00.0: below dmar1, which does not walk"):
        tables_of(legacy.fs).attach(0, SourceId(0x100))
    with pytest.raises(InvalidError, match=r"0000:00:07.0: there is none"):
        tables_of(legacy.fs).attach(0, SourceId(0x38))


def test_a_unit_that_does_not_obey_ends_all_changes(legacy: Rig) -> None:
    """What it may still reach is not used for anything else."""

    class Deaf(QtestWindow):
        deaf = False

        def _do(self, step: Step, memory: Region | None, seconds: float) -> bool:
            if self.deaf and step.kind is StepKind.WAIT_64:
                return False
            return super()._do(step, memory, seconds)

    window = Deaf(legacy.machine)
    ram = legacy.file("ram", 2 * MIB)
    tables_of(legacy.fs).map_file(0, AT, ram, 0, None, 3)
    legacy.activation(window).activate([], block_others=False)
    window.deaf = True
    with pytest.raises(UnitError, match=r"dmar0: invalidation .*: the unit does not end it"):
        tables_of(legacy.fs).unmap(0, AT, 2 * MIB)
    assert legacy.fs.read_only
    with pytest.raises(ReadOnlyError):
        legacy.fs.unlink(ROOT_INO, b"ram")


def test_a_unit_that_caches_what_is_absent_is_told_of_every_change(tmp_path: Path) -> None:
    rig = Rig(tmp_path, Mode.LEGACY, ",caching-mode=on")

    class Counting(QtestWindow):
        told = 0

        def _do(self, step: Step, memory: Region | None, seconds: float) -> bool:
            self.told += step.kind is StepKind.WRITE_64
            return super()._do(step, memory, seconds)

    try:
        window = Counting(rig.machine)
        rig.activation(window).activate([], block_others=False)
        ram = rig.file("ram", PAGE)
        rig.put(ram, 0, 5)
        before = window.told
        tables_of(rig.fs).map_file(0, AT, ram, 0, None, 3)
        assert window.told == before + 1  # the IOTLB, of one domain
        assert rig.load(FIRST, AT) == 5
        tables_of(rig.fs).detach(SECOND)
        before = window.told
        tables_of(rig.fs).attach(0, SECOND)
        assert window.told == before + 2  # context cache and IOTLB
        tables_of(rig.fs).unmap(0, AT, PAGE)
        assert rig.load(FIRST, AT) is None
    finally:
        rig.close()


@pytest.mark.fuse
def test_commands_on_a_mount_whose_memory_no_device_reaches() -> None:
    with Mounted(options="phys_base=0x100000000") as mounted:
        for command in (["activate"], ["activate", "--unit", "dmar0", "--cut-off"], ["deactivate"]):
            done = run_pkernfs("iommu", command[0], str(mounted.path), *command[1:])
            assert (done.returncode, done.stdout) == (1, "")
            assert done.stderr.count("\n") == 1
            expected = "no unit walks" if command == ["deactivate"] else "its addresses are not"
            assert expected in done.stderr


# ---------------------------------------------------------------------- refusals


def refused(rig: Rig, kind: type[PkernfsError], message: str, *names: str) -> None:
    """Activation is refused, and nothing was changed."""
    before = rig.unit().state()
    with pytest.raises(kind, match=message):
        rig.activation().activate(names, block_others=False)
    assert rig.unit().state() == before
    assert tables_of(rig.fs).active_units is None


def test_a_unit_that_the_kernels_driver_has(legacy: Rig) -> None:
    Path(legacy.host.path("sys/class/iommu/dmar0")).mkdir(parents=True)
    refused(legacy, BusyError, r"dmar0: this kernel's driver has it: boot with intel_iommu=off")


def test_a_unit_that_translates_for_somebody_else(legacy: Rig) -> None:
    window = legacy.window
    window.write64(0x20, 32 * MIB)
    for bit in (Command.SRTP.mask, Command.TE.mask):
        window.run([Step(StepKind.COMMAND, Command.OFFSET, bit)])
    refused(legacy, BusyError, "dmar0: translates already, by the tables at 0x2000000")


def test_a_region_without_addresses_of_its_own(legacy: Rig) -> None:
    legacy.region._backing.real_addresses = False
    refused(legacy, NotSupportedError, "SIZE!START, device-dax or on hugetlbfs")


def test_damaged_tables(legacy: Rig) -> None:
    at = legacy.fs.extents(legacy.fs.find(IOMMU_INO, b"dom-0"))[0].region_offset
    legacy.region.store_u64(at, 1 << 62 | 3)
    legacy.remount()
    refused(legacy, InvalidError, "iommu/dom-0: damaged: .*: run the check")


def test_no_table_of_units(legacy: Rig) -> None:
    os.unlink(legacy.host.path("sys/firmware/acpi/tables/DMAR"))
    refused(legacy, NotFoundError, "no DMAR table")


def test_units_that_are_not_there(legacy: Rig) -> None:
    refused(legacy, NotFoundError, "dmar5: no such unit: there is dmar0, dmar1", "dmar5")
    refused(legacy, PkernfsError, "dmar1: not here", "all")


def test_a_device_below_another_unit(legacy: Rig) -> None:
    refused(legacy, InvalidError, "0000:00:05.0: below dmar0, not dmar1: .*--unit all", "dmar1")


def test_a_device_that_is_not_there(legacy: Rig) -> None:
    tables_of(legacy.fs).attach(0, SourceId(0x38))
    refused(legacy, InvalidError, "0000:00:07.0: there is none")


def test_a_device_with_reserved_memory(legacy: Rig) -> None:
    legacy.write_table(
        drhd(UNIT, flags=1), rmrr(0x7000_0000, 0x7000_FFFF, scope(ENDPOINT, 0, (6, 0)))
    )
    refused(legacy, InvalidError, r"0000:00:06.0: .* 0x70000000-0x7000ffff .RMRR.")


def test_a_device_below_a_conventional_bridge(legacy: Rig) -> None:
    root = Path(legacy.host.root)
    add_device(root, "0000:00:1e.0", config(kind=6, express=7))
    add_device(root, "0000:00:1e.0/0000:02:01.0", config())
    tables_of(legacy.fs).attach(0, SourceId(0x208))
    refused(legacy, InvalidError, "0000:02:01.0: a bridge to conventional PCI")


@pytest.mark.parametrize(
    ("what", "message"), [("ats", "ATS is enabled"), ("pasid", "PASID is enabled")]
)
def test_a_device_with_requests_that_its_entry_knows_not(
    legacy: Rig, what: str, message: str
) -> None:
    data = config(express=0, ats=what == "ats", pasid=what == "pasid")
    Path(legacy.host.path("sys/bus/pci/devices/0000:00:05.0/config")).write_bytes(data)
    refused(legacy, InvalidError, message)


def test_devices_that_the_kernel_has_at_work(legacy: Rig) -> None:
    """They would lose their DMA; with --cut-off they do."""
    root = Path(legacy.host.root)
    add_device(root, "0000:00:02.0", config(command=BUS_MASTER), "ahci")
    add_device(root, "0000:00:03.0", config(), "idle")
    add_device(root, "0000:00:1c.0", config(command=BUS_MASTER, kind=6, express=4), "pcieport")
    add_device(root, "0000:00:1c.0/0000:01:00.0", config(command=BUS_MASTER, express=0), "nvme")
    refused(legacy, BusyError, r"not attached: 0000:00:02.0 \(ahci\): their DMA would fail")
    assert legacy.activation().activate([], block_others=True) == ["dmar0"]


def test_nothing_is_attached(legacy: Rig) -> None:
    for device in (FIRST, SECOND):
        tables_of(legacy.fs).detach(device)
    refused(legacy, InvalidError, "no device is attached: attach one, or say --unit")
    assert legacy.activation().activate(["dmar0"], block_others=False) == ["dmar0"]
    tables_of(legacy.fs).attach(0, FIRST)
    assert legacy.load(FIRST, SCRATCH) is not None


def test_memory_that_units_do_not_reach(legacy: Rig) -> None:
    legacy.write_table(drhd(UNIT, flags=1), width=29)
    refused(legacy, NotSupportedError, "memory up to 0x80000000, but it reaches 30 bits")


def test_another_mode_than_the_units(legacy: Rig) -> None:
    for device in (FIRST, SECOND):
        tables_of(legacy.fs).detach(device)
    tables_of(legacy.fs).create_root(Config(Mode.SCALABLE, 4))
    tables_of(legacy.fs).attach(0, FIRST)
    refused(legacy, NotSupportedError, r"dmar0: no scalable mode .ECAP.SMTS.")


def test_not_root(legacy: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    refused(legacy, PermissionDeniedError, "activate: the daemon is not root's")
