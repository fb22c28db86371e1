"""A kernel's live domain as one of a region, and QEMU's unit switched to it under a device at work.

QEMU runs without a guest. What a kernel would have in its own memory (root table, page tables, its
queue) is in a file of the region here: memory as good as any other to the unit, and to what reads
live tables.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from pkernfs.dma import snapshot
from pkernfs.dma.activation import Activation
from pkernfs.dma.mount import tables_of
from pkernfs.errors import (
    BusyError,
    InvalidError,
    NoSpaceError,
    NotFoundError,
    NotSupportedError,
    PermissionDeniedError,
    PkernfsError,
    UnitError,
)
from pkernfs.host.bars import Bar
from pkernfs.host.dmar import BRIDGE, ENDPOINT, Dmar, UnitStructure
from pkernfs.host.sysroot import Host
from pkernfs.iommu.config import Config, configure
from pkernfs.iommu.context_walk import Mode
from pkernfs.iommu.memory import Memory, store_words
from pkernfs.iommu.page_pool import Mapping
from pkernfs.iommu.page_table import PageTable
from pkernfs.iommu.root_tables import RootTables
from pkernfs.layout import BLOCK, IOMMU_INO, PAGE, ROOT_INO
from pkernfs.quantities import Iova, PhysAddr, RegionOff, RegionRun, SourceId
from pkernfs.region.region import Region
from pkernfs.units.discovery import FoundUnit
from pkernfs.units.kernel_tables import Shape
from pkernfs.units.mmio import MemoryWindow
from pkernfs.units.unit import QueueMemory, Unit
from pkernfs.vtd.invalidation import everything
from pkernfs.vtd.registers import STATUS, Command, RootTableAddress, Step, StepKind
from support.dmar_tables import add_device, config, drhd, rmrr, scope
from support.kernel_queue import Kernel
from support.mounting import Mounted, run_pkernfs
from support.qtest_machine import MIB
from support.qtest_window import UNIT, QtestWindow
from support.table_files import Host as TableHost
from support.table_files import drain
from support.unit_rig import AT, BUS_MASTER, FIRST, SCRATCH, SECOND, Rig

pytestmark = pytest.mark.vm

THIRD = SourceId(0x100)  # 01:00.0, below another unit
IDS = {FIRST: 7, SECOND: 8}
MARK = Iova(AT + 5 * MIB)  # where a device finds the word that is in ram at 5 MiB
OUTSIDE = PhysAddr(3 << 30)  # no memory of the region


class Driven(Rig):
    """A kernel drives the unit: two devices have a domain each, which maps their scratch page."""

    def __init__(self, path: Path, mode: Mode, options: str = "") -> None:
        super().__init__(path, mode, options)
        for number, device in enumerate((FIRST, SECOND)):
            tables_of(self.fs).detach(device)
            tables_of(self.fs).unmap(number, SCRATCH, PAGE)
        self.place = self.fs.extents(self.file("kernel", 4 * MIB))[0].region_offset
        memory = Memory(self.region, [RegionRun(self.place, 64 * PAGE)])
        configure(memory, store_words(self.region), Config(mode, 4))
        self.root = RootTables(memory, store_words(self.region))
        self.domains: dict[SourceId, PageTable] = {}
        for number, device in enumerate((FIRST, SECOND)):
            self.domains[device] = self.domain(number + 1)
            self.map(device, SCRATCH, f"scratch-{number}", PAGE)
            self.root.attach(device, self.domains[device].root, IDS[device])
        self.unit().enable_translation(self.root.root, mode, self.queue())
        Path(self.host.path("sys/class/iommu/dmar0")).mkdir(parents=True)
        self.ram = self.file("ram", 8 * MIB)
        self.put(self.ram, 5 * MIB, 0x55)
        self.second_window: MemoryWindow | None = None

    def domain(self, number: int) -> PageTable:
        memory = Memory(
            self.region, [RegionRun(RegionOff(self.place + number * 64 * PAGE), 64 * PAGE)]
        )
        return PageTable(memory, store_words(self.region))

    def queue(self) -> QueueMemory:
        at = self.place + 3 * MIB
        return QueueMemory(self.region, RegionOff(at), PhysAddr(at), 4 * PAGE)

    def physical(self, name: str, offset: int = 0) -> PhysAddr:
        ino = self.fs.find(ROOT_INO, name.encode())
        ((_low, _length, at),) = list(self.fs.pieces(ino, offset, 1))
        return PhysAddr(at)

    def map(
        self, device: SourceId, iova: Iova, name: str, length: int, offset: int = 0, perm: int = 3
    ) -> None:
        self.domains[device].map(iova, self.physical(name, offset), length, perm)

    def tell(self) -> None:
        """As a kernel does after an unmap."""
        self.unit().invalidate(everything(scalable=self.mode is Mode.SCALABLE), self.queue())

    def activation(
        self, window: QtestWindow | None = None, changing: QtestWindow | None = None
    ) -> Activation:
        def find(host: Host, dmar: Dmar) -> list[FoundUnit]:
            found = []
            for at, structure in enumerate(dmar.units):
                driven = structure.name in host.list("sys/class/iommu")
                unit = self._unit(at, window or self.window)
                found.append(FoundUnit(structure, driven, unit, "" if unit else "not here"))
            return found

        def reach(_host: Host, structure: UnitStructure) -> Unit:
            unit = self._unit(structure.number, changing or window or self.window)
            assert unit is not None
            return unit

        return Activation(self.fs, self.host, find, reach)

    def _unit(self, number: int, window: QtestWindow) -> Unit | None:
        if not number:
            return Unit("dmar0", window, UNIT)
        return Unit("dmar1", self.second_window) if self.second_window is not None else None

    def snapshot(self, device: SourceId = FIRST, number: int = 0) -> int:
        tables = tables_of(self.fs)
        kept = {d.source_id for d in tables.devices()} - tables.non_persistent()
        with self.activation().kernel_units() as kernel:
            reading = snapshot.read(kernel, device, kept)
        plan = drain(snapshot.plan(self.fs, self.host, reading))
        return self.fs.run(lambda: snapshot.apply(self.fs, plan, number))

    def mappings(self, number: int = 0) -> list[tuple[int, int, int, int]]:
        return [(*m,) for m in tables_of(self.fs).domain(number).mappings()]

    def state(self) -> object:
        """All that a refused snapshot must leave as it is."""
        tables = tables_of(self.fs)
        attached = [(d.source_id, d.table, d.domain_id) for d in tables.devices()]
        return [self.mappings(n) for n in tables.domains], attached, tables.bars()


@pytest.fixture(params=[Mode.LEGACY, Mode.SCALABLE], ids=["legacy", "scalable"])
def rig(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Driven]:
    made = Driven(tmp_path, request.param)
    yield made
    made.close()


@pytest.fixture
def legacy(tmp_path: Path) -> Iterator[Driven]:
    made = Driven(tmp_path, Mode.LEGACY)
    yield made
    made.close()


# ---------------------------------------------------------------------- snapshot and switch


def test_a_snapshot_and_the_switch_to_it(rig: Driven) -> None:
    rig.map(FIRST, AT, "ram", 8 * MIB)
    assert rig.load(FIRST, MARK) == 0x55
    assert rig.snapshot() == IDS[FIRST]
    assert rig.mappings() == [tuple(m) for m in rig.domains[FIRST].mappings()]
    [entry] = tables_of(rig.fs).devices()
    assert (entry.source_id, entry.domain_id) == (FIRST, IDS[FIRST])
    assert rig.unit().walks(rig.root.root), "a snapshot changes no unit"
    rig.activation().check_kernel_tables()
    assert rig.activation().switch_units() == ["dmar0"]
    assert rig.unit().walks(tables_of(rig.fs).need_root().root)
    assert rig.load(FIRST, MARK) == 0x55
    assert rig.load(SECOND, SCRATCH) is None, "not attached: cut off"
    rig.activation().check_kernel_tables()
    assert rig.activation().switch_units() == []


class Watching(QtestWindow):
    """Before and after each step the device does DMA, and translation is on."""

    rig: Driven
    steps = 0

    def _do(self, step: Step, memory: Region | None, seconds: float) -> bool:
        self.look()
        done = super()._do(step, memory, seconds)
        self.look()
        return done

    def look(self) -> None:
        self.steps += 1
        assert self.rig.unit().state().translating
        word = 0x1000 + self.steps
        self.rig.put(self.rig.ram, 5 * MIB, word)
        assert self.rig.load(FIRST, MARK) == word


@pytest.mark.parametrize("laps", [0, 128, 129])
def test_the_device_is_at_work_all_the_time(rig: Driven, laps: int) -> None:
    """With the kernel's queue in force, wherever its tail is; the kernel goes on in it."""
    kernel = Kernel(rig.region, rig.window, rig.place + 2 * MIB, wide=rig.mode is Mode.SCALABLE)
    for _ in range(laps + 1):
        kernel.submit()
    rig.map(FIRST, AT, "ram", 8 * MIB)
    rig.snapshot()
    window = Watching(rig.machine)
    window.rig = rig
    assert rig.activation(window).switch_units() == ["dmar0"]
    assert window.steps > 80
    kernel.submit()
    assert rig.unit().state().queue_on
    assert rig.load(FIRST, MARK) == 0x1000 + window.steps


@pytest.mark.parametrize("deaf_to", [StepKind.WAIT_32, StepKind.WAIT_64, StepKind.WAIT_MEMORY])
def test_a_unit_that_does_not_obey_keeps_the_kernels_root(rig: Driven, deaf_to: StepKind) -> None:
    class Deaf(QtestWindow):
        left = 1
        armed = True  # or with the new root

        def _do(self, step: Step, memory: Region | None, seconds: float) -> bool:
            done = super()._do(step, memory, seconds)
            self.armed = self.armed or step[:2] == (StepKind.WRITE_64, RootTableAddress.OFFSET)
            if step.kind is deaf_to and self.left and self.armed:
                self.left -= deaf_to is not StepKind.WAIT_MEMORY  # that is tried three times
                return False
            return done

    rig.map(FIRST, AT, "ram", 8 * MIB)
    rig.snapshot()
    by_queue = rig.unit().needs_queue(rig.mode)
    if by_queue is (deaf_to is StepKind.WAIT_64):
        return  # no such step
    if deaf_to is not StepKind.WAIT_32:  # a loan of the queue is tried again
        with pytest.raises(UnitError, match="dmar0: "):
            rig.activation(changing=Deaf(rig.machine)).switch_units()  # while it rehearses
    window = Deaf(rig.machine)
    window.armed = False
    with pytest.raises(UnitError, match="dmar0: "):
        rig.activation(changing=window).switch_units()
    assert window.armed
    assert rig.unit().walks(rig.root.root)
    assert rig.load(FIRST, MARK) == 0x55
    assert rig.load(SECOND, SCRATCH) is not None
    assert rig.activation().switch_units() == ["dmar0"]


def test_one_of_two_units_does_not_obey(legacy: Driven) -> None:
    """The other one gets the kernel's root back."""
    root = Path(legacy.host.root)
    add_device(root, "0000:00:1c.0", config(kind=6, express=4))
    add_device(root, "0000:00:1c.0/0000:01:00.0", config(express=0))
    legacy.write_table(drhd(UNIT, flags=1), drhd(UNIT + PAGE, scope(BRIDGE, 0, (0x1C, 0))))
    Path(legacy.host.path("sys/class/iommu/dmar1")).mkdir(parents=True)
    registers = bytearray(PAGE)
    for at, value in (
        (0, 0x10),
        (8, legacy.unit().capabilities.cap),
        (16, legacy.unit().capabilities.ecap),
        (STATUS, Command.TE.mask | Command.SRTP.mask),
        (0x20, legacy.root.root),
    ):
        registers[at : at + 8] = value.to_bytes(8, "little")
    legacy.second_window = MemoryWindow(registers)
    legacy.root.attach(THIRD, legacy.domains[FIRST].root, IDS[FIRST])
    for device in (FIRST, THIRD):
        legacy.snapshot(device)
    with pytest.raises(UnitError, match="dmar1: invalidation"):
        legacy.activation().switch_units()
    assert legacy.unit().walks(legacy.root.root)
    assert int.from_bytes(registers[0x20:0x28], "little") == legacy.root.root
    assert legacy.load(FIRST, SCRATCH) is not None


def test_back_to_the_kernels_root(rig: Driven) -> None:
    """When what should have come after the switch did not."""
    rig.map(FIRST, AT, "ram", 8 * MIB)
    rig.snapshot()
    activation = rig.activation()
    activation.switch_units()
    assert rig.load(SECOND, SCRATCH) is None
    activation.switch_back()
    assert rig.unit().walks(rig.root.root)
    assert rig.load(FIRST, MARK) == 0x55
    assert rig.load(SECOND, SCRATCH) is not None
    activation.switch_back()  # nothing is left to do


def test_a_unit_that_never_obeys_again_is_told_of(legacy: Driven) -> None:
    """It may be walking the region's root still: then nothing of the tables changes any more."""

    class Dead(QtestWindow):
        switched = False

        def _do(self, step: Step, memory: Region | None, seconds: float) -> bool:
            done = super()._do(step, memory, seconds)
            self.switched = self.switched or step[:2] == (
                StepKind.WRITE_64,
                RootTableAddress.OFFSET,
            )
            return done and not (self.switched and step.kind is StepKind.WAIT_32)

    legacy.map(FIRST, AT, "ram", 8 * MIB)
    legacy.snapshot()
    assert tables_of(legacy.fs).kernel_adopted is None
    reason = "dmar0: .*; and the root table before is not in force: dmar0: "
    with pytest.raises(UnitError, match=reason):
        legacy.activation(changing=Dead(legacy.machine)).switch_units()
    assert tables_of(legacy.fs).kernel_adopted is not None


def test_units_that_have_no_root_to_replace(legacy: Driven) -> None:
    unit, queue = legacy.unit(), None
    with pytest.raises(UnitError, match="translates in another mode than scalable"):
        unit.replace_root(legacy.root.root, Mode.SCALABLE, queue)
    unit.disable_translation(Mode.LEGACY, queue)
    with pytest.raises(UnitError, match="does not translate"):
        unit.replace_root(legacy.root.root, Mode.LEGACY, queue)
    assert not unit.state().translating


# ---------------------------------------------------------------------- again, and with others


def test_a_snapshot_follows_what_the_vmm_does(rig: Driven) -> None:
    rig.map(FIRST, AT, "ram", 2 * MIB)
    rig.snapshot()
    rig.map(FIRST, Iova(AT + 2 * MIB), "ram", 6 * MIB, 2 * MIB)
    with pytest.raises(InvalidError, match=r"0000:00:05.0: its live domain maps iova 0x40200000 "):
        rig.activation().check_kernel_tables()
    rig.snapshot()
    rig.activation().check_kernel_tables()
    rig.domains[FIRST].unmap(AT, 4 * MIB)
    with pytest.raises(InvalidError, match=r"dom-0 maps iova 0x40000000 .*snapshot 0000:00:05.0 "):
        rig.activation().switch_units()
    assert rig.unit().walks(rig.root.root)
    rig.snapshot()
    rig.domains[FIRST].protect(Iova(AT + 4 * MIB), PAGE, 1)
    with pytest.raises(InvalidError, match=r"iova 0x40400000 .0x1000 bytes, r. to"):
        rig.activation().check_kernel_tables()
    rig.snapshot()
    assert rig.mappings() == [tuple(m) for m in rig.domains[FIRST].mappings()]
    rig.tell()
    rig.activation().switch_units()
    assert rig.load(FIRST, MARK) == 0x55
    assert rig.load(FIRST, AT) is None


def test_devices_that_share_a_live_domain_share_one_here(rig: Driven) -> None:
    rig.root.detach(SECOND)
    rig.root.attach(SECOND, rig.domains[FIRST].root, IDS[FIRST])
    rig.tell()
    assert [rig.snapshot(d) for d in (FIRST, SECOND)] == [IDS[FIRST]] * 2
    assert [d.table for d in tables_of(rig.fs).devices()] == [tables_of(rig.fs).domain(0).root] * 2
    rig.activation().switch_units()
    assert rig.unit().faults() == []


def test_ids_that_are_taken(rig: Driven) -> None:
    """Here by another domain, or by the kernel for other tables: then one that nobody has."""
    tables = tables_of(rig.fs)
    tables.attach(1, SECOND, IDS[FIRST])
    number = rig.snapshot()
    assert number not in IDS.values()
    tables.detach(SECOND)
    tables.detach(FIRST)
    assert rig.snapshot() == IDS[FIRST]
    # The kernel gives ids anew.
    for device in (FIRST, SECOND):
        rig.root.detach(device)
    rig.root.attach(SECOND, rig.domains[SECOND].root, IDS[FIRST])
    rig.root.attach(FIRST, rig.domains[FIRST].root, 9)
    with pytest.raises(InvalidError, match=r"0000:00:05.0: .* domain id 7, .* to 0000:00:06.0"):
        rig.activation().check_kernel_tables()
    assert rig.snapshot() == 9
    rig.activation().check_kernel_tables()


def test_bars_of_other_devices(rig: Driven) -> None:
    resource = Path(rig.host.path("sys/bus/pci/devices/0000:00:06.0/resource"))
    resource.write_text(
        "0x00000000fe000000 0x00000000fe00ffff 0x0000000000040200\n" + "0 0 0\n" * 5
    )
    rig.domains[FIRST].map(AT, PhysAddr(0xFE00_4000), 2 * PAGE, 3)
    rig.snapshot()
    assert tables_of(rig.fs).bars() == [Bar(SECOND, 0, PhysAddr(0xFE00_0000), 0x10000)]
    assert rig.mappings()[0] == (AT, 0xFE00_4000, 2 * PAGE, 3)
    rig.activation().check_kernel_tables()
    rig.domains[FIRST].unmap(AT, 2 * PAGE)
    rig.snapshot()
    assert tables_of(rig.fs).bars() == []


def test_memory_of_a_file_that_is_in_the_snapshot_stays(rig: Driven) -> None:
    rig.map(FIRST, AT, "ram", 8 * MIB)
    rig.snapshot()
    with pytest.raises(BusyError):
        rig.fs.unlink(ROOT_INO, b"ram")
    rig.domains[FIRST].unmap(AT, 8 * MIB)
    rig.snapshot()
    rig.fs.unlink(ROOT_INO, b"ram")


def test_a_kernels_domain_that_maps_segments(pooled: TableHost) -> None:
    """What it maps is found in the files that have them; other memory of the pool is nobody's."""
    guest, flat = pooled.file_of("guest", 6 * MIB), pooled.file_of("flat", MIB)
    pooled.dom(0)
    pieces = pooled.fs.segments.of(pooled.fs.inode(guest)).pieces
    mappings = [
        Mapping(AT, pieces[0].start, 2 * MIB, 3),
        Mapping(Iova(AT + 2 * MIB), pieces[1].start, 2 * MIB, 3),
        Mapping(Iova(1 << 33), pooled.physical(flat), MIB, 1),
    ]
    reading = snapshot.Reading(
        FIRST, Shape(Mode.LEGACY, 4), 7, PhysAddr(0x123000), mappings,
        same=frozenset([FIRST]), taken=frozenset([3]), domain_ids=256, largest=3,
    )  # fmt: skip
    nowhere = Host("/nowhere")
    plan = drain(snapshot.plan(pooled.fs, nowhere, reading))
    assert [(p.ino, p.offset, p.length) for p in plan.pieces] == [
        (guest, 0, 2 * MIB), (guest, 2 * MIB, 2 * MIB), (flat, 0, MIB)
    ]  # fmt: skip
    pooled.run(lambda: snapshot.apply(pooled.fs, plan, 0))
    assert pooled.mappings(0) == [tuple(m) for m in mappings]
    pooled.assert_check_clean()
    with pytest.raises(BusyError):
        pooled.fs.unlink(ROOT_INO, b"guest")
    pooled.run(lambda: pooled.fs.setattr(guest, size=4 * MIB))  # the end of it is not mapped
    gone = reading._replace(mappings=[Mapping(AT, pieces[2].start, 2 * MIB, 3)])
    with pytest.raises(InvalidError, match="that does not survive: it is no file's of this mount"):
        drain(snapshot.plan(pooled.fs, nowhere, gone))
    pooled.run(lambda: pooled.fs.setattr(guest, size=6 * MIB))
    late = reading._replace(mappings=[Mapping(AT, pooled.physical(guest, 4 * MIB), 2 * MIB, 3)])
    plan = drain(snapshot.plan(pooled.fs, nowhere, late))
    pooled.run(lambda: pooled.fs.setattr(guest, size=4 * MIB))
    with pytest.raises(BusyError, match="it has changed meanwhile"):
        pooled.run(lambda: snapshot.apply(pooled.fs, plan, 0))
    tables_of(pooled.fs).detach(FIRST)


def test_root_pgtables_is_made_like_the_live_tables(rig: Driven) -> None:
    rig.fs.unlink(IOMMU_INO, b"root-pgtables")
    rig.snapshot()
    assert tables_of(rig.fs).config[:2] == (rig.mode, 4)
    rig.activation().switch_units()


def test_a_kernel_that_has_adopted_the_tables(rig: Driven) -> None:
    """As in kdump mode: root and context tables are the kernel's, and page tables the region's."""
    rig.snapshot()
    table = tables_of(rig.fs).domain(0)
    rig.root.detach(FIRST)
    rig.root.attach(FIRST, table.root, IDS[FIRST])
    rig.activation().check_kernel_tables()
    before = rig.state()
    assert rig.snapshot() == IDS[FIRST]
    with pytest.raises(BusyError, match="its live tables are those of dom-0: attach it there"):
        rig.snapshot(FIRST, 1)
    assert rig.state() == before
    rig.activation().switch_units()


def test_a_device_that_does_not_persist_is_not_looked_at(rig: Driven) -> None:
    rig.snapshot()
    tables_of(rig.fs).persist(FIRST, False)
    rig.map(FIRST, AT, "ram", 2 * MIB)
    rig.activation().check_kernel_tables()
    with pytest.raises(BusyError, match=r"0000:00:05.0: attached, and not to persist: hand over"):
        rig.activation().switch_units()
    tables_of(rig.fs).persist(FIRST, True)
    with pytest.raises(InvalidError, match="again"):
        rig.activation().check_kernel_tables()


def test_a_frozen_file_system_can_be_switched(rig: Driven) -> None:
    rig.snapshot()
    rig.fs.freeze()
    rig.activation().switch_units()
    rig.fs.thaw()
    assert rig.load(FIRST, SCRATCH) is not None


@pytest.mark.fuse
def test_the_command_on_a_mount_whose_memory_no_device_reaches() -> None:
    with Mounted(options="phys_base=0x100000000") as mounted:
        domain = mounted.path / "iommu/dom-0"
        domain.touch()
        os.truncate(domain, BLOCK)
        for words, expected in (
            (("0000:00:05.0", str(domain)), "its addresses are not those of memory that devices"),
            (("0001:00:05.0", str(domain)), "only PCI segment 0000 is supported"),
            (("nothing", str(domain)), "not a device's address"),
            (("0000:00:05.0", str(mounted.path / "iommu/dom-1")), "No such file or directory"),
            (("0000:00:05.0", str(mounted.path / "guest-ram")), "not a domain"),
        ):
            done = run_pkernfs("iommu", "snapshot", *words)
            assert (done.returncode, done.stdout) == (1, "")
            assert done.stderr.count("\n") == 1
            assert expected in done.stderr


# ---------------------------------------------------------------------- refusals


def refused(
    rig: Driven,
    kind: type[PkernfsError],
    message: str,
    device: SourceId = FIRST,
    number: int = 0,
) -> None:
    """A snapshot is refused in one line, and nothing was changed."""
    before = rig.state()
    with pytest.raises(kind, match=message) as failure:
        rig.snapshot(device, number)
    assert "\n" not in str(failure.value)
    assert rig.state() == before


def test_memory_outside_the_region(rig: Driven) -> None:
    rig.domains[FIRST].map(AT, OUTSIDE, 4 * PAGE, 3)
    message = r"0000:00:05.0: iova 0x40000000 leads to memory at 0xc0000000 that does not survive"
    refused(rig, InvalidError, message)
    rig.domains[FIRST].unmap(AT, 4 * PAGE)
    rig.snapshot()
    rig.domains[FIRST].map(AT, OUTSIDE, 4 * PAGE, 3)
    refused(rig, InvalidError, message)


def test_memory_of_the_region_that_is_no_live_files(rig: Driven) -> None:
    at = rig.physical("ram")
    rig.map(FIRST, AT, "ram", 8 * MIB)
    rig.fs.setattr(rig.ram, size=6 * MIB)
    refused(rig, InvalidError, f"iova {AT + 6 * MIB:#x} leads to memory at {at + 6 * MIB:#x}")
    rig.fs.unlink(ROOT_INO, b"ram")
    refused(rig, InvalidError, f"iova {AT:#x} leads to memory at {at:#x} that does not survive")


def test_memory_of_a_table_file(rig: Driven) -> None:
    at = tables_of(rig.fs).domain(1).root
    rig.domains[FIRST].map(AT, at, PAGE, 3)
    refused(rig, InvalidError, f"leads to memory at {at:#x} that does not survive")


def test_a_file_that_changes_meanwhile(rig: Driven) -> None:
    rig.map(FIRST, AT, "ram", 8 * MIB)
    with rig.activation().kernel_units() as kernel:
        reading = snapshot.read(kernel, FIRST, set())
    plan = drain(snapshot.plan(rig.fs, rig.host, reading))
    rig.fs.setattr(rig.ram, size=4 * MIB)
    before = rig.state()
    for _ in range(2):
        with pytest.raises(BusyError, match=r"it has changed meanwhile: .* try again"):
            rig.fs.run(partial(snapshot.apply, rig.fs, plan, 0))
        if rig.fs.find(ROOT_INO, b"ram"):
            rig.fs.unlink(ROOT_INO, b"ram")
    assert rig.state() == before


def test_domains_that_are_not_there_or_taken(rig: Driven) -> None:
    refused(rig, NotFoundError, "dom-9: no such domain", FIRST, 9)
    rig.fs.create(IOMMU_INO, b"dom-3", 0o100600, 0, 0)
    refused(rig, InvalidError, "dom-3: it was never sized", FIRST, 3)
    rig.snapshot()
    refused(rig, BusyError, "0000:00:05.0: attached to another domain", FIRST, 1)
    refused(rig, BusyError, "dom-0: device 0000:00:05.0 is attached, which has another", SECOND)


def test_devices_that_are_not_to_depend_on_tables(legacy: Driven) -> None:
    refused(legacy, NotFoundError, "0000:00:07.0: no such device", SourceId(0x38))
    place = Path(legacy.host.path("sys/bus/pci/devices/0000:00:05.0/config"))
    place.write_bytes(config(express=0, ats=True))
    refused(legacy, InvalidError, "ATS is enabled")
    place.write_bytes(config(express=0, pasid=True))
    refused(legacy, InvalidError, "PASID is enabled")
    place.write_bytes(config(command=BUS_MASTER))
    legacy.write_table(
        drhd(UNIT, flags=1), rmrr(0x7000_0000, 0x7000_FFFF, scope(ENDPOINT, 0, (5, 0)))
    )
    refused(legacy, InvalidError, "RMRR")
    legacy.write_table(drhd(UNIT, flags=1))
    root = Path(legacy.host.root)
    add_device(root, "0000:00:1e.0", config(kind=6, express=7))
    add_device(root, "0000:00:1e.0/0000:02:01.0", config())
    refused(legacy, InvalidError, "0000:02:01.0: a bridge to conventional PCI", SourceId(0x208))


def test_a_device_without_a_live_domain(rig: Driven) -> None:
    rig.root.detach(FIRST)
    refused(rig, NotFoundError, r"0000:00:05.0: no live domain in dmar0: bind it to vfio-pci")


def test_a_device_that_is_passed_through(legacy: Driven) -> None:
    [entry, _] = legacy.root.devices()
    at = legacy.root.memory.offset(entry.where, 8)
    assert at is not None
    legacy.region.store_u64(at, entry.context_words[0] | 2 << 2)
    refused(legacy, NotSupportedError, r"0000:00:05.0: its requests pass through untranslated")


def test_a_device_whose_requests_have_a_second_name(legacy: Driven) -> None:
    """The kernel has an entry for each; what comes under the other one would fault."""
    legacy.map(FIRST, AT, "ram", 8 * MIB)
    legacy.snapshot()
    alias = SourceId(0x1FF)
    legacy.root.attach(alias, legacy.domains[FIRST].root, IDS[FIRST])
    refused(legacy, InvalidError, r"an entry like its own for 0000:01:1f\.7, which is no device")
    with pytest.raises(InvalidError, match="an alias in requests"):
        legacy.activation().switch_units()
    legacy.root.detach(alias)
    assert legacy.activation().switch_units() == ["dmar0"]


def test_a_group_with_a_device_that_is_not_attached(rig: Driven) -> None:
    group = Path(rig.host.path("sys/kernel/iommu_groups/3/devices"))
    group.mkdir(parents=True)
    for name in ("0000:00:05.0", "0000:00:06.0", "0000:00:1d.0"):
        (group / name).mkdir()
    add_device(Path(rig.host.root), "0000:00:1d.0", config(kind=6, express=4))  # a bridge
    for name in ("0000:00:05.0", "0000:00:06.0"):
        Path(rig.host.path(f"sys/bus/pci/devices/{name}/iommu_group")).symlink_to(group.parent)
    refused(rig, InvalidError, r"0000:00:05.0: 0000:00:06.0 is in the same IOMMU group")
    # Devices of a group have one domain.
    rig.root.detach(SECOND)
    rig.root.attach(SECOND, rig.domains[FIRST].root, IDS[FIRST])
    tables_of(rig.fs).attach(0, SECOND)
    rig.snapshot(FIRST)
    rig.activation().check_kernel_tables()
    tables_of(rig.fs).persist(SECOND, False)
    with pytest.raises(InvalidError, match="is in the same IOMMU group"):
        rig.activation().check_kernel_tables()


def test_a_unit_that_no_driver_has(legacy: Driven) -> None:
    Path(legacy.host.path("sys/class/iommu/dmar0")).rmdir()
    refused(legacy, NotFoundError, r"0000:00:05.0: this kernel's driver does not have dmar0: .*=on")
    tables_of(legacy.fs).attach(0, FIRST)
    legacy.activation().check_kernel_tables()
    with pytest.raises(BusyError, match=r"dmar0: it does not walk .* iommu activate"):
        legacy.activation().switch_units()


def test_registers_that_cannot_be_reached(legacy: Driven) -> None:
    root = Path(legacy.host.root)
    add_device(root, "0000:00:1c.0", config(kind=6, express=4))
    add_device(root, "0000:00:1c.0/0000:01:00.0", config(express=0))
    Path(legacy.host.path("sys/class/iommu/dmar1")).mkdir(parents=True)
    refused(legacy, PkernfsError, "dmar1: not here", THIRD)


def test_tables_of_another_shape(legacy: Driven) -> None:
    tables_of(legacy.fs).create_root(Config(Mode.LEGACY, 3))
    refused(legacy, InvalidError, r"live tables are of legacy mode with 4 levels, .* --levels 4")
    tables_of(legacy.fs).create_root(Config(Mode.SCALABLE, 4))
    refused(legacy, InvalidError, r"the region's of scalable mode .*create --mode legacy")


def test_a_region_without_addresses_of_its_own(legacy: Driven) -> None:
    legacy.region._backing.real_addresses = False
    refused(legacy, NotSupportedError, "SIZE!START, device-dax or on hugetlbfs")


def test_too_few_pages_for_tables(rig: Driven) -> None:
    many = rig.file("many", 1100 * PAGE)
    at = rig.physical("many")
    assert len(rig.fs.extents(many)) == 1
    big = PageTable(
        Memory(
            rig.region,
            [RegionRun(rig.fs.extents(rig.file("tables", 8 * MIB))[0].region_offset, 8 * MIB)],
        ),
        store_words(rig.region),
    )
    for number in range(600):
        big.map(Iova(number * BLOCK), PhysAddr(at + number * PAGE), PAGE, 3)
    rig.root.detach(FIRST)
    rig.root.attach(FIRST, big.root, IDS[FIRST])
    refused(rig, NoSpaceError, r"dom-0: no free page for tables: it must grow by 2 MiB")
    rig.fs.setattr(rig.fs.find(IOMMU_INO, b"dom-0"), size=4 * MIB)
    rig.snapshot()
    rig.activation().check_kernel_tables()


def test_nothing_is_attached(legacy: Driven) -> None:
    legacy.region._backing.real_addresses = False
    legacy.activation().check_kernel_tables()
    assert legacy.activation().switch_units() == []
    legacy.fs.unlink(IOMMU_INO, b"root-pgtables")
    assert legacy.activation().switch_units() == []


def test_not_root(legacy: Driven, monkeypatch: pytest.MonkeyPatch) -> None:
    legacy.snapshot()
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    with pytest.raises(PermissionDeniedError, match="switch: the daemon is not root's"):
        legacy.activation().switch_units()


def test_damaged_tables_are_not_switched_to(legacy: Driven) -> None:
    legacy.snapshot()
    at = legacy.fs.extents(legacy.fs.find(IOMMU_INO, b"dom-0"))[0].region_offset
    legacy.region.store_u64(at, 1 << 62 | 3)
    legacy.remount()
    with pytest.raises(InvalidError, match=r"iommu/dom-0: damaged: .*: run the check"):
        legacy.activation().switch_units()
