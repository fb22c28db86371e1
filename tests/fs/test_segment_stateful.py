"""Files with segments against a model: a small pool, holders, remounts, lost memory."""

from __future__ import annotations

import stat
from collections.abc import Callable

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pkernfs.dma.mount import mount_filesystem
from pkernfs.errors import BusyError, NoSpaceError, RegionError
from pkernfs.fs.file import FALLOC_KEEP_SIZE, FALLOC_PUNCH_HOLE, FALLOC_ZERO_RANGE
from pkernfs.fs.mkfs import make_filesystem
from pkernfs.layout import BLOCK, ROOT_INO, SEGMENT_DEAD, SEGMENT_IN_USE
from pkernfs.pool.pool import Owner
from pkernfs.quantities import Ino, SegmentNo
from support.checking import MemoryFile, assert_clean
from support.memory_pool import POOL, MemoryPool
from support.pool_crash import check_space

MIB = 1 << 20
REGION_BYTES = 16 * MIB
POOL_BYTES = 12 * MIB
NAMES = [b"a", b"b", b"c", b"d"]
PUNCH = FALLOC_PUNCH_HOLE | FALLOC_KEEP_SIZE

PICK = st.integers(0, 1000)
#: Near the bounds of pages, blocks and what gives a file a segment.
SIZES = st.sampled_from(
    [0, 1, 4096, 70_000, MIB, 2 * MIB - 1, 2 * MIB, 2 * MIB + 1, 3 * MIB, 4 * MIB, 6 * MIB, 9 * MIB]
)
LENGTHS = st.sampled_from([1, 100, 4096, 5000, MIB, 2 * MIB, 4 * MIB])


class File:
    """What a file should hold."""

    def __init__(self, ino: Ino) -> None:
        self.ino = ino
        self.data = bytearray()
        self.owner = Owner(3, 4, 0o640)

    def cover(self, end: int) -> None:
        """Let there be bytes up to ``end``."""
        self.data += bytes(max(0, end - len(self.data)))


class SegmentMachine(RuleBasedStateMachine):
    """One file system with a pool, and what its files should hold."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = MemoryFile(REGION_BYTES)
        self.region = self.memory.open()
        make_filesystem(self.region, pool=POOL)
        self.pool = MemoryPool(POOL_BYTES)
        self.fs = mount_filesystem(self.region, open_pool=self.pool.opener())
        self.files: dict[bytes, File] = {}

    def teardown(self) -> None:
        self.fs.segments.close()
        self.region.close()
        self.memory.close()
        self.pool.put({})

    # ------------------------------------------------------------------ picking and running

    def file(self, number: int) -> File:
        return self.files[sorted(self.files)[number % len(self.files)]]

    def has_file(self) -> bool:
        return bool(self.files)

    def segment(self, file: File) -> SegmentNo | None:
        row = self.fs.segments.find(file.ino)
        return None if row is None else row.number

    def is_held(self, file: File) -> bool:
        return self.segment(file) in self.pool.busy

    def change(self, operation: Callable[[], object], *, cuts: File | None = None) -> bool:
        """Run a change; True if it has happened. It fails for what it may fail for, or not."""
        held = cuts is not None and self.is_held(cuts)
        try:
            self.fs.run(operation)
        except NoSpaceError:
            self.destroy_dead()  # what was begun for it; a daemon does that soon, by itself
            return False
        except BusyError:
            assert held, "busy, but nobody has it"
            return False
        assert not held, "what somebody has was cut"
        return True

    # ------------------------------------------------------------------ files

    @rule(name=st.sampled_from(NAMES))
    def create(self, name: bytes) -> None:
        if name not in self.files:
            ino = self.fs.create(ROOT_INO, name, stat.S_IFREG | 0o640, 3, 4).ino
            self.files[name] = File(ino)

    @precondition(has_file)
    @rule(n=PICK)
    def unlink(self, n: int) -> None:
        name = sorted(self.files)[n % len(self.files)]
        self.fs.unlink(ROOT_INO, name)
        del self.files[name]

    @precondition(has_file)
    @rule(n=PICK, size=SIZES)
    def truncate(self, n: int, size: int) -> None:
        file = self.file(n)
        cut = file if size < len(file.data) else None
        if self.change(lambda: self.fs.setattr(file.ino, size=size), cuts=cut):
            del file.data[size:]
            file.cover(size)

    @precondition(has_file)
    @rule(n=PICK, offset=SIZES, length=LENGTHS, value=st.integers(1, 255))
    def write(self, n: int, offset: int, length: int, value: int) -> None:
        file, data = self.file(n), bytes([value]) * length
        if self.change(lambda: self.fs.write(file.ino, offset, data)):
            file.cover(offset + length)
            file.data[offset : offset + length] = data

    @precondition(has_file)
    @rule(
        n=PICK,
        mode=st.sampled_from([0, FALLOC_KEEP_SIZE, FALLOC_ZERO_RANGE, FALLOC_ZERO_RANGE | 1]),
        offset=SIZES,
        length=LENGTHS,
    )
    def fallocate(self, n: int, mode: int, offset: int, length: int) -> None:
        file, end = self.file(n), offset + length
        if not self.change(lambda: self.fs.fallocate(file.ino, mode, offset, length)):
            return
        if not mode & FALLOC_KEEP_SIZE:
            file.cover(end)
        if mode & FALLOC_ZERO_RANGE:
            self.zero(file, offset, end)

    @precondition(has_file)
    @rule(n=PICK, offset=SIZES, length=LENGTHS)
    def punch(self, n: int, offset: int, length: int) -> None:
        file = self.file(n)
        if self.change(lambda: self.fs.fallocate(file.ino, PUNCH, offset, length), cuts=file):
            self.zero(file, offset, offset + length)

    @staticmethod
    def zero(file: File, start: int, end: int) -> None:
        end = min(end, len(file.data))
        if start < end:
            file.data[start:end] = bytes(end - start)

    @precondition(has_file)
    @rule(n=PICK, uid=st.sampled_from([0, 7]), mode=st.sampled_from([0o600, 0o644, 0o4755]))
    def set_owner(self, n: int, uid: int, mode: int) -> None:
        file = self.file(n)
        self.fs.setattr(file.ino, uid=uid, mode=mode)
        file.owner = Owner(uid, 4, mode & 0o777)

    # ------------------------------------------------------------------ the pool's other users

    @precondition(has_file)
    @rule(n=PICK)
    def hold(self, n: int) -> None:
        number = self.segment(self.file(n))
        if number is not None:
            self.pool.busy.add(number)

    @rule()
    def let_go(self) -> None:
        self.pool.busy.clear()

    @rule(taken=st.sampled_from([0, 3 * MIB, POOL_BYTES]))
    def take_memory(self, taken: int) -> None:
        """Somebody else has it, of whom the plan knows nothing."""
        self.pool.taken = taken

    @rule()
    def destroy_dead(self) -> None:
        self.fs.segments.reap()

    # ------------------------------------------------------------------ mounts

    @rule(clean=st.booleans())
    def remount(self, clean: bool) -> None:
        if clean:
            self.fs.unmount()
        else:
            self.fs.segments.close()
        self.region.close()
        self.region = self.memory.open()
        self.fs = mount_filesystem(self.region, open_pool=self.pool.opener())
        assert not self.fs.segments.lost

    @precondition(has_file)
    @rule(n=PICK)
    def lose(self, n: int) -> None:
        """The memory of one file goes; it alone fails, until it is removed."""
        name = sorted(self.files)[n % len(self.files)]
        number = self.segment(self.files[name])
        if number is None or number in self.pool.busy:
            return
        kept = self.pool.state()
        del kept[number]
        self.fs.segments.close()
        self.pool.put(kept)
        self.fs = mount_filesystem(self.region, open_pool=self.pool.opener())
        with pytest.raises(RegionError):
            self.fs.run(lambda: self.fs.write(self.files[name].ino, 0, b"x"))
        self.fs.unlink(ROOT_INO, name)
        del self.files[name]
        self.destroy_dead()

    # ------------------------------------------------------------------ what is always so

    @invariant()
    def files_hold_what_they_should(self) -> None:
        for file in self.files.values():
            found = self.fs.read(file.ino, 0, len(file.data) + 1)
            assert len(found) == len(file.data)
            assert bytes(found) == file.data, f"inode {file.ino}: other bytes"

    @invariant()
    def each_has_its_own_memory(self) -> None:
        rows = self.fs.segments.table.rows
        assert self.pool.memories.keys() == rows.keys()
        used = [row for row in rows.values() if row.state == SEGMENT_IN_USE]
        dead = [row for row in rows.values() if row.state == SEGMENT_DEAD]
        assert len(used) + len(dead) == len(rows)
        owners = {file.ino: file.owner for file in self.files.values()}
        assert len({row.ino for row in used}) == len(used)
        for row in used:
            assert self.pool.owners[row.number] == owners[row.ino]
            assert row.length == self.pool.length(row.number) == row.valid
            assert not row.length % BLOCK

    @invariant()
    def space_adds_up(self) -> None:
        check_space(self.fs, self.pool)

    @invariant()
    def it_is_clean(self) -> None:
        assert_clean(self.region)


TestSegments = pytest.mark.slow("a model of many steps")(SegmentMachine.TestCase)
