"""root-pgtables: the root table and all between it and the domains' page tables.

The file's first page is the root table. The second one is the configuration page
(:mod:`pkernfs.iommu.config`). Context tables, PASID directories and PASID tables are in the pages
after it; which of them are in use is found by walking.

Order of stores: a table is complete before the entry that refers to it; the words of an entry that
hold no P are stored before the one that does, and after it on removal. Each change is one commit.
"""

from __future__ import annotations

from collections.abc import Sequence

from pkernfs.errors import (
    ExistsError,
    InvalidError,
    NoTablePagesError,
    NotFoundError,
    TableDamageError,
)
from pkernfs.iommu.config import config_page, load_config
from pkernfs.iommu.context_walk import ContextReader, Device, Mode
from pkernfs.iommu.memory import Commit, Memory, Piece
from pkernfs.iommu.page_walk import Finding
from pkernfs.layout import PAGE
from pkernfs.quantities import PhysAddr, RegionOff, SourceId, Word
from pkernfs.vtd.entries import (
    MAX_PHYSICAL_BITS,
    PGTT_SECOND_STAGE,
    ContextEntry,
    PasidDirectoryEntry,
    PasidTableEntry,
    RootEntry,
    ScalableContextEntry,
    aw_of,
    bdf_text,
    check_source_id,
)

MAX_DOMAIN_ID = 0xFFFF
_NO_TABLE = PhysAddr(0)
_WORD_MASK = (1 << 64) - 1
_P = 1


class RootTables:
    """The tables in root-pgtables; the only writer of them.

    :param walked: a unit may have entries cached: the free of pages that a change frees is deferred
        until :meth:`invalidated`.
    :param coherent: as for :class:`~pkernfs.iommu.page_table.PageTable`.
    :raises TableDamageError: what is in the file is not a root table with its context tables.
    """

    def __init__(
        self,
        memory: Memory,
        commit: Commit,
        *,
        physical_bits: int = MAX_PHYSICAL_BITS,
        walked: bool = False,
        coherent: bool = True,
    ) -> None:
        self.memory = memory
        self.config = load_config(memory)
        self.walked = walked
        self.coherent = coherent
        self._commit = self._committing(commit)
        self._region = memory.region
        self._physical_bits = physical_bits
        reader = ContextReader(memory, self.root, self.config.mode, _refuse, physical_bits)
        self._devices = {d.source_id: d for d in reader.devices()}
        self._used = reader.pages | {config_page(memory)}
        self._deferred: set[PhysAddr] = set()

    def _committing(self, commit: Commit) -> Commit:
        def store(words: Sequence[Word]) -> None:
            commit(words)
            if not self.coherent:
                for offset, _word in words:
                    self._region.flush_lines(offset, 8)

        return store

    @property
    def root(self) -> PhysAddr:
        """Physical address of the root table."""
        return self.memory.first_page

    @property
    def used_pages(self) -> int:
        """Pages that are tables, or hold the configuration."""
        return len(self._used)

    def devices(self) -> list[Device]:
        """List what is attached, by source id."""
        return [self._devices[s] for s in sorted(self._devices)]

    def invalidated(self) -> None:
        """Free the deferred pages: the unit has invalidated what it had cached."""
        self._used -= self._deferred
        self._deferred.clear()

    # ------------------------------------------------------------------ changes

    def attach(self, source_id: SourceId, table: PhysAddr, domain_id: int) -> None:
        """Let a device's requests be translated by the page tables at ``table``.

        ``table`` is the physical address of a top-level table of as many levels as the
        configuration says.

        :raises ExistsError: the device is attached already.
        :raises NoTablePagesError: too few free pages; says how much root-pgtables must grow.
        :raises InvalidError: an id out of range, or no address of a page.
        """
        check_source_id(source_id)
        if not 0 <= domain_id <= MAX_DOMAIN_ID:
            raise InvalidError(f"domain id {domain_id}: not one: expected 0..{MAX_DOMAIN_ID}")
        if table >> self._physical_bits:
            raise InvalidError(f"page table at {table:#x}: beyond {self._physical_bits} bits")
        if source_id in self._devices:
            raise ExistsError(f"device {bdf_text(source_id)}: attached already: detach it first")
        pages = self.pages_for(source_id)
        if self.config.mode is Mode.LEGACY:
            entry = self._legacy_entry(table, domain_id)
        else:
            entry = self._scalable_entry(table, domain_id, *pages[:2])
        _root_at, context = self._root_word(source_id)
        self._store_entry(source_id, entry, _NO_TABLE if context else pages[-1])
        self._used.update(pages)
        self._devices[source_id] = self._read_back(source_id)

    def pages_for(self, source_id: SourceId) -> list[PhysAddr]:
        """The free pages that attaching a device takes; they stay free.

        :raises NoTablePagesError: too few free pages; says how much root-pgtables must grow.
        """
        _root_at, context = self._root_word(source_id)
        own = 0 if self.config.mode is Mode.LEGACY else 2
        return self._free_pages(own + (0 if context else 1))

    def detach(self, source_id: SourceId) -> bool:
        """End that; a context table that is empty then goes as well, which is what is returned.

        :raises NotFoundError: the device is not attached.
        """
        device = self._devices.get(source_id)
        if device is None:
            raise NotFoundError(f"device {bdf_text(source_id)}: not attached")
        freed = self._device_pages(device)
        root_at, table = self._root_word(source_id)
        context_at, size = self._context_place(source_id, table)
        context = self._region.view(self.memory.need_offset(table), PAGE)
        inside = context_at - table
        rest = bytes(context[:inside]) + bytes(context[inside + size :])
        stays = any(rest[i] & _P for i in range(0, len(rest), size))
        if stays:
            at = self.memory.need_offset(context_at)
            self._commit([Word(RegionOff(at + 8 * i), 0) for i in range(size // 8)])
        else:
            self._commit([Word(self.memory.need_offset(root_at), 0)])
            freed.append(table)
        del self._devices[source_id]
        if self.walked:
            self._deferred.update(freed)
        else:
            self._used.difference_update(freed)
        return not stays

    # ------------------------------------------------------------------ entries

    def _legacy_entry(self, table: PhysAddr, domain_id: int) -> list[int]:
        entry = ContextEntry.encode(P=1, SSPTPTR=table, AW=aw_of(self.config.levels), DID=domain_id)
        return _split(entry, ContextEntry.BITS)

    def _scalable_entry(
        self, table: PhysAddr, domain_id: int, directory: PhysAddr, pasids: PhysAddr
    ) -> list[int]:
        """The context entry, after filling two free pages: PASID directory and PASID table."""
        entry = PasidTableEntry.encode(
            P=1, AW=aw_of(self.config.levels), PGTT=PGTT_SECOND_STAGE, SSPTPTR=table, DID=domain_id
        )
        self._fill(pasids, _split(entry, PasidTableEntry.BITS))
        self._fill(directory, [PasidDirectoryEntry.encode(P=1, SMPTBLPTR=pasids)])
        context = ScalableContextEntry.encode(P=1, PASIDDIRPTR=directory)
        return _split(context, ScalableContextEntry.BITS)

    def _store_entry(self, source_id: SourceId, entry: Sequence[int], new: PhysAddr) -> None:
        """Store a context entry, in the free page ``new`` if the bus has no context table yet."""
        root_at, table = self._root_word(source_id)
        context_at, _size = self._context_place(source_id, table or new)
        if table:
            at = self.memory.need_offset(context_at)
            # P is in the first word: it is stored last.
            backwards = reversed(range(len(entry)))
            self._commit([Word(RegionOff(at + 8 * i), entry[i]) for i in backwards])
        else:
            self._fill(new, entry, context_at - new)
            word = RootEntry.encode(P=1, CTP=new)
            self._commit([Word(self.memory.need_offset(root_at), word)])

    def _read_back(self, source_id: SourceId) -> Device:
        reader = ContextReader(self.memory, self.root, self.config.mode, _refuse)
        return next(d for d in reader.devices() if d.source_id == source_id)

    def _fill(self, page: PhysAddr, words: Sequence[int], at: int = 0) -> None:
        """Store a page that nothing reaches yet: ``words`` at byte ``at``, zeros elsewhere."""
        data = bytearray(PAGE)
        for i, word in enumerate(words):
            data[at + 8 * i : at + 8 * i + 8] = word.to_bytes(8, "little")
        self._region.copy_in(self.memory.need_offset(page), data)
        if not self.coherent:
            self._region.flush_lines(self.memory.need_offset(page), PAGE)

    # ------------------------------------------------------------------ places

    def _root_word(self, source_id: SourceId) -> tuple[PhysAddr, PhysAddr]:
        """Address of the root entry's word for a device, and of its context table (0: none)."""
        half = source_id >> 7 & 1 if self.config.mode is Mode.SCALABLE else 0
        at = PhysAddr(self.root + (source_id >> 8) * 16 + half * 8)
        words = self.memory.words(at, 1)
        assert words is not None
        return at, RootEntry.CTP.get(words[0]) if words[0] & _P else _NO_TABLE

    def _context_place(self, source_id: SourceId, table: PhysAddr) -> tuple[PhysAddr, int]:
        """Address and size in bytes of a device's context entry."""
        if self.config.mode is Mode.LEGACY:
            return PhysAddr(table + (source_id & 0xFF) * 16), 16
        return PhysAddr(table + (source_id & 0x7F) * 32), 32

    def _device_pages(self, device: Device) -> list[PhysAddr]:
        if device.pasid is None:
            return []
        directory = ScalableContextEntry.PASIDDIRPTR.get(device.context_words[0])
        words = self.memory.words(directory, 1)
        return [directory, *[PasidDirectoryEntry.SMPTBLPTR.get(w) for w in words or () if w & _P]]

    def find_free_run(self, length: int, alignment: int) -> Piece:
        """Consecutive memory near the end of the file that is no table now; it stays free.

        :param length: bytes; ``alignment`` is that of its physical address. Whole pages.
        :raises NoTablePagesError: there is none.
        """
        for piece in sorted(self.memory.pieces, reverse=True):
            end = (piece.physical + piece.length - length) // alignment * alignment
            for at in range(end, piece.physical - 1, -alignment):
                if self._used.isdisjoint(range(at, at + length, PAGE)):
                    offset = RegionOff(piece.offset + at - piece.physical)
                    return Piece(PhysAddr(at), offset, length)
        raise NoTablePagesError("root-pgtables", length)

    def _free_pages(self, count: int) -> list[PhysAddr]:
        """Pages that are not in use.

        :raises NoTablePagesError: there are not so many.
        """
        found: list[PhysAddr] = []
        for piece in self.memory.pieces:
            for page in range(piece.physical, piece.physical + piece.length, PAGE):
                if len(found) == count:
                    return found
                if page not in self._used:
                    found.append(PhysAddr(page))
        if len(found) == count:
            return found
        raise NoTablePagesError("root-pgtables", (count - len(found)) * PAGE)


def _split(entry: int, bits: int) -> list[int]:
    return [entry >> at & _WORD_MASK for at in range(0, bits, 64)]


def _refuse(finding: Finding) -> None:
    raise TableDamageError(finding.message)
