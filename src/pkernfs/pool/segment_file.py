"""The file that is one segment of a directory: opened, made, sized, emptied.

On hugetlbfs, a mapping reserves the pages of the file for good, whether they are touched or not:
the reservation is the inode's, not the mapping's. So whoever maps the file later gets no SIGBUS.
Nothing here uses a mapping for more than that: the file's owner may cut the file at any time.
"""

from __future__ import annotations

import errno
import mmap
import os
import stat
from collections.abc import Iterator
from types import TracebackType

from pkernfs.errors import BusyError, NoSpaceError, PkernfsError, RegionError
from pkernfs.options import format_size
from pkernfs.region import files
from pkernfs.region.files import MemoryFile

_NEVER_WAIT = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_FULL = (errno.ENOSPC, errno.ENOMEM, errno.EDQUOT)
_BUSY = (errno.EAGAIN, errno.ETXTBSY)  # somebody has a lease on it, or executes it


class SegmentFile:
    """An open file of a segment, by its descriptor :attr:`fd`; a context manager that closes it."""

    def __init__(self, fd: int, name: str) -> None:
        self.fd = fd
        self.name = name
        info = os.fstat(fd)
        self.handle = info.st_ino
        self.size = info.st_size
        self._memory = files.memory_file(fd) or MemoryFile(is_huge=False, page_bytes=mmap.PAGESIZE)

    @classmethod
    def create(cls, directory: int, name: str) -> SegmentFile:
        """Make an empty file, for its maker only.

        :param directory: a descriptor; O_PATH will do
        :raises NoSpaceError: there is no memory, or no inode.
        :raises RegionError: the kernel refuses.
        """
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | _NEVER_WAIT
        try:
            fd = os.open(name, flags, 0o600, dir_fd=directory)
            os.fchown(fd, os.geteuid(), os.getegid())  # the directory may give it its own group
            os.fchmod(fd, 0o600)  # whatever the umask
        except OSError as e:
            raise _error(name, "cannot be made", e) from e
        return cls(fd, name)

    @classmethod
    def open(cls, directory: int, name: str, *, write: bool = True) -> SegmentFile:
        """Open a file that is there. It does not wait for one who has a lease on it.

        :raises RegionError: there is none, or it is no regular file.
        :raises BusyError: somebody has a lease on it, or executes it.
        """
        # A look at it first: what is a device or a FIFO is better not opened.
        check(directory, name)
        flags = (os.O_RDWR if write else os.O_RDONLY) | _NEVER_WAIT
        try:
            fd = os.open(name, flags, dir_fd=directory)
        except OSError as e:
            raise _error(name, "cannot be opened", e) from e
        return cls(fd, name)

    def __enter__(self) -> SegmentFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        os.close(self.fd)

    def resize(self, length: int) -> None:
        """Make it longer, by zeros, or shorter; and reserve its pages. Nothing changes on failure.

        :raises NoSpaceError: there is no memory.
        :raises RegionError: the kernel refuses.
        """
        before = self.size
        try:
            os.ftruncate(self.fd, length)
            if length >= before:
                self.reserve(length)
        except OSError as e:
            os.ftruncate(self.fd, before)
            raise _error(self.name, f"cannot be {format_size(length)} long", e) from e
        except NoSpaceError:
            os.ftruncate(self.fd, before)
            raise
        self.size = length

    def reserve(self, length: int) -> None:
        """Have huge pages for all of the file's bytes up to ``length``, now and later.

        On tmpfs nothing is reserved: the memory is taken when it is touched.

        :raises NoSpaceError: there are too few.
        :raises RegionError: the file has been cut meanwhile.
        """
        if not self._memory.is_huge:
            return
        try:
            mmap.mmap(self.fd, length).close()
        except ValueError as e:  # Python compares the length with the file's, and says so this way
            raise RegionError(f"{self.name}: cut meanwhile", errno.EIO) from e
        except OSError as e:
            raise _error(self.name, f"no huge pages for {format_size(length)}", e) from e

    def zero(self, start: int, end: int) -> None:
        """Zero bytes ``start`` to ``end``. On tmpfs whole pages go back to the kernel.

        On hugetlbfs no page does: it would go to others, and whoever touched its place in the file
        later might get SIGBUS.

        :raises RegionError: the kernel refuses.
        """
        try:
            for first, last in self._pieces(start, end):
                files.punch(self.fd, first, last)
        except OSError as e:
            raise _error(self.name, "cannot be zeroed", e) from e

    def _pieces(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """Cut a range so that a hole in each piece takes no page away.

        Since Linux 6.0 a hole in a part of a huge page has the kernel zero that part.
        """
        step = self._memory.page_bytes // 2 if self._memory.is_huge else end
        while start < end:
            stop = min(end, start - start % step + step)
            yield start, stop
            start = stop


def find(directory: int, name: str) -> os.stat_result | None:
    """Look at what has a name, without opening it; None: nothing has."""
    try:
        return os.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return None


def check(directory: int, name: str) -> os.stat_result:
    """Return the stat of the regular file of a name.

    :raises RegionError: there is none, or it is something else.
    """
    info = find(directory, name)
    if info is None:
        raise RegionError(f"{name}: lost: there is no file of that name", errno.ENOENT)
    if not stat.S_ISREG(info.st_mode):
        raise RegionError(f"{name}: lost: what has that name is no regular file")
    return info


def _error(name: str, what: str, error: OSError) -> PkernfsError:
    message = f"{name}: {what}: {error.strerror}"
    if error.errno in _FULL:
        return NoSpaceError(message)
    if error.errno in _BUSY:
        return BusyError(f"{name}: busy: somebody has a lease on it, or executes it")
    return RegionError(message, error.errno or errno.EIO)
