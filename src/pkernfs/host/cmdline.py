"""The kernel's command line: its words, numbers, the names of ``pkernfs=``.

:mod:`pkernfs.host.memmap` has what the kernel makes of ``memmap=``, by the kernel's own rules.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from pkernfs.errors import RegionError

_NUMBER = re.compile(r"(0[xX][0-9a-fA-F]+|[0-9]+)([KMGTPEkmgtpe]?)", re.ASCII)
_SHIFT = {"": 0, "k": 10, "m": 20, "g": 30, "t": 40, "p": 50, "e": 60}
_BLACKLISTS = ("modprobe.blacklist", "module_blacklist")  # kmod's, and the kernel's
_TRUE = ("", *"1yYtT")  # kstrtobool(); a parameter without a value is true
_NAMED = re.compile(r"([A-Za-z_][\w.-]*):(.+)", re.ASCII)


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
    split = (word.partition("=") for word in words(command_line))
    return [value for found, equals, value in split if equals and _plain(found) == name]


def _plain(name: str) -> str:
    """Return the name of a parameter with ``_`` for each ``-``, as parameq() compares names."""
    return name.replace("-", "_")


def spares_dax(command_line: str) -> list[str]:
    """Return the parameters that keep the kernel from making ordinary memory of dax devices.

    Soft-reserved memory is meant for the module kmem, which takes it as soon as it is loaded.
    """
    found = []
    for word in _in_force(command_line):
        written, _, value = word.partition("=")
        name = _plain(written)
        if (name in _BLACKLISTS and "kmem" in _listed(value)) or (
            name == "dax_hmem.region_idle" and value[:1] in _TRUE
        ):
            found.append(word)
    return found


def _in_force(command_line: str) -> list[str]:
    """Return the parameters, of each name the last one; all of modprobe's own."""
    found = words(command_line)
    last = {_plain(word.partition("=")[0]): number for number, word in enumerate(found)}
    return [
        word
        for number, word in enumerate(found)
        if (name := _plain(word.partition("=")[0])) == _BLACKLISTS[0] or last[name] == number
    ]


def _listed(value: str) -> list[str]:
    return value.replace("-", "_").split(",")


def hides_dax(command_line: str) -> str | None:
    """Return the parameter by which soft-reserved memory becomes no device; None: there is none.

    ``device_hmem.disable`` (drivers/dax/hmem/device.c), or no driver for it.
    """
    for word in _in_force(command_line):
        written, _, value = word.partition("=")
        name = _plain(written)
        if name == "device_hmem.disable" and value[:1] in _TRUE:
            return word
        if name in _BLACKLISTS and {"dax_hmem", "device_dax"} & set(_listed(value)):
            return word
    return None


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
