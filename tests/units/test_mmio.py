"""Registers in memory: what steps do to them, and that they reach nothing else."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from pkernfs.native._native import lib

from pkernfs.errors import PermissionDeniedError, UnitError
from pkernfs.host.sysroot import Host
from pkernfs.layout import PAGE
from pkernfs.quantities import PhysAddr, RegionOff
from pkernfs.region.region import Region
from pkernfs.units.mmio import MemoryWindow, open_window
from pkernfs.vtd.registers import KEPT, STATUS, Command, Step, StepKind

MIB = 1 << 20
BASE = PhysAddr(16 * PAGE)


def test_steps_on_memory() -> None:
    registers = bytearray(PAGE)
    window = MemoryWindow(registers)
    registers[STATUS : STATUS + 4] = 0xFF00_0003.to_bytes(4, "little")
    assert window.run(
        [
            Step(StepKind.WRITE_32, 0x100, 0x1_1234_5678),
            Step(StepKind.WRITE_64, 0x108, 0x1122_3344_5566_7788),
            Step(StepKind.COMMAND, Command.OFFSET, Command.SRTP.mask, Command.TE.mask),
            Step(StepKind.WAIT_32, 0x100, 0x5678, 0xFFFF),
            Step(StepKind.WAIT_64, 0x108, 0x1122 << 48, 0xFFFF << 48),
            Step(StepKind.WAIT_SAME, 0x108, 0x108),
        ]
    )
    assert window.read32(0x100) == 0x1234_5678
    assert window.read64(0x108) == 0x1122_3344_5566_7788
    # The one-shot bits are not repeated, TE is off, and all else is kept.
    assert window.read32(Command.OFFSET) == (0xFF00_0003 & KEPT | 1 << 30) & ~(1 << 31)


def test_a_wait_in_vain_ends_the_steps_but_not_the_last_ones() -> None:
    window = MemoryWindow(bytearray(PAGE))
    steps = [Step(StepKind.WAIT_32, 8, 1, 1), Step(StepKind.WRITE_32, 0, 1)]
    assert not window.run(steps, [Step(StepKind.WRITE_32, 4, 2)], seconds=0.01)
    assert (window.read32(0), window.read32(4)) == (0, 2)


def test_a_wait_for_memory_that_another_stores() -> None:
    region = Region.anonymous(2 * MIB)
    window = MemoryWindow(bytearray(PAGE))
    other = threading.Timer(0.05, region.store_u64, (64, 7))
    other.start()
    assert window.run([Step(StepKind.WAIT_MEMORY, 64, 7)], memory=region, seconds=10)
    other.join()
    region.close()


@pytest.mark.parametrize("offset", [-8, 2, PAGE, PAGE - 4])
def test_registers_that_are_not_there(offset: int) -> None:
    with pytest.raises(UnitError):
        MemoryWindow(bytearray(PAGE)).read64(offset)


@pytest.fixture
def region() -> Iterator[Region]:
    with Region.anonymous(2 * MIB) as made:
        yield made


@pytest.mark.parametrize(
    "step",
    [
        Step(StepKind.WRITE_32, PAGE, 1),
        Step(StepKind.WRITE_32, PAGE - 2, 1),
        Step(StepKind.WRITE_32, 2, 1),
        Step(StepKind.WRITE_64, PAGE - 4, 1),
        Step(StepKind.WRITE_64, 4, 1),
        Step(StepKind.WRITE_64, (1 << 64) - 8, 1),
        Step(StepKind.WAIT_32, PAGE, 0),
        Step(StepKind.WAIT_64, PAGE, 0),
        Step(StepKind.WAIT_SAME, 0, PAGE),
        Step(StepKind.WAIT_SAME, PAGE, 0),
        Step(StepKind.WAIT_MEMORY, 2 * MIB, 0),
        Step(StepKind.WAIT_MEMORY, 2 * MIB - 2, 0),
        Step(StepKind.WAIT_MEMORY, (1 << 64) - 4, 0),
        Step(7, 0, 0),  # type: ignore[arg-type]
    ],
)
def test_steps_that_reach_too_far_are_not_begun(region: Region, step: Step) -> None:
    registers = bytearray(PAGE)
    window = MemoryWindow(registers)
    first = Step(StepKind.WRITE_32, 0, 1)
    for steps, last in (([first, step], []), ([first], [step])):
        with pytest.raises(UnitError, match="reaches beyond"):
            window.run(steps, last, memory=region, seconds=0)
    assert not any(registers)


def test_a_wait_for_memory_where_there_is_none() -> None:
    with pytest.raises(UnitError, match="reaches beyond"):
        MemoryWindow(bytearray(PAGE)).run([Step(StepKind.WAIT_MEMORY, 0, 0)])


def test_a_command_where_the_unit_has_no_such_registers() -> None:
    with pytest.raises(UnitError, match="reaches beyond"):
        MemoryWindow(bytearray(STATUS)).run([Step(StepKind.COMMAND, Command.OFFSET, 1)])


def test_every_kind_is_known_to_c() -> None:
    registers = bytearray(PAGE)
    with Region.anonymous(2 * MIB) as region:
        for kind in StepKind:
            assert MemoryWindow(registers).run([Step(kind, 0, 0)], memory=region)


# ---------------------------------------------------------------------- /dev/mem


def device(tmp_path: Path, version: int, cap: int, ecap: int, size: int = 8 * PAGE) -> Host:
    """A machine whose memory is a file with a unit's registers in it."""
    (tmp_path / "dev").mkdir()
    with (tmp_path / "dev/mem").open("wb") as file:
        file.truncate(BASE + size)
        file.seek(BASE)
        file.write(version.to_bytes(8, "little") + cap.to_bytes(8, "little"))
        file.write(ecap.to_bytes(8, "little"))
    return Host(str(tmp_path))


def test_as_many_registers_as_the_unit_says(tmp_path: Path) -> None:
    # Fault records at 0x3ff0 and eight of them: five pages.
    host = device(tmp_path, 0x60, 1 << 10 | 0x3FF << 24 | 7 << 40, 1)
    window = open_window(BASE, host, write=True)
    assert window.run([Step(StepKind.WRITE_64, 5 * PAGE - 8, 0x1122_3344_5566_7788)])
    with pytest.raises(UnitError):
        window.read32(5 * PAGE)
    assert open_window(BASE, host, write=False).read32(5 * PAGE - 4) == 0x1122_3344


@pytest.mark.parametrize("cap", [0, (1 << 64) - 1])
def test_no_unit_answers(tmp_path: Path, cap: int) -> None:
    with pytest.raises(UnitError, match=f"registers at {BASE:#x}: no unit answers"):
        open_window(BASE, device(tmp_path, 0x10, cap, 0), write=False)


def test_no_memory_to_map(tmp_path: Path) -> None:
    with pytest.raises(PermissionDeniedError, match=r"a kernel without CONFIG_DEVMEM"):
        open_window(BASE, Host(str(tmp_path)), write=False)


def test_flushed_lines_are_as_before() -> None:
    """Lines that begin before a range, and end behind it, are written back whole."""
    with Region.anonymous(2 * MIB) as region:
        region.copy_in(RegionOff(60), bytes(range(200)))
        region.flush_lines(RegionOff(63), 130)
        assert region.read(RegionOff(60), 200) == bytes(range(200))
        lib.pk_flush_lines(region.base, 0)


@pytest.mark.parametrize("base", [BASE + 16, 1 << 52, (1 << 64) - PAGE])
def test_a_base_that_is_no_address(base: int, tmp_path: Path) -> None:
    """The firmware has said it, and Linux does not look at it."""
    with pytest.raises(UnitError, match="no address of a page"):
        open_window(PhysAddr(base), Host(str(tmp_path)), write=False)
