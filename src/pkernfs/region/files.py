"""File regions: a file on hugetlbfs, tmpfs or any file system."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from typing import NamedTuple

from pkernfs.errors import NoSpaceError, RegionError
from pkernfs.host.mount_table import own_mounts
from pkernfs.host.sysroot import HOST
from pkernfs.layout import BLOCK, PAGE
from pkernfs.native._native import ffi, lib
from pkernfs.options import format_size
from pkernfs.quantities import BlockNo, BlockRun, PhysAddr, RegionOff, RegionRange
from pkernfs.region.backing import Backing, dangling_link, given_pieces, open_path
from pkernfs.region.locks import lock_file

_TMPFS = 0x01021994
_HUGETLBFS = 0x958458F6
_RAMFS = 0x858458F6
_RAM_FILE_SYSTEMS = (_TMPFS, _HUGETLBFS, _RAMFS)
_OVERLAYFS = 0x794C7630
_LEAST_ROOM = 2 * BLOCK
_SECTOR = 512


def is_in_memory(path: str) -> bool:
    """Tell whether a file is the kernel's own memory: on tmpfs, ramfs or hugetlbfs.

    False for what is not there. On an overlay the directory counts that has its changes.
    """
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        info = os.fstat(fd)
        if stat.S_ISBLK(info.st_mode) or stat.S_ISCHR(info.st_mode):
            return False  # its node is in memory, and it is not
        magic = int(lib.pk_fs_magic(fd))
        upper = _upper_directory(info.st_dev) if magic == _OVERLAYFS else None
    finally:
        os.close(fd)
    return magic in _RAM_FILE_SYSTEMS or (upper is not None and is_in_memory(upper))


def _upper_directory(device: int) -> str | None:
    """Return ``upperdir=`` of the overlay with that device number; None: it is not told."""
    for _, where, fstype, options in own_mounts(HOST):
        if fstype == "overlay" and _device_of(where) == device:
            found = [o[len("upperdir=") :] for o in options if o.startswith("upperdir=")]
            # In an initramfs' own names, it may lead back into the overlay.
            return found[0] if found and _device_of(found[0]) != device else None
    return None


def _device_of(path: str) -> int | None:
    try:
        return os.stat(path).st_dev
    except OSError:
        return None


class MemoryFile(NamedTuple):
    """What a file, or a directory, is on: the kernel's own memory, in pages of so many bytes."""

    is_huge: bool
    page_bytes: int


def memory_file(fd: int) -> MemoryFile | None:
    """Tell the memory of an open file on hugetlbfs or tmpfs; None: it is on something else."""
    magic = int(lib.pk_fs_magic(fd))
    if magic == _HUGETLBFS:
        return MemoryFile(is_huge=True, page_bytes=os.fstat(fd).st_blksize)
    return MemoryFile(is_huge=False, page_bytes=PAGE) if magic == _TMPFS else None


def punch(fd: int, start: int, end: int) -> None:
    """Zero bytes ``start`` to ``end`` of an open file; whole pages of them go back to the kernel.

    :raises OSError: the kernel refuses.
    """
    error = lib.pk_punch(fd, start, end - start)
    if error:
        raise OSError(error, os.strerror(error))


def untouched(directory: int) -> int:
    """Count the bytes of a directory's regular files that have no memory yet.

    Other threads run meanwhile. Files that come or go then may count or not.

    :param directory: a descriptor; O_PATH will do
    :raises OSError: the kernel refuses.
    """
    count = ffi.new("uint64_t *")
    error = lib.pk_untouched(directory, count)
    if error:
        raise OSError(error, os.strerror(error))
    return int(count[0])


class OpenFileBacking(Backing):
    """A file that is open already: its first ``size`` bytes, or all of it. It is closed at the end.

    Nothing is closed if this fails.

    :raises RegionError: too small to map.
    """

    def __init__(
        self, fd: int, name: str, *, size: int | None = None, phys_base: PhysAddr | None = None
    ) -> None:
        info = os.fstat(fd)
        magic = int(lib.pk_fs_magic(fd))
        page_bytes = info.st_blksize if magic == _HUGETLBFS else PAGE
        size = info.st_size if size is None else min(size, info.st_size)
        if size < page_bytes:
            raise RegionError(f"{name}: region too small: got {info.st_size} bytes")
        size -= size % page_bytes
        super().__init__(name, size, given_pieces(name, size, phys_base))
        self.fd = fd
        self.page_bytes = page_bytes
        self.in_pagemap = self._is_huge = magic == _HUGETLBFS
        self.real_addresses = self._is_huge and phys_base is None
        self.needs_sync = magic not in _RAM_FILE_SYSTEMS
        self.looks_far = magic == _TMPFS
        self._fds = [fd]

    @property
    def untouched(self) -> bool:
        """The file has no memory yet: it is all zero, and even reading it would give it some."""
        return self.fd is not None and os.fstat(self.fd).st_blocks == 0

    def known_zero(self) -> list[BlockRun]:
        """Return the blocks that lie in holes of the file."""
        blocks = self.size // BLOCK
        if self._is_huge:  # does not tell holes
            return [BlockRun(BlockNo(0), blocks)] if self.untouched else []
        runs = []
        end = 0
        for start, stop in self.data_ranges(RegionOff(0), RegionOff(self.size)):
            first = BlockNo(-(-end // BLOCK))
            if start // BLOCK > first:
                runs.append(BlockRun(first, start // BLOCK - first))
            end = stop
        first = BlockNo(-(-end // BLOCK))
        if blocks > first:
            runs.append(BlockRun(first, blocks - first))
        return runs

    def data_ranges(self, first: RegionOff, last: RegionOff) -> Iterator[RegionRange]:
        """Yield what is no hole of the file; all, if it cannot be told."""
        if self.fd is None or self._is_huge:
            yield RegionRange(first, last)
            return
        end = first
        while end < last:
            try:
                start = RegionOff(os.lseek(self.fd, end, os.SEEK_DATA))
                stop = RegionOff(os.lseek(self.fd, start, os.SEEK_HOLE))
            except OSError as e:
                if e.errno == errno.ENXIO:  # no more, or cut in between
                    return
                yield RegionRange(end, last)
                return
            if start >= last:
                return
            end = min(stop, last)
            yield RegionRange(start, end)

    def has_data(self, first: RegionOff, last: RegionOff) -> bool:
        """Tell if there is anything but a hole; so it is, if it cannot be told.

        Where the data ends is not asked: tmpfs looks at each page up to there.
        """
        if self.fd is None or self._is_huge:
            return True
        try:
            return os.lseek(self.fd, first, os.SEEK_DATA) < last
        except OSError as e:
            return e.errno != errno.ENXIO

    def reserve(self, offset: RegionOff, length: int) -> None:
        """Give memory to holes of the file.

        :raises NoSpaceError: the file system that it is on is full.
        """
        if self.fd is None or self._is_huge:  # the mapping has reserved them
            return
        for start, end in list(self._holes(offset, length)):  # tmpfs takes its time over the rest
            # Other errors (EOPNOTSUPP of remote file systems) do not say what there is room for.
            if lib.pk_reserve(self.fd, start, end - start) in (errno.ENOSPC, errno.EDQUOT):
                raise NoSpaceError(
                    f"{self.name}: a sparse file, and the file system that it is on is full"
                )

    def _holes(self, offset: RegionOff, length: int) -> Iterator[RegionRange]:
        """The holes of the file in a range, as far as can be told."""
        assert self.fd is not None
        if os.fstat(self.fd).st_blocks * _SECTOR >= self.size:
            return
        at = offset
        for start, end in self.data_ranges(offset, RegionOff(offset + length)):
            if start > at:
                yield RegionRange(at, start)
            at = end
        if at < offset + length:
            yield RegionRange(at, RegionOff(offset + length))


def sync_file_system(fd: int) -> None:
    """Have the kernel write back what is not yet on the file system of an open file.

    :raises OSError: some of it could not be written.
    """
    error = int(lib.pk_syncfs(fd))
    if error:
        raise OSError(error, os.strerror(error))


class FileBacking(OpenFileBacking):
    """A file by its path, locked exclusively if ``write``.

    :raises RegionError: missing, a directory, not permitted, too small to map.
    :raises LockedError: another process has it open.
    """

    def __init__(self, path: str, *, write: bool, phys_base: PhysAddr | None, lock: bool) -> None:
        fd = _open(path, write)
        try:
            held = lock_file(fd, path, exclusive=write) if lock else None
            super().__init__(fd, path, phys_base=phys_base)
        except BaseException:
            os.close(fd)
            raise
        self._lock = held if write else None


def create(path: str, size: int) -> None:
    """Make a file region of ``size`` bytes, all zero and sparse.

    :raises RegionError: the file exists, or cannot be made or sized.
    """
    _check_room(path, size)
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError as e:
        why, number = dangling_link(path) or e.strerror, e.errno or errno.EIO
        raise RegionError(f"{path}: cannot create: {why}", number) from e
    try:
        os.ftruncate(fd, size)
    except (OSError, OverflowError) as e:
        os.unlink(path)
        number = getattr(e, "errno", None) or errno.EFBIG
        raise RegionError(f"{path}: cannot size: {_why_no_size(fd, size, number)}", number) from e
    finally:
        os.close(fd)


def _why_no_size(fd: int, size: int, number: int) -> str:
    memory = memory_file(fd)
    if memory is not None and size % memory.page_bytes:
        pages = format_size(memory.page_bytes)
        return f"got {format_size(size)}, expected a multiple of its pages of {pages}"
    return os.strerror(number)


def _check_room(path: str, size: int) -> None:
    """Refuse a file system in which not even the metadata of a new region would fit.

    :raises RegionError: it is too full.
    """
    try:
        room = os.statvfs(os.path.dirname(path) or ".")
    except OSError:
        return  # open() says it better
    if room.f_blocks and room.f_bavail * room.f_frsize < min(size, _LEAST_ROOM):
        raise RegionError(f"{path}: cannot create: the file system is full", errno.ENOSPC)


def _open(path: str, write: bool) -> int:
    fd = open_path(path, write=write, flags=os.O_NONBLOCK)
    mode = os.fstat(fd).st_mode
    if not stat.S_ISREG(mode):
        os.close(fd)
        kind = "a directory" if stat.S_ISDIR(mode) else "neither a file nor a known device"
        raise RegionError(f"{path}: not a region: it is {kind}")
    return fd
