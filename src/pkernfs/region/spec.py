"""Region specs: the text by which a command names a region; nothing is opened here.

A region spec, the first argument of every command, is ``SIZE!START`` (through /dev/mem),
``/dev/daxX.Y``, a file, a directory (the file ``base`` in it, beside its segments), or ``none``
(``none:NAME``) for what ``pkernfs=`` on the kernel command line names.
"""

from __future__ import annotations

import errno
import os
import re

from pkernfs.errors import RegionError
from pkernfs.host import cmdline
from pkernfs.host.cmdline import Named
from pkernfs.host.iomem import Span
from pkernfs.host.sysroot import HOST, Host
from pkernfs.layout import BLOCK
from pkernfs.quantities import PhysAddr

#: The file in a directory of segments that is the region (docs/format.md, section 12).
BASE = "base"
_ADDRESS_BITS = 52  # as many as a page-table entry has
_NONE = re.compile(r"none(:.*)?", re.DOTALL)
_PHYSICAL = re.compile(r"(\d\w*)!(\d\w*)", re.ASCII)
_NEARLY = re.compile(
    r"(\d[\da-fx]*[KMGTPE]?)(?:i?B)?\\*[!$%@#:+-](\d[\da-fx]*[KMGTPE]?)(?:i?B)?",
    re.ASCII | re.IGNORECASE,
)
_DEVICE = re.compile(r"/dev/(dax|mem)\S*", re.ASCII)


def resolve(spec: str, host: Host = HOST) -> str:
    """Return a spec that means the same in another directory, in the one way to write it.

    ``none`` becomes what ``pkernfs=`` names; file names become absolute; a directory becomes the
    file in it.

    :raises RegionError: no such region on the kernel command line, or no such kind of region; a
        directory without a region.
    """
    if _NONE.fullmatch(spec):
        spec = resolve_none(spec, host.command_line())
    _refuse_several(spec)
    if looks_physical(spec):
        return str(parse_span(spec))
    return os.path.realpath(file_of(spec))


def is_file_spec(spec: str) -> bool:
    """Tell whether a spec names a file region: one that can be made, sized and removed."""
    if _NONE.fullmatch(spec) or looks_physical(spec) or _is_several(spec):
        return False
    return not _DEVICE.fullmatch(os.path.realpath(spec))


def dir_of(spec: str) -> str | None:
    """Return the directory, there or not, that a file spec names; None: it names no directory."""
    names_one = spec.endswith("/") or os.path.isdir(spec)
    return os.path.realpath(spec) if names_one and is_file_spec(spec) else None


def file_of(spec: str) -> str:
    """Return the file that a file spec names: in a directory it is ``base``; else the spec itself.

    :raises RegionError: there is no such directory, or no such file in it.
    """
    if not spec.endswith("/") and not os.path.isdir(spec):
        return spec
    path = os.path.join(spec, BASE)
    if not os.path.isdir(spec):
        raise RegionError(f"{spec}: not a region: no such directory", errno.ENOENT)
    if not os.path.lexists(path):
        why = f"it is a directory without a file named {BASE}"
        raise RegionError(f"{spec}: not a region: {why}", errno.EISDIR)
    return path


def _refuse_several(spec: str) -> None:
    """Refuse a list of ranges.

    :raises RegionError: it is one.
    """
    if _is_several(spec):
        raise RegionError(f"{spec}: several ranges in one file system are not there yet: give one")


def _is_several(spec: str) -> bool:
    """A list with any part that is no file's name; the name of a file may have commas."""
    parts = spec.split(",")
    known = any(looks_physical(part) or _DEVICE.fullmatch(part) for part in parts)
    return len(parts) > 1 and known and not os.path.lexists(spec)


# ---------------------------------------------------------------------------- SIZE!START


def looks_physical(spec: str) -> bool:
    """Tell whether ``spec`` is meant to be SIZE!START, right or wrong."""
    return _PHYSICAL.fullmatch(spec) is not None


def parse_span(spec: str) -> Span:
    """Return the range of ``SIZE!START``, numbers as on the kernel command line.

    :raises RegionError: no such spec, unaligned, or beyond any address.
    """
    match = _PHYSICAL.fullmatch(spec)
    try:
        if match is None:
            raise ValueError
        size, start = (cmdline.parse_number(text) for text in match.groups())
    except ValueError:
        hint = did_you_mean(spec) or ", as in 1G!4G"
        raise RegionError(f"{spec}: bad region: expected SIZE!START{hint}") from None
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
    return Span(PhysAddr(start), size)


def did_you_mean(spec: str) -> str:
    """Return a hint for what is nearly ``SIZE!START``: units as people write them, memmap='s signs.

    Empty if there is no such region either.
    """
    match = _NEARLY.fullmatch(os.path.basename(spec))
    meant = match and f"{match[1]}!{match[2]}"
    if not meant or meant == spec:
        return ""
    try:
        span = parse_span(meant)
    except RegionError:
        return ""
    return f" (did you mean {span}?)"


# ---------------------------------------------------------------------------- none


def resolve_none(spec: str, command_line: str) -> str:
    """Return the region spec that ``none`` or ``none:NAME`` stands for.

    :raises RegionError: there is no such region on the command line, or several for ``none``.
    """
    found = cmdline.named_regions(command_line)
    if not found:
        raise RegionError(
            f"{spec}: no pkernfs= on the kernel command line: "
            "boot with pkernfs=SIZE!START memmap=SIZE%START"
        )
    if spec != "none":
        name = spec.removeprefix("none:")
        for one in found:
            if one.name == name:
                return one.spec
        raise RegionError(f"{spec}: no region of that name in pkernfs=: expected {_choices(found)}")
    candidates = found if len(found) == 1 else [one for one in found if one.name is None]
    if len(candidates) != 1:
        raise RegionError(f"none: pkernfs= names {len(found)} regions: expected {_choices(found)}")
    return candidates[0].spec


def _choices(found: list[Named]) -> str:
    return " or ".join(one.spec if one.name is None else f"none:{one.name}" for one in found)
