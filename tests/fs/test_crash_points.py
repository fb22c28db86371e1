"""Every operation, cut at every store: what the next mount finds is before or after, never between.

The harness is crash.py. Environment: ``PKERNFS_SEED`` repeats the random subsets of a run.
"""

from __future__ import annotations

import contextlib
import os
import random
import stat
from collections import Counter
from collections.abc import Iterator
from functools import partial
from unittest import mock

import pytest

from pkernfs.alloc import bitmap
from pkernfs.dma.mount import mount_filesystem
from pkernfs.errors import CorruptionError, FormatError, NoSpaceError
from pkernfs.fs import fsck, mkfs, superblock
from pkernfs.fs.file import FALLOC_KEEP_SIZE, FALLOC_PUNCH_HOLE, FALLOC_ZERO_RANGE
from pkernfs.fs.filesystem import FileSystem
from pkernfs.fs.namei import RENAME_EXCHANGE, RENAME_WHITEOUT
from pkernfs.fs.super import Access
from pkernfs.layout import (
    BLOCK,
    CLASS_DATA,
    CLASS_META,
    FIRST_MAP_PAGE,
    PAGE,
    PAGES_PER_BLOCK,
    ROOT_INO,
    STATE_PAGE,
    SUPERBLOCK_PAGE,
)
from pkernfs.quantities import RegionOff
from pkernfs.region.region import Region
from support.crash import (
    JOURNAL,
    JOURNAL_END,
    MIB,
    REGION_BYTES,
    Clock,
    Operation,
    Replay,
    Scenario,
    Sweep,
    Tree,
    check_structure,
    check_works,
    cut,
    formatted,
    is_metadata,
    recorded,
    say,
    snapshot,
)
from support.handover import hand_over, verify
from support.operations import (
    REG,
    allocate,
    at,
    each,
    make,
    move,
    opened,
    release_all,
    resize,
    text,
    unlink,
    without_space,
    write,
)

pytestmark = pytest.mark.crash

SEED = int(os.environ.get("PKERNFS_SEED") or random.randrange(1 << 32))


def populate(fs: FileSystem) -> None:
    """A little of everything."""
    fs.mkdir(ROOT_INO, b"d", 0o2755, 1, 2)
    d = at(fs, "d")
    make(fs, "d/a", text(100, 1))
    make(fs, "d/b", text(5000, 2))
    fs.link(at(fs, "d/b"), d, b"b2")
    make(fs, "d/empty")
    fs.mkdir(d, b"sub", 0o700, 0, 0)
    fs.mkdir(d, b"full", 0o755, 0, 0)
    make(fs, "d/full/x", text(9000, 3))
    fs.symlink(d, b"short", b"a", 0, 0)
    fs.symlink(d, b"long", text(3000, 4).replace(b"/", b"."), 0, 0)
    fs.create(d, b"fifo", stat.S_IFIFO | 0o600, 5, 6)
    fs.create(d, b"null", stat.S_IFCHR | 0o666, 0, 0, os.makedev(1, 3))
    fs.setxattr(at(fs, "d/a"), b"user.small", b"one")
    fs.setxattr(at(fs, "d/b"), b"user.large", text(6000, 5))
    fs.create(at(fs, "iommu"), b"dom-0", REG, 0, 0)


def sparse(fs: FileSystem) -> None:
    """s: 1 MiB in pages with four holes."""
    make(fs, "s")
    ino = at(fs, "s")
    for i in range(5):
        fs.write(ino, i * 8 * PAGE + 100, text(6000, i))


def fragments(count: int) -> Operation:
    """f: every second page is its own extent."""

    def run(fs: FileSystem) -> None:
        make(fs, "f")
        make(fs, "g")
        for i in range(count):
            fs.write(at(fs, "f"), i * PAGE, text(64, i))
            fs.write(at(fs, "g"), i * PAGE, text(64, i))
        assert len(fs.extents(at(fs, "f"))) > count // 2

    return run


def big(size: int) -> Operation:
    """big: a file in blocks, written in one go."""
    return lambda fs: make(fs, "big", text(size, 7))


def zero_free(fs: FileSystem) -> None:
    """All free blocks are known to be zero, as after a while of idling."""
    while (isolated := fs.next_dirty(64 * MIB)) is not None:
        for offset, length in isolated.pieces():
            fs.region.zero(offset, length)
        fs.finish_zeroing(isolated)


def names(directory: str, first: int, last: int, length: int = 40) -> Operation:
    def run(fs: FileSystem) -> None:
        d = at(fs, directory)
        for i in range(first, last):
            fs.link(at(fs, "d/a"), d, b"%0*d" % (length, i))

    return run


def no_names(directory: str, first: int, last: int, length: int = 40) -> Operation:
    def run(fs: FileSystem) -> None:
        d = at(fs, directory)
        for i in range(first, last):
            fs.unlink(d, b"%0*d" % (length, i))

    return run


def set_times(fs: FileSystem) -> None:
    fs.setattr(at(fs, "d/a"), atime=1_234_567_890, mtime=-5)


def orphan(fs: FileSystem) -> None:
    ino = at(fs, "d/b")
    fs.open(ino)
    fs.unlink(at(fs, "d"), b"b")
    fs.unlink(at(fs, "d"), b"b2")


def unnamed(fs: FileSystem) -> None:
    """A file without a name, open, with data."""
    ino = fs.tmpfile(at(fs, "d"), 0o640, 3, 4).ino
    fs.open(ino)
    fs.write(ino, 0, text(5000, 8))


def name_it(fs: FileSystem) -> None:
    """Give the file of :func:`unnamed` a name."""
    fs.link(next(iter(fs._life._opens)), at(fs, "d"), b"named")


def inode_page_full(fs: FileSystem) -> None:
    """No inode is free: the next one makes the table grow."""
    i = 0
    while fs.super.inodes.used < len(fs.super.inodes):
        make(fs, f"i{i}")
        i += 1


def free_pages(fs: FileSystem, kind: int) -> list[int]:
    """Lengths of the free runs in the carved blocks of a class."""
    blocks = fs.super.pages._partial.get(kind, {})
    return [count for block in blocks for _, count in bitmap.runs(fs.super.pages._free[block])]


def use_up_meta(fs: FileSystem) -> None:
    """No page of the metadata blocks is free."""
    n = 0
    while runs := free_pages(fs, CLASS_META):
        pages = 1 if not n else min(16, sum(runs))
        fs.setxattr(at(fs, "d/empty"), b"user.%d" % n, b"x" * 4032 * pages)
        n += 1


def use_up_data(fs: FileSystem) -> None:
    """No page of the data blocks is free."""
    n = 0
    while runs := free_pages(fs, CLASS_DATA):
        fs.setattr(make(fs, f"use{n}"), size=min(256, max(runs)) * PAGE)
        n += 1


def second_carved(fs: FileSystem) -> None:
    """pages is alone in a second carved block for data."""
    use_up_data(fs)
    make(fs, "pages", text(9000, 3))
    fs.unlink(ROOT_INO, b"use0")


def in_steps(operation: Operation) -> Operation:
    """As if a transaction had room for a few pages only."""

    def run(fs: FileSystem) -> None:
        with mock.patch("pkernfs.fs.extents.SAFE_PAGES", 3):
            operation(fs)

    return run


def full(fs: FileSystem) -> None:
    """No space is left but what is kept for freeing."""
    ino, size = make(fs, "fill"), 0
    for step in (BLOCK, PAGE):
        with contextlib.suppress(NoSpaceError):
            while True:
                fs.run(lambda new=size + step: fs.setattr(ino, size=new))  # type: ignore[misc]
                size += step


def _mount_again(fs: FileSystem) -> None:
    mount_filesystem(fs.region, clock=Clock(1 << 60)).super.access = Access.READ_ONLY


def _compare_handover(fs: FileSystem) -> None:
    """The first mount after a handover, and the end of its verification."""
    again = mount_filesystem(fs.region, clock=Clock(1 << 60))
    verify(again)
    again.super.access = Access.READ_ONLY


SCENARIOS = [
    Scenario("hand over", hand_over),
    Scenario("hand over, large files", hand_over, setup=each(big(5 * MIB), zero_free)),
    Scenario("hand over, inode table grows", hand_over, setup=inode_page_full),
    Scenario("hand over, with an orphan", hand_over, setup=orphan),
    Scenario("abort a handover", lambda fs: fs.thaw(), setup=hand_over),
    Scenario("first mount after a handover", _compare_handover, setup=hand_over),
    Scenario("create", lambda fs: fs.create(at(fs, "d"), b"new", REG, 1, 1)),
    Scenario("create, first name", lambda fs: fs.create(at(fs, "d/sub"), b"new", REG, 1, 1)),
    Scenario(
        "create a device", lambda fs: fs.create(ROOT_INO, b"dev", stat.S_IFBLK | 0o600, 0, 0, 2049)
    ),
    Scenario("create in iommu", lambda fs: fs.create(at(fs, "iommu"), b"dom-7", REG, 0, 0)),
    Scenario(
        "create, inode table grows",
        lambda fs: fs.create(at(fs, "d"), b"new", REG, 1, 1),
        setup=inode_page_full,
    ),
    Scenario(
        "create, carves a block",
        lambda fs: fs.create(at(fs, "d/sub"), b"new", REG, 1, 1),
        setup=each(zero_free, use_up_meta),
    ),
    Scenario("mkdir", lambda fs: fs.mkdir(at(fs, "d"), b"new", 0o750, 1, 1)),
    Scenario("symlink, short", lambda fs: fs.symlink(at(fs, "d"), b"new", b"to", 1, 1)),
    Scenario("symlink, long", lambda fs: fs.symlink(at(fs, "d"), b"new", b"t" * 4000, 1, 1)),
    Scenario("link", lambda fs: fs.link(at(fs, "d/a"), ROOT_INO, b"new")),
    Scenario("unlink, small", unlink("d/a")),
    Scenario("unlink, one of two names", unlink("d/b2")),
    Scenario("unlink, long symlink", unlink("d/long")),
    Scenario("unlink, many extents", unlink("f"), setup=fragments(12)),
    Scenario("unlink, blocks", unlink("big"), setup=big(3 * MIB)),
    Scenario("unlink, open", unlink("d/a"), setup=opened("d/a")),
    Scenario("unlink, looked up", unlink("d/a"), setup=lambda fs: fs.remember(at(fs, "d/a"))),
    Scenario("release of an orphan", release_all, orphan),
    Scenario("rmdir", lambda fs: fs.rmdir(at(fs, "d"), b"sub")),
    Scenario("rename", move("d/a", "d/new")),
    Scenario("rename, replaces a file", move("d/a", "d/empty")),
    Scenario("rename, replaces blocks", move("d/a", "big"), setup=big(2 * MIB)),
    Scenario("rename, replaces an open file", move("d/a", "d/full/x"), setup=opened("d/full/x")),
    Scenario("rename, replaces a directory", move("d/full", "d/sub")),
    Scenario("rename, exchanges", move("d/a", "d/full", RENAME_EXCHANGE)),
    Scenario("rename, exchanges across", move("d/a", "d/full/x", RENAME_EXCHANGE)),
    Scenario("rename, exchanges directory and file across", move("d/sub", "d/full/x", 2)),
    Scenario("rename, leaves a whiteout", move("d/a", "d/c", RENAME_WHITEOUT)),
    Scenario("rename, replaces and leaves a whiteout", move("d/a", "d/b", RENAME_WHITEOUT)),
    Scenario("rename, directory leaves a whiteout", move("d/full", "new", RENAME_WHITEOUT)),
    Scenario(
        "rename, a whiteout grows the inode table",
        move("d/a", "d/c", RENAME_WHITEOUT),
        setup=inode_page_full,
    ),
    Scenario("tmpfile", unnamed),
    Scenario("tmpfile grows the inode table", unnamed, setup=inode_page_full),
    Scenario("tmpfile, linked", name_it, setup=unnamed),
    Scenario("tmpfile, closed", release_all, setup=unnamed),
    Scenario("rename, file across", move("d/a", "d/full/y")),
    Scenario("rename, directory across", move("d/full", "new")),
    Scenario("chmod", lambda fs: fs.setattr(at(fs, "d/a"), mode=0o4711)),
    Scenario("chown", lambda fs: fs.setattr(at(fs, "d/a"), uid=99, gid=98)),
    Scenario("utimens", set_times),
    Scenario("read, access time", lambda fs: fs.read(at(fs, "d/b"), 0, 10)),
    Scenario("grow, in its page", resize("d/a", 4000), relaxed=(b"/d/a",)),
    Scenario("grow, by pages", resize("d/b", 40000), relaxed=(b"/d/b", b"/d/b2")),
    Scenario("grow, to blocks", resize("d/b", 3 * MIB), relaxed=(b"/d/b", b"/d/b2")),
    Scenario(
        "grow, to known zero blocks",
        resize("d/empty", 5 * MIB),
        setup=zero_free,
        relaxed=(b"/d/empty",),
    ),
    Scenario(
        "grow, block by block", resize("big", 5 * MIB), setup=big(3 * MIB), relaxed=(b"/big",)
    ),
    Scenario("shrink, in a page", resize("d/b", 4500)),
    Scenario("shrink, to a page", resize("d/b", 4096)),
    Scenario("shrink, to nothing", resize("d/b", 0)),
    Scenario("shrink, in a block", resize("big", 3 * MIB - 12345), setup=big(3 * MIB)),
    Scenario("shrink, to the first block", resize("big", 1000), setup=big(5 * MIB)),
    Scenario("shrink, frees blocks", resize("big", 2 * MIB), setup=big(5 * MIB)),
    Scenario("write, new small file", write("d/empty", 0, text(3000, 9)), relaxed=(b"/d/empty",)),
    Scenario("write, append in the page", write("d/a", 100, text(500, 9)), relaxed=(b"/d/a",)),
    Scenario("write, append beyond a gap", write("d/a", 300, text(500, 9)), relaxed=(b"/d/a",)),
    Scenario(
        "write, append over pages", write("d/b", 5000, text(9001, 9)), relaxed=(b"/d/b", b"/d/b2")
    ),
    Scenario(
        "write, far beyond the end", write("d/b", 50000, text(300, 9)), relaxed=(b"/d/b", b"/d/b2")
    ),
    Scenario(
        "write, into a hole",
        write("s", 2 * PAGE + 9, text(7000, 9)),
        setup=sparse,
        relaxed=(b"/s",),
    ),
    Scenario(
        "write, hole and data",
        write("s", PAGE, text(9 * PAGE, 9)),
        setup=sparse,
        torn=(b"/s", PAGE, 10 * PAGE),
        relaxed=(b"/s",),
    ),
    Scenario("write, overwrite", write("d/b", 1001, text(3001, 9)), torn=(b"/d/b", 1001, 4002)),
    Scenario(
        "write, overwrite and append",
        write("d/b", 4990, text(200, 9)),
        torn=(b"/d/b", 4990, 5190),
        relaxed=(b"/d/b", b"/d/b2"),
    ),
    Scenario("write, promotes", write("d/b", 5000, text(2 * MIB, 9)), relaxed=(b"/d/b", b"/d/b2")),
    Scenario(
        "write, promotes into a zero block",
        write("d/b", 4000, text(2 * MIB, 9)),
        setup=zero_free,
        torn=(b"/d/b", 4000, 5000),
        relaxed=(b"/d/b", b"/d/b2"),
    ),
    Scenario(
        "write, new large file", write("d/empty", 10, text(3 * MIB, 9)), relaxed=(b"/d/empty",)
    ),
    Scenario(
        "write, append to blocks",
        write("big", 3 * MIB, text(100000, 9)),
        setup=big(3 * MIB),
        relaxed=(b"/big",),
    ),
    Scenario(
        "write, append to the next block",
        write("big", 4 * MIB - 5, text(100000, 9)),
        setup=big(4 * MIB - 5),
        relaxed=(b"/big",),
    ),
    Scenario(
        "write, into a hole of blocks",
        write("big", 2 * MIB + 9, text(1000, 9)),
        setup=each(big(100), resize("big", 5 * MIB), allocate("big", 3, 2 * MIB, 2 * MIB)),
        torn=(b"/big", 2 * MIB + 9, 2 * MIB + 1009),
        relaxed=(b"/big",),
    ),
    Scenario(
        "write, carves a zero block",
        write("d/empty", 0, text(3000, 9)),
        setup=each(zero_free, use_up_data),
        relaxed=(b"/d/empty",),
    ),
    Scenario(
        "write, no space",
        without_space(write("d/a", 50, text(30000, 9))),
        setup=full,
    ),
    Scenario("unlink, no space", unlink("d/b2"), setup=full),
    Scenario("punch, no space", allocate("s", 3, PAGE // 2, 70000), setup=each(sparse, full)),
    Scenario("fallocate", allocate("d/a", 0, 0, 50000), relaxed=(b"/d/a",)),
    Scenario("fallocate, blocks", allocate("d/a", 0, 3 * MIB, 2 * MIB), relaxed=(b"/d/a",)),
    Scenario(
        "fallocate, keeps size", allocate("d/a", FALLOC_KEEP_SIZE, 0, 50000), relaxed=(b"/d/a",)
    ),
    Scenario("punch, in a page", allocate("d/b", FALLOC_PUNCH_HOLE | FALLOC_KEEP_SIZE, 100, 200)),
    Scenario(
        "punch, pages",
        allocate("s", FALLOC_PUNCH_HOLE | FALLOC_KEEP_SIZE, 500, 70000),
        setup=sparse,
    ),
    Scenario(
        "punch, blocks",
        allocate("big", FALLOC_PUNCH_HOLE | FALLOC_KEEP_SIZE, MIB, 4 * MIB),
        setup=big(6 * MIB),
    ),
    Scenario(
        "punch, in a block",
        allocate("big", FALLOC_PUNCH_HOLE | FALLOC_KEEP_SIZE, 5000, 100001),
        setup=big(2 * MIB),
    ),
    Scenario(
        "punch, to the end", allocate("d/b", FALLOC_PUNCH_HOLE | FALLOC_KEEP_SIZE, 4000, 9000)
    ),
    Scenario(
        "zero range", allocate("d/b", FALLOC_ZERO_RANGE, 1000, 2000), torn=(b"/d/b", 1000, 3000)
    ),
    Scenario(
        "zero range, beyond the end",
        allocate("d/b", FALLOC_ZERO_RANGE, 4000, 9000),
        torn=(b"/d/b", 4000, 5000),
        relaxed=(b"/d/b", b"/d/b2"),
    ),
    Scenario(
        "zero range, keeps size",
        allocate("d/b", FALLOC_ZERO_RANGE | FALLOC_KEEP_SIZE, 4000, 9000),
        torn=(b"/d/b", 4000, 5000),
        relaxed=(b"/d/b", b"/d/b2"),
    ),
    Scenario("setxattr, first", lambda fs: fs.setxattr(at(fs, "d/empty"), b"user.n", b"value")),
    Scenario("setxattr, second", lambda fs: fs.setxattr(at(fs, "d/a"), b"trusted.n", b"v" * 400)),
    Scenario("setxattr, replaces", lambda fs: fs.setxattr(at(fs, "d/a"), b"user.small", b"two")),
    Scenario(
        "setxattr, 64 KiB",
        lambda fs: fs.setxattr(at(fs, "d/a"), b"user.n", text(65536, 9)),
        journal_stride=4,
    ),
    Scenario(
        "setxattr, replaces a large one",
        lambda fs: fs.setxattr(at(fs, "d/b"), b"user.large", text(7000, 9)),
    ),
    Scenario("removexattr", lambda fs: fs.removexattr(at(fs, "d/a"), b"user.small")),
    Scenario("removexattr, large", lambda fs: fs.removexattr(at(fs, "d/b"), b"user.large")),
    Scenario(
        "name splits the root leaf", names("d/sub", 17, 18, 200), setup=names("d/sub", 0, 17, 200)
    ),
    Scenario(
        "extents spill into a tree",
        write("s", 44 * PAGE, text(3000, 9)),
        setup=sparse,
        relaxed=(b"/s",),
    ),
    Scenario(
        "extents leave the tree",
        resize("s", 0),
        setup=each(sparse, write("s", 44 * PAGE, text(3000, 9))),
    ),
    Scenario(
        "extent leaf splits",
        write("f", 169 * PAGE, text(100, 9)),
        setup=fragments(168),
        relaxed=(b"/f",),
    ),
    Scenario("block is given back", unlink("pages"), setup=second_carved),
    Scenario("shrink, several transactions", in_steps(resize("f", 100)), setup=fragments(60)),
    Scenario("unlink, several transactions", in_steps(unlink("f")), setup=fragments(60)),
    Scenario(
        "punch, several transactions", in_steps(allocate("f", 3, 5000, 100000)), setup=fragments(60)
    ),
    Scenario("zeroing of free blocks", zero_free),
    Scenario("mount", lambda fs: _mount_again(fs), setup=lambda fs: fs.unmount()),
    Scenario("unmount", lambda fs: fs.unmount()),
    Scenario("unmount with orphans", lambda fs: fs.unmount(), setup=orphan),
]


# ---------------------------------------------------------------------- the tests


class Figures:
    """What was tried, for the report."""

    def __init__(self) -> None:
        self.total: Counter[str] = Counter()

    def add(self, figures: Counter[str]) -> None:
        self.total += figures

    def line(self) -> str:
        t = self.total
        return (
            f"crash points: {t['operations']} operations, {t['stores']} stores, "
            f"{t['points']} points, {t['recovery points']} in recovery, {t['subsets']} subsets "
            f"({t['same image']} of the points with the image of the one before), seed {SEED}"
        )


@pytest.fixture(scope="module")
def figures(request: pytest.FixtureRequest) -> Iterator[Figures]:
    """Counts what is tried; the sum is printed behind the last test."""
    found = Figures()
    yield found
    say(request.config, found.line())


@pytest.fixture(scope="module")
def base() -> bytes:
    """A populated file system on a region full of old bytes, unmounted."""
    return formatted(REGION_BYTES, populate)


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda s: s.name)
def test_cut_at_every_store(scenario: Scenario, base: bytes, figures: Figures) -> None:
    sweep = Sweep(scenario, base, SEED)
    assert sweep.stores
    result = sweep.run()
    figures.add(result.figures)
    assert not result.failures, "\n".join(result.failures)


NAMES = 24  # of 200 bytes: 17 fill a leaf
SEQUENCES: dict[str, list[Operation]] = {
    "directory grows": [names("d/sub", i, i + 1, 200) for i in range(14, NAMES)],
    "directory shrinks": [no_names("d/sub", i, i + 1, 200) for i in range(NAMES)],
    "attributes grow": [
        partial(lambda fs, i: fs.setxattr(at(fs, "d/empty"), b"user.%d" % i, b"v" * 500), i=i)
        for i in range(9)
    ],
}


@pytest.mark.parametrize("sequence", SEQUENCES)
def test_sequence_cut_at_every_store(sequence: str, base: bytes, figures: Figures) -> None:
    """Operation after operation, each cut: nodes split and merge on the way."""
    if sequence == "directory shrinks":
        base = Sweep(Scenario("fill", names("d/sub", 0, NAMES, 200)), base).after
    elif sequence == "directory grows":
        base = Sweep(Scenario("fill", names("d/sub", 0, 14, 200)), base).after
    for number, operation in enumerate(SEQUENCES[sequence]):
        sweep = Sweep(
            Scenario(f"{sequence}, {number}", operation, subsets=1, recoveries=2), base, SEED
        )
        result = sweep.run()
        figures.add(result.figures)
        assert not result.failures, "\n".join(result.failures)
        base = sweep.after


@pytest.mark.parametrize("old", ["zeros", "poison", "a file system"])
def test_mkfs_cut(old: str, base: bytes, figures: Figures) -> None:
    """What a cut mkfs leaves is no file system, or the old one, or the new one."""
    size = REGION_BYTES // 2
    before = {
        "zeros": bytes(size),
        "poison": b"\xdb" * size,
        "a file system": formatted(size, lambda fs: make(fs, "old", b"content") and None),
    }[old]
    replay = Replay(before)
    trees: list[Tree] = []
    with Region.anonymous(size) as region:
        region.copy_in(RegionOff(0), before)
        if old == "a file system":
            trees.append(snapshot(mount_filesystem(region)))
            region.copy_in(RegionOff(0), before)
        stores = recorded(lambda: mkfs.make_filesystem(region, clock=Clock()))
        trees.append(snapshot(mount_filesystem(region)))
    refused: list[bool] = []

    def look(region: Region) -> None:
        try:
            fs = mount_filesystem(region)
        except (FormatError, CorruptionError):
            refused.append(True)
            return
        refused.append(False)
        assert snapshot(fs) in trees
        check_works(fs, thorough=False)
        fs.unmount()
        if superblock.load(region).from_backup:  # the backup is there, the first copy is not yet
            fsck.check(region, repair=True)
        check_structure(region)

    for store in stores:
        for piece in cut(store, whole=False):
            figures.add(Counter({"points": 1}))
            if replay.store(piece):
                replay.look(look)
            else:
                figures.add(Counter({"same image": 1}))
    figures.add(Counter({"operations": 1, "stores": len(stores)}))
    assert not refused[-1]
    assert any(refused)
    replay.close()


@pytest.mark.parametrize("damage", ["bits", "pages"])
def test_fsck_cut(damage: str, base: bytes, figures: Figures) -> None:
    """A cut repair: another one ends it; where nothing is lost, the tree is all there."""
    damaged = bytearray(base)
    if damage == "bits":  # in what can be rebuilt
        for page in (SUPERBLOCK_PAGE, STATE_PAGE, FIRST_MAP_PAGE, 2 * PAGES_PER_BLOCK):
            damaged[page * PAGE + 200] ^= 0x10
    else:  # a page of names, and its neighbours
        for page in range(2 * PAGES_PER_BLOCK + 3, 2 * PAGES_PER_BLOCK + 6):
            damaged[page * PAGE : (page + 1) * PAGE] = b"\xdb" * PAGE
    with Region.anonymous(len(base)) as region:
        region.copy_in(RegionOff(0), bytes(damaged))
        stores = recorded(lambda: fsck.check(region, repair=True))
        check_structure(region)
        tree = snapshot(mount_filesystem(region, clock=Clock()))
    replay = Replay(bytes(damaged))

    def look(region: Region) -> None:
        fsck.check(region, repair=True)
        check_structure(region)
        fs = mount_filesystem(region, clock=Clock())
        if damage == "bits":
            assert snapshot(fs) == tree
        check_works(fs, thorough=False)
        fs.unmount()
        check_structure(region)

    for store in stores:
        for piece in cut(store, whole=not is_metadata(store, base, base)):
            figures.add(Counter({"points": 1}))
            if replay.store(piece):
                replay.look(look)
            else:
                figures.add(Counter({"same image": 1}))
    figures.add(Counter({"operations": 1, "stores": len(stores)}))
    replay.close()


@pytest.mark.parametrize("lost", ["the record", "the commit word", "half of the runs"])
def test_harness_finds_what_it_is_for(lost: str, base: bytes) -> None:
    """Without one of the journal's steps the same sweep has failures."""
    sweep = Sweep(Scenario("mkdir", lambda fs: fs.mkdir(ROOT_INO, b"new", 0o755, 0, 0)), base)
    assert not sweep.prefixes(0, len(sweep.pieces)).failures
    kept = []
    for number, (piece, fence) in enumerate(sweep.pieces):
        record = JOURNAL < piece[0] < JOURNAL_END
        run = not record and not fence and number > len(sweep.pieces) // 2
        if lost == "the record" and record and piece[0] > JOURNAL + 100:
            continue
        if lost == "the commit word" and fence:
            continue
        if lost == "half of the runs" and run and number % 2:
            continue
        kept.append((piece, fence))
    sweep.pieces = kept
    result = sweep.prefixes(0, len(kept))
    sweep._check_order(result)
    assert result.failures


def test_trace_has_every_store(base: bytes) -> None:
    """No store goes round the recorder: the trace replayed is the region as it is."""
    for scenario in SCENARIOS:
        sweep = Sweep(scenario, base, SEED)
        image = bytearray(sweep.before)
        for store in sweep.stores:
            image[store.offset : store.offset + store.length] = store.bytes
        assert image == sweep.after, scenario.name
