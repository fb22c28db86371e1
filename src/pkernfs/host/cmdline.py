"""The kernel's command line: its words, the ranges of ``memmap=``, the names of ``pkernfs=``.

Texts are parsed as the kernel parses them (memparse(), parse_memmap_one(), next_arg()).
:mod:`pkernfs.host.iomem` tells whether the kernel that runs has obeyed them.
"""

from __future__ import annotations

import enum
import itertools
import re
from collections.abc import Iterable
from typing import NamedTuple

from pkernfs.errors import RegionError
from pkernfs.quantities import PhysAddr

_NUMBER = re.compile(r"(0[xX][0-9a-fA-F]+|[0-9]+)([KMGTPEkmgtpe]?)", re.ASCII)
_SHIFT = {"": 0, "k": 10, "m": 20, "g": 30, "t": 40, "p": 50, "e": 60}
_MEMMAP = re.compile(r"([^@#$!%]+)([@#$!%])(.*)", re.ASCII)
_CHANGE = re.compile(r"(?:-(\w+))?(?:\+(\w+))?", re.ASCII)
_NAMED = re.compile(r"([A-Za-z_][\w.-]*):(.+)", re.ASCII)

KASLR_RANGES = 4  # MAX_MEMMAP_REGIONS of the kernel's decompressor

# Types of the BIOS's memory map, as memmap=...-OLD+NEW has them (asm/e820/types.h).
_E820_RAM = 1
_E820_RESERVED = 2
_E820_PMEM = (7, 12)
_E820_SOFT_RESERVED = 0xEFFFFFFF


class Kind(enum.Enum):
    """The use that a memmap= parameter gives its range."""

    RAM = "ordinary memory"
    REMOVED = "removed"
    RESERVED = "reserved"
    SOFT = "soft-reserved"
    PMEM = "persistent memory"
    OTHER = "something else"


class Reservation(NamedTuple):
    """One range of one memmap= parameter; bytes, ``end`` is not part of it."""

    start: PhysAddr
    end: PhysAddr
    kind: Kind
    parameter: str


class Piece(NamedTuple):
    """A part of a range, and the one reservation that is in force in all of it, if any.

    Bytes; ``end`` is not part of it.
    """

    start: PhysAddr
    end: PhysAddr
    reservation: Reservation | None


def parse_number(text: str) -> int:
    """Parse a number as the kernel's memparse() does: 0x hexadecimal, 0 octal, suffixes K to E.

    :raises ValueError: it is none, or there is more behind it.
    """
    match = _NUMBER.fullmatch(text)
    if match is None:
        raise ValueError(f"not a number: {text!r}")
    digits, suffix = match.groups()
    value = int(digits, 16 if digits[:2] in ("0x", "0X") else 8 if digits[0] == "0" else 10)
    return value << _SHIFT[suffix.lower()]


def format_number(number: int) -> str:
    """Format a number of bytes for :func:`parse_number`, in the largest unit that divides it."""
    for suffix, shift in (("T", 40), ("G", 30), ("M", 20), ("K", 10)):
        if number and number % (1 << shift) == 0:
            return f"{number >> shift}{suffix}"
    return str(number)


def words(command_line: str) -> list[str]:
    """Return the parameters, without quotes; those behind ``--`` are not the kernel's."""
    found = []
    for word in quoted_words(command_line):
        if word == "--":
            break
        found.append(word.replace('"', ""))
    return found


def quoted_words(command_line: str) -> list[str]:
    """Return all words as they stand there, quotes included."""
    return re.findall(r'(?:[^\s"]|"[^"]*(?:"|$))+', command_line)


def with_words(command_line: str, more: Iterable[str]) -> str:
    """Return the command line with more parameters, before what is not the kernel's (``--``)."""
    found = quoted_words(command_line)
    at = found.index("--") if "--" in found else len(found)
    return " ".join([*found[:at], *more, *found[at:]])


def values(command_line: str, name: str) -> list[str]:
    """Return the value of the parameter ``name``, each time that it is there."""
    return [w[len(name) + 1 :] for w in words(command_line) if w.startswith(f"{name}=")]


# ---------------------------------------------------------------------------- memmap=


def reservations(command_line: str) -> list[Reservation]:
    """Return the ranges that memmap= parameters change, in order; a later one overrides."""
    found = []
    for value in values(command_line, "memmap"):
        for text in value.split(","):
            one = _parse_memmap(text)
            if one is not None:
                found.append(one)
    return found


def _parse_memmap(text: str) -> Reservation | None:
    match = _MEMMAP.fullmatch(text)
    if match is None:
        return None  # exactmap, or a limit
    size_text, sign, rest = match.groups()
    kind: Kind | None
    try:
        size = parse_number(size_text)
        if sign == "%":
            place = re.split(r"[-+]", rest, maxsplit=1)[0]
            start = parse_number(place)
            kind = _kind_of_change(rest[len(place) :])
        else:
            start = parse_number(rest)
            kind = {"$": Kind.RESERVED, "!": Kind.PMEM, "@": Kind.RAM}.get(sign, Kind.OTHER)
    except ValueError:
        return None
    if kind is None or not size:
        return None
    return Reservation(PhysAddr(start), PhysAddr(start + size), kind, f"memmap={text}")


def _kind_of_change(change: str) -> Kind | None:
    """Return the kind for ``-OLD+NEW`` behind ``SIZE%START``; None if RAM stays RAM."""
    match = _CHANGE.fullmatch(change)
    if match is None:
        raise ValueError(f"not a change: {change!r}")
    old, new = (0 if number is None else int(number, 0) for number in match.groups())
    if old not in (0, _E820_RAM):
        return None
    if not new:
        return Kind.REMOVED
    kinds = {_E820_RAM: Kind.RAM, _E820_RESERVED: Kind.RESERVED, _E820_SOFT_RESERVED: Kind.SOFT}
    return kinds.get(new, Kind.PMEM if new in _E820_PMEM else Kind.OTHER)


def coverage(found: list[Reservation], start: PhysAddr, end: PhysAddr) -> list[Piece]:
    """Cut ``start`` to ``end`` where another reservation, or none, is in force."""
    edges = {start, end}
    edges.update(e for r in found for e in (r.start, r.end) if start < e < end)
    pieces: list[Piece] = []
    cuts = sorted(edges)
    for low, high in itertools.pairwise(cuts):
        one = next((r for r in reversed(found) if r.start <= low and high <= r.end), None)
        if pieces and pieces[-1].reservation == one:
            pieces[-1] = Piece(pieces[-1].start, high, one)
        else:
            pieces.append(Piece(low, high, one))
    return pieces


def kaslr_danger(command_line: str) -> str | None:
    """Return the memmap= parameter into whose range KASLR may put the kernel; None: it cannot.

    It takes memmap=SIZE%START for a limit of SIZE, and gives up with more than four ranges
    (parse_memmap() and mem_avoid_memmap() in arch/x86/boot/compressed/kaslr.c).
    """
    found = values(command_line, "memmap")
    ranges = [text for value in found for text in value.split(",")]
    if "nokaslr" in words(command_line) or len(ranges) > KASLR_RANGES:
        return None
    for text in ranges:
        match = _MEMMAP.fullmatch(text)
        if match is None or match[2] != "%":
            continue
        try:
            size = parse_number(match[1])
            start = parse_number(re.split(r"[-+]", match[3], maxsplit=1)[0])
        except ValueError:
            continue
        if size > start:
            return f"memmap={text}"
    return None


def spares_dax(command_line: str) -> list[str]:
    """Return the parameters that keep the kernel from making ordinary memory of dax devices.

    Soft-reserved memory is meant for the module kmem, which takes it as soon as it is loaded.
    """
    found = []
    for word in words(command_line):
        name, _, value = word.partition("=")
        listed = value.replace("-", "_").split(",")
        if (name in ("modprobe.blacklist", "module_blacklist") and "kmem" in listed) or (
            name == "dax_hmem.region_idle" and value[:1] in ("", *"1yYtT")
        ):
            found.append(word)
    return found


# ---------------------------------------------------------------------------- pkernfs=


class Named(NamedTuple):
    """One region of pkernfs=; ``name`` is None where it has none."""

    name: str | None
    spec: str


def named_regions(command_line: str) -> list[Named]:
    """Return the regions that pkernfs= parameters name, in order.

    :raises RegionError: a parameter without a value, or two regions of one name.
    """
    found: list[Named] = []
    for value in values(command_line, "pkernfs"):
        match = _NAMED.fullmatch(value)
        one = Named(match[1], match[2]) if match else Named(None, value)
        if not one.spec:
            raise RegionError("pkernfs=: empty on the kernel command line: expected SIZE!START")
        if one.name is not None and any(other.name == one.name for other in found):
            raise RegionError(f"pkernfs={value}: the name is there twice")
        found.append(one)
    return found
