"""Every crash point: replay a prefix of an operation's stores, mount, and compare.

:class:`Sweep` records the stores of one operation, rebuilds the region at each 8-byte step of them,
and there recovers, compares the whole tree with what it was before and after, checks the structure
and goes on working. What a check itself stores is undone afterwards, so the region is copied once.

The scenarios are in test_crash_points.py.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import random
import traceback
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from multiprocessing.connection import Connection
from typing import Any, NamedTuple
from unittest import mock

import pytest

from pkernfs.dma.mount import mount_filesystem
from pkernfs.errors import NoSpaceError
from pkernfs.fs import fsck, mkfs
from pkernfs.fs.filesystem import FileSystem
from pkernfs.layout import (
    BLOCK,
    BLOCK_MAP,
    BLOCK_MAP_OFFSET,
    FIRST_MAP_PAGE,
    JOURNAL_PAGE,
    JOURNAL_PAGES,
    MAGIC_NAMES,
    MAGIC_OVERFLOW,
    MAP_USED_OFFSET,
    MAP_ZERO_OFFSET,
    PAGE,
    ROOT_INO,
    page_offset,
)
from pkernfs.quantities import Ino, PhysAddr, RegionOff
from pkernfs.region import trace
from pkernfs.region.checksum import crc32c
from pkernfs.region.region import Region
from pkernfs.region.trace import Store
from support.handover import verify

MIB = 1 << 20
REGION_BYTES = 16 * MIB
JOURNAL = page_offset(JOURNAL_PAGE)
JOURNAL_END = JOURNAL + JOURNAL_PAGES * PAGE
POISON = b"\xdb" * MIB
LONG_STORE = 64  # bytes; a longer run of data is cut at its ends and in the middle only
MAX_FAILURES = 3
_MAGICS = {magic.to_bytes(4, "little") for magic in MAGIC_NAMES if magic != MAGIC_OVERFLOW}


Operation = Callable[[FileSystem], object]


class Piece(NamedTuple):
    """The smallest step of a replay: bytes for a region offset."""

    offset: RegionOff
    data: bytes


class Clock:
    """Time that moves by a microsecond with each look; the same in every run."""

    def __init__(self, start: int = 1_700_000_000_000_000_000) -> None:
        self.now = start

    def __call__(self) -> int:
        self.now += 1000
        return self.now


def say(config: pytest.Config, line: str) -> None:
    """A line in the report of the test run, also of one that passes."""
    reporter = config.pluginmanager.getplugin("terminalreporter")
    capture = config.pluginmanager.getplugin("capturemanager")
    if reporter is not None:
        with contextlib.nullcontext() if capture is None else capture.global_and_fixture_disabled():
            reporter.ensure_newline()
            reporter.write_line(line)


def recorded(operation: Callable[[], object]) -> list[Store]:
    """The stores that ``operation`` makes into any region."""
    trace.trace_start()
    try:
        operation()
    finally:
        stores = trace.trace_stop()
    return stores


def formatted(size: int = REGION_BYTES, populate: Operation | None = None) -> bytes:
    """The image of a file system made over poison, and unmounted; the same in every run."""
    with Region.anonymous(size) as region:
        for at in range(0, size, MIB):
            region.copy_in(RegionOff(at), POISON)
        with mock.patch("pkernfs.fs.mkfs.os.urandom", lambda n: bytes(range(n))):
            mkfs.make_filesystem(region, uuid=bytes(range(16, 32)), clock=Clock())
        fs = mount_filesystem(region, clock=Clock())
        if populate is not None:
            populate(fs)
        fs.unmount()
        return region.read(RegionOff(0), size)


# ---------------------------------------------------------------------- snapshots


class Entry(NamedTuple):
    """All that can be seen of a name."""

    ino: Ino
    generation: int
    mode: int
    uid: int
    gid: int
    nlink: int
    rdev: int
    size: int
    times: tuple[int, int, int, int]
    blocks512: int
    content: int | bytes  # checksum of a file's bytes; a symlink's target
    xattrs: tuple[tuple[bytes, bytes], ...]
    native: bool


Tree = dict[bytes, Entry]


def walk(fs: FileSystem) -> Iterator[tuple[bytes, Ino]]:
    """``(path, inode number)`` of everything, the root as ``/``."""
    yield b"/", ROOT_INO
    todo = [(b"/", ROOT_INO)]
    while todo:
        path, ino = todo.pop()
        for name, child, kind, _cookie in list(fs.readdir(ino, 0)):
            yield path + name, child
            if kind == 4:
                todo.append((path + name + b"/", child))


def pieces(fs: FileSystem, ino: Ino) -> Iterator[tuple[int, memoryview | None]]:
    """``(length, bytes or None for a hole)`` from a file's start to its end."""
    at, size = 0, fs.inode(ino).size
    if fs.read_only:
        yield size, memoryview(fs.read(ino, 0, size))
        return
    for e in fs.extents(ino):
        start, end = max(e.offset, at), min(e.offset + e.length, size)
        if start > at:
            yield start - at, None
        if end > start:
            where = RegionOff(e.region_offset + start - e.offset)
            yield end - start, fs.memory(ino).view(where, end - start)
            at = end
    if size > at:
        yield size - at, None


def content(fs: FileSystem, ino: Ino) -> bytes:
    """A file's bytes, without an access time."""
    return b"".join([bytes(n) if part is None else bytes(part) for n, part in pieces(fs, ino)])


def _entry(fs: FileSystem, ino: Ino) -> Entry:
    i = fs.inode(ino)
    held: int | bytes = 0
    if i.is_reg:
        for n, part in pieces(fs, ino):
            held = crc32c(bytes(n) if part is None else part, int(held))
    elif i.mode & 0o170000 == 0o120000:
        held = fs.readlink(ino)
    xattrs = tuple(sorted((n, fs.getxattr(ino, n)) for n in fs.listxattr(ino)))
    times = (i.atime, i.mtime, i.ctime, i.btime)
    return Entry(
        i.ino, i.generation, i.mode, i.uid, i.gid, i.nlink, i.rdev, i.size, times, i.blocks512,
        held, xattrs, fs.natives.is_native(ino),
    )  # fmt: skip


def snapshot(fs: FileSystem) -> Tree:
    """Everything that can be seen of a file system, by path."""
    return {path: _entry(fs, ino) for path, ino in walk(fs)}


def difference(got: Tree, expected: Tree) -> str:
    """What tells two trees apart, for a message."""
    lines = [f"+{path!r}" for path in got.keys() - expected.keys()]
    lines += [f"-{path!r}" for path in expected.keys() - got.keys()]
    for path in got.keys() & expected.keys():
        if got[path] != expected[path]:
            lines += [
                f"{path!r} {name}: got {a!r:.80}, expected {b!r:.80}"
                for name, a, b in zip(Entry._fields, got[path], expected[path], strict=True)
                if a != b
            ]
    return "; ".join(lines)


# ---------------------------------------------------------------------- what is right


@dataclass
class Scenario:
    """One operation, and what may be seen if it is cut.

    ``torn`` is (path, start, end): bytes of the file that may be old or new each for itself, before
    the end of the old file. ``relaxed`` names files whose memory (st_blocks) may change unseen.
    """

    name: str
    operation: Operation
    setup: Operation | None = None
    torn: tuple[bytes, int, int] | None = None
    relaxed: tuple[bytes, ...] = ()
    size: int = REGION_BYTES
    populate: Operation | None = None
    journal_stride: int = 1  # words of a large record between two cuts, before its commit
    whole_stores: bool = False  # cut between stores, and not inside those of a few words
    subsets: int = 8  # random subsets of each epoch
    recoveries: int = 9  # points at which recovery is cut as well, at most


@dataclass
class Oracle:
    """Says of a recovered tree whether it is the one before or the one after."""

    before: Tree
    after: Tree
    relaxed: tuple[bytes, ...] = ()
    torn: tuple[bytes, int, int] | None = None
    torn_before: bytes = b""
    torn_after: bytes = b""

    def judge(self, fs: FileSystem) -> str:
        """``before``, ``after`` or ``same``.

        :raises AssertionError: neither.
        """
        tree, before, after = snapshot(fs), self.before, self.after
        relaxed = tree.keys() if fs.read_only else self.relaxed
        if relaxed:
            tree, before, after = (_without_blocks(t, relaxed) for t in (tree, before, after))
        if tree == after:
            return "same" if before == after else "after"
        if tree == before:
            return "before"
        if self.torn is not None and self._is_torn(fs, tree, before):
            return "before"
        raise AssertionError(
            f"neither before ({difference(tree, before)}) nor after ({difference(tree, after)})"
        )

    def _is_torn(self, fs: FileSystem, tree: Tree, before: Tree) -> bool:
        assert self.torn is not None
        path, start, end = self.torn
        ino = before[path].ino
        if _without_content(tree, ino) != _without_content(before, ino):
            return False
        data = content(fs, tree[path].ino)
        end = min(end, len(data))
        old, new = self.torn_before, self.torn_after
        return (
            data[:start] == old[:start]
            and data[end:] == old[end : len(data)]
            and all(data[i] in (old[i], new[i]) for i in range(start, end))
        )


def _without_blocks(tree: Tree, paths: Collection[bytes]) -> Tree:
    return {path: e._replace(blocks512=0) if path in paths else e for path, e in tree.items()}


def _without_content(tree: Tree, ino: Ino) -> Tree:
    return {path: e._replace(content=0) if e.ino == ino else e for path, e in tree.items()}


def check_structure(region: Region) -> None:
    """:raises AssertionError: fsck finds something."""
    found = [p.message for p in fsck.check(region, repair=False).problems]
    assert not found, f"fsck: {found[:4]}"


def check_zero_blocks(region: Region) -> None:
    """:raises AssertionError: a block that is said to be zero is not."""
    at = page_offset(FIRST_MAP_PAGE)
    _first, count = BLOCK_MAP.unpack_from(region.view(at, PAGE), BLOCK_MAP_OFFSET)
    size = -(-count // 8)
    used, zero = (
        int.from_bytes(region.view(RegionOff(at + offset), size), "little")
        for offset in (MAP_USED_OFFSET, MAP_ZERO_OFFSET)
    )
    assert not used & zero, f"blocks in use that are said to be free: {used & zero:#x}"
    for block in range(count):
        if zero >> block & 1:
            at = RegionOff(block * BLOCK)
            assert region.is_zero(at, BLOCK), f"block {block}: not zero, as it is said"


def check_handover(fs: FileSystem) -> None:
    """:raises AssertionError: a handover came before this mount, and something has changed."""
    mount_report = fs.mount_report
    assert mount_report is not None
    if mount_report.record is not None and mount_report.record.list_ino:
        found = verify(fs)
        assert not found.trouble, f"handover: {found.trouble}"
        assert not len(found.changes), f"handover: {[c.text() for c in found.changes.all()]}"


def check_growth(fs: FileSystem, path: bytes, ino: Ino) -> None:
    """Extend a file to the end of what it may hold already; a native one is none after this.

    :raises AssertionError: a byte that it gained is not zero.
    """
    fs.natives.off(ino)  # a native file keeps its size
    inode = fs.inode(ino)
    old = inode.size
    unit = BLOCK if inode.blocks512 * 512 >= BLOCK or old > BLOCK // 2 else PAGE
    new = -(-(old + 1) // unit) * unit
    try:
        fs.run(lambda: fs.setattr(ino, size=new))
    except NoSpaceError:
        return
    gained = content(fs, ino)[old:]
    assert gained == bytes(new - old), f"{path!r}: stale bytes beyond {old}: {_first(gained)}"


def _first(data: bytes) -> str:
    at = next(i for i, value in enumerate(data) if value)
    return f"at {at}: {data[at : at + 16].hex()}"


def check_works(fs: FileSystem, *, thorough: bool) -> None:
    """The recovered file system goes on working, and no old byte ever comes back.

    :raises AssertionError: it does not, or a gained byte is not zero.
    """
    seen = set()
    for path, ino in list(walk(fs)):
        if fs.inode(ino).is_reg and ino not in seen and not path.startswith(b"/iommu"):
            seen.add(ino)
            check_growth(fs, path, ino)
    try:
        ino = fs.run(lambda: fs.create(ROOT_INO, b"crash probe", 0o100600, 7, 7)).ino
        fs.run(lambda: fs.write(ino, 5, b"works" * 1000))
        fs.run(lambda: fs.setattr(ino, size=9 * PAGE))
    except NoSpaceError:
        return
    assert content(fs, ino) == bytes(5) + b"works" * 1000 + bytes(9 * PAGE - 5005)
    if thorough:
        _fill_up(fs, ino)
    fs.unlink(ROOT_INO, b"crash probe")


def _fill_up(fs: FileSystem, ino: Ino) -> None:
    """Take all the free space there is and look at every byte of it."""
    end = 9 * PAGE
    for step in (BLOCK, PAGE):
        while True:
            try:
                fs.run(lambda new=end + step: fs.setattr(ino, size=new))  # type: ignore[misc]
            except NoSpaceError:
                break
            end += step
    data = content(fs, ino)
    at = data.find(0xDB)
    assert data[9 * PAGE :] == bytes(end - 9 * PAGE), f"stale bytes, poison at {at}"


# ---------------------------------------------------------------------- replay


def is_metadata(store: Store, before: bytes, after: bytes) -> bool:
    """Whether a store is to be cut at each of its 8-byte steps."""
    if store.length <= LONG_STORE or JOURNAL <= store.offset < JOURNAL_END:
        return True
    page = store.offset - store.offset % PAGE
    return after[page : page + 4] in _MAGICS or before[page : page + 4] in _MAGICS


def cut(store: Store, *, whole: bool, stride: int = 1) -> Iterator[Piece]:
    """Split a store at 8-byte boundaries; at a few of them if ``whole``."""
    start, end = store.offset, store.offset + store.length
    first = min(end, start - start % 8 + 8)
    last = max(first, (end - 1) // 8 * 8)
    if whole:
        middle = (first + last) // 2
        bounds = [start, first, middle - middle % 8, middle - middle % 8 + 8, last, end]
    else:
        bounds = [start, *range(first, end, 8 * stride), end]
    data = store.bytes
    bounds = sorted({min(max(b, start), end) for b in bounds})
    for low, high in pairwise(bounds):
        yield Piece(RegionOff(low), data[low - start : high - start])


def is_fence(store: Store) -> bool:
    """The commit word of the journal: everything before it is stored before, and so on."""
    return store.offset == JOURNAL and store.length == 8


class Replay:
    """A region at some point of a trace, and its image in memory to go back to.

    What a subclass has beside the region is part of its images, and its changes are steps.
    """

    def __init__(self, image: bytes, phys_base: PhysAddr | None = None) -> None:
        self.region = Region.anonymous(len(image), phys_base=phys_base)
        self.region.copy_in(RegionOff(0), image)
        self.image = bytearray(image)

    def now(self) -> bytes:
        """All there is: another one can be made of it."""
        return self.region.read(RegionOff(0), self.region.size)

    def mount(self, clock: Clock, *, read_only: bool = False) -> FileSystem:
        """Open the file system as it is now."""
        return mount_filesystem(self.region, clock=clock, read_only=read_only)

    def record(self, operation: Callable[[], object]) -> list[Any]:
        """The stores that ``operation`` makes, and what other steps there are."""
        return recorded(operation)

    def store(self, piece: Any) -> bool:
        """Apply one step; False if it changed nothing."""
        offset, data = piece
        end = offset + len(data)
        if self.image[offset:end] == data:
            return False
        self.image[offset:end] = data
        self.region.copy_in(offset, data)
        return True

    def look(self, check: Callable[[Region], object]) -> list[Store]:
        """Run ``check`` on the region and undo what it stores; returns its stores."""
        stores: list[Store] = []
        trace.trace_start()
        try:
            check(self.region)
        finally:
            stores = trace.trace_stop()
            self.undo(stores)
        return stores

    def steps_of(self, operation: Callable[[], object]) -> list[Any]:
        """As :meth:`record`; and what it has done is undone."""
        return self.look(lambda region: operation())

    def undo(self, stores: list[Store]) -> None:
        """Have the region as the image is."""
        for s in stores:
            self.region.copy_in(s.offset, self.image[s.offset : s.offset + s.length])

    def close(self) -> None:
        """Unmap."""
        self.region.close()


@dataclass
class Result:
    """Figures of a sweep, and what went wrong."""

    figures: Counter[str] = field(default_factory=Counter)
    verdicts: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def add(self, other: Result) -> None:
        """Take another part's results in, in order."""
        self.figures += other.figures
        self.verdicts += other.verdicts
        self.failures += other.failures


class Sweep:
    """All cuts of one scenario."""

    replay: Callable[[bytes], Replay] = Replay

    def __init__(self, scenario: Scenario, base: bytes, seed: int = 1) -> None:
        self.scenario = scenario
        self.seed = seed
        self.clock = Clock()
        with contextlib.closing(self.replay(base)) as replay:
            fs = replay.mount(self.clock)
            if scenario.setup is not None:
                scenario.setup(fs)
            self.before = replay.now()
            self.stores = replay.record(lambda: scenario.operation(fs))
            self.after = replay.now()
            live = None if fs.read_only else snapshot(fs)
        self.oracle = self._oracle(live)
        self.pieces = list(self._pieces())

    def _oracle(self, live: Tree | None) -> Oracle:
        trees: list[Tree] = []
        contents: list[bytes] = []
        for image in (self.before, self.after):
            with contextlib.closing(self.replay(image)) as replay:
                fs = replay.mount(Clock())
                tree = snapshot(fs)
                trees.append(tree)
                torn = self.scenario.torn
                contents.append(content(fs, tree[torn[0]].ino) if torn else b"")
        if live is not None:
            assert live == trees[1], f"what is seen is not what lasts: {difference(live, trees[1])}"
        before, after = trees
        return Oracle(before, after, self.scenario.relaxed, self.scenario.torn, *contents)

    def _pieces(self) -> Iterator[tuple[Any, bool]]:
        """Steps, each with whether it is the commit word."""
        for store in self.stores:
            if not isinstance(store, Store):
                yield store, False
                continue
            whole = self.scenario.whole_stores or not is_metadata(store, self.before, self.after)
            stride = self.scenario.journal_stride if JOURNAL < store.offset < JOURNAL_END else 1
            for piece in cut(store, whole=whole, stride=stride):
                yield piece, is_fence(store)

    # ------------------------------------------------------------------ looking at a point

    def examine(self, replay: Replay, result: Result, what: str, number: int) -> str | None:
        """Recover, compare, check and work at one point; the verdict, None if it failed."""
        verdict: list[str] = []

        def look(region: Region) -> None:
            fs = replay.mount(Clock(1 << 61))
            verdict.append(self.oracle.judge(fs))
            check_handover(fs)
            if number % 8 == 0:
                self._fsck(region)
            check_zero_blocks(region)
            fs = self.check_more(fs, replay)
            check_works(fs, thorough=number % 32 == 0)
            fs.unmount()
            self._fsck(region)

        def look_read_only(region: Region) -> None:
            fs = replay.mount(Clock(1 << 61), read_only=True)
            seen = self.oracle.judge(fs)
            assert seen in (verdict[0], "same"), f"read-only {seen}, else {verdict[0]}"

        try:
            replay.look(look)
            if number % 4 == 0:
                replay.look(look_read_only)
        except Exception as e:
            text = f"{self.scenario.name}: {what}: {type(e).__name__}: {e}"
            if not isinstance(e, AssertionError):
                text += "\n" + "".join(traceback.format_exception(e)[-4:])
            result.failures.append(text)
            return None
        return verdict[0]

    def _fsck(self, region: Region) -> None:
        check_structure(region)

    def check_more(self, fs: FileSystem, replay: Replay) -> FileSystem:
        """Check what else there is; returns the file system, or another mount of it.

        :raises AssertionError: something beside the region is not as it should be.
        """
        return fs

    # ------------------------------------------------------------------ every prefix

    def prefixes(self, start: int, end: int) -> Result:
        """Look at the points after steps start..end-1; recovery is cut at some of them too."""
        result = Result()
        replay = self.replay(self.before)
        nested = self._nested()
        for number, (piece, _) in enumerate(self.pieces[:end]):
            changed = replay.store(piece)
            if number < start:
                continue
            result.figures["points"] += 1
            if not changed:
                result.figures["same image"] += 1
                continue
            where = f"after step {number} of {len(self.pieces)} ({_told(piece)})"
            verdict = self.examine(replay, result, where, number)
            if verdict is not None:
                result.verdicts.append(verdict)
                if number in nested:
                    self._cut_recovery(replay, result, where, verdict)
            if len(result.failures) >= MAX_FAILURES:
                break
        replay.close()
        return result

    def _nested(self) -> set[int]:
        """Points at which recovery is cut as well: at commits, amid the runs, and behind."""
        fences = [i for i, (_, fence) in enumerate(self.pieces) if fence]
        picked: list[int] = []
        for low, high in zip(fences[::2], fences[1::2], strict=False):
            picked += [low, (low + high) // 2, high]
        most = self.scenario.recoveries
        if len(picked) > most:
            picked = [picked[i * (len(picked) - 1) // (most - 1)] for i in range(most)]
        return set(picked)

    def _cut_recovery(self, replay: Replay, result: Result, where: str, verdict: str) -> None:
        """Stop the mount itself after each of its steps: the verdict must stay the same."""
        inner = self.replay(replay.now())
        stores = replay.steps_of(lambda: replay.mount(Clock(1 << 61)))
        steps = [step for s in stores for step in self._steps_of_recovery(s)]
        for number, piece in enumerate(steps):
            result.figures["recovery points"] += 1
            if not inner.store(piece):
                result.figures["same image"] += 1
                continue
            what = f"{where}, recovery cut after step {number} of {len(steps)}"
            got = self.examine(inner, result, what, number + 1)
            if got is not None and got != verdict:
                result.failures.append(f"{self.scenario.name}: {what}: {verdict} became {got}")
            if len(result.failures) >= MAX_FAILURES:
                break
        inner.close()

    def _steps_of_recovery(self, store: Any) -> Iterator[Any]:
        if not isinstance(store, Store):
            return iter([store])
        whole = self.scenario.whole_stores or not is_metadata(store, self.after, b"")
        return cut(store, whole=whole)

    # ------------------------------------------------------------------ any order between fences

    def subsets(self) -> Result:
        """Between two commit words the order is not fixed: try random subsets of the words."""
        result = Result()
        rng = random.Random(f"{self.seed} {self.scenario.name}")
        replay = self.replay(self.before)
        for epoch in self._epochs():
            for _ in range(self.scenario.subsets if len(epoch) > 1 else 0):
                share = rng.choice((0.1, 0.5, 0.9))
                chosen = [p for p in epoch if rng.random() < share]
                rng.shuffle(chosen)
                undo = [Piece(at, bytes(replay.image[at : at + len(data)])) for at, data in chosen]
                for piece in chosen:
                    replay.store(piece)
                result.figures["subsets"] += 1
                self.examine(replay, result, f"{len(chosen)} of {len(epoch)} steps", 1)
                for piece in reversed(undo):
                    replay.store(piece)
            for piece in epoch:
                replay.store(piece)
            if len(result.failures) >= MAX_FAILURES:
                break
        replay.close()
        return result

    def _epochs(self) -> Iterator[list[Piece]]:
        epoch: list[Piece] = []
        for piece, fence in self.pieces:
            if fence or not isinstance(piece, Piece):
                yield epoch
                yield [piece]
                epoch = []
            else:
                epoch.append(piece)
        yield epoch

    # ------------------------------------------------------------------ all of it

    def run(self) -> Result:
        """Everything, on two processors."""
        middle = len(self.pieces) // 2
        result = in_parallel(
            lambda: self.prefixes(0, middle),
            lambda: self.prefixes(middle, len(self.pieces)),
        )
        result.figures["stores"] = len(self.stores)
        result.figures["operations"] = 1
        self._check_order(result)
        result.add(self.subsets())
        return result

    def _check_order(self, result: Result) -> None:
        """Once an operation has happened, it stays so; all its stores make it happen."""
        seen = [v for v in result.verdicts if v != "same"]
        if seen != sorted(seen, key="before after".split().index):
            result.failures.append(f"{self.scenario.name}: before comes again after after")
        if seen and seen[-1] != "after" and not result.failures:
            result.failures.append(f"{self.scenario.name}: all is stored, but it has not happened")


def _told(step: Any) -> str:
    return f"{step.offset:#x}+{len(step.data)}" if isinstance(step, Piece) else str(step)


def in_parallel(first: Callable[[], Result], second: Callable[[], Result]) -> Result:
    """Run ``first`` here in a child and ``second`` in this process; their results in order."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(first, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        late = second()
        result: Result = ours.recv()
    finally:
        ours.close()
        process.join(60)
        if process.is_alive():
            process.kill()
            process.join()
    result.add(late)
    return result


def _child(work: Callable[[], Result], pipe: Connection) -> None:
    try:
        result = work()
    except BaseException:
        result = Result(failures=[traceback.format_exc()])
    pipe.send(result)
    pipe.close()
