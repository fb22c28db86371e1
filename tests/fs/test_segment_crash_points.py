"""Operations on files with segments, cut at every store and at every step of the pool.

The next mount finds what was before or after; files, rows and memories fit each other again, and
another mount has nothing to do. The harness is support/pool_crash.py.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Iterator

import pytest

from pkernfs.dma.mount import mount_filesystem
from pkernfs.fs.file import FALLOC_KEEP_SIZE, FALLOC_PUNCH_HOLE, FALLOC_ZERO_RANGE
from pkernfs.fs.filesystem import FileSystem
from pkernfs.fs.super import Access
from support.crash import MIB, Clock, Operation, Scenario, say
from support.handover import hand_over, verify
from support.memory_pool import MemoryPool
from support.operations import (
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
from support.pool_crash import Image, PoolSweep, formatted

pytestmark = pytest.mark.crash

SEED = int(os.environ.get("PKERNFS_SEED") or random.randrange(1 << 32))
PUNCH = FALLOC_PUNCH_HOLE | FALLOC_KEEP_SIZE
SIZE = 3 * MIB + 5000  # of the file guest


def populate(fs: FileSystem) -> None:
    """Two files with segments that have 6 of the pool's 10 MiB, and two without."""
    make(fs, "empty")
    make(fs, "small", text(9000, 1))
    for name, size in (("guest", SIZE), ("other", 2 * MIB)):
        make(fs, name)
        each(resize(name, size), write(name, 0, text(size, size)))(fs)


def pool_of(fs: FileSystem) -> MemoryPool:
    assert isinstance(fs.segments.pool, MemoryPool)
    return fs.segments.pool


def hold(path: str) -> Operation:
    """Somebody has the segment of a file mapped."""

    def run(fs: FileSystem) -> None:
        row = fs.segments.find(at(fs, path))
        assert row is not None
        pool_of(fs).busy.add(row.number)

    return run


def let_go(fs: FileSystem) -> None:
    pool_of(fs).busy.clear()


def take_memory(fs: FileSystem) -> None:
    """The pool has less than it says."""
    pool_of(fs).taken = 3 * MIB


def hand_over_segments(fs: FileSystem) -> None:
    """With digests of every segment."""
    hand_over(fs)


def first_mount(fs: FileSystem) -> None:
    """The first mount after a handover, and the end of its verification."""
    again = mount_filesystem(fs.region, clock=Clock(1 << 60), open_pool=pool_of(fs).opener())
    assert not verify(again).changes.all()
    again.super.access = Access.READ_ONLY
    again.segments.close()


def park(fs: FileSystem) -> None:
    """The mount has left all segments to be restored later."""
    pool = pool_of(fs)
    pool.parks = True
    fs.segments.absent = dict.fromkeys(pool.park(list(fs.segments.table.rows.values())))


def bring_all(fs: FileSystem) -> None:
    fs.segments.bring_all()


def destroy_dead(fs: FileSystem) -> None:
    fs.segments.reap()


def native_off(fs: FileSystem) -> None:
    fs.natives.off(at(fs, "guest"))


def scenario(
    name: str,
    operation: Operation,
    *relaxed: str,
    setup: Operation | None = None,
    torn: tuple[int, int] | None = None,
) -> Scenario:
    return Scenario(
        name,
        operation,
        setup,
        None if torn is None else (b"/guest", *torn),
        tuple(b"/" + path.encode() for path in relaxed),
        whole_stores=True,
        subsets=1,
        recoveries=2,
    )


SCENARIOS = [
    scenario("truncate, empty", resize("empty", 2 * MIB + 5), "empty"),
    scenario("truncate, copies", resize("small", 2 * MIB), "small"),
    scenario("truncate, without a name", resize("empty", 2 * MIB), "empty", setup=opened("empty")),
    scenario("fallocate", allocate("small", 0, 0, 2 * MIB + 1), "small"),
    scenario("fallocate, keeps size", allocate("empty", FALLOC_KEEP_SIZE, 0, 2 * MIB), "empty"),
    scenario("zero range", allocate("small", FALLOC_ZERO_RANGE, 9000, 2 * MIB), "small"),
    scenario("takes from the dead", resize("empty", 6 * MIB), "empty", setup=unlink("other")),
    scenario("truncate, no memory", without_space(resize("small", 4 * MIB)), setup=take_memory),
    scenario("grow", resize("guest", 5 * MIB), "guest"),
    scenario("grow, no memory", without_space(resize("guest", 7 * MIB)), setup=take_memory),
    scenario("grow by a write", write("guest", 4 * MIB - 100, text(300, 2)), "guest"),
    scenario("grow by fallocate", allocate("guest", 1, 4 * MIB, 2 * MIB), "guest"),
    scenario("grow by zero range", allocate("guest", 16, SIZE, 2 * MIB), "guest"),
    scenario("write", write("guest", 5000, text(9000, 2)), torn=(5000, 14000)),
    scenario("write over the end", write("guest", SIZE - 9, text(999, 2)), torn=(SIZE - 9, SIZE)),
    scenario("write behind the end", write("guest", SIZE + 999, text(999, 2))),
    scenario("shrink", resize("guest", MIB + 7)),
    scenario("shrink in its memory", resize("guest", 3 * MIB)),
    scenario("shrink to nothing", resize("guest", 0)),
    scenario("truncate to its size", resize("guest", SIZE)),
    scenario("punch", allocate("guest", PUNCH, 5000, 2 * MIB)),
    scenario("punch to the end", allocate("guest", PUNCH, 3 * MIB, 9 * MIB)),
    scenario("zero range in it", allocate("guest", 16, 5000, 9000), torn=(5000, 14000)),
    scenario("chmod", lambda fs: fs.setattr(at(fs, "guest"), mode=0o600)),
    scenario("chown", lambda fs: fs.setattr(at(fs, "guest"), uid=7, gid=8)),
    scenario("native on", lambda fs: fs.natives.on(at(fs, "guest"))),
    scenario("native off", native_off, setup=lambda fs: fs.natives.on(at(fs, "guest"))),
    scenario("unlink", each(unlink("guest"), destroy_dead)),
    scenario("unlink, held", each(unlink("guest"), destroy_dead), setup=hold("guest")),
    scenario("unlink, open", unlink("guest"), setup=opened("guest")),
    scenario("release of an orphan", release_all, setup=each(opened("guest"), unlink("guest"))),
    scenario("rename over", each(move("small", "guest"), destroy_dead)),
    scenario(
        "the last holder goes", destroy_dead, setup=each(hold("guest"), unlink("guest"), let_go)
    ),
    scenario("hand over", hand_over_segments),
    scenario(
        "hand over, dead segment", hand_over_segments, setup=each(hold("guest"), unlink("guest"))
    ),
    scenario("abort a handover", lambda fs: fs.thaw(), setup=hand_over_segments),
    scenario("first mount after a handover", first_mount, setup=hand_over_segments),
    scenario("restored later", bring_all, setup=park),
    scenario("restored by a cut", each(resize("guest", MIB + 7), bring_all), setup=park),
    scenario(
        "unlink before it is restored", each(unlink("guest"), destroy_dead, bring_all), setup=park
    ),
    scenario("unmount before all are restored", lambda fs: fs.unmount(), setup=park),
    scenario("unmount", lambda fs: fs.unmount(), setup=each(opened("guest"), unlink("guest"))),
]


@pytest.fixture(scope="module")
def figures(request: pytest.FixtureRequest) -> Iterator[Counter[str]]:
    """Counts what is tried; the sum is printed behind the last test."""
    found: Counter[str] = Counter()
    yield found
    say(
        request.config,
        f"crash points with segments: {found['operations']} operations, {found['stores']} stores "
        f"and steps of the pool, {found['points']} points, {found['recovery points']} in recovery",
    )


@pytest.fixture(scope="module")
def files() -> Image:
    """A file system with a pool of files: new memory is zero from the start."""
    return formatted(populate, dirty=False)


@pytest.fixture(scope="module")
def devices() -> Image:
    """A file system with a pool of devices: new memory holds old bytes, and is to be zeroed."""
    return formatted(populate, dirty=True)


def sweep(scenario: Scenario, base: Image, figures: Counter[str]) -> None:
    result = PoolSweep(scenario, base, SEED).run()
    figures.update(result.figures)
    assert not result.failures, "\n".join(result.failures)


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda s: s.name)
def test_cut_at_every_step(scenario: Scenario, files: Image, figures: Counter[str]) -> None:
    sweep(scenario, files, figures)


@pytest.mark.parametrize("name", ["truncate, copies", "grow", "grow by a write", "shrink"])
def test_memory_of_devices(name: str, devices: Image, figures: Counter[str]) -> None:
    sweep(next(s for s in SCENARIOS if s.name == name), devices, figures)
