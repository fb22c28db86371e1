"""Mappings of files that have memory of their own: the kernel's rules, then real mounts."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pagecache import cached_pages
from pkernfs.errors import BusyError, RegionError
from pkernfs.fuse.passthrough import NO_BACKING, Passthrough
from pkernfs.quantities import Ino
from support.mounted_pool import GRANULE, MountedPool, huge_pool, native_of, tmpfs
from support.mounting import MIB, Mapper, is_mounted, wait_until

FILE = Ino(7)
DEVICE = 33
BACKING_OPEN, BACKING_CLOSE = 0x4010E501, 0x4004E502  # linux/fuse.h
SIZE = 4 * MIB


# ---------------------------------------------------------------------- one mode for each open file


class Kernel:
    """What Passthrough asks the kernel for, and which files have memory of their own."""

    def __init__(self) -> None:
        self.one, self.other = os.memfd_create("one"), os.memfd_create("other")
        self.native: dict[Ino, int] = {}
        self.refusal: int | None = None
        self.registered: dict[int, str] = {}  # id: name
        self._last = 0

    def ioctl(self, device: int, request: int, argument: bytes | bytearray) -> Any:
        assert device == DEVICE
        if request == BACKING_CLOSE:
            (backing_id,) = struct.unpack("=I", argument)
            if self.refusal is not None:
                raise OSError(self.refusal, os.strerror(self.refusal))
            del self.registered[backing_id]
            return bytes(argument)
        assert request == BACKING_OPEN
        fd, flags, padding = struct.unpack("=iIQ", argument)
        assert (flags, padding) == (0, 0)
        if self.refusal is not None:
            raise OSError(self.refusal, os.strerror(self.refusal))
        self._last += 1
        assert fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_ACCMODE
        self.registered[self._last] = os.readlink(f"/proc/self/fd/{fd}")
        return self._last if isinstance(argument, bytearray) else bytes(argument)  # as fcntl does


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[Kernel]:
    kernel = Kernel()
    monkeypatch.setattr(fcntl, "ioctl", kernel.ioctl)
    yield kernel
    os.close(kernel.one)
    os.close(kernel.other)


@pytest.fixture
def files(kernel: Kernel) -> Passthrough:
    return Passthrough(kernel.native.get, DEVICE)


def test_a_file_is_registered_once_while_it_is_open(kernel: Kernel, files: Passthrough) -> None:
    kernel.native = {FILE: kernel.one, Ino(8): kernel.other}
    files = Passthrough(kernel.native.get, DEVICE)
    first = files.opened(FILE)
    assert files.opened(FILE) == first != files.opened(Ino(8))
    assert sorted(kernel.registered.values()) == ["/memfd:one (deleted)", "/memfd:other (deleted)"]
    files.released(FILE)
    assert len(kernel.registered) == 2
    files.released(FILE)
    assert list(kernel.registered.values()) == ["/memfd:other (deleted)"]
    assert files.opened(FILE) not in (first, NO_BACKING), "a new registration"


def test_what_has_no_memory_of_its_own(kernel: Kernel, files: Passthrough) -> None:
    assert files.opened(FILE) == NO_BACKING
    files.released(FILE)
    files.released(FILE)  # once too often, which no kernel does
    assert not kernel.registered


def test_an_open_file_keeps_its_mode(kernel: Kernel, files: Passthrough) -> None:
    """Both ways: it gets memory of its own, or another one, while somebody has it open."""
    assert files.opened(FILE) == NO_BACKING
    kernel.native[FILE] = kernel.one
    assert files.opened(FILE) == NO_BACKING
    files.released(FILE)
    assert files.opened(FILE) == NO_BACKING, "the second handle is there still"
    files.released(FILE)
    files.released(FILE)
    backing = files.opened(FILE)
    assert backing != NO_BACKING
    del kernel.native[FILE]
    assert files.opened(FILE) == backing


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (errno.ELOOP, "a file on hugetlbfs or overlayfs"),
        (errno.EPERM, "CAP_SYS_ADMIN"),
        (errno.EMFILE, "Too many open files"),
    ],
)
def test_what_the_kernel_refuses(
    kernel: Kernel, files: Passthrough, code: int, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It is mapped through the page cache, and the log says why."""
    kernel.native[FILE] = kernel.one
    kernel.refusal = code
    assert files.opened(FILE) == NO_BACKING
    (record,) = caplog.records
    assert record.getMessage().startswith("inode 7: mapped through the page cache, not directly: ")
    assert reason in record.getMessage()
    caplog.clear()


def test_memory_that_is_lost(kernel: Kernel, caplog: pytest.LogCaptureFixture) -> None:
    """Who touches it gets an error, and that is logged there."""

    def native(ino: Ino) -> int | None:
        raise RegionError("segment-3: it was removed")

    files = Passthrough(native, DEVICE)
    assert files.opened(FILE) == NO_BACKING
    files.released(FILE)
    assert not caplog.records


def test_memory_that_is_busy(kernel: Kernel, caplog: pytest.LogCaptureFixture) -> None:
    def native(ino: Ino) -> int | None:
        raise BusyError("segment-3: somebody has a lease on it")

    files = Passthrough(native, DEVICE)
    assert files.opened(FILE) == NO_BACKING
    files.released(FILE)
    assert files.opened(FILE) == NO_BACKING
    [record] = caplog.records
    assert record.getMessage().endswith("not directly: segment-3: somebody has a lease on it")
    caplog.clear()


def test_the_end_of_a_mount(kernel: Kernel, files: Passthrough) -> None:
    kernel.native[FILE] = kernel.one
    first = files.opened(FILE)
    kernel.refusal = errno.ENOTCONN
    files.released(FILE)
    kernel.refusal = None
    assert files.opened(FILE) not in (first, NO_BACKING), "it is closed, all the same"


# ---------------------------------------------------------------------- real mounts


@pytest.fixture
def mounted() -> Iterator[MountedPool]:
    with MountedPool() as mount:
        yield mount


@contextlib.contextmanager
def mapped(path: Path, flags: int = os.O_RDWR, length: int = SIZE) -> Iterator[mmap.mmap]:
    """A shared mapping of a file, which is closed before."""
    fd = os.open(path, flags)
    try:
        writes = mmap.PROT_WRITE if flags & os.O_ACCMODE == os.O_RDWR else 0
        memory = mmap.mmap(fd, length, prot=mmap.PROT_READ | writes)
    finally:
        os.close(fd)
    with memory:
        yield memory


@pytest.mark.fuse
@pytest.mark.parametrize("cache", ["direct", "page"])
def test_one_memory(cache: str) -> None:
    """Stores, reads and writes meet at once in the segment, and nowhere else."""
    with MountedPool(options=f"cache={cache}") as mount:
        path = mount.file(size=SIZE)
        own = native_of(path)
        with mapped(path) as memory, open(path, "r+b", buffering=0) as f, open(own, "r+b", 0) as o:
            memory[5000:5005] = b"store"
            assert os.pread(f.fileno(), 5, 5000) == b"store"
            assert os.pread(o.fileno(), 5, 5000) == b"store"
            os.pwrite(f.fileno(), b"write", 5000)
            assert memory[5000:5005] == b"write"
            os.pwrite(o.fileno(), b"other", 5000)
            assert memory[5000:5005] == b"other"
            assert f.read(5005)[5000:] == b"other"
            memory[:] = b"x" * SIZE
            memory.flush()
            os.fsync(f.fileno())
            assert cached_pages(f.fileno()) == 0
            assert cached_pages(o.fileno()) == SIZE // mmap.PAGESIZE


@pytest.mark.fuse
def test_what_a_killed_daemon_had_registered_is_in_nobodys_way() -> None:
    """While a program maps one file of its mount, others are cut, or go with their memory."""
    with tmpfs("size=64m") as place, MountedPool(8 * MIB, place=place) as mount:
        paths = [mount.file(name, SIZE) for name in ("kept", "cut", "removed")]
        with contextlib.ExitStack() as ends:
            kept, *others = (ends.enter_context(Mapper(path, SIZE)) for path in paths)
            for other in others:
                other.store(0, b"x" * SIZE)
            mount.kill()
            mount.start()
            for other in others:
                other.end(kill=True)
            os.truncate(paths[1], GRANULE)
            removed = native_of(paths[2])
            before = os.statvfs(place).f_bfree
            paths[2].unlink()
            mount.wait_until_gone(removed)
            gained = (os.statvfs(place).f_bfree - before) * os.statvfs(place).f_frsize
            assert gained == SIZE
            kept.store(0, b"kept")
        assert paths[0].read_bytes()[:4] == b"kept"


@pytest.mark.fuse
def test_without_memory_of_its_own_the_page_cache_has_a_copy() -> None:
    with MountedPool(options="segments=no") as mount:
        path = mount.file(size=SIZE)
        with mapped(path) as memory, open(path, "rb", buffering=0) as f:
            memory[:] = b"x" * SIZE
            assert cached_pages(f.fileno()) == SIZE // mmap.PAGESIZE


@pytest.mark.fuse
def test_every_way_to_open(mounted: MountedPool) -> None:
    path = mounted.file(size=SIZE)
    with mapped(path) as memory, contextlib.ExitStack() as open_files:
        memory[:3] = b"one"
        for flags in (os.O_RDONLY, os.O_RDWR, os.O_RDWR | os.O_APPEND, os.O_RDWR | os.O_DIRECT):
            with mapped(path, flags) as again:
                assert again[:3] == b"one"
            fd = os.open(path, flags)
            open_files.callback(os.close, fd)
            with mapped(Path(f"/proc/self/fd/{fd}")) as again:
                again[10:13] = b"two"
            assert memory[10:13] == b"two"
            private = mmap.mmap(fd, SIZE, mmap.MAP_PRIVATE)
            private[:3] = b"own"
            private.close()
            assert memory[:3] == b"one"
        writer = os.open(path, os.O_WRONLY)
        open_files.callback(os.close, writer)
        os.pwrite(writer, b"six", 0)
        assert memory[:3] == b"six"
        with Mapper(path, SIZE) as other:
            other.store(0, b"two")
            assert memory[:3] == b"two"
        with pytest.raises(PermissionError), open(path, "rb") as f:
            mmap.mmap(f.fileno(), SIZE)


@pytest.mark.fuse
def test_sizes_are_those_of_the_daemon(mounted: MountedPool) -> None:
    """The mapping alone reaches to the end of the memory."""
    path = mounted.file(size=GRANULE)
    os.truncate(path, 5000)
    with open(path, "r+b", buffering=0) as f:
        assert os.fstat(f.fileno()).st_size == 5000
        assert os.lseek(f.fileno(), 0, os.SEEK_END) == 5000
        assert len(os.pread(f.fileno(), SIZE, 0)) == 5000
        with mmap.mmap(f.fileno(), 5000) as memory:
            os.ftruncate(f.fileno(), SIZE)
            memory[0] = 1
            assert os.pread(f.fileno(), 1, 0) == b"\1"
        assert len(os.pread(f.fileno(), 2 * SIZE, 0)) == SIZE


@pytest.mark.fuse
def test_it_gets_memory_of_its_own_while_it_is_open(mounted: MountedPool) -> None:
    """What is open goes on as it was, mapped or not; the next open after the last close changes.

    So it is for whoever creates a file and sizes and maps it by the same descriptor.
    """
    path = mounted.path / "f"
    fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
    os.truncate(fd, SIZE)
    own = native_of(path)
    with open(fd, "r+b", buffering=0) as f, mmap.mmap(f.fileno(), SIZE) as copy:
        copy[:4] = b"copy"
        with mapped(path) as memory:
            assert memory[:4] == b"copy"
            assert cached_pages(f.fileno())
        assert os.pread(f.fileno(), 4, 0) == b"copy", "it is written back for the reader"
        assert own.read_bytes()[:4] == b"copy"
        copy[:4] = b"last"

    def is_own() -> bool:  # the kernel tells of the last close when it likes
        with mapped(path) as memory, own.open("r+b", buffering=0) as o:
            o.write(b"own!")
            return memory[:4] == b"own!"

    wait_until(is_own, "the memory of its own")
    with open(path, "rb", buffering=0) as f:
        assert cached_pages(f.fileno()) == 0


@pytest.mark.fuse
def test_a_mapping_outlives_descriptor_and_name(mounted: MountedPool) -> None:
    path = mounted.file(size=SIZE)
    own = native_of(path)
    with mapped(path) as memory:
        with mapped(path) as again:  # with every descriptor closed, it is registered anew
            again[:5] = b"store"
        path.unlink()
        assert memory[:5] == b"store"
        assert own.exists()
        busy = subprocess.run(["umount", str(mounted.path)], capture_output=True, text=True)
        assert "busy" in busy.stderr, "the mapping keeps the mount"
        assert is_mounted(mounted.path)
    mounted.wait_until_gone(own)
    mounted.unmount()


@pytest.mark.fuse
def test_a_mapping_outlives_the_daemon(mounted: MountedPool) -> None:
    """SIGKILL: the kernel has the memory. The next daemon's clients map the same."""
    path = mounted.file(size=SIZE)
    own = native_of(path)
    with Mapper(path, SIZE) as client, mapped(path) as memory:
        memory[:6] = b"before"
        mounted.kill()
        client.store(MIB, b"after, in a page that nobody had touched")
        assert memory[MIB : MIB + 5] == b"after"
        memory[:] = bytes(SIZE)
        client.store(0, b"store")
        client.tell("msync")
        assert own.read_bytes()[:6] == b"store\0"
        mounted.start()
        with mapped(path) as again:
            again[:5] = b"again"
            assert client.load(0, 5) == b"again"
            with open(path, "rb", buffering=0) as f:
                assert f.read(5) == b"again"


@pytest.mark.fuse
def test_memory_that_the_kernel_does_not_pass_through_to() -> None:
    """Huge pages: the file is mapped as any other, through the page cache."""
    with huge_pool(SIZE) as mount:
        path = mount.file(size=SIZE)
        with mapped(path) as memory, open(path, "rb", buffering=0) as f:
            assert memory[:5] == bytes(5)
            assert cached_pages(f.fileno())
        assert not mount.ended(), "it is so with each file there"
