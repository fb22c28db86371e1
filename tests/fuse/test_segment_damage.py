"""Segments that somebody changes behind the daemon's back, and directories that are no good.

One clear line each; one file's loss; the daemon goes on, and so does the next mount.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from pkernfs.cli import fsck_main
from pkernfs.region.region import Region
from support.damage import Damage, Populated
from support.huge_pages import huge_pages
from support.mounted_pool import GRANULE, MountedPool, native_of, tmpfs
from support.mounting import MIB, Mapper, child, run_pkernfs
from support.segments import set_item

pytestmark = pytest.mark.fuse

SIZE = 4 * MIB
IO_ERROR = re.escape(os.strerror(errno.EIO))


@pytest.fixture
def mounted() -> Iterator[MountedPool]:
    with MountedPool() as mount:
        yield mount


def fill(mount: MountedPool) -> tuple[Path, Path]:
    """Two files with segments and data, which the daemon has mapped."""
    files = mount.file("victim", SIZE), mount.file("other", SIZE)
    for path in files:
        write(path, path.name.encode())
    return files


def head(path: Path) -> bytes:
    """The first bytes of a file."""
    with path.open("rb", buffering=0) as file:
        return file.read(6)


def write(path: Path, data: bytes) -> None:
    """Store at the beginning of a file."""
    fd = os.open(path, os.O_WRONLY)
    try:
        os.pwrite(fd, data, 0)
    finally:
        os.close(fd)


def lines(said: str, words: str) -> int:
    """Count the lines with ``words``, a regular expression."""
    return sum(re.search(words, line) is not None for line in said.splitlines())


# ---------------------------------------------------------------------- one file's loss


def remove(native: Path) -> None:
    native.unlink()


def cut(native: Path) -> None:
    os.truncate(native, MIB)


def replace(native: Path) -> None:
    native.unlink()
    native.write_bytes(b"y" * SIZE)


def link(native: Path) -> None:
    native.unlink()
    native.symlink_to("/etc/passwd")


def fifo(native: Path) -> None:
    native.unlink()
    os.mkfifo(native)


def directory(native: Path) -> None:
    native.unlink()
    native.mkdir()


LOSSES = [
    (remove, "lost: there is no file of that name"),
    (cut, "lost: it was cut: got 1048576 bytes, expected 4194304 or more"),
    (replace, "lost: another file has its name: got inode"),
    (link, "lost: what has that name is no regular file"),
    (fifo, "lost: what has that name is no regular file"),
    (directory, "lost: what has that name is no regular file"),
]
CHANGES = {change.__name__: change for change, _ in LOSSES}


def victims(mount: MountedPool) -> dict[Path, tuple[Path, str]]:
    """A file for each loss, with its segment and what the log will say of it."""
    found = {}
    for change, says in LOSSES:
        path = mount.file(change.__name__, SIZE)
        write(path, b"victim")
        native = native_of(path)
        found[path] = native, rf"{native.name}: {says}"
    return found


def test_segments_are_lost_between_two_mounts(mounted: MountedPool) -> None:
    lost = victims(mounted)
    other = mounted.file("other", SIZE)
    write(other, b"other")
    mounted.unmount()
    for path, (native, _) in lost.items():
        CHANGES[path.name](native)
    mounted.damaged = True
    mounted.start()
    for path in lost:
        assert path.stat().st_size == SIZE
        uses: list[Callable[[], object]] = [
            partial(head, path),
            partial(write, path, b"x" * 10000),
            partial(os.truncate, path, 2 * SIZE),
        ]
        for use in uses:
            with pytest.raises(OSError, match=IO_ERROR):
                use()
        os.truncate(path, 0)  # that needs no memory
        path.unlink()
        assert mounted.file(path.name, SIZE).read_bytes() == bytes(SIZE), "its place is taken"
    assert head(other) == b"other\0"
    said = mounted.ended()
    for _, says in lost.values():
        assert re.search(rf"pkernfs: {mounted.region}: inode \d+: {says}", said)
        assert lines(said, says) <= 2, "at the mount, and at the first use"
    assert "Traceback" not in said


def test_segments_are_lost_while_they_are_mounted(mounted: MountedPool) -> None:
    """Whoever has one keeps it; what needs its name fails."""
    lost = victims(mounted)
    other = mounted.file("other", SIZE)
    write(other, b"other")
    for path, (native, _) in lost.items():
        with Mapper(path, SIZE) as client:
            client.store(0, b"kept")
            CHANGES[path.name](native)
            assert client.load(0, 4) == b"kept"
            for size in (2 * SIZE, GRANULE, 0):
                with pytest.raises(OSError, match=IO_ERROR):
                    os.truncate(path, size)
            assert path.stat().st_size == SIZE
        with contextlib.suppress(OSError):
            head(path)
        path.unlink()
    assert head(other) == b"other\0"
    native = native_of(other)
    other.unlink()
    mounted.wait_until_gone(native)
    mounted.damaged = True
    said = mounted.ended()
    assert [lines(said, says) for _, says in lost.values()] == [1] * len(lost)
    assert "Traceback" not in said
    mounted.start()
    assert os.listdir(mounted.path) == ["iommu"]
    strays = {name for name in os.listdir(mounted.pool) if name != "base"}
    not_ours = {n.name for p, (n, _) in lost.items() if p.name not in ("remove", "cut")}
    assert strays == not_ours
    assert lines(mounted.ended(), "no file has this segment") == 1, "the regular file, by its name"


def test_a_lost_row_is_made_again_by_fsck(
    mounted: MountedPool, capsys: pytest.CaptureFixture[str]
) -> None:
    """The file beside the region is the segment's, as its owner, mode and length say."""
    path = mounted.file("guest", SIZE)
    os.chown(path, 7, 8)
    write(path, b"kept")
    number = int(native_of(path).name.removeprefix("segment-"))
    mounted.unmount()
    with Region.open(str(mounted.region), write=True) as region:
        set_item(Damage(Populated(region, {})), number, None)
    assert fsck_main(["-y", mounted.spec]) == 1
    assert f"its segment {number} has no row: made from the file" in capsys.readouterr().out
    mounted.start()
    assert head(path) == b"kept\0\0"
    assert native_of(path).name == f"segment-{number}"
    os.truncate(path, 2 * SIZE)
    assert not mounted.ended()


def test_a_cut_segment_is_made_whole_again(mounted: MountedPool) -> None:
    """By its owner: what was cut is zero, the rest is there."""
    victim, _ = fill(mounted)
    native = native_of(victim)
    os.truncate(native, MIB)
    with pytest.raises(OSError, match=IO_ERROR):
        victim.read_bytes()
    with open(victim, "rb", buffering=0) as file, pytest.raises(OSError, match=IO_ERROR):
        os.pread(file.fileno(), 10, 3 * MIB)
    os.truncate(native, SIZE)
    assert head(victim) == b"victim"
    os.truncate(native, MIB)
    mounted.unmount()
    os.truncate(native, SIZE)
    mounted.start()
    assert victim.read_bytes() == b"victim".ljust(SIZE, b"\0")


def test_a_lengthened_segment(mounted: MountedPool) -> None:
    """What is beyond the row is nobody's: it is zeroed when the file gains it, or cut."""
    victim, _ = fill(mounted)
    native = native_of(victim)
    with native.open("r+b") as file:
        file.seek(SIZE)
        file.write(b"smuggled" * MIB)
    os.truncate(victim, 2 * SIZE)
    assert victim.read_bytes()[SIZE:] == bytes(SIZE)
    os.truncate(victim, SIZE)
    assert native.stat().st_size == SIZE
    os.truncate(native, 5 * SIZE)
    mounted.unmount()
    mounted.start()
    assert native.stat().st_size == SIZE
    assert head(victim) == b"victim"
    assert not mounted.ended()


def test_owner_and_mode_are_put_right(mounted: MountedPool) -> None:
    """At a mount, and with each change through the mount."""
    victim, _ = fill(mounted)
    native = native_of(victim)
    victim.chmod(0o640)

    def spoil() -> None:
        native.chmod(0o4777)
        os.chown(native, 7, 8)

    def owner() -> tuple[int, int, int]:
        info = native.stat()
        return info.st_uid, info.st_gid, info.st_mode & 0o7777

    spoil()
    mounted.kill()
    mounted.start()
    assert owner() == (0, 0, 0o640)
    spoil()
    os.chown(victim, 5, 6)
    assert owner() == (5, 6, 0o640)
    assert head(victim) == b"victim"


@contextlib.contextmanager
def immutable(path: Path) -> Iterator[None]:
    """A file or directory that even root does not change; skips the test where there is no such."""
    done = subprocess.run(["chattr", "+i", path], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no immutable files: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["chattr", "-i", path], check=True)


def test_an_immutable_segment(mounted: MountedPool) -> None:
    """A refusal leaves the file as it was; the memory of a removed file stays, and is told."""
    victim, other = fill(mounted)
    native = native_of(victim)
    with immutable(native):
        with pytest.raises(OSError, match=IO_ERROR):
            victim.chmod(0o604)
        assert victim.stat().st_mode & 0o777 == 0o644
        with pytest.raises(OSError, match=IO_ERROR):
            os.chown(victim, 5, 5)
        assert victim.stat().st_uid == 0
        assert head(victim) == b"victim"
        victim.unlink()
        other.unlink()
        mounted.wait_until_gone(mounted.pool / "segment-2")
        said = mounted.ended()
        mounted.start()
    assert lines(said, "segment-1: cannot be given to its owner: Operation not permitted") == 1
    assert lines(said, "segment-1: cannot be removed from") == 1
    mounted.wait_until_gone(native)


def test_an_immutable_directory(mounted: MountedPool) -> None:
    victim, other = fill(mounted)
    new = mounted.file("new")
    with immutable(mounted.pool):
        with pytest.raises(OSError, match=IO_ERROR):
            os.truncate(new, SIZE)
        assert head(victim) == b"victim"
        other.unlink()
        os.truncate(victim, GRANULE)
    os.truncate(new, SIZE)
    mounted.wait_until_gone(mounted.pool / "segment-2")
    said = mounted.ended()
    assert lines(said, "segment-3: cannot be made: Operation not permitted") == 1
    assert "Traceback" not in said


# ---------------------------------------------------------------------- at every moment


def cut_and_mend(native: Path, stop: float) -> None:
    """What the owner of a segment may do to it, again and again."""
    fd = os.open(native, os.O_RDWR)
    while time.monotonic() < stop:
        for size in (0, SIZE, GRANULE, 2 * SIZE):
            os.ftruncate(fd, size)
    os.ftruncate(fd, SIZE)


def attempt(uses: list[Callable[[], object]]) -> set[int]:
    """Call each; return the errnos, and 0 for success."""
    met = set()
    for use in uses:
        try:
            use()
            met.add(0)
        except OSError as e:
            met.add(e.errno or -1)
    return met


@pytest.mark.parametrize("huge", [False, True])
def test_a_tenant_cuts_what_others_use(huge: bool) -> None:
    """Who reads through the mount gets EIO and never SIGBUS; the others notice nothing."""
    with contextlib.ExitStack() as stack:
        place = stack.enter_context(huge_pages(32 * MIB)) if huge else None
        mount = stack.enter_context(MountedPool(8 * MIB, place=place))
        mount.damaged = True
        victim, other = fill(mount)
        fd = os.open(victim, os.O_RDWR)
        stop = time.monotonic() + 1.5
        native = native_of(victim)
        met = set()
        with child(lambda: cut_and_mend(native, stop)) as pid:
            while time.monotonic() < stop:
                at = random.randrange(4) * MIB
                met |= attempt(
                    [
                        lambda at=at: os.pread(fd, MIB, at),  # type: ignore[misc]
                        lambda at=at: os.pwrite(fd, b"x" * MIB, at),  # type: ignore[misc]
                        lambda: os.lseek(fd, 0, os.SEEK_HOLE),
                        lambda: os.truncate(victim, 5 * MIB),
                        lambda: os.truncate(victim, GRANULE),
                        lambda: victim.chmod(0o600),
                        lambda: os.getxattr(victim, "system.pkernfs.extents"),
                    ]
                )
                assert head(other) == b"other\0"
            os.waitpid(pid, 0)
        os.close(fd)
        assert met <= {0, errno.EIO, errno.EBUSY, errno.ENOSPC}
        assert {0, errno.EIO} <= met
        said = mount.ended()
        assert "Traceback" not in said
        assert len(said.splitlines()) < 50
        mount.start()
        assert head(other) == b"other\0"


# ---------------------------------------------------------------------- the directory


def test_the_directory_is_renamed(mounted: MountedPool) -> None:
    """The daemon has it open: nothing is lost, and paths are the new ones."""
    victim, _ = fill(mounted)
    mounted.pool = mounted.pool.rename(mounted.directory / "renamed")
    mounted.region = mounted.pool / "base"
    assert native_of(victim) == mounted.pool / "segment-1"
    with Mapper(victim, SIZE) as client:
        client.store(0, b"stored")
        assert native_of(victim).read_bytes()[:6] == b"stored"
    assert native_of(mounted.file("new", SIZE)) == mounted.pool / "segment-3"
    victim.unlink()
    mounted.wait_until_gone(mounted.pool / "segment-1")
    assert not mounted.ended()
    mounted.start()


def test_its_tmpfs_is_unmounted_lazily() -> None:
    """It lives as long as the daemon has it; the next mount finds no region, and says so."""
    with tmpfs() as place, MountedPool(place=place) as mount:
        victim, other = fill(mount)
        subprocess.run(["umount", "-l", place], check=True)
        with Mapper(victim, SIZE) as client:
            client.store(0, b"stored")
            assert head(victim) == b"stored"
        victim.unlink()
        os.truncate(other, 2 * SIZE)
        new = mount.file("new", SIZE)
        new.chmod(0o600)
        assert new.read_bytes() == bytes(SIZE)
        assert not mount.ended()
        done = run_pkernfs("mount", "-f", mount.spec, str(mount.path))
        assert done.returncode == 32
        assert len(done.stderr.splitlines()) == 1


def test_read_only() -> None:
    """A tmpfs that was remounted read-only between mounts: only a read-only mount is possible."""
    with tmpfs() as place, MountedPool(place=place) as mount:
        victim, _ = fill(mount)
        mount.unmount()
        subprocess.run(["mount", "-o", "remount,ro", place], check=True)
        refused = run_pkernfs("mount", "-f", mount.spec, str(mount.path))
        assert refused.returncode == 32
        assert "Read-only file system" in refused.stderr
        assert len(refused.stderr.splitlines()) == 1
        mount.options = "ro"
        mount.start()
        assert head(victim) == b"victim"
        fd = os.open(victim, os.O_RDONLY)
        with mmap.mmap(fd, SIZE, prot=mmap.PROT_READ) as memory:
            assert memory[:6] == b"victim"
        os.close(fd)
        with pytest.raises(OSError, match="Read-only"):
            os.truncate(victim, 0)
        assert not mount.ended()


# ---------------------------------------------------------------------- regions in one directory


def test_one_region_in_a_directory(mounted: MountedPool) -> None:
    """A second mount, mkfs and fsck of it are refused; so is a base range under another name."""
    fill(mounted)
    second = mounted.directory / "second"
    second.mkdir()
    done = run_pkernfs("mount", "-f", mounted.spec, str(second))
    assert done.returncode == 32
    assert f"{mounted.region}: in use" in done.stderr
    mounted.unmount()
    shutil.copy(mounted.region, mounted.pool / "base2")
    done = run_pkernfs("mount", "-f", str(mounted.pool / "base2"), str(second))
    assert done.returncode == 32
    assert done.stderr == (
        f"pkernfs: {mounted.pool}/base2: its segments are not here: "
        "they are beside a region that is a file named base\n"
    )
    elsewhere = mounted.directory / "elsewhere"
    elsewhere.mkdir(mode=0o711)
    shutil.copy(mounted.region, elsewhere)
    (mounted.pool / "base2").unlink()
    mounted.start()
    assert head(mounted.path / "victim") == b"victim", "nothing has touched it"


def test_a_directory_of_others(mounted: MountedPool) -> None:
    """Who can write to it can put any file in the place of a segment: it is refused."""
    victim, _ = fill(mounted)
    mounted.unmount()
    for mode, uid in ((0o777, 0), (0o711, 7)):
        mounted.pool.chmod(mode)
        os.chown(mounted.pool, uid, uid)
        done = run_pkernfs("mount", "-f", mounted.spec, str(mounted.path))
        assert done.returncode == 32
        assert "it belongs to somebody else, or others can write to it" in done.stderr
        assert len(done.stderr.splitlines()) == 1
    os.chown(mounted.pool, 0, 0)
    mounted.start()
    assert head(victim) == b"victim"


def mkfs(*words: str) -> subprocess.CompletedProcess[str]:
    """mkfs.pkernfs WORDS."""
    program = "import sys; from pkernfs.cli import mkfs_main; sys.exit(mkfs_main())"
    return subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True)


def test_a_directory_is_formatted_again(mounted: MountedPool) -> None:
    """Never while it is mounted; with -f, and the segments go; those without a base, too."""
    victim, _ = fill(mounted)
    assert "in use" in mkfs("-f", mounted.spec).stderr
    assert head(victim) == b"victim"
    mounted.unmount()
    done = mkfs(mounted.spec)
    assert done.returncode == 1
    assert done.stderr == (
        f"mkfs.pkernfs: {mounted.spec}: not formatted: it holds segment-1 of a pkernfs and 1 more; "
        "-f removes them\n"
    )
    mounted.start()
    assert head(victim) == b"victim", "a refusal changes nothing"
    mounted.unmount()
    mounted.region.unlink()
    done = mkfs("-s", "16M", mounted.spec)
    assert done.returncode == 1
    assert "it holds segment-1 of a pkernfs and 1 more" in done.stderr
    assert not mounted.region.exists()
    done = mkfs("-f", "-s", "16M", mounted.spec)
    assert done.returncode == 0, done.stderr
    assert os.listdir(mounted.pool) == ["base"]
    assert mounted.region.stat().st_mode & 0o777 == 0o600
    mounted.start()
    assert os.listdir(mounted.path) == ["iommu"]
    assert mounted.file("new", SIZE).read_bytes() == bytes(SIZE)


# ---------------------------------------------------------------------- an old kernel


_OLD_KERNEL = """
import sys
from pkernfs.cli import main
from pkernfs.fuse import shim
shim.why_no_passthrough = lambda: "kernel 6.1 has none"
sys.exit(main())
"""


def test_a_kernel_without_passthrough(mounted: MountedPool) -> None:
    """Mappings are copies in the page cache, as of any file; one warning says so."""
    mounted.unmount()
    mounted.program = ["-c", _OLD_KERNEL]
    mounted.start()
    for name in "ab":
        path = mounted.file(name, SIZE)
        with path.open("r+b", buffering=0) as file, mmap.mmap(file.fileno(), SIZE) as memory:
            memory[:6] = b"stored"
            assert os.pread(file.fileno(), 6, 0) == b"stored", "it is written back for a read"
            memory[MIB : MIB + 4] = b"late"
            memory.flush()
            assert native_of(path).read_bytes()[MIB : MIB + 4] == b"late"
    assert mounted.ended() == (
        "pkernfs: segments are mapped through the page cache, not directly: kernel 6.1 has none\n"
    )
