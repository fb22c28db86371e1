"""Physical address ranges, and whether one is free for a region: see :func:`check`.

Everything here reads texts of the kernel; nothing is opened, mapped or stored.
"""

from __future__ import annotations

import errno
import re
import struct
from collections.abc import Iterator
from typing import NamedTuple

from pkernfs.errors import RegionError
from pkernfs.host import cmdline
from pkernfs.host.cmdline import Kind, Reservation, format_number
from pkernfs.host.sysroot import Host
from pkernfs.layout import BLOCK

_ADDRESS_BITS = 52  # as many as a page-table entry has
_SPEC = re.compile(r"(\d\w*)!(\d\w*)", re.ASCII)
_LINE = re.compile(r"( *)([0-9a-f]+)-([0-9a-f]+) : (.*)")
_FREE = (Kind.REMOVED, Kind.RESERVED)
_MEMORY = ("System RAM", "Soft Reserved")
_KERNEL = "Kernel "  # its code, its data, its bss: children of System RAM


class Span(NamedTuple):
    """A range of physical addresses, in bytes."""

    start: int
    size: int

    @property
    def end(self) -> int:
        """The first address behind it."""
        return self.start + self.size

    def __str__(self) -> str:
        return f"{format_number(self.size)}!{format_number(self.start)}"


def looks_physical(spec: str) -> bool:
    """Whether ``spec`` is meant to be SIZE!START, right or wrong."""
    return _SPEC.fullmatch(spec) is not None


def parse_span(spec: str) -> Span:
    """The range of ``SIZE!START``, numbers as on the kernel command line.

    :raises RegionError: no such spec, unaligned, or beyond any address.
    """
    match = _SPEC.fullmatch(spec)
    try:
        if match is None:
            raise ValueError
        size, start = (cmdline.parse_number(text) for text in match.groups())
    except ValueError:
        raise RegionError(f"{spec}: bad region: expected SIZE!START, as in 1G!4G") from None
    for what, number in (("size", size), ("start", start)):
        if number % BLOCK:
            raise RegionError(
                f"{spec}: bad {what}: got {number:#x}, expected a multiple of 2 MiB ({BLOCK:#x})"
            )
    if not size:
        raise RegionError(f"{spec}: bad size: got 0")
    if start + size > 1 << _ADDRESS_BITS:
        raise RegionError(
            f"{spec}: beyond the last physical address: got {start + size - 1:#x}, "
            f"expected below 2^{_ADDRESS_BITS}"
        )
    return Span(start, size)


def memmap_parameter(span: Span) -> str:
    """The kernel parameter that reserves a range.

    ``%`` needs no escaping in boot loaders. But the kernel that places itself at random (KASLR)
    takes ``SIZE%START`` for the end of memory at SIZE, so it may put itself into a region that is
    larger than its own start; ``$`` it keeps away from.
    """
    sign = "%" if span.size <= span.start else "$"
    return f"memmap={format_number(span.size)}{sign}{format_number(span.start)}"


# ---------------------------------------------------------------------------- the check


class Resource(NamedTuple):
    """One line of /proc/iomem; ``end`` is not part of it."""

    start: int
    end: int
    name: str


def parse_iomem(text: str) -> list[Resource]:
    """Every line of /proc/iomem, parents before children."""
    lines = (_LINE.fullmatch(line) for line in text.splitlines())
    return [Resource(int(m[2], 16), int(m[3], 16) + 1, m[4]) for m in lines if m]


def check(spec: str, span: Span, host: Host) -> None:
    """Refuse a range that is not a region's to have, without touching it.

    The firmware must have reported memory there, memmap= must keep all of it from the kernel, and
    nothing in /proc/iomem may have claimed any of it.

    :raises RegionError: with the parameter to add to the kernel command line, where that helps.
    """
    command_line = host.command_line()
    resources = read_iomem(spec, host)
    reserved = cmdline.reservations(command_line)
    if not cmdline.values(command_line, "elfcorehdr") and not any(
        r.kind is Kind.RAM for r in reserved
    ):  # the kernel of a crash, and those after it, are told of little memory
        _check_memory(spec, span, _firmware_map(host))
    _check_reserved(spec, span, reserved, resources)
    _check_kernel(spec, span, resources)
    for resource in resources:
        if overlap(span, resource):
            _check_resource(spec, span, resource)


def read_iomem(spec: str, host: Host) -> list[Resource]:
    """Every line of /proc/iomem, parents before children.

    :raises RegionError: it cannot be read, or shows no addresses to this process.
    """
    try:
        found = parse_iomem(host.read("proc/iomem"))
    except OSError as e:
        raise RegionError(f"{spec}: cannot read /proc/iomem: {e.strerror}", e.errno or 0) from e
    if not any(resource.start for resource in found):
        raise RegionError(
            f"{spec}: /proc/iomem shows no addresses: root is needed (CAP_SYS_ADMIN)", errno.EPERM
        )
    return found


def _check_memory(spec: str, span: Span, firmware: list[tuple[int, int, str]]) -> None:
    """The firmware's own map, which memmap= does not change."""
    if not firmware:
        return
    at = span.start
    for start, end, kind in sorted(firmware):
        if start <= at < end and kind in _MEMORY:
            at = end
    if at >= span.end:
        return
    there = next((kind for start, end, kind in firmware if start <= at < end), "nothing")
    ram = ", ".join(
        f"{start:#x}-{end - 1:#x}" for start, end, kind in sorted(firmware) if kind in _MEMORY
    )
    raise RegionError(
        f"{spec}: no memory at {at:#x}: the firmware reports {there} there, and memory at {ram}"
    )


def _check_kernel(spec: str, span: Span, resources: list[Resource]) -> None:
    """Of a range that memmap= covers. In any other one it may be, wherever KASLR has put it."""
    for resource in resources:
        if resource.name.startswith(_KERNEL) and overlap(span, resource):
            raise RegionError(
                f"{spec}: the running kernel was put into it, at {resource.start:#x}: what it held "
                "is lost: load kernels with kexec -s, and choose a START below other memory"
            )


def overlap(one: Span, other: Span | Resource) -> bool:
    """Tell whether two ranges have a byte in common."""
    return other.start < one.end and one.start < other.end


def _firmware_map(host: Host) -> list[tuple[int, int, str]]:
    found = []
    base = "sys/firmware/memmap"
    for number in host.list(base):
        texts = [host.find(f"{base}/{number}/{name}") for name in ("start", "end", "type")]
        if texts[0] and texts[1] and texts[2]:
            found.append((int(texts[0], 16), int(texts[1], 16) + 1, texts[2]))
    return found


def _check_reserved(
    spec: str, span: Span, reserved: list[Reservation], resources: list[Resource]
) -> None:
    pieces = cmdline.coverage(reserved, span.start, span.end)
    wrong = next((p for p in pieces if p[2] is None or p[2].kind not in _FREE), None)
    if wrong is None:
        return
    at, _, holder = wrong
    remedy = f"boot with {memmap_parameter(span)} on the kernel command line"
    if holder is not None and holder.kind is Kind.SOFT:
        raise RegionError(
            f"{spec}: {holder.parameter} keeps {at:#x} for device-dax: "
            "use /dev/daxX.Y (modprobe dax_hmem; modprobe device_dax)"
        )
    if holder is not None:
        raise RegionError(
            f"{spec}: {holder.parameter} makes {holder.kind.value} of {at:#x}: {remedy} instead"
        )
    good = next((p[2] for p in pieces if p[2] is not None), None)
    if good is not None:
        ends = f"ends at {good.end:#x}" if good.start <= at else f"begins at {good.start:#x}"
        raise RegionError(
            f"{spec}: not all of {span.start:#x}-{span.end - 1:#x} is reserved: "
            f"{good.parameter} {ends}: {remedy} instead"
        )
    owners = (r.name for r in reversed(resources) if r.start <= at < r.end)
    owner = next((name for name in owners if not name.startswith(_KERNEL)), None)
    what = f"it is {owner}" if owner else "no memmap= covers it"
    raise RegionError(f"{spec}: not reserved: {what} at {at:#x}: {remedy}")


def _check_resource(spec: str, span: Span, resource: Resource) -> None:
    """A range in /proc/iomem that the region has a part in."""
    name = resource.name
    if name in ("Reserved", "RAM buffer"):
        return  # what memmap=SIZE$START becomes; and a gap that the kernel keeps free
    where = f"{max(resource.start, span.start):#x}-{min(resource.end, span.end) - 1:#x}"
    if name.startswith("System RAM"):
        raise RegionError(
            f"{spec}: {where} is System RAM, although memmap= covers it: "
            f"boot with {memmap_parameter(span)} as the last memmap="
        )
    raise RegionError(f"{spec}: {where} is claimed by {name!r} (/proc/iomem): choose another START")


# ---------------------------------------------------------------------------- NUMA

_SRAT_ENTRIES = 48
_SRAT_APIC, _SRAT_MEMORY, _SRAT_X2APIC = 0, 1, 2


def nodes_of(span: Span, host: Host) -> list[int]:
    """The NUMA nodes that a range lies in, by the firmware's table; empty if they are not known."""
    memory = _srat_memory(host)
    if memory:
        return sorted({n for low, high, n in memory if low < span.end and span.start < high})
    nodes = [n for n in host.list("sys/devices/system/node") if re.fullmatch(r"node\d+", n)]
    return [int(nodes[0][4:])] if len(nodes) == 1 else []


def _srat_memory(host: Host) -> list[tuple[int, int, int]]:
    """``(start, end, node)`` from the SRAT; none without one, or without leave to read it."""
    try:
        with open(host.path("sys/firmware/acpi/tables/SRAT"), "rb") as file:
            table = file.read()
    except OSError:
        return []
    entries = list(_srat_entries(table))
    # The kernel numbers nodes as it meets their domains: processors first, then memory.
    domains: list[int] = []
    for kind, entry in sorted(entries, key=lambda e: e[0] == _SRAT_MEMORY):
        domain = _enabled_domain(kind, entry)
        if domain is not None and domain not in domains:
            domains.append(domain)
    found = []
    for kind, entry in entries:
        domain = _enabled_domain(kind, entry)
        if kind == _SRAT_MEMORY and domain is not None:
            start, size = struct.unpack_from("<QQ", entry, 8)
            found.append((start, start + size, domains.index(domain)))
    return found


def _srat_entries(table: bytes) -> Iterator[tuple[int, bytes]]:
    least = {_SRAT_APIC: 16, _SRAT_MEMORY: 40, _SRAT_X2APIC: 24}
    at = _SRAT_ENTRIES
    while at + 2 <= len(table):
        kind, length = table[at], table[at + 1]
        entry = table[at : at + length]
        if length < 2 or len(entry) < length:
            return
        if kind in least and length >= least[kind]:
            yield kind, entry
        at += length


def _enabled_domain(kind: int, entry: bytes) -> int | None:
    flags_at = {_SRAT_APIC: 4, _SRAT_MEMORY: 28, _SRAT_X2APIC: 12}[kind]
    if not entry[flags_at] & 1:
        return None
    if kind == _SRAT_APIC:
        return entry[2] | int.from_bytes(entry[9:12], "little") << 8
    return int.from_bytes(entry[2:6] if kind == _SRAT_MEMORY else entry[4:8], "little")
