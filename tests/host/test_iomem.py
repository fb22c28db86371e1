"""What /proc/iomem and the firmware's map tell of physical memory."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from pkernfs.errors import RegionError
from pkernfs.host.iomem import (
    Resource,
    Span,
    overlap,
    parse_iomem,
    read_firmware_map,
    read_iomem,
)
from pkernfs.quantities import PhysAddr
from support.made_up_host import FIRMWARE, IOMEM, make_machine

G = PhysAddr(1 << 30)
M = 1 << 20


def test_a_span_is_written_as_a_spec() -> None:
    assert str(Span(PhysAddr(4 * G), G)) == "1G!4G"
    assert str(Span(PhysAddr(2 * M), 1026 * M)) == "1026M!2M"
    assert Span(G, 512 * M).end == G + 512 * M


def test_every_line_is_a_resource() -> None:
    found = parse_iomem(IOMEM)
    assert len(found) == len(IOMEM.splitlines())
    assert found[0] == Resource(PhysAddr(0), PhysAddr(0x1000), "Reserved")
    at = [r.name for r in found].index("System ROM")
    start, end = PhysAddr(0xF0000), PhysAddr(0x100000)
    assert found[at - 1] == Resource(start, end, "Reserved")  # its parent
    assert found[at] == Resource(start, end, "System ROM")
    assert found[-1] == Resource(PhysAddr(4 * G), PhysAddr(6 * G), "System RAM")


@pytest.mark.parametrize("line", ["", "quiet", "0-1", "00-0g : x", "00-01: x", "\t00-01 : x"])
def test_other_lines_are_passed_by(line: str) -> None:
    assert parse_iomem(f"{line}\n00-0f : y : z\n{line}") == [
        Resource(PhysAddr(0), PhysAddr(16), "y : z")
    ]


def test_reading_says_for_whom(tmp_path: Path) -> None:
    machine = make_machine(tmp_path)
    assert read_iomem("anybody", machine) == parse_iomem(IOMEM)
    machine.write("proc/iomem", "00000000-00000000 : Reserved\n")
    with pytest.raises(RegionError, match=r"^anybody: /proc/iomem shows no addresses") as caught:
        read_iomem("anybody", machine)
    assert caught.value.errno == errno.EPERM
    (tmp_path / "proc/iomem").unlink()
    with pytest.raises(RegionError, match=r"^anybody: cannot read /proc/iomem: No such") as caught:
        read_iomem("anybody", machine)
    assert caught.value.errno == errno.ENOENT


def test_the_firmwares_map(tmp_path: Path) -> None:
    machine = make_machine(tmp_path)
    expected = [
        Resource(PhysAddr(start), PhysAddr(last + 1), kind) for start, last, kind in FIRMWARE
    ]
    assert read_firmware_map(machine) == expected
    (tmp_path / "sys/firmware/memmap/0/type").unlink()  # an entry that is not whole
    assert read_firmware_map(machine) == expected[1:]
    assert read_firmware_map(make_machine(tmp_path / "other", firmware=())) == []


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [(0, G, False), (0, G + 1, True), (G + M, G + M + 1, True), (2 * G, 3 * G, False)],
)
def test_what_overlaps(start: PhysAddr, end: PhysAddr, expected: bool) -> None:
    assert overlap(Span(G, G), Resource(start, end, "x")) is expected
