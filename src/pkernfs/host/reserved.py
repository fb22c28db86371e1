"""What keeps ranges of physical memory from this kernel, and what keeps them from the next one.

A range is kept apart by a word on the command line, by the firmware's own memory map, or by
something that is in neither. kexec passes the firmware's map on (kexec_file_load(),
arch/x86/kernel/kexec-bzimage64.c, setup_e820_entries(): e820_table_kexec), and the command line.
So a range of the third sort is lost, if the next command line does not name it:

- ``efi_fake_mem=`` changes the map from the descriptors of conventional memory that EFI has given
  (arch/x86/platform/efi/fake_mem.c, until Linux 6.11). kexec passes the runtime services' on only.
- A boot loader that starts the kernel without its EFI stub has memory for special purposes in the
  map as RAM; the kernel changes that from the same descriptors (do_add_efi_memmap()).
"""

from __future__ import annotations

import enum
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from pkernfs.host import cmdline, memmap
from pkernfs.host.cmdline import format_number
from pkernfs.host.iomem import Resource, Span, overlap, read_firmware_map, read_iomem
from pkernfs.host.memmap import Entry, Kind, Rules
from pkernfs.host.sysroot import Host
from pkernfs.quantities import PhysAddr

#: e820_type_to_string(), arch/x86/kernel/e820.c: /sys/firmware/memmap and /proc/iomem.
_TYPES = {
    "System RAM": memmap.RAM,
    "Reserved": memmap.RESERVED,
    "ACPI Tables": memmap.ACPI,
    "Persistent Memory": memmap.PMEM,
    "Persistent Memory (legacy)": memmap.PRAM,
    "Soft Reserved": memmap.SOFT_RESERVED,
}
_SOMETHING_ELSE = 5  # E820_TYPE_UNUSABLE
_DAX = re.compile(r"(dax\d+\.|hmem\.?)\d+", re.ASCII)
_FREE = (Kind.REMOVED, Kind.RESERVED)
_PASSED_TYPES = {Kind.SOFT: "0xefffffff", Kind.PMEM: "12", Kind.RESERVED: "2"}


class By(enum.Enum):
    """What keeps a range apart."""

    WORD = "the command line"
    FIRMWARE = "the firmware's memory map"
    FAKE_MEM = "efi_fake_mem="
    UNKNOWN = "something that is neither in the firmware's map nor on the command line"


class Kept(NamedTuple):
    """A range that this kernel leaves alone; bytes, ``end`` is not part of it.

    :ivar word: has a kernel that kexec starts leave it alone in the same way; "": none is needed
    """

    start: PhysAddr
    end: PhysAddr
    kind: Kind
    by: By
    word: str

    def is_served_by(self, kind: Kind) -> bool:
        """Tell whether a kernel that has this kind of memory there leaves it alone as well."""
        return kind is self.kind or (kind in _FREE and self.kind in _FREE)


def firmware_map(host: Host) -> list[Entry] | None:
    """Return the map before all words, as kexec passes it on; None: it is not shown."""
    found = read_firmware_map(host)
    if not found:
        return None
    return [Entry(r.start, r.end, _TYPES.get(r.name, _SOMETHING_ELSE)) for r in found]


def find_kept(spans: Sequence[Span], host: Host) -> list[Kept]:
    """Return what keeps each part of ``spans`` from this kernel; nothing of what is its memory.

    :raises RegionError: /proc/iomem is needed and cannot be read.
    """
    return [kept for span in spans for kept in _kept(span, host)]


def _kept(span: Span, host: Host) -> Iterator[Kept]:
    firmware = firmware_map(host)
    for piece in memmap.coverage(
        host.command_line(), span.start, span.end, firmware=firmware or None
    ):
        start, end, reservation, kind = piece
        if reservation is not None:
            if kind is not Kind.RAM:
                yield Kept(start, end, kind, By.WORD, reservation.parameter)
        elif kind is not Kind.RAM:
            yield Kept(start, end, kind, By.FIRMWARE, "")
        else:
            yield from _kept_otherwise(Span(start, end - start), host)


def _kept_otherwise(span: Span, host: Host) -> Iterator[Kept]:
    """Yield what is RAM by the map and the words, and yet none of the kernel's."""
    resources = read_iomem(str(span), host)
    if any(r.name.startswith("System RAM") and overlap(span, r) for r in resources):
        return
    faked = next((s for s in fake_mem_spans(host.command_line()) if overlap(s, span)), None)
    if faked is not None:
        word = word_for(Kind.SOFT, faked)
        yield Kept(span.start, span.end, Kind.SOFT, By.FAKE_MEM, word)
        return
    found = [r for r in resources if r.start <= span.start and span.end <= r.end]
    kind = next((k for r in found if (k := _kind_of(r)) is not None), Kind.REMOVED)
    whole = Span(found[0].start, found[0].end - found[0].start) if found else span
    yield Kept(span.start, span.end, kind, By.UNKNOWN, word_for(kind, whole))


def _kind_of(resource: Resource) -> Kind | None:
    if _DAX.fullmatch(resource.name) or resource.name == "Soft Reserved":
        return Kind.SOFT
    return Kind.PMEM if resource.name.startswith("Persistent Memory") else None


def fake_mem_spans(command_line: str) -> list[Span]:
    """Return the ranges that ``efi_fake_mem=SIZE@START:ATTRIBUTE`` soft-reserves."""
    found = []
    for value in cmdline.values(command_line, "efi_fake_mem"):
        one = memmap.handle_mem_options(f"efi_fake_mem={value}", memmap.KNOWN[0])
        found += [Span(PhysAddr(a.start), a.size) for a in one.avoided]
    return found


def word_for(kind: Kind, span: Span, *, of_ram: bool = True) -> str:
    """Return the memmap= that makes this kind of memory of a range.

    :param of_ram: of what is RAM there; what is not stays as it is. A kernel that is started by a
        panic has no RAM there, so nothing would change.
    """
    old = "-1" if of_ram else ""
    new = f"+{_PASSED_TYPES[kind]}" if kind in _PASSED_TYPES else ""
    return f"memmap={format_number(span.size)}%{format_number(span.start)}{old}{new}"


def lost_by(
    command_line: str,
    kept: Sequence[Kept],
    firmware: Sequence[Entry] | None,
    rules: tuple[Rules, ...] = (memmap.NEWEST,),
) -> list[Kept]:
    """Return those that a kernel with that command line would not leave alone in the same way.

    :param firmware: the map that it is given; None: RAM.
    :param rules: that it may follow.
    """
    return [
        one
        for one in kept
        if any(
            not one.is_served_by(piece.kind)
            for rule in rules
            for piece in memmap.coverage(command_line, one.start, one.end, rule, firmware)
        )
    ]


def word_in_crash_kernel(one: Kept, host: Host) -> str:
    """Return what a kernel that is started by a panic needs; "": nothing.

    It is given no memory but its own and what is reserved (arch/x86/kernel/crash.c,
    crash_setup_memmap_entries()): nothing there is RAM that could be changed, and nothing is
    soft-reserved. The ACPI table NFIT tells of persistent memory of the firmware's anew.
    """
    if one.kind not in (Kind.SOFT, Kind.PMEM):
        return ""
    if one.by is not By.FIRMWARE:
        return one.word.replace("-1+", "+")
    for entry in firmware_map(host) or []:
        if entry.start <= one.start and one.end <= entry.end and entry.kind != memmap.PMEM:
            whole = Span(PhysAddr(entry.start), entry.end - entry.start)
            return word_for(one.kind, whole, of_ram=False)
    return ""
