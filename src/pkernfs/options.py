"""Parsers of byte counts and of ``-o`` mount options.

They return numbers and dictionaries. Other modules act on the options.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from pkernfs.errors import NotSupportedError, UsageError
from pkernfs.quantities import PhysAddr

_SIZE = re.compile(r"(0[xX][0-9a-fA-F]+|[0-9]+)([KMGTkmgt]?)(iB)?", re.ASCII)
_DECIMAL = re.compile(r"([0-9]+[KMGT])B", re.ASCII | re.IGNORECASE)
_SHIFT = {"": 0, "k": 10, "m": 20, "g": 30, "t": 40}
_MAX_SIZE = (1 << 63) - 1
_MAX_DIGITS = 100
_ADDRESS_BITS = 52  # as many physical address bits as a page-table entry has
_PAGE = 4096


def parse_size(text: str, what: str = "size") -> int:
    """Parse a byte count: decimal or 0x, with K, M, G or T for powers of 1024, also as KiB.

    ``GB`` is a power of 1000 elsewhere, and refused.

    :raises UsageError: ``text`` is something else, or above a signed 64-bit integer.
    """
    match = _SIZE.fullmatch(text)
    if match is None or (match[3] and not match[2]):
        meant = _DECIMAL.fullmatch(text)
        hint = f" (did you mean {meant[1]}?)" if meant else ""
        raise UsageError(
            f"bad {what}: got {text!r}, expected a number with K, M, G or T, or 0x{hint}"
        )
    number, suffix, _unit = match.groups()
    if len(number) <= _MAX_DIGITS:  # int() has a limit of its own
        size = int(number, 16 if number[:2] in ("0x", "0X") else 10) << _SHIFT[suffix.lower()]
        if size <= _MAX_SIZE:
            return size
    raise UsageError(f"bad {what}: got {text!r}, expected less than 2^63")


def format_size(size: int) -> str:
    """Write ``size`` bytes in the largest unit that it reaches, with at most one decimal."""
    for unit, shift in (("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if size >= 1 << shift:
            exact = size / (1 << shift)
            return f"{exact:.0f} {unit}" if exact.is_integer() else f"{exact:.1f} {unit}"
    return f"{size} bytes"


class MountOption(NamedTuple):
    """A mount option of pkernfs's own; ``value`` names its argument."""

    name: str
    value: str | None
    help: str


#: In the order of the manual page.
MOUNT_OPTIONS = (
    MountOption(
        "ro", None, "refuse every change through the mount; store nothing into the region."
    ),
    MountOption(
        "mkfs",
        None,
        "format the region if it has no trace of a pkernfs (its first blocks are all zero). A "
        "damaged pkernfs, another file system or other data is never formatted.",
    ),
    MountOption(
        "verify",
        None,
        "after a handover with digests: compare the data of all files before the mount answers. "
        "Without it the daemon compares while it serves.",
    ),
    MountOption(
        "phys_base",
        "ADDR",
        "use ADDR as the physical address of the region's first byte. For a region without "
        "physical addresses (an image, a test). Decimal or 0x, a multiple of 4096.",
    ),
    MountOption(
        "allow_other",
        None,
        "let all users use the mount, within its permissions. Without it only the user who mounts "
        "may use it; not even root may.",
    ),
    MountOption(
        "default_permissions",
        None,
        "have the kernel check permissions by mode and owner. Always on; accepted for mount(8).",
    ),
    MountOption(
        "cache",
        "MODE",
        "open files with direct I/O (direct), through the kernel's page cache (page), or let "
        "pkernfs choose (auto, the default). See docs/coherence.md.",
    ),
    MountOption(
        "segments",
        "yes|no",
        "on a region with a pool: give a file a segment when truncate or fallocate first gives it "
        "2 MiB or more (yes, the default), or only if `pkernfs segment FILE on` has said so (no).",
    ),
    MountOption(
        "spin",
        "MICROSECONDS",
        "poll so long for the next request before sleeping; 100 if not given.",
    ),
)
_CHOICES = {"cache": ("auto", "direct", "page"), "segments": ("yes", "no")}
_MAX_SPIN_MICROSECONDS = 1_000_000

#: Options that the kernel's VFS handles; they are passed on unchanged.
VFS_OPTIONS = frozenset(
    "rw dev nodev suid nosuid exec noexec atime noatime diratime nodiratime relatime norelatime "
    "strictatime nostrictatime sync async dirsync symfollow nosymfollow".split()
)

#: Options for mount(8), systemd and /etc/fstab; they have no effect here.
IGNORED_OPTIONS = frozenset(
    "defaults auto noauto user nouser users nousers owner noowner group nogroup _netdev nofail "
    "lazytime nolazytime silent loud iversion noiversion mand nomand".split()
)
#: Options of the VFS that have a value.
_VFS_PREFIXES = ("context=", "fscontext=", "defcontext=", "rootcontext=")
_IGNORED_PREFIXES = ("x-", "X-", "comment=", "user=", "fsname=", "subtype=")


def parse_mount_options(texts: list[str]) -> dict[str, bool | int | str]:
    """Parse the arguments of all ``-o``, in their order; the last option of a kind wins.

    Flags become True; ``phys_base`` and ``spin`` become numbers. Options of the VFS are flags too.
    Options for mount(8) and systemd are left out.

    :raises UsageError: an option is not known; a value is missing, bad or superfluous.
    """
    known = {option.name: option for option in MOUNT_OPTIONS}
    result: dict[str, bool | int | str] = {}
    for text in (part for argument in texts for part in argument.split(",")):
        name, equals, value = text.partition("=")
        if not text or name in IGNORED_OPTIONS or text.startswith(_IGNORED_PREFIXES):
            continue
        if name in known:
            takes_value = known[name].value is not None
        elif name in VFS_OPTIONS:
            takes_value = False
        elif text.startswith(_VFS_PREFIXES):
            takes_value = True
        elif name == "remount":
            raise NotSupportedError("cannot remount: unmount, and mount with the other options")
        else:
            raise UsageError(f"unknown mount option: {text}")
        if takes_value != bool(equals):
            expected = f"{name}={known[name].value or 'VALUE'}" if takes_value else name
            raise UsageError(f"bad mount option: got {text}, expected {expected}")
        for superseded in (name, _opposite(name)):
            result.pop(superseded, None)
        result[name] = _parse_value(name, value) if takes_value else True
    return result


def _opposite(name: str) -> str:
    if name in ("ro", "rw"):
        return "rw" if name == "ro" else "ro"
    return name[2:] if name.startswith("no") else f"no{name}"


def _parse_value(name: str, value: str) -> int | str:
    if name == "phys_base":
        return _parse_phys_base(value)
    if name in _CHOICES and value not in _CHOICES[name]:
        raise UsageError(f"bad {name}: got {value!r}, expected {', '.join(_CHOICES[name])}")
    if name == "spin":
        spin = parse_size(value, "spin")
        if spin > _MAX_SPIN_MICROSECONDS:
            raise UsageError(f"bad spin: got {value}, expected up to {_MAX_SPIN_MICROSECONDS}")
        return spin
    return value


def _parse_phys_base(text: str) -> PhysAddr:
    address = parse_size(text, "phys_base")
    if address % _PAGE:
        raise UsageError(f"bad phys_base: got {text}, expected a multiple of {_PAGE}")
    if address >> _ADDRESS_BITS:
        raise UsageError(f"bad phys_base: got {text}, expected less than 2^{_ADDRESS_BITS}")
    return PhysAddr(address)
