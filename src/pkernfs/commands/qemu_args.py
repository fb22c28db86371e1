"""``pkernfs qemu-args``: print the options with which QEMU maps a file in the region itself.

Through the mount, guest memory would be in the kernel's page cache: a second copy, which devices
and the next kernel do not see. ``memory-backend-file`` maps a file's segment as a whole. Of a file
without one it maps the region at the file's place: with ``offset=`` (QEMU 8.1 and later), and the
file must be one piece there. The plain path of a native file leads to its segment, and QEMU gets
that path: it is the same for every kernel, whatever number a device has there.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shlex
import shutil
import stat
import sys
from typing import Any, NamedTuple

from pkernfs.commands.extents import read_extents
from pkernfs.commands.path import check_there
from pkernfs.control.mounts import Mount, beneath, mount_of, mount_with_native
from pkernfs.errors import (
    InvalidError,
    NotFoundError,
    NotSupportedError,
    PermissionDeniedError,
    ReadOnlyError,
    UsageError,
)
from pkernfs.fuse import segment_xattr
from pkernfs.fuse.extents_xattr import Extent
from pkernfs.fuse.segment_xattr import SegmentInfo
from pkernfs.host import qemu
from pkernfs.options import format_size
from pkernfs.quantities import FileSpan, RegionOff
from pkernfs.region.spec import looks_physical, parse_span

QEMU = "qemu-system-x86_64"
#: The ids that QEMU accepts for an object.
_ID = re.compile(r"[A-Za-z][A-Za-z0-9._-]*")
_BLOCK = 2 << 20


class MemPath(NamedTuple):
    """A file or device that QEMU can map, and the offset of the region's first byte in it.

    Offset, size and address of a mapping must be multiples of ``align``. All in bytes.
    """

    path: str
    start: int
    align: int


class Qemu(NamedTuple):
    """A program that is a QEMU, and its version, as in ``8.2.1``."""

    path: str
    version: str


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``pkernfs qemu-args``."""
    parser.add_argument(
        "--id",
        default="pkernfs",
        metavar="ID",
        help="the name of the memory object; pkernfs if not given.",
    )
    parser.add_argument(
        "--qemu",
        default=QEMU,
        metavar="PATH",
        help=f"the QEMU whose version is checked; {QEMU} if not given.",
    )
    parser.add_argument(
        "--live-update",
        action="store_true",
        help="refuse a QEMU with which the guest cannot be saved by cpr-reboot, too.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON.")
    parser.add_argument("file", metavar="FILE", help="a file on a pkernfs mount.")


def run(args: argparse.Namespace) -> int:
    """Print the options for ``args.file``."""
    if not _ID.fullmatch(args.id):
        raise UsageError(f"bad id: got {args.id!r}, expected a letter, then letters, digits, ._-")
    facts = describe(args.file, args.id)
    facts["qemu"], facts["qemu_version"] = check_qemu(
        args.qemu, offset=facts["segment"] is None, live_update=args.live_update
    )
    text = json.dumps(facts, indent=2) if args.json else shlex.join(facts["args"])
    sys.stdout.flush()
    sys.stdout.buffer.write(os.fsencode(text) + b"\n")  # a path may be no text
    return 0


def describe(file: str, object_id: str) -> dict[str, Any]:
    """Build the JSON of ``pkernfs qemu-args`` but for the facts about QEMU itself.

    :raises PkernfsError: the file cannot be mapped as guest memory; with the remedy.
    """
    place = _by_plain_path(file) or _by_segment_or_offset(file)
    offset = {} if place.offset is None else {"offset": place.offset}
    memory = {
        "qom-type": "memory-backend-file",
        "id": object_id,
        "size": place.size,
        "mem-path": place.path,
        **offset,
        "align": place.align,
        "share": True,
    }
    return {
        "file": file,
        "region": place.region,
        "region_offset": place.region_offset,
        "segment": place.segment,
        "object": memory,
        "args": ["-object", _option(memory), "-machine", f"memory-backend={object_id}"],
    }


class Place(NamedTuple):
    """What QEMU is to map of a file: ``path``, from ``offset`` on; None: as a whole.

    ``segment`` is the number of the file's segment, None if it has none or that cannot be seen.
    """

    region: str
    path: str
    size: int
    align: int
    segment: int | None = None
    region_offset: RegionOff | None = None
    offset: int | None = None


def _by_plain_path(file: str) -> Place | None:
    """Return the place of a native file, whose plain path leads to its segment; None: of another.

    The segment says all itself, so whoever may open it may ask.

    :raises PkernfsError: it cannot be mapped as guest memory.
    """
    mount = mount_with_native(file)
    if mount is None:
        return None
    info = os.stat(file)
    number = None
    with contextlib.suppress(PermissionDeniedError), beneath(file) as below:
        segment = segment_xattr.read(below)
        if segment is not None:
            number = segment.number
            _check_units(file, os.stat(below).st_size, segment)
    size, align = info.st_size, info.st_blksize
    if stat.S_ISCHR(info.st_mode):
        size = _dax_number(info.st_rdev, "size") or 0
        align = _dax_number(info.st_rdev, "align") or 0
    if not size:
        raise NotSupportedError(f"{file}: cannot be mapped by QEMU: its segment has no size")
    return Place(mount.source, os.path.abspath(file), size, max(_BLOCK, align), number)


def _by_segment_or_offset(file: str) -> Place:
    """Return the place of a file that is not native: its native path, or where in the region it is.

    :raises PkernfsError: it cannot be mapped as guest memory.
    """
    mount, size = _check_file(file)
    segment = segment_xattr.read(file)
    if segment is not None:
        check_there(file, segment)
        _check_units(file, size, segment)
        return Place(mount.source, segment.path, size, segment.granule, segment.number)
    found = mem_path_of(mount.source)
    region_offset = _one_piece(file, size, found)
    offset = found.start + region_offset
    return Place(
        mount.source, found.path, size, found.align, region_offset=region_offset, offset=offset
    )


def _option(memory: dict[str, Any]) -> str:
    """Write the argument of -object. QEMU's escape of a comma in a value is two commas."""
    words = [str(memory["qom-type"])]
    for name, value in memory.items():
        if name != "qom-type":
            text = "on" if value is True else str(value).replace(",", ",,")
            words.append(f"{name}={text}")
    return ",".join(words)


# ------------------------------------------------------------------------------- the file


def _check_file(file: str) -> tuple[Mount, int]:
    """Return the file's mount and size in bytes; flush what mappings through the mount stored.

    :raises PkernfsError: it is in no pkernfs, or cannot be guest memory.
    """
    mount = mount_of(file)
    if mount is None:
        raise NotSupportedError(f"{file}: cannot be mapped by QEMU: it is not on a pkernfs mount")
    info = os.stat(file)
    if not stat.S_ISREG(info.st_mode):
        raise InvalidError(f"{file}: cannot be guest memory: it is not a regular file")
    inside = os.path.relpath(os.path.realpath(file), mount.mount_point)
    if inside.startswith("iommu/"):
        raise InvalidError(f"{file}: cannot be guest memory: it holds the tables of an IOMMU")
    if not info.st_size:
        raise InvalidError(f"{file}: it is empty: truncate -s SIZE {_word(file)}")
    if info.st_size % _BLOCK:
        whole = -(-info.st_size // _BLOCK) * _BLOCK
        raise InvalidError(
            f"{file}: its size is no multiple of 2 MiB: got {info.st_size} bytes: "
            f"truncate -s {whole} {_word(file)}"
        )
    if os.statvfs(file).f_flag & os.ST_RDONLY:
        raise ReadOnlyError(f"{file}: it is mounted read-only, and a guest writes its memory")
    fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
    return mount, info.st_size


def _check_units(file: str, size: int, segment: SegmentInfo) -> None:
    """:raises InvalidError: QEMU could not map the segment as guest memory, and the remedy."""
    if size % segment.granule:
        whole = -(-size // segment.granule) * segment.granule
        raise InvalidError(
            f"{file}: its size is no multiple of {format_size(segment.granule)}: got {size} bytes: "
            f"truncate -s {whole} {_word(file)}"
        )


def _one_piece(file: str, size: int, place: MemPath) -> RegionOff:
    """Return the region offset of the file's one piece.

    :raises InvalidError: the file has holes, is in several pieces, or is not aligned.
    """
    pieces = join(list(read_extents(file)))
    allocated = sum(piece.length for piece in pieces)
    if allocated < size:
        raise InvalidError(
            f"{file}: {format_size(size - allocated)} of it are holes: "
            f"fallocate -l {size} {_word(file)}"
        )
    if len(pieces) > 1:
        raise InvalidError(f"{file}: it is in {len(pieces)} pieces: {_mend(file, size)}")
    region_offset = pieces[0].region_offset
    where = place.start + region_offset
    if region_offset % _BLOCK:
        raise InvalidError(f"{file}: it is not in 2 MiB blocks: {_mend(file, size)}")
    if where % place.align or size % place.align:
        raise NotSupportedError(
            f"{file}: cannot be mapped in units of {format_size(place.align)}, as "
            f"{place.path} needs: got {format_size(size)} at {where:#x}"
        )
    return region_offset


def join(extents: list[Extent]) -> list[FileSpan]:
    """Join extents that are neighbours in the region, wherever they are in physical memory."""
    pieces: list[FileSpan] = []
    for offset, length, region_offset, _ in extents:
        last = pieces[-1] if pieces else None
        if last and (offset, region_offset) == (
            last.offset + last.length,
            last.region_offset + last.length,
        ):
            pieces[-1] = last._replace(length=last.length + length)
        else:
            pieces.append(FileSpan(offset, length, region_offset))
    return pieces


def _mend(file: str, size: int) -> str:
    """Return the command that puts the file into one piece, if there is room for one.

    A new file that gets its size at once is laid out at once; dd must not cut it first.
    """
    new = f"{file}.new"
    while os.path.lexists(new):
        new += "~"
    old_word, new_word = _word(file), _word(new)
    return (
        f"cp --attributes-only --preserve=all {old_word} {new_word} && "
        f"truncate -s {size} {new_word} && "
        f"dd if={old_word} of={new_word} bs=1M conv=notrunc status=none && "
        f"mv {new_word} {old_word} (needs {format_size(size)} free in one run)"
    )


def _word(path: str) -> str:
    """Quote a path for a shell command, so that it is no option."""
    return shlex.quote(f"./{path}" if path.startswith("-") else path)


# ------------------------------------------------------------------------------- the region


def mem_path_of(source: str) -> MemPath:
    """Return what QEMU must open for the region ``source``, as the mount table names it.

    :raises PkernfsError: the region is gone, or cannot be mapped as one.
    """
    if looks_physical(source):
        return MemPath("/dev/mem", parse_span(source).start, _BLOCK)
    try:
        info = os.stat(source)
    except FileNotFoundError:
        raise NotFoundError(
            f"{source}: cannot be mapped by QEMU: the region's file has lost its name"
        ) from None
    if stat.S_ISCHR(info.st_mode):
        return MemPath(source, 0, max(_BLOCK, _dax_number(info.st_rdev, "align") or 0))
    # st_blksize is the page size on hugetlbfs, and 4 KiB or so elsewhere.
    return MemPath(source, 0, max(_BLOCK, info.st_blksize))


def _dax_number(device: int, name: str) -> int | None:
    """Read a number in bytes that the kernel tells of a dax device; None: it is no such device."""
    path = f"/sys/dev/char/{os.major(device)}:{os.minor(device)}/{name}"
    try:
        with open(path, encoding="ascii") as file:
            return int(file.read())
    except FileNotFoundError:
        return None


# ------------------------------------------------------------------------------- QEMU


def check_qemu(command: str, *, offset: bool = True, live_update: bool = False) -> Qemu:
    """Return path and version of a QEMU that is new enough, for a live update if that is wanted.

    :param offset: it is to map a file at an offset.

    :raises NotFoundError: there is no such program.
    :raises NotSupportedError: it is too old, or no QEMU.
    """
    path = shutil.which(command)
    if path is None:
        raise NotFoundError(
            f"{command}: no such program: apt-get install qemu-system-x86, or give --qemu PATH"
        )
    said = qemu.version_line(path)
    version = qemu.parse_version(said)
    if version is None:
        raise NotSupportedError(f"{path}: does not tell a version of QEMU: got {said!r}")
    major, minor, *_ = map(int, version.split("."))
    needed, what = qemu.OLDEST_PLAIN, "memory-backend= of -machine"
    if offset:
        needed, what = qemu.OLDEST, "offset= of memory-backend-file"
    if live_update:
        needed, what = qemu.OLDEST_CPR, "cpr-reboot"
    if (major, minor) < needed:
        oldest = ".".join(map(str, needed))
        raise NotSupportedError(
            f"{path}: too old: got QEMU {version}, expected {oldest} or later ({what}): install "
            "that of Debian 13 or of bookworm-backports, or give --qemu PATH"
        )
    return Qemu(path, version)
