"""Segments that are files of a directory on hugetlbfs or tmpfs, beside the file ``base``.

Only root can make files in the directory. So a file there is what its name says if it has the inode
number that was recorded for it; a file of another number is somebody's who is root, and stays. The
owner of a segment may cut, lengthen or punch its file, as that of any file; what that costs is the
owner's bytes, and they are looked for at each step here.
"""

from __future__ import annotations

import logging
import os
import re
import stat
from collections.abc import Iterator
from contextlib import AbstractContextManager, suppress

from pkernfs.errors import (
    BusyError,
    NoSpaceError,
    NotSupportedError,
    PkernfsError,
    RegionError,
)
from pkernfs.host.sysroot import HOST
from pkernfs.layout import BLOCK, POOL_DIRECTORY
from pkernfs.options import format_size
from pkernfs.pool import segment_file
from pkernfs.pool.lease import holders_of, leased, nobody_else
from pkernfs.pool.pool import Holder, Owner, Passed, Segment, Space, nothing_is_passed
from pkernfs.pool.segment_file import SegmentFile
from pkernfs.quantities import SegmentNo
from pkernfs.region.files import MemoryFile, OpenFileBacking, memory_file, untouched
from pkernfs.region.region import Region
from pkernfs.region.spec import BASE

log = logging.getLogger(__name__)

_NAME = re.compile(r"segment-([1-9]\d*)", re.ASCII)
_SECTOR = 512
_PERMISSIONS = 0o777
_OTHERS_WRITE = 0o022
_ACL = "system.posix_acl_access"
_UNLIMITED = 1 << 62  # blocks: statfs of hugetlbfs may say -1


class DirectoryPool:
    """A pool (:class:`pkernfs.pool.pool.Pool`) in a directory; use :meth:`at`.

    The directory is known by a descriptor: it may be renamed. Before :meth:`resize`, :meth:`punch`
    and :meth:`check_unused` the caller unmaps the segment, for its mapping counts as one of others.
    """

    kind = POOL_DIRECTORY

    def __init__(self, directory: int, name: str, granule: int, memory: MemoryFile) -> None:
        self.name = name
        self.granule = granule
        self.passed: Passed = nothing_is_passed
        self._directory = directory
        self._memory = memory

    @classmethod
    def at(cls, path: str, granule: int | None = None) -> DirectoryPool:
        """Open a directory as a pool.

        :param granule: as recorded, in bytes; None: the least that its pages allow
        :raises RegionError: it is no directory on hugetlbfs or tmpfs, others can write to it, or
            its pages are too large for the granule.
        """
        try:
            directory = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as e:
            raise RegionError(f"{path}: cannot open: {e.strerror}", e.errno or 0) from e
        try:
            memory = _checked(directory, path)
            least = max(BLOCK, memory.page_bytes)
            if granule is not None and granule % least:
                raise RegionError(
                    f"{path}: pages too large: got {format_size(memory.page_bytes)}, "
                    f"expected at most {format_size(granule)}"
                )
        except BaseException:
            os.close(directory)
            raise
        return cls(directory, path, granule or least, memory)

    def close(self) -> None:
        """Let go of the directory; the segments stay."""
        os.close(self._directory)

    @property
    def passes(self) -> bool:
        """Files on tmpfs are regular ones below no other file system."""
        return not self._memory.is_huge

    # ------------------------------------------------------------------ memory

    def capacity(self) -> int:
        """Quick. Return how many bytes all segments together can have."""
        total, _ = self._huge_pages() if self._memory.is_huge else self._tmpfs_pages()
        return total

    def space(self) -> Space:
        """Look how much memory there is.

        What is promised to segments is not free, whether they have touched it or not: on tmpfs,
        each is looked at.
        """
        if self._memory.is_huge:
            total, free = self._huge_pages()
        else:
            total, free = self._tmpfs_pages()
            # Each file is asked every time: owners touch, punch and lengthen theirs at any moment.
            free = max(0, free - untouched(self._directory))
        free -= free % self.granule
        return Space(total, free, free)

    def _huge_pages(self) -> tuple[int, int]:
        """All pages and the free ones, in bytes.

        Pages are reserved for segments, which both the kernel and the mount count.
        """
        size = self._memory.page_bytes
        place = f"sys/kernel/mm/hugepages/hugepages-{size >> 10}kB"
        total, free, reserved = (
            int(HOST.find(f"{place}/{name}_hugepages") or 0) * size
            for name in ("nr", "free", "resv")
        )
        mount = os.fstatvfs(self._directory)
        if not 0 < mount.f_blocks < _UNLIMITED:
            return total, max(0, free - reserved)
        left = mount.f_bavail * mount.f_frsize
        return min(total, mount.f_blocks * mount.f_frsize), max(0, min(free - reserved, left))

    def _tmpfs_pages(self) -> tuple[int, int]:
        """All pages and the free ones, in bytes. Some of these are promised to segments."""
        mount = os.fstatvfs(self._directory)
        if mount.f_blocks:
            return mount.f_blocks * mount.f_frsize, mount.f_bavail * mount.f_frsize
        return _memory_of_machine()  # mounted with size=0: as much as the machine has

    def plan(self, wanted: Segment, others: list[Segment]) -> Segment:
        """Return ``wanted``: where its memory is, the kernel chooses.

        :raises NoSpaceError: on tmpfs, there is less than it needs. On hugetlbfs the kernel says so
            when the segment is made.
        :raises NotSupportedError: it is to be on a NUMA node.
        """
        if wanted.node is not None:
            raise NotSupportedError(f"{self.name}: this pool does not choose the NUMA node")
        if self._memory.is_huge:
            return wanted
        there = segment_file.find(self._directory, _name(wanted))
        needed = wanted.length - (0 if there is None else there.st_size)
        free = self.space().free
        if needed > free:
            raise NoSpaceError(
                f"{_name(wanted)}: no memory: needs {format_size(needed)}, "
                f"{format_size(free)} are free in {self.name}"
            )
        return wanted

    # ------------------------------------------------------------------ making and taking apart

    def create(self, segment: Segment) -> Segment:
        """Make the file of a new segment, for root only; on hugetlbfs all its pages are reserved.

        :raises NoSpaceError: there is no memory.
        :raises RegionError: the kernel refuses, or what has its name is not ours.
        """
        name = _name(segment)
        self._remove_left_over(name)
        with SegmentFile.create(self._directory, name) as file:
            try:
                self._lengthen(file, segment.length)
            except BaseException:
                self._unlink(name)
                raise
            return segment._replace(valid=segment.length, handle=file.handle)

    def _remove_left_over(self, name: str) -> None:
        """Remove what an interrupted :meth:`create` has made, which only root can open.

        :raises RegionError: it is not that.
        """
        there = segment_file.find(self._directory, name)
        if there is None:
            return
        if not _is_as_made(there):
            raise RegionError(f"{name}: something that is not ours has that name in {self.name}")
        self._unlink(name)

    def _unlink(self, name: str) -> None:
        """:raises RegionError: the kernel refuses: read-only, or the file is immutable."""
        try:
            os.unlink(name, dir_fd=self._directory)
        except FileNotFoundError:
            pass
        except OSError as e:
            why = f"cannot be removed from {self.name}: {e.strerror}"
            raise RegionError(f"{name}: {why}", e.errno or 0) from e

    def park(self, rows: list[Segment]) -> list[SegmentNo]:
        """Nothing is parked: a file is there, or it is lost."""
        return []

    def restore(self, segment: Segment) -> Segment:
        """Check the file of a segment in use, and complete what was interrupted.

        Is it longer than its row and somebody has it, then it stays so, and that is logged.

        :raises RegionError: it is lost, or not what it was; or there is no memory for what it was
            growing by.
        """
        try:
            opened = self._file(segment)
        except BusyError as e:  # its owner may do that, and need not lose it
            if segment.valid < segment.length:
                raise RegionError(str(e), e.errno) from e
            return self._checked_unopened(segment)
        with opened as file:
            try:
                self._complete(file, segment)
            except NoSpaceError as e:
                raise RegionError(str(e), e.errno) from e
            try:
                file.reserve(segment.length)
            except NoSpaceError as e:  # its owner has punched it
                log.warning("%s: it may lack memory when it is touched", e)
            try:
                self._cut(file, segment)
            except BusyError as e:
                log.warning("%s: stays longer than it should be", e)
            return segment._replace(valid=segment.length, handle=file.handle)

    def _checked_unopened(self, segment: Segment) -> Segment:
        """:raises RegionError: it is lost, or not what it was."""
        info = segment_file.check(self._directory, _name(segment))
        _check_file(segment, info.st_ino, info.st_size)
        return segment._replace(handle=info.st_ino)

    def resize(self, segment: Segment) -> Segment:
        """Make a file as long as the row of its segment. Growth needs it from nobody.

        :raises BusyError: it is to be shorter, and somebody has it.
        :raises NoSpaceError: there is no memory.
        :raises RegionError: it is lost, or not what it was.
        """
        with self._file(segment) as file:
            self._complete(file, segment)
            self._cut(file, segment)
            return segment._replace(valid=segment.length, handle=file.handle)

    def _complete(self, file: SegmentFile, segment: Segment) -> None:
        """Give a file what its segment has beyond ``valid``, all zero.

        :raises NoSpaceError: there is no memory.
        """
        if segment.valid >= segment.length:
            return
        if file.size > segment.valid:  # an interrupted growth, or its owner has lengthened it
            file.zero(segment.valid, min(file.size, segment.length))
        self._lengthen(file, segment.length)

    def _lengthen(self, file: SegmentFile, length: int) -> None:
        """Have ``length`` bytes or more in a file, and memory for them.

        :raises NoSpaceError: there is none; the message says how much there is.
        """
        try:
            if file.size < length:
                file.resize(length)
            else:
                file.reserve(length)
        except NoSpaceError as e:
            free = format_size(self.space().free)
            raise NoSpaceError(f"{e}: {free} are free in {self.name}") from e

    def _cut(self, file: SegmentFile, segment: Segment) -> None:
        """:raises BusyError: there is something to cut, and somebody has it."""
        if file.size > segment.length:
            with self._nobody_else(file, segment):
                file.resize(segment.length)

    def punch(self, segment: Segment, start: int, end: int) -> None:
        """Zero bytes ``start`` to ``end``; on tmpfs, whole pages of them go back to the kernel.

        :raises BusyError: somebody has it.
        :raises RegionError: it is lost, or not what it was.
        """
        with self._file(segment) as file, self._nobody_else(file, segment):
            file.zero(start, end)

    def destroy(self, segment: Segment) -> None:
        """Remove the file. Whoever has it keeps it; the kernel has the memory back after that.

        If another file has its name, that stays, and it is logged: the segment's own has gone.

        :raises RegionError: the kernel refuses.
        """
        name = _name(segment)
        there = segment_file.find(self._directory, name)
        if there is None:
            return
        ours = there.st_ino == segment.handle if segment.handle else _is_as_made(there)
        if not ours or not stat.S_ISREG(there.st_mode):
            log.warning("%s: not removed: another file has its name in %s", name, self.name)
            return
        self._empty(segment, name)
        self._unlink(name)

    def _empty(self, segment: Segment, name: str) -> None:
        """Give the memory of a segment that goes back, if nobody else has it.

        Without its name it has none. But what a killed daemon had open as the backing file of a
        mapping the kernel keeps, as long as anything of that mount is mapped.
        """
        with suppress(PkernfsError), SegmentFile.open(self._directory, name) as file:
            _check_handle(segment, file.handle)
            with leased(file.fd) as is_nobodys, suppress(OSError):
                if is_nobodys:
                    os.ftruncate(file.fd, 0)

    def strays(self, known: list[Segment]) -> list[str]:
        """Remove files that no row knows and nobody can miss; name the others.

        A row is there before its file, and goes after it. So a file without a row is none of this
        file system's, or the row was lost by damage: then a program may want its bytes. Only what
        :meth:`create` can have made and nobody has written to is removed, and only if its number is
        below one in use, so that this file system has given it.
        """
        numbers = {row.number for row in known}
        told = []
        files = [(name, info) for name, info in self._files() if name != BASE]
        for name, info in sorted(files, key=lambda file: _number(file[0])):
            if _number(name) in numbers:
                continue
            was_given = _number(name) < max(numbers, default=0)
            if was_given and _is_as_made(info) and not info.st_blocks:
                self._unlink(name)
            else:
                size = format_size(info.st_blocks * _SECTOR)
                told.append(f"{self.name}/{name}: no file has this segment, and it takes {size}")
        return told

    def segment_names(self) -> list[str]:
        """Return the names of all files that are named as segments, by their numbers."""
        names = [name for name, _ in self._files() if name != BASE]
        return sorted(names, key=_number)

    def remove(self, name: str) -> None:
        """Remove one of :meth:`segment_names`: its file system is formatted anew.

        :raises RegionError: the kernel refuses.
        """
        self._unlink(name)

    # ------------------------------------------------------------------ who has it

    def check_unused(self, segment: Segment) -> None:
        """:raises BusyError: somebody has it open or mapped; the message says who."""
        with self._file(segment) as file, self._nobody_else(file, segment):
            pass

    def _nobody_else(self, file: SegmentFile, segment: Segment) -> AbstractContextManager[None]:
        return nobody_else(file.fd, file.name, self.passed(segment), segment.ino)

    def holders(self, segment: Segment) -> list[Holder]:
        """Return who has it open or mapped, but for this process.

        What nobody sees of them is one holder without a process: a descriptor on its way, or a
        mapping through FUSE; the kernel counts them, but on hugetlbfs since Linux 7.0.
        """
        name = _name(segment)
        try:
            with self._file(segment) as file:
                return holders_of(file.fd, name, self.passed(segment), segment.ino)
        except BusyError:  # it cannot be opened: for somebody has a lease on it, or executes it
            fd = self._look_at(segment)
        try:
            return holders_of(fd, name, self.passed(segment), segment.ino)
        finally:
            os.close(fd)

    def set_owner(self, segment: Segment, owner: Owner) -> None:
        """Quick. Let ``owner`` open the segment, and nobody else but root."""
        fd = self._look_at(segment)
        try:
            _give_to(f"/proc/self/fd/{fd}", os.fstat(fd), owner)
        except OSError as e:
            why = f"cannot be given to its owner: {e.strerror}"
            raise RegionError(f"{_name(segment)}: {why}", e.errno or 0) from e
        finally:
            os.close(fd)

    def open(self, segment: Segment, *, write: bool) -> Region:
        """Quick. Map a segment. It never waits.

        :raises RegionError: it is not there, or not what it was.
        :raises BusyError: somebody has a lease on it: its owner, or this pool for a moment.
        """
        with self._file(segment, write=write) as file:
            fd = os.dup(file.fd)
        path = f"{self.name}/{_name(segment)}"
        try:
            _check_file(segment._replace(valid=segment.length), file.handle, file.size)
            backing = OpenFileBacking(fd, path, size=segment.length)
            # Its owner may have cut it since.
            _check_file(segment._replace(valid=segment.length), file.handle, backing.size)
            backing.may_vanish = True
            return Region(backing, writable=write)
        except BaseException:
            os.close(fd)
            raise

    def native_path(self, segment: Segment) -> str:
        """Quick. The path of the file, by the name that the directory has now."""
        return os.path.join(os.readlink(self._path), _name(segment))

    # ------------------------------------------------------------------ files of the directory

    @property
    def _path(self) -> str:
        """The directory, for calls that take no descriptor of O_PATH."""
        return f"/proc/self/fd/{self._directory}"

    def _files(self) -> Iterator[tuple[str, os.stat_result]]:
        """Yield the name and the stat of each regular file that has a name of ours."""
        with os.scandir(self._path) as entries:
            for entry in entries:
                if entry.name == BASE or _NAME.fullmatch(entry.name):
                    try:
                        info = entry.stat(follow_symlinks=False)
                    except FileNotFoundError:  # another thread has just destroyed it
                        continue
                    if stat.S_ISREG(info.st_mode):
                        yield entry.name, info

    def _file(self, segment: Segment, *, write: bool = True) -> SegmentFile:
        """Open the file of a segment.

        :raises RegionError: it is lost, or not what it was.
        :raises BusyError: somebody has a lease on it.
        """
        file = SegmentFile.open(self._directory, _name(segment), write=write)
        try:
            _check_file(segment, file.handle, file.size)
        except BaseException:
            os.close(file.fd)
            raise
        return file

    def _look_at(self, segment: Segment) -> int:
        """Return a descriptor of O_PATH, which breaks no lease, also if its owner has cut it.

        :raises RegionError: the file is lost, or another one.
        """
        name = _name(segment)
        segment_file.check(self._directory, name)
        fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._directory)
        try:
            _check_handle(segment, os.fstat(fd).st_ino)
        except BaseException:
            os.close(fd)
            raise
        return fd


def _name(segment: Segment) -> str:
    return f"segment-{segment.number}"


def _number(name: str) -> int:
    return int(name.removeprefix("segment-"))


def _checked(directory: int, path: str) -> MemoryFile:
    """Return the memory of a directory.

    :raises RegionError: it has none, or others can write to it.
    """
    memory = memory_file(directory)
    if memory is None:
        raise RegionError(f"{path}: no pool of segments: it is on neither hugetlbfs nor tmpfs")
    info = os.fstat(directory)
    if info.st_uid != os.geteuid() or info.st_mode & _OTHERS_WRITE:
        raise RegionError(
            f"{path}: no pool of segments: it belongs to somebody else, or others can write to it: "
            f"chown root {path}; chmod 0711 {path}"
        )
    return memory


def _check_file(segment: Segment, handle: int, size: int) -> None:
    """:raises RegionError: the file is another one than that which was made, or was cut."""
    _check_handle(segment, handle)
    least = min(segment.valid, segment.length)
    if size < least:
        raise RegionError(
            f"{_name(segment)}: lost: it was cut: got {size} bytes, expected {least} or more"
        )


def _check_handle(segment: Segment, handle: int) -> None:
    """:raises RegionError: the file is another one than that which was made."""
    if segment.handle and segment.handle != handle:
        raise RegionError(
            f"{_name(segment)}: lost: another file has its name: got inode {handle}, "
            f"expected {segment.handle}"
        )


def _is_as_made(info: os.stat_result) -> bool:
    """Tell whether it is as a new segment is before its owner gets it."""
    is_private = stat.S_ISREG(info.st_mode) and not stat.S_IMODE(info.st_mode) & ~0o600
    return is_private and info.st_uid == os.geteuid() and info.st_nlink == 1


def _give_to(path: str, now: os.stat_result, owner: Owner) -> None:
    """Set owner and mode, so that at no moment anybody has more than before or after.

    An access control list, which the last owner may have set to let himself in again, goes.
    """
    mode = owner.mode & _PERMISSIONS
    has_acl = _has_acl(path)
    if has_acl or (now.st_uid, now.st_gid) != (owner.uid, owner.gid):
        os.chmod(path, 0)
        if has_acl:
            os.removexattr(path, _ACL)
        os.chown(path, owner.uid, owner.gid)
    if stat.S_IMODE(os.stat(path).st_mode) != mode:
        os.chmod(path, mode)


def _has_acl(path: str) -> bool:
    try:
        return _ACL in os.listxattr(path)
    except OSError:  # hugetlbfs has none
        return False


def _memory_of_machine() -> tuple[int, int]:
    """Return the machine's memory in bytes: all, and what programs could have of it."""
    lines = (HOST.find("proc/meminfo") or "").split("\n")
    told = {line.split(":")[0]: line.split()[1] for line in lines if ":" in line}
    return int(told.get("MemTotal", 0)) << 10, int(told.get("MemAvailable", 0)) << 10
