"""Files and domains against a model of what is mapped: a mapped byte is never freed.

Whether an operation is refused is decided by the model alone, page by page; the file system has
nothing but its tables to tell it from.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pkernfs.dma.domains import FilePiece
from pkernfs.errors import (
    BusyError,
    ExistsError,
    NoSpaceError,
    NoTablePagesError,
    NotFoundError,
)
from pkernfs.fs.file import FALLOC_KEEP_SIZE, FALLOC_PUNCH_HOLE, FALLOC_ZERO_RANGE
from pkernfs.fs.namei import RENAME_EXCHANGE
from pkernfs.fs.names import ROOT_PGTABLES
from pkernfs.host.iomem import Span
from pkernfs.layout import BLOCK, IOMMU_INO, PAGE, ROOT_INO, Extent
from pkernfs.quantities import Ino, Iova, PageNo, SourceId
from support.checking import assert_clean
from support.memory_pool import MemoryPool, PiecedPool
from support.table_files import MIB, PHYS_BASE, Host

REGION_BYTES = 96 * MIB
POOL_BYTES = 24 * MIB
MAX_PAGES = 3 * BLOCK // PAGE
PICK = st.integers(0, 1 << 16)
NAMES = st.sampled_from(["a", "b", "c", "d", "e"])
DOMAINS = st.sampled_from([0, 1, 65535])
DEVICES = st.sampled_from([0x00, 0x28, 0x2A80]).map(SourceId)
PAGES = st.one_of(
    st.sampled_from([0, 1, 2, 255, 256, 511, 512, 513, 1024, MAX_PAGES - 1]),
    st.integers(0, MAX_PAGES - 1),
)
COUNTS = st.one_of(st.sampled_from([1, 2, 255, 512, 513, 1024]), st.integers(1, MAX_PAGES))
IOVAS = st.one_of(
    st.sampled_from([0, 1, 511, 512, 1 << 18, (1 << 18) - 1, (1 << 36) - MAX_PAGES]),
    st.integers(0, 2048),
)
PERMS = st.sampled_from([1, 2, 3, 3, 3])


@dataclass(eq=False)
class File:
    """``size`` is in bytes."""

    ino: Ino
    size: int = 0
    names: set[str] = field(default_factory=set)


Mapped = tuple[File, int, int]  # file, page of the file, permissions


@dataclass(eq=False)
class Domain:
    pages: dict[int, Mapped] = field(default_factory=dict)
    devices: set[SourceId] = field(default_factory=set)


class TablesMachine(RuleBasedStateMachine):
    """One file system, and what its tables should say."""

    pool: Callable[[], MemoryPool | None] = lambda: None

    def __init__(self) -> None:
        super().__init__()
        self.host = Host(REGION_BYTES, pool=type(self).pool())
        self.names: dict[str, File] = {}
        self.domains: dict[int, Domain] = {}

    def teardown(self) -> None:
        self.remount(clean=True, with_addresses=True)
        for number, domain in list(self.domains.items()):
            for source_id in list(domain.devices):
                self.host.tables.detach(source_id)
            self.host.fs.unlink(IOMMU_INO, b"dom-%d" % number)
        for name in list(self.names):  # nothing is pinned for good
            self.host.fs.unlink(ROOT_INO, name.encode())
        if self.host.fs.find(IOMMU_INO, ROOT_PGTABLES):
            self.host.fs.unlink(IOMMU_INO, ROOT_PGTABLES)
        assert_clean(self.host.region)
        self.host.close()

    # ------------------------------------------------------------------ the model's answers

    def pinned(self, file: File, start: int = 0, end: int = 1 << 52) -> bool:
        """Whether a device may reach one of pages start..end-1."""
        return any(
            f is file and start <= page < end
            for domain in self.domains.values()
            for f, page, _perm in domain.pages.values()
        )

    def expect(self, busy: bool, operation: Callable[[], object]) -> bool:
        """Run it: refused if ``busy``, else done (or out of space). Whether it is done."""
        try:
            self.host.run(operation)
        except BusyError:
            assert busy, "refused, but nothing of it is mapped"
            return False
        except NoSpaceError:
            return False
        assert not busy, "done, but a device may reach it"
        return True

    def pick(self, number: int) -> tuple[str, File]:
        names = sorted(self.names)
        name = names[number % len(names)]
        return name, self.names[name]

    def pick_domain(self, number: int) -> tuple[int, Domain]:
        numbers = sorted(self.domains)
        found = numbers[number % len(numbers)]
        return found, self.domains[found]

    def aimed(self, file: File, page: int, aim: bool) -> int:
        """``page``, or one of the file's that are mapped."""
        pages = sorted(
            {p for d in self.domains.values() for f, p, _perm in d.pages.values() if f is file}
        )
        return pages[page % len(pages)] if aim and pages else page

    def has_file(self) -> bool:
        return bool(self.names)

    def has_domain(self) -> bool:
        return bool(self.domains)

    def drop(self, name: str) -> None:
        self.names.pop(name).names.discard(name)

    # ------------------------------------------------------------------ files

    @initialize(sizes=st.lists(PAGES, min_size=2, max_size=3), start=PAGES, count=COUNTS)
    def something_is_mapped(self, sizes: list[int], start: int, count: int) -> None:
        """Without this most runs end before much is."""
        for name, pages in zip("abc", sizes, strict=False):
            self.create(name)
            self.resize(ord(name) - ord("a"), pages, 0, aim=False)
        self.make_domain(0)
        self.map(0, 0, 0, start, count, 3)

    @rule(name=NAMES)
    def create(self, name: str) -> None:
        if name not in self.names:
            ino = self.host.fs.create(ROOT_INO, name.encode(), 0o100600, 0, 0).ino
            self.names[name] = File(ino, 0, {name})

    @precondition(has_file)
    @rule(n=PICK, page=PAGES, count=st.sampled_from([1, 3, 300]), skip=st.sampled_from([0, 7]))
    def write(self, n: int, page: int, count: int, skip: int) -> None:
        _name, file = self.pick(n)
        start, data = page * PAGE + skip, b"w" * (count * PAGE)
        if self.expect(False, partial(self.host.fs.write, file.ino, start, data)):
            file.size = max(file.size, start + len(data))

    @precondition(has_file)
    @rule(n=PICK, pages=PAGES, skip=st.sampled_from([0, 0, 0, 1, 4095]), aim=st.booleans())
    def resize(self, n: int, pages: int, skip: int, aim: bool) -> None:
        _name, file = self.pick(n)
        pages = self.aimed(file, pages, aim)
        size = pages * PAGE + skip
        busy = size < file.size and self.pinned(file, size // PAGE)
        if self.expect(busy, partial(self.host.fs.setattr, file.ino, size=size)):
            file.size = size

    @precondition(has_file)
    @rule(n=PICK, page=PAGES, count=COUNTS, skip=st.sampled_from([0, 0, 1]), aim=st.booleans())
    def punch(self, n: int, page: int, count: int, skip: int, aim: bool) -> None:
        _name, file = self.pick(n)
        page = self.aimed(file, page, aim)
        start, length = page * PAGE + skip, count * PAGE
        mode = FALLOC_PUNCH_HOLE | FALLOC_KEEP_SIZE
        busy = self.pinned(file, page, -(-(start + length) // PAGE))
        self.expect(busy, partial(self.host.fs.fallocate, file.ino, mode, start, length))

    @precondition(has_file)
    @rule(n=PICK, page=PAGES, count=COUNTS, mode=st.sampled_from([0, 1, 16, 17]))
    def allocate(self, n: int, page: int, count: int, mode: int) -> None:
        _name, file = self.pick(n)
        assert mode & ~FALLOC_KEEP_SIZE in (0, FALLOC_ZERO_RANGE)
        start, length = page * PAGE, count * PAGE
        if self.expect(False, partial(self.host.fs.fallocate, file.ino, mode, start, length)):
            file.size = file.size if mode & FALLOC_KEEP_SIZE else max(file.size, start + length)

    @precondition(has_file)
    @rule(n=PICK)
    def unlink(self, n: int) -> None:
        name, file = self.pick(n)
        busy = len(file.names) == 1 and self.pinned(file)
        if self.expect(busy, partial(self.host.fs.unlink, ROOT_INO, name.encode())):
            self.drop(name)

    @precondition(has_file)
    @rule(n=PICK, new=NAMES)
    def link(self, n: int, new: str) -> None:
        _name, file = self.pick(n)
        if new not in self.names:
            self.host.fs.link(file.ino, ROOT_INO, new.encode())
            file.names.add(new)
            self.names[new] = file

    @precondition(has_file)
    @rule(n=PICK, new=NAMES, exchange=st.booleans())
    def rename(self, n: int, new: str, exchange: bool) -> None:
        name, file = self.pick(n)
        old = self.names.get(new)
        flags = RENAME_EXCHANGE if exchange and old is not None else 0
        operation = partial(
            self.host.fs.rename, ROOT_INO, name.encode(), ROOT_INO, new.encode(), flags
        )
        gone = old is not None and not flags and old is not file
        busy = gone and old is not None and len(old.names) == 1 and self.pinned(old)
        if not self.expect(busy, operation) or old is file:
            return
        self.drop(name)
        if old is not None:
            self.drop(new)
            if flags:
                self.names[name] = old
                old.names.add(name)
        self.names[new] = file
        file.names.add(new)

    # ------------------------------------------------------------------ domains

    @rule(number=DOMAINS)
    def make_domain(self, number: int) -> None:
        if number not in self.domains:
            self.host.dom(number)
            self.domains[number] = Domain()

    @precondition(has_domain)
    @rule(n=PICK)
    def grow_domain(self, n: int) -> None:
        number, _domain = self.pick_domain(n)
        ino = self.host.fs.find(IOMMU_INO, b"dom-%d" % number)
        size = self.host.fs.inode(ino).size
        if size < 3 * BLOCK:
            self.expect(False, partial(self.host.fs.setattr, ino, size=size + BLOCK))

    @precondition(has_domain)
    @rule(n=PICK)
    def unlink_domain(self, n: int) -> None:
        number, domain = self.pick_domain(n)
        operation = partial(self.host.fs.unlink, IOMMU_INO, b"dom-%d" % number)
        if self.expect(bool(domain.devices), operation):
            del self.domains[number]

    @precondition(has_domain)
    @rule(n=PICK, new=DOMAINS, exchange=st.booleans())
    def rename_domain(self, n: int, new: int, exchange: bool) -> None:
        number, domain = self.pick_domain(n)
        old = self.domains.get(new)
        if old is domain:
            return
        flags = RENAME_EXCHANGE if exchange and old is not None else 0
        busy = bool(domain.devices or (old is not None and old.devices))
        names = b"dom-%d" % number, b"dom-%d" % new
        operation = partial(self.host.fs.rename, IOMMU_INO, names[0], IOMMU_INO, names[1], flags)
        if self.expect(busy, operation):
            del self.domains[number]
            self.domains[new] = domain
            if flags and old is not None:
                self.domains[number] = old

    @rule()
    def unlink_root(self) -> None:
        if not self.host.fs.find(IOMMU_INO, ROOT_PGTABLES):
            return
        busy = any(d.devices for d in self.domains.values())
        self.expect(busy, partial(self.host.fs.unlink, IOMMU_INO, ROOT_PGTABLES))

    @precondition(lambda self: self.has_domain() and self.has_file())
    @rule(n=PICK, d=PICK, iova=IOVAS, page=PAGES, count=COUNTS, perm=PERMS)
    def map(self, n: int, d: int, iova: int, page: int, count: int, perm: int) -> None:
        number, domain = self.pick_domain(d)
        _name, file = self.pick(n)
        whole = file.size // PAGE
        if not whole:
            return
        page %= whole
        count = min(count, whole - page)
        new = {iova + i: (file, page + i, perm) for i in range(count)}
        clash = any(domain.pages.get(at, wanted) != wanted for at, wanted in new.items())
        before = self.host.tables.domain(number).used_pages
        try:
            self.host.map(number, Iova(iova * PAGE), file.ino, page * PAGE, count * PAGE, perm)
        except ExistsError:
            assert clash
            return
        except NoTablePagesError:
            assert self.host.tables.domain(number).used_pages == before
            return
        except NoSpaceError:
            return
        assert not clash
        domain.pages.update(new)

    @precondition(has_domain)
    @rule(d=PICK, iova=IOVAS, count=COUNTS, all_of_it=st.booleans())
    def unmap(self, d: int, iova: int, count: int, all_of_it: bool) -> None:
        number, domain = self.pick_domain(d)
        if all_of_it:
            iova, count = 0, 1 << 36
        gone = [at for at in domain.pages if iova <= at < iova + count]
        try:
            done = self.host.tables.unmap(number, Iova(iova * PAGE), count * PAGE)
        except NotFoundError:
            assert not gone
            return
        except NoTablePagesError:
            return
        assert done == len(gone) * PAGE
        for at in gone:
            del domain.pages[at]

    @precondition(has_domain)
    @rule(d=PICK, source_id=DEVICES)
    def attach(self, d: int, source_id: SourceId) -> None:
        number, domain = self.pick_domain(d)
        taken = any(source_id in other.devices for other in self.domains.values())
        try:
            self.host.attach(number, source_id)
        except ExistsError:
            assert taken
            return
        except NoSpaceError:
            return
        assert not taken
        domain.devices.add(source_id)

    @rule(source_id=DEVICES)
    def detach(self, source_id: SourceId) -> None:
        holder = next((d for d in self.domains.values() if source_id in d.devices), None)
        try:
            self.host.tables.detach(source_id)
        except NotFoundError:
            assert holder is None
            return
        assert holder is not None
        holder.devices.remove(source_id)

    # ------------------------------------------------------------------ remounts

    @rule(clean=st.booleans(), with_addresses=st.booleans())
    def remount(self, clean: bool, with_addresses: bool) -> None:
        """All that is known is found again, in a region with or without addresses of its own."""
        with_addresses |= not self.host.fs.find(IOMMU_INO, ROOT_PGTABLES)
        before = self.host.state()
        pins = self._pins()
        self.host.remount(PHYS_BASE if with_addresses else None, clean=clean)
        assert self.host.state() == before
        assert self._pins() == pins

    def _pins(self) -> dict[str, list[tuple[int, str | None]]]:
        """Who holds each piece of each file."""
        return {
            name: [
                (piece.offset, self._holder(piece))
                for piece in self.host.tables.file_pieces(file.ino, 0, file.size)
            ]
            for name, file in self.names.items()
        }

    def _holder(self, piece: FilePiece) -> str | None:
        tables = self.host.tables
        if piece.physical >= PiecedPool.start:
            return tables.holder_of_memory([Span(piece.physical, piece.length)])
        page = PageNo((piece.physical - PHYS_BASE) // PAGE)
        return tables.holder([Extent(0, page, -(-piece.length // PAGE))])

    # ------------------------------------------------------------------ what always holds

    @invariant()
    def sizes(self) -> None:
        for file in self.names.values():
            assert self.host.fs.inode(file.ino).size == file.size

    @invariant()
    def tables_say_what_is_mapped(self) -> None:
        """Every mapped page leads to where the file has its memory now."""
        where: dict[int, dict[int, int]] = {}
        for file in self.names.values():
            pages = where.setdefault(file.ino, {})
            whole = -(-file.size // PAGE) * PAGE
            for low, at, length in self.host.tables.file_pieces(file.ino, 0, whole):
                pages.update((low // PAGE + i, at // PAGE + i) for i in range(length // PAGE))
        assert set(self.host.tables.domains) == set(self.domains)
        for number, domain in self.domains.items():
            found = {}
            for iova, physical, length, perm in self.host.mappings(number):
                for i in range(length // PAGE):
                    found[iova // PAGE + i] = (physical // PAGE + i, perm)
            wanted = {
                at: (where[file.ino][page], perm) for at, (file, page, perm) in domain.pages.items()
            }
            assert found == wanted

    @invariant()
    def devices(self) -> None:
        wanted = {s: d for d, domain in self.domains.items() for s in domain.devices}
        found = {d.source_id: d.table for d in self.host.tables.devices()}
        assert found == {s: self.host.tables.domain(d).root for s, d in wanted.items()}

    @invariant()
    def check_is_clean(self) -> None:
        self.host.assert_check_clean()

    @invariant()
    def nothing_is_wrong(self) -> None:
        assert not self.host.fs.read_only


TestTables = pytest.mark.slow("a model of all of it")(TablesMachine.TestCase)
TestTables.settings = settings(max_examples=3 * settings().max_examples)


class SegmentsMachine(TablesMachine):
    """The same, where files get segments, and lose them."""

    pool = partial(PiecedPool, POOL_BYTES, dirty=True)

    @precondition(TablesMachine.has_file)
    @rule(n=PICK, on=st.booleans())
    def convert(self, n: int, on: bool) -> None:
        _name, file = self.pick(n)
        conversions = self.host.fs.conversions
        convert = conversions.on if on else conversions.off
        try:
            self.expect(self.pinned(file), partial(convert, file.ino))
        finally:
            conversions.give_up(file.ino)

    @rule()
    def reap(self) -> None:
        """Nothing that a device may reach is dead, and so nothing has to wait."""
        assert self.host.fs.segments.reap() == {}

    @invariant()
    def no_segment_is_lost(self) -> None:
        assert not self.host.fs.segments.lost


TestSegments = pytest.mark.slow("a model of all of it")(SegmentsMachine.TestCase)
TestSegments.settings = settings(max_examples=2 * settings().max_examples)
