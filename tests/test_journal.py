"""Transactions: all or nothing, at every store; and records that nobody should believe."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pkernfs.native._native import lib

from pkernfs.errors import CorruptionError, NoSpaceError, ReadOnlyError
from pkernfs.journal import (
    JOURNAL_DAMAGED,
    JOURNAL_EMPTY,
    JOURNAL_PENDING,
    MAX_PAGES,
    SAFE_PAGES,
    PageStore,
    TransactionTooLarge,
)
from pkernfs.layout import (
    HEADER,
    JOURNAL_PAGE,
    JOURNAL_PAGES,
    MAGIC_INODES,
    MAGIC_RECORD,
    MAGIC_TREE,
    NO_INO,
    PAGE,
    RECORD,
    RUN,
    page_offset,
)
from pkernfs.quantities import Ino, PageNo, RegionOff, Word, pages_from
from pkernfs.region.checksum import crc32c
from pkernfs.region.region import Region
from pkernfs.region.trace import Store, trace_start, trace_stop
from support.checking import MemoryFile

UUID = bytes(range(16))
SIZE = 16 << 20
TOTAL = SIZE // PAGE
FIRST = PageNo(2048)  # pages from here on are metadata for these tests
JOURNAL = page_offset(JOURNAL_PAGE)
CAPACITY = JOURNAL_PAGES * PAGE


def open_store(region: Region) -> PageStore:
    return PageStore(region, UUID, JOURNAL_PAGE, JOURNAL_PAGES, TOTAL)


def edit(store: PageStore, page: PageNo, at: int, data: bytes) -> None:
    """Change some bytes of a page inside a transaction."""
    store.edit(page, MAGIC_TREE)[at : at + len(data)] = data


def peek(store: PageStore, page: PageNo, at: int, length: int) -> bytes:
    return bytes(store.read(page, MAGIC_TREE)[at : at + length])


def body(image: memoryview) -> bytes:
    """All of a page but its header."""
    return bytes(image[64:])


def fill(store: PageStore, count: int, seed: int = 1, *, first: PageNo = FIRST) -> None:
    """Pages of random bytes, in one transaction (so many that they are new do not use the log)."""
    rnd = random.Random(seed)
    with store:
        for page in pages_from(first, count):
            store.new(page, MAGIC_TREE, Ino(5))[64:] = rnd.randbytes(PAGE - 64)


@pytest.fixture
def region() -> Iterator[Region]:
    with MemoryFile(SIZE) as memory, memory.open() as opened:
        yield opened


@pytest.fixture
def store(region: Region) -> PageStore:
    return open_store(region)


# ------------------------------------------------------------------------------ transactions


def test_a_transaction_is_seen_inside_at_once_and_outside_at_the_end(
    region: Region, store: PageStore
) -> None:
    fill(store, 2)
    before = body(store.read(FIRST, MAGIC_TREE))
    with store:
        image = store.edit(FIRST, MAGIC_TREE)
        image[100:103] = b"new"
        assert peek(store, FIRST, 100, 3) == b"new"
        assert bytes(store.edit(FIRST, MAGIC_TREE)[100:103]) == b"new"
        assert region.read(RegionOff(FIRST * PAGE + 64), PAGE - 64) == before
        assert store.pages_changed == 1
    assert peek(store, FIRST, 100, 3) == b"new"
    assert region.read(RegionOff(FIRST * PAGE + 100), 3) == b"new"
    assert peek(open_store(region), FIRST, 100, 3) == b"new"
    assert store.journal_state() == JOURNAL_EMPTY
    magic, checksum, itself, owner, uuid = HEADER.unpack(
        region.read(page_offset(FIRST), HEADER.size)
    )
    assert (magic, itself, owner, uuid) == (MAGIC_TREE, FIRST, 5, UUID)
    assert checksum == region.page_checksum(FIRST)


def test_giving_up_changes_nothing(region: Region, store: PageStore) -> None:
    fill(store, 3)
    before = region.read(RegionOff(0), SIZE)
    calls: list[str] = []

    def give_up() -> None:
        edit(store, FIRST, 200, b"lost")
        store.new(PageNo(FIRST + 7), MAGIC_TREE, Ino(1))[200:204] = b"lost"
        store.on_commit.append(lambda: calls.append("commit"))
        store.on_abort.append(lambda: calls.append("first"))
        store.on_abort.append(lambda: calls.append("second"))
        raise KeyError

    with pytest.raises(KeyError), store:
        give_up()
    assert calls == ["second", "first"]
    assert region.read(RegionOff(0), SIZE) == before
    assert store.pages_changed == 0
    with store:
        store.on_abort.append(lambda: calls.append("never"))
        store.on_commit.append(lambda: calls.append("commit"))
    assert calls == ["second", "first", "commit"]
    with pytest.raises(CorruptionError):
        store.read(PageNo(FIRST + 7), MAGIC_TREE)


def test_one_at_a_time_and_only_inside(store: PageStore) -> None:
    fill(store, 1)
    with store, pytest.raises(RuntimeError):
        store.__enter__()
    with pytest.raises(RuntimeError):
        store.edit(FIRST, MAGIC_TREE)
    with pytest.raises(RuntimeError):
        store.new(FIRST, MAGIC_TREE, NO_INO)


def test_an_empty_transaction_stores_nothing(store: PageStore) -> None:
    fill(store, 1)
    trace_start()
    with store:
        pass
    with store:
        store.edit(FIRST, MAGIC_TREE)
    assert trace_stop() == []


def test_too_large_changes_nothing(region: Region, store: PageStore) -> None:
    for first in range(0, 1_000, 250):
        fill(store, 250, first, first=PageNo(FIRST + first))
    before = region.read(RegionOff(0), SIZE)
    calls: list[str] = []

    def change_all() -> None:
        store.on_abort.append(lambda: calls.append("abort"))
        for page in pages_from(FIRST, 1_000):
            edit(store, page, 64, random.Random(page).randbytes(PAGE - 64))

    def make_more() -> None:
        for page in pages_from(FIRST, MAX_PAGES + 1):
            store.new(page, MAGIC_TREE, NO_INO)

    with pytest.raises(TransactionTooLarge), store:
        change_all()
    assert calls == ["abort"]
    assert region.read(RegionOff(0), SIZE) == before or store.journal_state() == JOURNAL_EMPTY
    assert region.read(page_offset(FIRST), 1_000 * PAGE) == before[FIRST * PAGE :][: 1_000 * PAGE]
    with pytest.raises(TransactionTooLarge), store:
        make_more()
    assert region.read(page_offset(FIRST), 1_000 * PAGE) == before[FIRST * PAGE :][: 1_000 * PAGE]
    assert issubclass(TransactionTooLarge, NoSpaceError)


def test_so_many_pages_always_fit(region: Region, store: PageStore) -> None:
    for first in range(0, SAFE_PAGES, 100):
        fill(store, 100, first, first=PageNo(FIRST + first))
    with store:
        for page in pages_from(FIRST, SAFE_PAGES):
            # The worst for the log: as many runs as can be.
            image = store.edit(page, MAGIC_TREE)
            for at in range(64, PAGE, 32):
                image[at] ^= 0xFF
    with store:
        for page in pages_from(FIRST, SAFE_PAGES):
            image = store.edit(page, MAGIC_TREE)
            image[64:] = bytes(byte ^ 0xFF for byte in image[64:])
    again = open_store(region)
    for page in pages_from(FIRST, SAFE_PAGES):
        again.read(page, MAGIC_TREE)


@pytest.mark.parametrize("words", range(1, 7))
def test_no_pattern_of_words_takes_more_than_the_images(
    region: Region, store: PageStore, words: int
) -> None:
    """Every first, second, ... word of as many pages as are always safe."""
    for first in range(0, SAFE_PAGES, 100):
        fill(store, 100, first, first=PageNo(FIRST + first))
    pattern = (b"\xff" + bytes(8 * words - 1)) * (PAGE // words // 8 + 1)
    mask = int.from_bytes(pattern[: PAGE - 64], "little")
    with store:
        for page in pages_from(FIRST, SAFE_PAGES):
            image = store.edit(page, MAGIC_TREE)
            changed = int.from_bytes(image[64:], "little") ^ mask
            image[64:] = changed.to_bytes(PAGE - 64, "little")
    assert SAFE_PAGES * PAGE < CAPACITY
    assert RECORD.unpack_from(region.read(JOURNAL, RECORD.size))[4] <= SAFE_PAGES * PAGE


def test_read_only(region: Region, store: PageStore) -> None:
    fill(store, 1)
    with MemoryFile(SIZE) as memory:
        with memory.open() as other:
            other.copy_in(RegionOff(0), region.view(RegionOff(0), SIZE))
        with memory.open(write=False) as other:
            frozen = open_store(other)
            assert frozen.read(FIRST, MAGIC_TREE)[16] == 5
            with pytest.raises(ReadOnlyError), frozen:
                pass


def test_a_change_that_must_not_wait(region: Region, store: PageStore) -> None:
    fill(store, 2)

    def change(page: memoryview) -> None:
        page[300:303] = b"now"

    def give_up() -> None:
        edit(store, FIRST, 100, b"lost")
        store.change_now(FIRST, MAGIC_TREE, change)
        assert region.read(RegionOff(FIRST * PAGE + 300), 3) == b"now"
        assert region.read(RegionOff(FIRST * PAGE + 100), 4) != b"lost"
        assert bytes(store.read(FIRST, MAGIC_TREE)[300:303]) == b"now"
        assert bytes(store.read(FIRST, MAGIC_TREE)[100:104]) == b"lost"
        open_store(region).read(FIRST, MAGIC_TREE)
        raise KeyError

    with pytest.raises(KeyError), store:
        give_up()
    assert bytes(store.read(FIRST, MAGIC_TREE)[300:303]) == b"now"
    assert bytes(store.read(FIRST, MAGIC_TREE)[100:104]) != b"lost"
    with store:
        store.edit(PageNo(FIRST + 1), MAGIC_TREE)[100:104] = b"kept"
        store.change_now(PageNo(FIRST + 1), MAGIC_TREE, change)
    page = bytes(open_store(region).read(PageNo(FIRST + 1), MAGIC_TREE))
    assert (page[100:104], page[300:303]) == (b"kept", b"now")


# ------------------------------------------------------------------------------ pages


def test_only_intact_pages_are_used(region: Region, store: PageStore) -> None:
    fill(store, 1)
    good = region.read(page_offset(FIRST), PAGE)

    def refused(image: bytes, page: PageNo = FIRST, magic: int = MAGIC_TREE) -> str:
        region.copy_in(page_offset(page), image)
        with pytest.raises(CorruptionError) as caught:
            open_store(region).read(page, magic)
        region.copy_in(page_offset(FIRST), good)
        return str(caught.value)

    def sealed(image: bytes) -> bytes:
        crc = crc32c(image[:4] + bytes(4) + image[8:])
        return image[:4] + crc.to_bytes(4, "little") + image[8:]

    rnd = random.Random(3)
    for _ in range(200):
        bit = rnd.randrange(PAGE * 8)
        flipped = bytearray(good)
        flipped[bit // 8] ^= 1 << bit % 8
        refused(bytes(flipped))
    assert "not its own page" in refused(good, PageNo(FIRST + 1))
    assert "another file system" in refused(sealed(good[:24] + bytes(16) + good[40:]))
    assert "magic" in refused(good, magic=MAGIC_INODES)
    for page in map(PageNo, (-1, TOTAL, 1 << 60)):
        with pytest.raises(CorruptionError):
            open_store(region).read(page, MAGIC_TREE)
    open_store(region).read(FIRST, MAGIC_TREE)


def test_a_freed_page_is_looked_at_again(store: PageStore) -> None:
    fill(store, 1)
    store.read(FIRST, MAGIC_TREE)
    with store:
        store.forget(FIRST)
    store.region.copy_in(page_offset(FIRST), b"data of a file")
    with pytest.raises(CorruptionError):
        store.read(FIRST, MAGIC_TREE)


# ------------------------------------------------------------------------------ recovery


def steps(stores: list[Store]) -> Iterator[tuple[RegionOff, bytes]]:
    """The stores in steps of 8 bytes."""
    for offset, length, data in stores:
        data = bytes(length) if data is None else data
        for at in range(0, length, 8):
            yield RegionOff(offset + at), data[at : at + 8]


@pytest.mark.slow("hundreds of recoveries")
@pytest.mark.parametrize("seed", range(4))
def test_before_or_after_at_every_step(seed: int) -> None:
    rnd = random.Random(seed)
    with Region.anonymous(SIZE) as region, Region.anonymous(SIZE) as cut:
        store = open_store(region)
        fill(store, 4, seed)
        cut.copy_in(RegionOff(0), region.view(RegionOff(0), SIZE))
        old = [body(store.read(PageNo(FIRST + i), MAGIC_TREE)) for i in range(4)]
        trace_start()
        with store:
            for i in range(4):
                image = store.edit(PageNo(FIRST + i), MAGIC_TREE)
                for _ in range(rnd.randrange(1, 12)):
                    at = rnd.randrange(64, PAGE - 16)
                    image[at : at + 16] = rnd.randbytes(16)
            store.new(PageNo(FIRST + 9), MAGIC_TREE, Ino(2))[64:] = rnd.randbytes(PAGE - 64)
        stores = trace_stop()
        new = [body(store.read(PageNo(FIRST + i), MAGIC_TREE)) for i in range(4)]
        outcomes = []
        for offset, data in steps(stores):
            recovered = Region.anonymous(SIZE)
            for page in (*pages_from(FIRST, 10), *pages_from(JOURNAL_PAGE, 3)):
                at = page_offset(page)
                recovered.copy_in(at, cut.view(at, PAGE))
            after = open_store(recovered)
            after.recover()
            found = [body(after.read(PageNo(FIRST + i), MAGIC_TREE)) for i in range(4)]
            assert found in (old, new)
            outcomes.append(found == new)
            assert after.journal_state() == JOURNAL_EMPTY
            recovered.close()
            cut.copy_in(offset, data)
        assert outcomes == sorted(outcomes), "once after, never before again"
        assert outcomes[-1]
        assert not outcomes[0]


def record(runs: bytes, count: int, *, length: int | None = None, commit: int = 7) -> bytes:
    """A record with the right checksum over whatever it says."""
    length = len(runs) if length is None else length
    head = RECORD.pack(commit, MAGIC_RECORD, 0, 7, length, count, UUID, 0)
    crc = crc32c(head[16:] + runs)
    return head[:12] + crc.to_bytes(4, "little") + head[16:] + runs


def run(offset: int, words: int, data: bytes | None = None) -> bytes:
    return RUN.pack(offset, words) + (bytes(8 * words) if data is None else data)


def test_a_pending_record_is_carried_out(region: Region, store: PageStore) -> None:
    target = page_offset(FIRST)
    region.copy_in(JOURNAL, record(run(target, 2, b"A" * 16) + run(SIZE - 8, 1, b"B" * 8), 2))
    assert store.journal_state() == JOURNAL_PENDING
    assert store.recover()
    assert region.read(target, 17) == b"A" * 16 + b"\0"
    assert region.read(RegionOff(SIZE - 8), 8) == b"B" * 8
    assert store.journal_state() == JOURNAL_EMPTY
    assert not store.recover()


@pytest.mark.parametrize("how", ["read-only region", "read-only mount"])
def test_replay_in_memory_leaves_the_region_alone(how: str) -> None:
    with MemoryFile(SIZE) as memory:
        with memory.open() as region:
            store = open_store(region)
            fill(store, 2)
            trace_start()
            with store:
                for i in range(2):
                    store.edit(PageNo(FIRST + i), MAGIC_TREE)[1000:1003] = b"new"
            stores = trace_stop()
            new = [bytes(store.read(PageNo(FIRST + i), MAGIC_TREE)) for i in range(2)]
            # Put the region back to where only the commit word has been stored.
            fill(store, 2)
            commit = next(i for i, (at, n, _) in enumerate(stores) if (at, n) == (JOURNAL, 8))
            for offset, _length, data in stores[: commit + 1]:
                assert data is not None
                region.copy_in(offset, data)
            before = region.read(RegionOff(0), SIZE)
        with memory.open(write=how == "read-only mount") as region:
            store = open_store(region)
            assert store.recover(write=False)
            assert [bytes(store.read(PageNo(FIRST + i), MAGIC_TREE)) for i in range(2)] == new
            assert region.read(RegionOff(0), SIZE) == before
            assert store.journal_state() == JOURNAL_PENDING


HOSTILE = {
    "beyond the region": record(run(SIZE, 1), 1),
    "across the end": record(run(SIZE - 8, 2), 1),
    "far away": record(run((1 << 64) - 8, 1), 1),
    "wraps around": record(run((1 << 64) - 8, 2), 1),
    "unaligned": record(run(FIRST * PAGE + 4, 1), 1),
    "into the journal": record(run(JOURNAL, 1), 1),
    "into the journal's end": record(run(JOURNAL + CAPACITY - 8, 1), 1),
    "across the journal's start": record(run(JOURNAL - 8, 2), 1),
    "no words": record(run(FIRST * PAGE, 0), 1),
    "too many words": record(run(FIRST * PAGE, 513), 1),
    "more words than bytes": record(RUN.pack(FIRST * PAGE, 3) + bytes(8), 1),
    "endless words": record(RUN.pack(FIRST * PAGE, (1 << 61) + 1) + bytes(8), 1),
    "half a run": record(run(FIRST * PAGE, 1) + bytes(8), 1),
    "fewer runs": record(run(FIRST * PAGE, 1), 2),
    "more runs": record(run(FIRST * PAGE, 1) * 2, 1),
    "longer than the journal": record(b"", 0, length=CAPACITY),
    "endless": record(b"", 0, length=(1 << 64) - 1),
    "another sequence": record(run(FIRST * PAGE, 1), 1, commit=8),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_records_are_refused(name: str, region: Region, store: PageStore) -> None:
    region.copy_in(JOURNAL, HOSTILE[name])
    before = region.read(RegionOff(0), SIZE)
    assert store.journal_state() == JOURNAL_DAMAGED
    with pytest.raises(CorruptionError):
        store.recover()
    assert region.read(RegionOff(0), SIZE) == before


@given(data=st.data())
def test_damaged_records_are_refused(data: st.DataObject) -> None:
    good = record(run(FIRST * PAGE, 3, b"x" * 24) + run(9 * PAGE, 1, b"y" * 8), 2)
    at = data.draw(st.integers(0, len(good) - 1))
    bit = data.draw(st.integers(0, 7))
    bad = bytearray(good)
    bad[at] ^= 1 << bit
    with Region.anonymous(SIZE) as region:
        region.copy_in(JOURNAL, bad)
        store = open_store(region)
        # Nothing looks at the reserved bytes but the checksum; bytes 0..15 it does not cover.
        assert store.journal_state() == JOURNAL_DAMAGED
        with pytest.raises(CorruptionError):
            store.recover()
        assert region.is_zero(page_offset(FIRST), PAGE)
        assert region.is_zero(RegionOff(9 * PAGE), PAGE)


@given(junk=st.binary(min_size=16, max_size=300))
def test_junk_in_the_journal(junk: bytes) -> None:
    with Region.anonymous(SIZE) as region:
        region.copy_in(JOURNAL, junk)
        state = open_store(region).journal_state()
        assert state == (JOURNAL_DAMAGED if any(junk[:8]) else JOURNAL_EMPTY)


def test_a_cut_record_without_commit_is_nothing(region: Region, store: PageStore) -> None:
    whole = record(run(FIRST * PAGE, 3, b"x" * 24), 1)
    region.copy_in(RegionOff(JOURNAL + 8), whole[8:])
    assert store.journal_state() == JOURNAL_EMPTY
    assert not store.recover()
    assert region.is_zero(page_offset(FIRST), PAGE)


# ------------------------------------------------------------------------------ what C is not to do


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_records_are_not_carried_out(name: str, region: Region, store: PageStore) -> None:
    """Not even by who does not ask what the journal holds."""
    region.copy_in(JOURNAL, HOSTILE[name])
    before = region.read(RegionOff(0), SIZE)
    done = lib.pk_journal_replay(region.base, SIZE, JOURNAL, CAPACITY, store._uuid_c)
    assert done == JOURNAL_DAMAGED
    assert region.read(RegionOff(0), SIZE) == before


@pytest.mark.parametrize(
    ("journal", "capacity"),
    [(JOURNAL, 63), (SIZE, PAGE), (SIZE - PAGE, 2 * PAGE), (1 << 63, 1 << 63), (JOURNAL + 4, PAGE)],
)
def test_a_journal_that_is_not_in_the_region(
    journal: RegionOff, capacity: int, region: Region, store: PageStore
) -> None:
    uuid = store._uuid_c
    assert lib.pk_journal_state(region.base, SIZE, journal, capacity, uuid) == JOURNAL_DAMAGED
    store._journal, store._capacity = journal, capacity
    with pytest.raises(CorruptionError, match="out of the region"):
        fill(store, 1)
    with pytest.raises(CorruptionError, match="out of the region"):
        store.commit_words([Word(page_offset(FIRST), 1)])
    assert region.is_zero(page_offset(FIRST), PAGE)


@pytest.mark.parametrize("page", [SIZE // PAGE, 1 << 40, (1 << 64) - 1])
def test_pages_that_are_not_in_the_region(page: PageNo, region: Region, store: PageStore) -> None:
    calls: list[str] = []
    before = region.read(RegionOff(0), SIZE)

    def new_page() -> None:
        store.on_abort.append(lambda: calls.append("abort"))
        store.new(FIRST, MAGIC_TREE, Ino(5))
        store.new(page, MAGIC_TREE, Ino(5))
        store.edit(page, MAGIC_TREE)[100] = 1

    with pytest.raises(CorruptionError, match="out of the region"), store:
        new_page()
    assert calls == ["abort"]
    assert not store.is_open
    assert region.read(RegionOff(0), SIZE) == before


def test_words_that_are_not_in_the_region(region: Region, store: PageStore) -> None:
    store.total_pages = 1 << 40
    for offset in (SIZE, SIZE + 8, SIZE - 4 + (1 << 32)):
        with pytest.raises(CorruptionError, match="out of the region"):
            store.commit_words([Word(page_offset(FIRST), 1), Word(RegionOff(offset // 8 * 8), 1)])
    assert region.is_zero(page_offset(FIRST), PAGE)


def test_a_short_uuid_is_refused(region: Region) -> None:
    with pytest.raises(ValueError, match="buffer is too small"):
        PageStore(region, UUID[:15], JOURNAL_PAGE, 2, SIZE // PAGE)
