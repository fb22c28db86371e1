"""Second-stage page tables of one domain, changed under an IOMMU that may be walking them.

A change is planned on private images of the tables that it touches. Then new tables, which nothing
reaches yet, are stored in free pages. Words of reachable tables that differ go out as one commit
(one journal record), each as an aligned 8-byte store. Each of these stores leaves valid tables: it
changes what its own entry maps from before to after, and nothing else. docs/iommu.md has the
reasons.

The places of the pool's pages are the business of :mod:`pkernfs.iommu.memory`. The caller decides
what may be mapped.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, cast

from pkernfs.errors import ExistsError, InvalidError, NoTablePagesError, TableDamageError
from pkernfs.host.iomem import Span
from pkernfs.iommu.memory import Commit, Memory
from pkernfs.iommu.page_pool import (
    Mapping,
    TablePool,
    any_present,
    conflicting_entry,
    fill_entries,
    merged_entry,
)
from pkernfs.iommu.page_walk import check_tree, scan_tree, without
from pkernfs.layout import PAGE
from pkernfs.quantities import Iova, PhysAddr, RegionOff, Word
from pkernfs.vtd.entries import (
    ADDRESS_MASK,
    ENTRIES,
    LARGEST_LEAF_LEVEL,
    LEVELS,
    MAX_PHYSICAL_BITS,
    PS,
    READ_WRITE,
    is_leaf,
    is_present,
    leaf_bytes,
    width_bits,
)

#: Words of reachable tables that one change stores; a table with many of them is replaced instead.
RECORD_WORDS = 16384
_FIRST = Iova(0)


class _Image:
    """A table as it will be. ``fresh``: nothing reaches it yet."""

    __slots__ = ("children", "fresh", "index", "level", "parent", "physical", "words")

    def __init__(
        self,
        physical: PhysAddr,
        level: int,
        data: bytes,
        parent: _Image | None,
        index: int,
        *,
        fresh: bool,
    ) -> None:
        self.physical = physical
        self.level = level
        self.words = memoryview(bytearray(data)).cast("Q")
        self.parent = parent
        self.index = index
        self.fresh = fresh
        self.children: dict[int, _Image] = {}

    def pieces(self, start: int, end: int) -> Iterator[tuple[int, int, int, bool]]:
        """``(index, from, to, whole)`` of each entry that addresses start..end-1 are in.

        Plain numbers: there are many entries, and a call for each to name them is slow.
        """
        size = leaf_bytes(self.level)
        while start < end:
            stop = min(end, (start // size + 1) * size)
            yield start // size % ENTRIES, start, stop, stop - start == size
            start = stop


class PageTable:
    """The page tables in the pages of one domain file; the first page is the top-level table.

    :param levels: 3, 4 or 5, for addresses of 39, 48 or 57 bits.
    :param largest: level of the largest leaf that the unit knows: 1 4 KiB, 2 2 MiB, 3 1 GiB.
    :param walked: a unit may have entries of these tables cached: the free of pages that a change
        frees is deferred until :meth:`invalidated`. Earlier deferred ones are not known: the unit
        has to invalidate everything before the first change.
    :param coherent: units see what is in the processor's caches; else what is stored is written
        back as well, new tables before what refers to them.
    :raises TableDamageError: what is in the pages is no such tree.
    """

    def __init__(
        self,
        memory: Memory,
        commit: Commit,
        *,
        levels: int = 4,
        largest: int = LARGEST_LEAF_LEVEL,
        physical_bits: int = MAX_PHYSICAL_BITS,
        walked: bool = False,
        coherent: bool = True,
        record_words: int = RECORD_WORDS,
    ) -> None:
        if levels not in LEVELS:
            raise InvalidError(f"page tables: bad number of levels: got {levels}, expected 3, 4, 5")
        self.memory = memory
        self.levels = levels
        self.largest = largest
        self.physical_bits = physical_bits
        self.walked = walked
        self.coherent = coherent
        #: A unit may have cached what has been changed since :meth:`invalidated`.
        self.stale = False
        self._commit = commit
        self._record_words = record_words
        self._region = memory.region
        self._pool = TablePool(memory.region, memory.pieces)
        figures = check_tree(self._pool, self.root, levels, physical_bits=physical_bits)
        if figures.findings:
            raise TableDamageError(figures.findings[0].message)

    @property
    def root(self) -> PhysAddr:
        """Physical address of the top-level table."""
        return self.memory.first_page

    @property
    def free_pages(self) -> int:
        """Pages of the pool that the next change may take."""
        return self._pool.free_pages

    @property
    def used_pages(self) -> int:
        """Pages of the pool that are tables, the top-level one included."""
        return self._pool.used_pages

    def invalidated(self) -> None:
        """Free the deferred pages: the unit has invalidated what it had cached."""
        self._pool.release()
        self.stale = False

    def mappings(self, start: Iova = _FIRST, end: Iova | None = None) -> Iterator[Mapping]:
        """List what is mapped, in order, neighbours joined; cut at leaves, not at start and end."""
        end = Iova(1 << width_bits(self.levels)) if end is None else end
        return scan_tree(self._pool, self.root, self.levels, start, end)

    # ------------------------------------------------------------------ changes

    def map(self, iova: Iova, physical: PhysAddr, length: int, perm: int) -> None:
        """Map ``length`` bytes from ``iova`` on to consecutive memory from ``physical`` on.

        What is mapped already must be mapped just so.

        :raises ExistsError: something of it is mapped otherwise.
        :raises NoTablePagesError: too few free pages; says how many bytes the file must grow.
        :raises InvalidError: unaligned, empty, beyond the width, or no permission.
        """
        self.map_pieces(iova, [Span(physical, length)], perm)

    def map_pieces(self, iova: Iova, pieces: Sequence[Span], perm: int) -> None:
        """As :meth:`map`, for pieces of memory one after the other, all or nothing."""
        self.check_perm(perm)
        self.check_range(iova, sum(length for _physical, length in pieces))
        for physical, length in pieces:
            self._check_memory(physical, length)
        with self._change() as root:
            for physical, length in _coalesced(pieces):
                end = Iova(iova + length)
                self._map(root, iova, end, physical, perm)
                iova = end

    def unmap(self, iova: Iova, length: int) -> int:
        """Unmap all that is mapped there; returns how many bytes were.

        :raises NoTablePagesError: too few free pages to split a superpage.
        :raises InvalidError: unaligned, empty or beyond the width.
        """
        self.check_range(iova, length)
        with self._change() as root:
            return self._unmap(root, iova, iova + length)

    def protect(self, iova: Iova, length: int, perm: int) -> int:
        """Give all that is mapped there other permissions; returns how many bytes there are.

        :raises NoTablePagesError: too few free pages to split a superpage or to replace tables.
        :raises InvalidError: unaligned, empty, beyond the width, or no permission.
        """
        self.check_perm(perm)
        self.check_range(iova, length)
        with self._change() as root:
            return self._protect(root, iova, iova + length, perm)

    def replace(self, wanted: Sequence[Mapping], largest: int = LARGEST_LEAF_LEVEL) -> None:
        """Map ``wanted``, which is in order and does not overlap, and nothing else.

        It is one change, of what differs: what is mapped just so already stays as it is.

        :param largest: level of the largest leaf from now on, as for the class.
        :raises NoTablePagesError: too few free pages; says how many bytes the file must grow.
        :raises InvalidError: unaligned, beyond the width, no permission, not in order.
        """
        end = 0
        for m in wanted:
            self.check_perm(m.perm)
            self.check_range(m.iova, m.length)
            self._check_memory(m.physical, m.length)
            if m.iova < end:
                raise InvalidError(f"iova {m.iova:#x}: mapped twice")
            end = m.iova + m.length
        self.largest = min(self.largest, largest)
        now = list(self.mappings())
        gone = _runs(without(now, wanted))
        with self._change() as root:
            # All of these first: what is mapped then meets nothing that has to go.
            for run in gone:
                self._unmap(root, run.start, run.end)
            for m in without(wanted, now):
                self._map(root, m.iova, Iova(m.iova + m.length), m.physical, m.perm)

    def _check_memory(self, physical: PhysAddr, length: int) -> None:
        if physical % PAGE:
            raise InvalidError(
                f"memory at {physical:#x}: unaligned: expected a multiple of {PAGE:#x}"
            )
        if length % PAGE or length <= 0:
            raise InvalidError(
                f"memory at {physical:#x}: bad length: got {length:#x} bytes, expected whole pages"
            )
        if physical < 0 or physical + length > 1 << self.physical_bits:
            raise InvalidError(f"memory at {physical:#x}: beyond {self.physical_bits} address bits")

    def check_perm(self, perm: int) -> None:
        """:raises InvalidError: not READ, WRITE or both."""
        if not perm & READ_WRITE or perm & ~READ_WRITE:
            raise InvalidError(f"permission {perm:#x}: expected r, w or rw")

    def check_range(self, iova: Iova, length: int) -> None:
        """:raises InvalidError: unaligned, empty, beyond the width or not canonical for it."""
        limit = 1 << width_bits(self.levels)
        if length <= 0:
            raise InvalidError(f"iova {iova:#x}: bad length: got {length}, expected more than 0")
        if iova % PAGE:
            raise InvalidError(f"iova {iova:#x}: unaligned: expected a multiple of {PAGE:#x}")
        if length % PAGE:
            raise InvalidError(
                f"iova {iova:#x}: bad length: got {length:#x} bytes, expected whole pages"
            )
        if iova < 0 or iova >= 1 << 64:
            raise InvalidError(f"iova {iova:#x}: not an address of 64 bits")
        if iova + length > limit:
            top = (1 << 64) - limit // 2
            reason = "not canonical for" if iova >= limit and iova < top else "beyond"
            raise InvalidError(
                f"iova {iova:#x}: {reason} {width_bits(self.levels)} bits: "
                f"got {length:#x} bytes, expected an end up to {limit:#x}"
            )

    # ------------------------------------------------------------------ one change

    @contextmanager
    def _change(self) -> Iterator[_Image]:
        """Plan on images from the top-level one on; all of it is stored at the end, or nothing."""
        self._pool.begin()
        try:
            root = _Image(self.root, self.levels, self._read(self.root), None, 0, fresh=False)
            yield root
            images = self._images(root)
            changed = self._bounded(images)
            if missing := self._pool.missing_pages:
                raise NoTablePagesError("page tables", missing * PAGE)
            for image in images:
                if image.fresh:
                    self._region.copy_in(self._offset(image.physical), image.words.cast("B"))
            if not self.coherent:
                for offset in self._pool.new_pages():
                    self._region.flush_lines(offset, PAGE)
            if changed:
                if self.walked and not self.stale:
                    self.stale = any(is_present(self._word(at)) for at, _new in changed)
                self._commit(changed)
            if not self.coherent:
                for offset, _new in changed:
                    self._region.flush_lines(offset, 8)
        except BaseException:
            self._pool.abort()
            raise
        self._pool.commit(deferred=self.walked)

    def _images(self, root: _Image) -> list[_Image]:
        images = [root]
        for image in images:
            images += image.children.values()
        return images

    def _bounded(self, images: list[_Image]) -> list[Word]:
        """List the words to store into reachable tables; if too many, replace the most changed."""
        changed = {id(i): self._count_changed(i) for i in images if not i.fresh}
        total = sum(changed.values())
        replaceable = [i for i in images if not i.fresh and i.parent is not None]
        for image in sorted(replaceable, key=lambda i: -changed[id(i)]):
            if total <= self._record_words or changed[id(image)] < 2:
                break
            assert image.parent is not None
            if not self._pool.free_pages:
                break
            new = self._pool.alloc()
            self._pool.free(image.physical)
            image.physical, image.fresh = new, True
            words = image.parent.words
            words[image.index] = words[image.index] & ~ADDRESS_MASK | new
            total -= changed[id(image)] - 1
        return [word for i in images if not i.fresh for word in self._changed(i)]

    def _changed(self, image: _Image) -> list[Word]:
        offset = self._offset(image.physical)
        now = self._region.view(offset, PAGE)
        if now == image.words.cast("B"):
            return []
        return [
            Word(at, new)
            for at, new, old in zip(_word_offsets(offset), image.words, now.cast("Q"), strict=True)
            if new != old
        ]

    def _count_changed(self, image: _Image) -> int:
        now = self._region.view(self._offset(image.physical), PAGE)
        if now == image.words.cast("B"):
            return 0
        return sum(map(operator.ne, image.words, now.cast("Q")))

    def _offset(self, physical: PhysAddr) -> RegionOff:
        offset = self.memory.offset(physical)
        if offset is None:
            raise TableDamageError(f"page table at {physical:#x}: outside the domain's file")
        return offset

    def _word(self, offset: RegionOff) -> int:
        return int.from_bytes(self._region.view(offset, 8), "little")

    def _read(self, physical: PhysAddr) -> bytes:
        return self._region.read(self._offset(physical), PAGE)

    def _child(self, image: _Image, index: int) -> _Image:
        """The table that a present entry refers to."""
        child = image.children.get(index)
        if child is None:
            at = PhysAddr(image.words[index] & ADDRESS_MASK)
            if not self._pool.is_reachable(at):
                raise TableDamageError(f"page table at {at:#x}: not one of this domain's tables")
            child = _Image(at, image.level - 1, self._read(at), image, index, fresh=False)
            image.children[index] = child
        return child

    def _new(self, image: _Image, index: int) -> _Image:
        """A new empty table for an entry. Without a free page all goes on, to count them."""
        at = self._pool.alloc()
        child = _Image(at, image.level - 1, bytes(PAGE), image, index, fresh=True)
        image.children[index] = child
        image.words[index] = at & ADDRESS_MASK | READ_WRITE
        return child

    def _split(self, image: _Image, index: int) -> _Image:
        """A new table of smaller leaves for a superpage."""
        entry = image.words[index]
        child = self._new(image, index)
        if child.level == 1:
            entry &= ~PS
        fill_entries(child.words, entry, leaf_bytes(child.level))
        return child

    def _put(self, image: _Image, index: int, entry: int) -> None:
        """``entry`` instead of the child table that has an image."""
        child = image.children.pop(index)
        self._pool.free(child.physical)
        image.words[index] = entry

    def _merge(self, image: _Image, index: int) -> None:
        """A superpage instead of a child table, if that maps the same."""
        child = image.children[index]
        if child.level < self.largest:
            entry = merged_entry(child.words, leaf_bytes(child.level))
            if entry:
                self._put(image, index, entry)

    # ------------------------------------------------------------------ map

    def _map(self, image: _Image, start: Iova, end: Iova, physical: PhysAddr, perm: int) -> None:
        size = leaf_bytes(image.level)
        at = start
        while at < end:
            target = PhysAddr(physical + at - start)
            count = (end - at) // size if not at % size and not target % size else 0
            if count and image.level <= self.largest:
                index = at // size % ENTRIES
                done = self._map_leaves(image, at, min(count, ENTRIES - index), target, perm)
                at = Iova(at + done * size)
                continue
            stop = min(end, Iova((at // size + 1) * size))
            self._map_below(image, at, stop, target, perm)
            at = stop

    def _map_leaves(
        self, image: _Image, iova: Iova, count: int, target: PhysAddr, perm: int
    ) -> int:
        """Leaves in up to ``count`` entries of this table; returns how many are done."""
        size = leaf_bytes(image.level)
        index = iova // size % ENTRIES
        first = target | perm | (PS if image.level > 1 else 0)
        run = image.words[index : index + count]
        good = conflicting_entry(run, first, size)
        if good:
            fill_entries(run[:good], first, size)
            return good
        entry = run[0]
        if is_leaf(entry, image.level):
            raise self._exists(iova)
        table = PhysAddr(entry & ADDRESS_MASK)
        conflict = self._pool.verify(table, image.level - 1, target, perm)
        if conflict is not None:
            raise self._exists(Iova(iova + conflict))
        self._pool.drop(table, image.level - 1)
        run[0] = first
        return 1

    def _map_below(
        self, image: _Image, start: Iova, end: Iova, target: PhysAddr, perm: int
    ) -> None:
        """Map what one entry has to reach through a table."""
        size = leaf_bytes(image.level)
        index = start // size % ENTRIES
        entry = image.words[index]
        if is_present(entry) and is_leaf(entry, image.level):
            if (entry & ADDRESS_MASK) + start % size != target or entry & READ_WRITE != perm:
                raise self._exists(start)
            return
        if not is_present(entry) and end - start == size:
            leaf = min(image.level - 1, self.largest)
            while target % leaf_bytes(leaf):
                leaf -= 1
            table = self._pool.build(image.level - 1, leaf, target, perm)
            image.words[index] = table & ADDRESS_MASK | READ_WRITE
            return
        child = self._child(image, index) if is_present(entry) else self._new(image, index)
        self._map(child, start, end, target, perm)
        self._merge(image, index)

    def _exists(self, iova: Iova) -> ExistsError:
        return ExistsError(f"iova {iova:#x}: already mapped to something else")

    # ------------------------------------------------------------------ unmap

    def _unmap(self, image: _Image, start: int, end: int) -> int:
        size = leaf_bytes(image.level)
        done = 0
        for index, at, stop, whole in image.pieces(start, end):
            entry = image.words[index]
            if not is_present(entry):
                continue
            if whole:
                image.words[index] = 0
                if is_leaf(entry, image.level):
                    done += size
                else:
                    done += self._pool.drop(PhysAddr(entry & ADDRESS_MASK), image.level - 1)
                continue
            split = is_leaf(entry, image.level)
            child = self._split(image, index) if split else self._child(image, index)
            done += self._unmap(child, at, stop)
            if not any_present(child.words):
                self._put(image, index, 0)
        return done

    # ------------------------------------------------------------------ protect

    def _protect(self, image: _Image, start: int, end: int, perm: int) -> int:
        done = 0
        for index, at, stop, whole in image.pieces(start, end):
            entry = image.words[index]
            if not is_present(entry):
                continue
            leaf = is_leaf(entry, image.level)
            if leaf and (whole or entry & READ_WRITE == perm):
                image.words[index] = entry & ~READ_WRITE | perm
                done += stop - at
                continue
            if whole and image.level > 2:
                old = PhysAddr(entry & ADDRESS_MASK)
                table, mapped = self._pool.copy(old, image.level - 1, perm)
                image.words[index] = entry & ~ADDRESS_MASK | table & ADDRESS_MASK
                done += mapped
                continue
            child = self._split(image, index) if leaf else self._child(image, index)
            done += self._protect(child, at, stop, perm)
            self._merge(image, index)
        return done


def _word_offsets(page: RegionOff) -> Iterable[RegionOff]:
    """Those of the words of a page; one call for all of them."""
    return cast(Iterable[RegionOff], range(page, page + PAGE, 8))


def _coalesced(pieces: Sequence[Span]) -> list[Span]:
    joined: list[Span] = []
    for piece in pieces:
        if joined:
            (start, size), (physical, length) = joined[-1], piece
            if start + size == physical:
                joined[-1] = Span(start, size + length)
                continue
        joined.append(piece)
    return joined


class _Run(NamedTuple):
    """Addresses from ``start`` up to ``end``, which is not included."""

    start: Iova
    end: Iova


def _runs(mappings: Iterable[Mapping]) -> list[_Run]:
    """The addresses of mappings that are in order; what touches is one."""
    runs: list[_Run] = []
    for m in mappings:
        end = Iova(m.iova + m.length)
        if runs and runs[-1].end == m.iova:
            runs[-1] = _Run(runs[-1].start, end)
        else:
            runs.append(_Run(m.iova, end))
    return runs
