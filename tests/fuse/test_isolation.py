"""What one owner of a segment can do to another, and to the daemon: tried, by processes of others.

docs/security.md has what is enforced by what.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import signal
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support.huge_pages import huge_pages
from support.mounted_pool import GRANULE, MountedPool, native_of, tmpfs
from support.mounting import MIB, Mapper, child, libc, run_as, wait_until

pytestmark = pytest.mark.fuse

libc.mmap.restype = ctypes.c_void_p
ALICE, BOB = 1234, 1235
SIZE = 4 * MIB
SECRET = b"the secret of one tenant"
ACL = "system.posix_acl_access"


class Tenants(MountedPool):
    """A mount with a file each of two users, which nobody else may open."""

    def __init__(self, place: Path | None = None) -> None:
        super().__init__(8 * MIB, "allow_other", place)
        self.own: dict[int, Path] = {}

    def give_files(self) -> None:
        for uid, name in ((ALICE, "alice"), (BOB, "bob")):
            path = self.own[uid] = self.file(name)
            path.chmod(0o600)
            os.chown(path, uid, uid)
            os.truncate(path, SIZE)
            put(path, SECRET)


def put(path: Path, data: bytes, at: int = 0) -> None:
    fd = os.open(path, os.O_WRONLY)
    try:
        os.pwrite(fd, data, at)
    finally:
        os.close(fd)


def get(path: Path, length: int = len(SECRET), at: int = 0) -> bytes:
    fd = os.open(path, os.O_RDONLY)
    try:
        return os.pread(fd, length, at)
    finally:
        os.close(fd)


@pytest.fixture(scope="module")
def tmpfs_mount() -> Iterator[Tenants]:
    with Tenants() as mount:
        yield mount


@pytest.fixture(scope="module")
def huge_mount() -> Iterator[Tenants]:
    with huge_pages(40 * MIB) as place, Tenants(place) as mount:
        yield mount


@pytest.fixture(params=["tmpfs_mount", "huge_mount"])
def tenants(request: pytest.FixtureRequest) -> Iterator[Tenants]:
    """A mount with new files of both, which tests one after the other have."""
    with request.getfixturevalue(request.param).lent() as mount:
        mount.give_files()
        yield mount


@pytest.fixture
def on_tmpfs(tmpfs_mount: Tenants) -> Iterator[Tenants]:
    with tmpfs_mount.lent() as mount:
        mount.give_files()
        yield mount


def refused(use: Callable[[], object], *codes: int) -> None:
    """:raises AssertionError: it was not refused, or otherwise."""
    with pytest.raises(OSError, match=r".") as caught:
        use()
    assert caught.value.errno in (codes or (errno.EACCES, errno.EPERM)), caught.value


def system_call(number: int, *words: int) -> int:
    """:raises OSError: the kernel refuses."""
    result = int(libc.syscall(number, *map(ctypes.c_long, words)))
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


# ---------------------------------------------------------------------- by a name


def test_nobody_opens_what_is_another_ones(tenants: Tenants) -> None:
    """By the mount, by the native path, by the directory, or by the region."""
    theirs, own = tenants.own[ALICE], tenants.own[BOB]
    native, mine = native_of(theirs), native_of(own)

    def attack() -> None:
        for path in (theirs, native, tenants.region):
            for flags in (os.O_RDONLY, os.O_WRONLY, os.O_RDWR):
                refused(lambda path=path, flags=flags: os.open(path, flags))  # type: ignore[misc]
            refused(lambda path=path: os.truncate(path, 0))  # type: ignore[misc]
            refused(lambda path=path: os.chmod(path, 0o666))  # type: ignore[misc]
            refused(lambda path=path: os.chown(path, BOB, BOB))  # type: ignore[misc]
        pool = tenants.pool
        refused(lambda: os.listdir(pool))
        refused(lambda: os.open(pool, os.O_RDONLY | os.O_DIRECTORY))
        refused(lambda: (pool / "segment-9").touch())
        refused(lambda: os.open(pool, os.O_TMPFILE | os.O_RDWR))
        refused(lambda: os.unlink(mine))
        refused(lambda: os.rename(mine, pool / "segment-9"))
        refused(lambda: os.rename(mine, native))
        refused(lambda: os.link(mine, pool / "segment-9"))
        refused(lambda: os.symlink("/", pool / "segment-9"))
        refused(lambda: os.rmdir(pool))
        refused(lambda: os.chmod(pool, 0o777))
        assert get(own) == get(mine) == SECRET, "but its own"

    run_as(BOB, attack)
    assert get(theirs) == SECRET


def test_who_may_read_cannot_write(on_tmpfs: Tenants) -> None:
    """Not even by a mapping that is made writable later."""
    theirs = on_tmpfs.own[ALICE]
    theirs.chmod(0o604)

    def attack() -> None:
        for path in (theirs, native_of(theirs)):
            fd = os.open(path, os.O_RDONLY)
            refused(lambda fd=fd: mmap.mmap(fd, SIZE))  # type: ignore[misc]
            refused(lambda fd=fd: os.open(f"/proc/self/fd/{fd}", os.O_RDWR))  # type: ignore[misc]
            memory = mmap.mmap(fd, SIZE, prot=mmap.PROT_READ)
            assert memory[: len(SECRET)] == SECRET
            maps = Path("/proc/self/maps").read_text().splitlines()
            low = int(next(line for line in maps if str(path) in line).split("-")[0], 16)
            refused(lambda low=low: system_call(_MPROTECT, low, SIZE, _WRITABLE))  # type: ignore[misc]

    run_as(BOB, attack)


def test_hard_links() -> None:
    """None is made of another one's; of one's own only where a directory of the pool's file system
    can be written to.
    """
    with tmpfs("mode=1777") as shared, Tenants(shared) as mount:
        mount.give_files()
        theirs, mine = native_of(mount.own[ALICE]), native_of(mount.own[BOB])
        shared.chmod(0o1777)
        protected = Path("/proc/sys/fs/protected_hardlinks").read_text().strip() == "1"

        def attack() -> None:
            if protected:
                refused(lambda: os.link(theirs, shared / "theirs"))
            os.link(mine, shared / "mine")

        run_as(BOB, attack)
        # One's own link follows its file's owner, and keeps no memory: that is taken from it.
        os.chown(mount.own[BOB], ALICE, ALICE)
        run_as(BOB, lambda: refused(lambda: os.open(shared / "mine", os.O_RDONLY)))
        mount.own[BOB].unlink()
        mount.wait_until_gone(mine)
        assert not (shared / "mine").stat().st_size
        new = mount.file("new", SIZE)
        assert new.read_bytes() == bytes(SIZE)


# ---------------------------------------------------------------------- by a process


def test_nobody_gets_at_the_daemon(tenants: Tenants) -> None:
    """Nor at the other tenant's process, by /proc or the calls that look into processes."""
    assert tenants.daemon is not None
    with Mapper(tenants.own[ALICE], SIZE) as client:
        client.store(0, SECRET)
        victims = [tenants.daemon.pid]

        def hold() -> None:
            fd = os.open(tenants.own[ALICE], os.O_RDWR)
            memory = mmap.mmap(fd, SIZE)
            memory[0] = memory[0]
            signal.pause()

        with child(hold, ALICE) as pid:
            wait_until(lambda: str(tenants.own[ALICE]) in maps_of(pid), "the other tenant maps it")
            victims.append(pid)
            for victim in victims:
                run_as(BOB, lambda victim=victim: look_into(victim))  # type: ignore[misc]


def maps_of(pid: int) -> str:
    return Path(f"/proc/{pid}/maps").read_text()


_MPROTECT, _PTRACE, _PROCESS_VM_READV, _PIDFD_OPEN, _PIDFD_GETFD = 10, 101, 310, 434, 438  # x86-64
_PTRACE_SEIZE = 0x4206
_WRITABLE = mmap.PROT_READ | mmap.PROT_WRITE


def look_into(pid: int) -> None:
    """Try all that the kernel has for that on a process of another user."""
    place = Path(f"/proc/{pid}")
    for name in ("mem", "maps", "pagemap", "environ"):
        refused(lambda name=name: (place / name).read_bytes())  # type: ignore[misc]
    for name in ("fd", "map_files", "fdinfo"):
        refused(lambda name=name: os.listdir(place / name))  # type: ignore[misc]
    refused(lambda: system_call(_PTRACE, _PTRACE_SEIZE, pid, 0, 0))
    pidfd = system_call(_PIDFD_OPEN, pid, 0)
    for number in range(30):
        refused(lambda n=number: system_call(_PIDFD_GETFD, pidfd, n, 0))  # type: ignore[misc]
    memory = (ctypes.c_uint64 * 2)(0x10000, 8)  # struct iovec
    at = ctypes.addressof(memory)
    refused(lambda: system_call(_PROCESS_VM_READV, pid, at, 1, at, 1, 0))
    refused(lambda: os.kill(pid, signal.SIGKILL))
    for handle in ("/dev/mem", "/proc/kcore", "/proc/kpageflags"):
        if Path(handle).exists():
            refused(lambda handle=handle: os.open(handle, os.O_RDONLY))  # type: ignore[misc]


# ---------------------------------------------------------------------- beyond the end


def test_there_is_nothing_beyond_the_end(tenants: Tenants) -> None:
    """A mapping that is longer than the segment ends in SIGBUS, a read at the end of the file."""
    own = tenants.own[BOB]
    native = native_of(own)

    def beyond(path: Path) -> None:
        signal.signal(signal.SIGBUS, signal.SIG_DFL)  # a command that ran here may have its own
        fd = os.open(path, os.O_RDWR)
        assert os.pread(fd, SIZE, SIZE) == b""
        at = libc.mmap(None, ctypes.c_size_t(4 * SIZE), mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
        assert ctypes.string_at(at, len(SECRET)) == SECRET
        ctypes.string_at(at + SIZE, 1)

    for path in (own, native):
        with child(lambda path=path: beyond(path), BOB) as pid:  # type: ignore[misc]
            _, status = os.waitpid(pid, 0)
        assert os.WTERMSIG(status) == signal.SIGBUS

    def lengthen() -> None:
        """One's own native file can be lengthened: by zeros."""
        os.truncate(native, 2 * SIZE)
        fd = os.open(native, os.O_RDWR)
        with mmap.mmap(fd, 2 * SIZE) as memory:
            assert memory[SIZE:] == bytes(SIZE)

    run_as(BOB, lengthen)
    assert own.stat().st_size == SIZE
    assert get(tenants.own[ALICE]) == SECRET


# ---------------------------------------------------------------------- after it was one's own


def test_the_memory_of_a_removed_file(tenants: Tenants) -> None:
    """Whoever still maps it has it alone; the next file has other memory, and that is zero."""
    theirs = tenants.own[ALICE]
    native = native_of(theirs)
    with Mapper(theirs, SIZE) as passed, Mapper(native, SIZE) as mapped:
        mapped.store(MIB, SECRET)
        theirs.unlink()
        new = tenants.file("new", SIZE)
        os.chown(new, BOB, BOB)
        assert native_of(new) != native
        assert get(new, SIZE) == bytes(SIZE)
        mapped.store(0, b"written after the end of the file")
        put(new, b"the next one's", 2 * MIB)
        assert get(new, 2 * MIB) == bytes(2 * MIB)
        assert mapped.load(2 * MIB, 5) == bytes(5)
        passed.end()
    new.unlink()
    tenants.wait_until_gone(native)
    for _ in range(3):  # whichever pages the kernel gives
        again = tenants.file("again", SIZE)
        assert get(again, SIZE) == bytes(SIZE)
        put(again, b"x" * SIZE)
        before = native_of(again)
        again.unlink()
        tenants.wait_until_gone(before)


def test_the_memory_that_a_cut_gives_back(tenants: Tenants) -> None:
    own = tenants.own[ALICE]
    put(own, b"x" * SIZE)
    os.truncate(own, GRANULE + 5)
    os.truncate(own, SIZE)
    assert get(own, SIZE, GRANULE) == b"x" * 5 + bytes(SIZE - GRANULE - 5)


def test_a_new_owner(tenants: Tenants) -> None:
    """The former one opens it no more; what he has mapped or open stays so: that is how files are.

    So who gives a file away sees to it that nobody has it, or makes a new one.
    """
    path = tenants.own[ALICE]
    native = native_of(path)
    ready, done = os.pipe(), os.pipe()

    def former() -> None:
        kept = os.open(native, os.O_RDWR)
        memory = mmap.mmap(kept, SIZE)
        os.write(ready[1], b"1")
        os.read(done[0], 1)
        for name in (path, native, Path(f"/proc/self/fd/{kept}")):
            refused(lambda name=name: os.open(name, os.O_RDWR))  # type: ignore[misc]
        memory[: len(SECRET)] = SECRET[::-1]
        refused(lambda: os.fchmod(kept, 0o666))

    with child(former, ALICE) as pid:
        os.close(ready[1])  # else nothing tells that the child has ended
        assert os.read(ready[0], 1)
        os.chown(path, BOB, BOB)
        os.write(done[1], b"1")
        assert os.waitpid(pid, 0)[1] == 0
    for end in (ready[0], *done):
        os.close(end)
    run_as(BOB, lambda: os.open(native, os.O_RDWR))
    assert get(path) == SECRET[::-1], "by the mapping from before"


def test_modes_follow(tenants: Tenants) -> None:
    """chmod through the mount, by the owner: at once, and both ways."""
    path = tenants.own[ALICE]
    native = native_of(path)
    run_as(BOB, lambda: refused(lambda: get(native)))
    run_as(ALICE, lambda: path.chmod(0o644))
    run_as(BOB, lambda: get(native))
    run_as(ALICE, lambda: path.chmod(0o4600))
    run_as(BOB, lambda: refused(lambda: get(native)))
    assert native.stat().st_mode & 0o7777 == 0o600, "a segment is nothing to execute as its owner"
    tenants.kill()
    tenants.start()
    run_as(BOB, lambda: refused(lambda: get(native)))


def acl_for(uid: int) -> bytes:
    """An access control list that lets ``uid`` read and write."""
    everybody = 0xFFFFFFFF
    entries = [(1, 6, everybody), (2, 6, uid), (4, 0, everybody), (16, 6, everybody)]
    entries.append((32, 0, everybody))
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


def test_a_way_in_that_the_former_owner_has_left(on_tmpfs: Tenants) -> None:
    """An access control list on the native file goes with the next owner or mode, or mount."""
    path = on_tmpfs.own[ALICE]
    native = native_of(path)

    def leave_open() -> None:
        os.setxattr(native, ACL, acl_for(ALICE))

    run_as(ALICE, leave_open)
    os.chown(path, BOB, BOB)
    run_as(BOB, lambda: path.chmod(0o660))
    run_as(ALICE, lambda: refused(lambda: get(native)))
    assert not os.listxattr(native)
    os.setxattr(native, ACL, acl_for(ALICE))
    run_as(ALICE, lambda: get(native))
    on_tmpfs.kill()
    on_tmpfs.start()
    run_as(ALICE, lambda: refused(lambda: get(native)))
    assert get(path) == SECRET


# ---------------------------------------------------------------------- to the pool


def test_a_tenant_fills_the_pool() -> None:
    """By its own native file: as much as the tmpfs has. Nobody loses a byte; others wait.

    A tmpfs of its own size keeps that from the machine; quotas of tmpfs keep it from the others.
    """
    with tmpfs("size=24m") as place, Tenants(place) as mount:
        mount.give_files()
        native = native_of(mount.own[BOB])

        def fill() -> None:
            fd = os.open(native, os.O_RDWR)
            with contextlib.suppress(OSError):
                while True:
                    os.write(fd, b"x" * MIB)

        run_as(BOB, fill)
        new = mount.file("new")
        refused(lambda: os.truncate(new, SIZE), errno.ENOSPC)
        # What Alice has not touched yet is promised, but not taken.
        refused(lambda: put(mount.own[ALICE], b"x" * MIB, MIB), errno.ENOSPC)
        assert get(mount.own[ALICE]) == SECRET
        (mount.path / "small").write_bytes(b"y" * 4096)  # the region has its own
        mount.own[BOB].unlink()
        mount.wait_until_gone(native)
        os.truncate(new, SIZE)
        put(mount.own[ALICE], b"x" * SIZE)
        said = mount.ended()
        assert "no memory: needs 4 MiB" in said
        assert "Traceback" not in said


def test_a_quota_of_tmpfs_keeps_tenants_apart() -> None:
    """``usrquota`` (Linux 6.6): a tenant's own file cannot take what is others'."""
    with contextlib.ExitStack() as stack:
        try:
            options = "size=64m,usrquota,usrquota_block_hardlimit=16m"
            place = stack.enter_context(tmpfs(options))
        except subprocess.CalledProcessError:
            pytest.skip("this kernel has no quotas on tmpfs")
        mount = stack.enter_context(Tenants(place))
        mount.give_files()
        native = native_of(mount.own[BOB])

        def fill() -> None:
            fd = os.open(native, os.O_RDWR)
            with contextlib.suppress(OSError):
                while True:
                    os.write(fd, b"x" * MIB)
            assert os.fstat(fd).st_blocks * 512 <= 16 * MIB

        run_as(BOB, fill)
        new = mount.file("new", SIZE)
        put(new, b"x" * SIZE)
        put(mount.own[ALICE], b"x" * SIZE)
        mount.own[BOB].unlink()
