"""What keeps a range from this kernel, and what keeps it from the next one."""

from __future__ import annotations

from pathlib import Path

import pytest

from pkernfs.errors import RegionError
from pkernfs.host import memmap
from pkernfs.host.iomem import Span
from pkernfs.host.memmap import Entry, Kind
from pkernfs.host.reserved import (
    By,
    Kept,
    fake_mem_spans,
    find_kept,
    firmware_map,
    lost_by,
    word_for,
    word_in_crash_kernel,
)
from pkernfs.quantities import PhysAddr
from support.made_up_host import Machine, make_machine

M, G = 1 << 20, 1 << 30
SPAN = Span(PhysAddr(G), 512 * M)
RAM = ((0, 8 * G - 1, "System RAM"),)


def machine_with(root: Path, kind: str, line: str = "quiet", iomem: str = "") -> Machine:
    """A machine whose firmware reports one GiB of that kind at 1 GiB."""
    firmware = ((0, G - 1, "System RAM"), (G, 2 * G - 1, kind))
    return make_machine(root, command_line=line, firmware=firmware, iomem=f"0-1 : x\n{iomem}")


@pytest.mark.parametrize(
    ("word", "kind"),
    [
        ("memmap=512M%1G", Kind.REMOVED),
        ("memmap=1G$512M,1G!1536M", Kind.RESERVED),
        ("memmap=1G!1G", Kind.PMEM),
        ("memmap=1G%1G-1+0xefffffff", Kind.SOFT),
        ("memmap=1G%1G+12", Kind.PMEM),
        ("mem=1G", Kind.REMOVED),
    ],
)
def test_kept_by_a_word(tmp_path: Path, word: str, kind: Kind) -> None:
    machine = make_machine(tmp_path, command_line=f"ro {word}", firmware=RAM)
    [kept] = find_kept([SPAN], machine)
    assert kept == Kept(SPAN.start, SPAN.end, kind, By.WORD, kept.word)
    assert word.startswith(kept.word.partition(",")[0])
    assert lost_by(f"{word} quiet", [kept], firmware_map(machine)) == []
    assert lost_by("quiet", [kept], firmware_map(machine)) == [kept]


@pytest.mark.parametrize(
    ("firmware", "kind"),
    [
        ("Soft Reserved", Kind.SOFT),
        ("Persistent Memory", Kind.PMEM),
        ("Persistent Memory (legacy)", Kind.PMEM),
        ("Reserved", Kind.RESERVED),
        ("ACPI Tables", Kind.OTHER),
        ("Unknown E820 type", Kind.OTHER),
    ],
)
def test_kept_by_the_firmware(tmp_path: Path, firmware: str, kind: Kind) -> None:
    machine = machine_with(tmp_path, firmware)
    kept = find_kept([SPAN], machine)
    assert kept == [Kept(SPAN.start, SPAN.end, kind, By.FIRMWARE, "")]
    assert lost_by("memmap=1G@1G", kept, firmware_map(machine)) == []  # the higher type counts
    assert lost_by("memmap=exactmap,4G@0,1G$8G", kept, firmware_map(machine)) == kept


@pytest.mark.parametrize("old", ["-7", "-12", "-0xefffffff", "-2"])
def test_a_word_that_changes_what_the_firmware_reports(tmp_path: Path, old: str) -> None:
    """Soft-reserved, of whatever it was before; of RAM the same word makes nothing."""
    names = {"-7": "Persistent Memory", "-12": "Persistent Memory (legacy)",
             "-0xefffffff": "Soft Reserved", "-2": "Reserved"}  # fmt: skip
    new = "12" if old == "-0xefffffff" else "0xefffffff"
    word = f"memmap=1G%1G{old}+{new}"
    machine = machine_with(tmp_path, names[old], word)
    [kept] = find_kept([SPAN], machine)
    assert (kept.kind, kept.by, kept.word) == (
        Kind.PMEM if new == "12" else Kind.SOFT, By.WORD, word,
    )  # fmt: skip
    assert lost_by(word, [kept], firmware_map(machine)) == []
    assert lost_by(word, [kept], [Entry(0, 8 * G, memmap.RAM)]) == [kept]
    assert word_in_crash_kernel(kept, machine) in (word, f"memmap=1G%1G+{new}")


def test_two_ways_in_one_range(tmp_path: Path) -> None:
    firmware = ((0, G + 256 * M - 1, "System RAM"), (G + 256 * M, 2 * G - 1, "Soft Reserved"))
    machine = make_machine(tmp_path, command_line="memmap=256M%1G", firmware=firmware)
    assert [(k.end - k.start, k.kind, k.by) for k in find_kept([SPAN], machine)] == [
        (256 * M, Kind.REMOVED, By.WORD),
        (256 * M, Kind.SOFT, By.FIRMWARE),
    ]


@pytest.mark.parametrize(
    ("iomem", "kind", "word"),
    [
        ("40000000-7fffffff : Soft Reserved", Kind.SOFT, "memmap=1G%1G-1+0xefffffff"),
        ("40000000-7fffffff : hmem.0\n  40000000-7fffffff : dax0.0", Kind.SOFT,
         "memmap=1G%1G-1+0xefffffff"),
        ("40000000-7fffffff : Persistent Memory (legacy)", Kind.PMEM, "memmap=1G%1G-1+12"),
        ("", Kind.REMOVED, "memmap=512M%1G-1"),
    ],
)  # fmt: skip
def test_kept_by_what_cannot_be_seen(tmp_path: Path, iomem: str, kind: Kind, word: str) -> None:
    machine = machine_with(tmp_path, "System RAM", iomem=f"0-fff : Reserved\n{iomem}\n")
    machine.write("proc/iomem", f"00001000-00001fff : Reserved\n{iomem}\n")
    kept = find_kept([SPAN], machine)
    assert kept == [Kept(SPAN.start, SPAN.end, kind, By.UNKNOWN, word)]
    assert lost_by("quiet", kept, firmware_map(machine)) == kept
    assert lost_by(word, kept, firmware_map(machine)) == []


def test_no_map_of_the_firmware_is_shown(tmp_path: Path) -> None:
    """Then nobody knows if the firmware keeps it apart: it has to be said by a word."""
    machine = make_machine(tmp_path, command_line="quiet", firmware=())
    assert firmware_map(machine) is None
    assert [kept.by for kept in find_kept([SPAN], machine)] == [By.UNKNOWN]
    machine.write("proc/iomem", "")
    with pytest.raises(RegionError, match="shows no addresses"):
        find_kept([SPAN], machine)


def test_memory_of_the_kernel_is_not_kept(tmp_path: Path) -> None:
    machine = machine_with(tmp_path, "System RAM")
    machine.write("proc/iomem", "00100000-7fffffff : System RAM\n")
    assert find_kept([SPAN], machine) == []
    machine.write("proc/cmdline", "memmap=512M@1G")
    assert find_kept([SPAN], machine) == []


def test_efi_fake_mem(tmp_path: Path) -> None:
    line = "efi_fake_mem=1G@1G:0x40000,1G@4G:0x8000 efi_fake_mem=2G@8G:0x48000 memmap=1G$3G"
    assert fake_mem_spans(line) == [Span(PhysAddr(G), G), Span(PhysAddr(8 * G), 2 * G)]
    machine = machine_with(tmp_path, "System RAM", line)
    machine.write("proc/iomem", "40000000-7fffffff : Soft Reserved\n")
    word = "memmap=1G%1G-1+0xefffffff"
    kept = [Kept(SPAN.start, SPAN.end, Kind.SOFT, By.FAKE_MEM, word)]
    assert find_kept([SPAN], machine) == kept
    assert lost_by(line, kept, firmware_map(machine)) == kept
    assert word_in_crash_kernel(kept[0], machine) == "memmap=1G%1G+0xefffffff"


@pytest.mark.parametrize(
    ("kind", "word"),
    [
        ("Soft Reserved", "memmap=1G%1G+0xefffffff"),
        ("Persistent Memory", ""),  # NFIT
        ("Persistent Memory (legacy)", "memmap=1G%1G+12"),
        ("Reserved", ""),
    ],
)
def test_a_crash_kernel_is_told_nothing_by_the_firmware(
    tmp_path: Path, kind: str, word: str
) -> None:
    """Its map has its own memory, and what is reserved."""
    machine = machine_with(tmp_path, kind)
    [kept] = find_kept([SPAN], machine)
    assert word_in_crash_kernel(kept, machine) == word
    if word:
        assert lost_by("quiet", [kept], []) == [kept]
        assert lost_by(word, [kept], []) == []


def test_words() -> None:
    assert word_for(Kind.REMOVED, SPAN) == "memmap=512M%1G-1"
    assert word_for(Kind.RESERVED, SPAN) == "memmap=512M%1G-1+2"
    assert word_for(Kind.PMEM, SPAN, of_ram=False) == "memmap=512M%1G+12"


@pytest.mark.parametrize(
    ("one", "other"), [(Kind.REMOVED, Kind.RESERVED), (Kind.RESERVED, Kind.REMOVED)]
)
def test_removed_and_reserved_memory_serve_alike(one: Kind, other: Kind) -> None:
    """/dev/mem has both."""
    kept = Kept(SPAN.start, SPAN.end, one, By.FIRMWARE, "")
    assert kept.is_served_by(one)
    assert kept.is_served_by(other)
    assert not kept.is_served_by(Kind.SOFT)
    assert not kept._replace(kind=Kind.SOFT).is_served_by(other)
