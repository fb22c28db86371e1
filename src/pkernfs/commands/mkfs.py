"""``mkfs.pkernfs``: make a pkernfs in a region, and the file for it where asked.

Without ``-f`` it formats an empty region only. A refusal or a failure leaves the file as it was,
and leaves none where there was none.
"""

from __future__ import annotations

import argparse
import errno
import os
import stat
from typing import TYPE_CHECKING

from pkernfs.control.mounts import refuse_mount_point
from pkernfs.errors import ExistsError, RegionError, UsageError
from pkernfs.layout import MIN_REGION_BYTES, PAGE
from pkernfs.options import format_size, parse_size
from pkernfs.region.spec import BASE, did_you_mean, dir_of, is_file_spec, resolve

if TYPE_CHECKING:
    from pkernfs.layout import PoolFields
    from pkernfs.region.region import Region

_MAX_LABEL_BYTES = 64


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of mkfs.pkernfs."""
    parser.add_argument(
        "-L",
        "--label",
        metavar="LABEL",
        default="",
        help="name the file system; up to 64 bytes of UTF-8.",
    )
    parser.add_argument(
        "-s",
        "--size",
        metavar="SIZE",
        help="make the file REGION of SIZE bytes (K, M, G and T are powers of 1024), or extend an "
        "empty file to SIZE. A file of another size is refused; -f extends it, but never cuts "
        "it.",
    )
    parser.add_argument(
        "-f",
        "--force",
        action="store_true",
        help="format a region even if it holds a pkernfs, another file system or other data; never "
        "one that is mounted.",
    )
    parser.add_argument(
        "region",
        metavar="REGION",
        help="the region to format: SIZE!START, /dev/daxX.Y, none, a file on hugetlbfs, tmpfs or a "
        "disk, or a directory on hugetlbfs or tmpfs; see pkernfs(8). In a directory, -s is the "
        "size of the base range, and files of 2 MiB or more get memory of their own beside it; of "
        "a dax device, too.",
    )


def run(args: argparse.Namespace) -> int:
    """Format ``args.region``, and print its size and label."""
    label = _checked_label(args.label)
    size = None if args.size is None else _checked_size(args.size)
    refuse_mount_point(args.region)
    if not is_file_spec(args.region):
        return _report(args.region, _format_physical(args.region, label, size, args.force), label)
    directory = dir_of(args.region)
    if directory is not None:
        return _run_in_directory(directory, args.region, label, size, args.force)
    return _report(args.region, _format_file(args.region, label, size, args.force), label)


def _format_physical(region: str, label: str, size: int | None, force: bool) -> int:
    """Format a region in physical memory; of a dax device, ``size`` bytes are the base range."""
    if size is None:
        return _format(region, label, force)
    from pkernfs.host.sysroot import HOST
    from pkernfs.region.dax import device_name

    name = device_name(resolve(region), HOST)
    if name is None:
        raise UsageError(
            f"-s: {region} has a size of its own; -s is for files, directories and dax devices"
        )
    from pkernfs.layout import BLOCK, POOL_DAX, PoolFields
    from pkernfs.region.dax_making import keep_base
    from pkernfs.region.region import Region

    if not force:
        with Region.open(region, write=True) as opened:
            _refuse_content(opened)
    keep_base(name, size, HOST)
    return _format(region, label, force, PoolFields(POOL_DAX, BLOCK))


def _refuse_content(region: Region) -> None:
    """:raises ExistsError: the region holds something, so that only -f formats it."""
    from pkernfs.fs.mkfs import Content, probe

    if (found := probe(region)).content is not Content.EMPTY:
        raise ExistsError(
            f"{region.name}: not formatted: it holds {found.what}; -f overwrites that"
        )


def _run_in_directory(
    directory: str, region: str, label: str, size: int | None, force: bool
) -> int:
    """Format the base range in a directory, which is the pool of segments from then on.

    Segments of an earlier file system go if forced, after the base range that knew them.
    """
    from pkernfs.layout import POOL_DIRECTORY, PoolFields
    from pkernfs.pool.directory import DirectoryPool

    pool = DirectoryPool.at(directory)
    try:
        segments = pool.segment_names()
        if segments and not force:
            raise ExistsError(
                f"{region}: not formatted: it holds {segments[0]} of a pkernfs"
                f"{f' and {len(segments) - 1} more' if segments[1:] else ''}; -f removes them"
            )
        fields = PoolFields(POOL_DIRECTORY, pool.granule)
        made = _format_file(os.path.join(directory, BASE), label, size, force, fields)
        for name in segments:
            pool.remove(name)
    finally:
        pool.close()
    return _report(region, made, label)


def _format_file(
    path: str, label: str, size: int | None, force: bool, pool: PoolFields | None = None
) -> int:
    """Make or extend the file of a region, and format it; return its size in bytes."""
    before = _file_size(path)
    _resize(path, before, size, force)
    try:
        return _format(path, label, force, pool)
    except BaseException:
        _restore(path, before)
        raise


def _report(region: str, made: int, label: str) -> int:
    print(f"{region}: {format_size(made)}" + (f", label {label}" if label else ""))
    return 0


def _format(path: str, label: str, force: bool, pool: PoolFields | None = None) -> int:
    """Format a region that may be formatted; return its size in bytes."""
    from pkernfs.fs.mkfs import make_filesystem
    from pkernfs.layout import NO_POOL
    from pkernfs.region.region import Region

    with Region.open(path, write=True) as region:
        if not force:
            _refuse_content(region)
        make_filesystem(region, label=label, pool=pool or NO_POOL)
        return region.size


def _checked_label(label: str) -> str:
    if len(os.fsencode(label)) > _MAX_LABEL_BYTES or not label.isprintable():
        raise UsageError(
            f"bad label: got {label!r}, expected up to {_MAX_LABEL_BYTES} bytes of printable text"
        )
    return label


def _checked_size(text: str) -> int:
    size = parse_size(text)
    if size < MIN_REGION_BYTES:
        raise UsageError(f"bad size: got {text}, expected {format_size(MIN_REGION_BYTES)} or more")
    if size % PAGE:
        raise UsageError(f"bad size: got {text}, expected a multiple of {PAGE} bytes")
    return size


def _file_size(path: str) -> int | None:
    """Return a file's size in bytes; None for no file, 0 for one that Region.open refuses."""
    try:
        info = os.stat(path)
    except FileNotFoundError:
        return None
    return info.st_size if stat.S_ISREG(info.st_mode) else 0


def _resize(path: str, before: int | None, size: int | None, force: bool) -> None:
    """Make the file, or extend it to ``size`` bytes, where that harms nobody."""
    from pkernfs.region.backing import dangling_link
    from pkernfs.region.region import Region

    if before is None:
        why = dangling_link(path)
        if why is not None:
            raise RegionError(f"{path}: cannot create: {why}", errno.ENOENT)
        if size is None:
            hint = did_you_mean(path) or "; -s SIZE makes one"
            raise RegionError(f"{path}: cannot open: no such file{hint}")
        Region.create(path, size)
    elif size is not None and size != before and os.path.isfile(path):
        if size < before or (before and not force):
            hint = "it is never cut" if size < before else "-f extends it"
            raise RegionError(f"{path}: has another size: got {before}, expected {size}; {hint}")
        if before >= PAGE:
            Region.open(path, write=True).close()  # nobody may have it mounted
        _truncate(path, size)


def _restore(path: str, before: int | None) -> None:
    """Undo what :func:`_resize` did."""
    if before is None:
        if os.path.exists(path):
            os.unlink(path)
    elif os.path.isfile(path) and os.path.getsize(path) > before:
        _truncate(path, before)


def _truncate(path: str, size: int) -> None:
    try:
        os.truncate(path, size)
    except OSError as e:
        raise RegionError(f"{path}: cannot size: {e.strerror}", e.errno or 0) from e
