"""root-pgtables and dom-N of a mounted file system: who changes them, and what they pin.

The files are ordinary ones whose contents are :mod:`pkernfs.iommu`'s. What must not be freed is
found by walking the tables, never from a record of its own that could disagree with them.
"""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

from pkernfs.dma.kernel_adopted import Adopted
from pkernfs.errors import (
    BusyError,
    ExistsError,
    InvalidError,
    NoSpaceError,
    NoTablePagesError,
    NotFoundError,
    PermissionDeniedError,
    PkernfsError,
    ReadOnlyError,
    TableDamageError,
    TooBigError,
    UnitError,
)
from pkernfs.fs.names import ROOT_PGTABLES, is_table_name
from pkernfs.host.bars import Bar
from pkernfs.iommu.config import (
    Config,
    adopt_addresses,
    config_offset,
    config_page,
    config_words,
    configure,
    forget_bar,
    load_bars,
    load_config,
    load_transient,
    record_bar,
    set_transient,
)
from pkernfs.iommu.context_walk import Device
from pkernfs.iommu.memory import Memory
from pkernfs.iommu.page_pool import BlockMap, Mapping, TablePool
from pkernfs.iommu.page_table import PageTable
from pkernfs.iommu.page_walk import Tree
from pkernfs.iommu.root_tables import MAX_DOMAIN_ID, RootTables
from pkernfs.layout import BLOCK, INODE_FLAG_TABLE, IOMMU_INO, PAGE
from pkernfs.units.unit_set import Walking
from pkernfs.vtd.entries import LARGEST_LEAF_LEVEL, LEVELS, bdf_text, check_source_id

if TYPE_CHECKING:
    from pkernfs.fs.filesystem import FileSystem

log = logging.getLogger(__name__)

_KEEP_SIZE = 1
_MAPPINGS_AT_ONCE = 256
#: 0 is reserved with CAP.CM, and the kernel keeps 0 and 1 for itself.
FIRST_DOMAIN_ID = 2


class TableFile(NamedTuple):
    """A file of /iommu as it was when its tables were opened."""

    ino: int
    size: int


class TableFiles:
    """The tables of one mounted file system.

    All of it runs to its end without giving way; what changes the tables goes through
    :meth:`PageStore.commit_words`.
    """

    def __init__(self, fs: FileSystem) -> None:
        self._fs = fs
        self._files: dict[bytes, TableFile] = {}
        self._domains: dict[int, PageTable] = {}
        self._trees: dict[int, Tree] = {}
        self._damaged: dict[bytes, str] = {}
        self._root: RootTables | None = None
        self._config = Config()
        #: How many levels the domains' tables have; all that there are, if that is not known.
        self._levels: tuple[int, ...] = (self._config.levels,)
        self._elsewhere: str | None = None
        self._map: BlockMap | None = None
        self._map_is_old = True
        self._region_memory: Memory | None = None
        #: The units that walk the tables now. They are told of each change before it returns.
        self._walking: Walking | None = None
        #: Tables that the running kernel's own entries lead to; None: it has adopted none.
        self.adopted: Adopted | None = None
        #: While tables are read outside the event loop, their files stay as they are.
        self.readers = 0
        self.refresh()

    # ------------------------------------------------------------------ the files

    def refresh(self) -> None:
        """Look at /iommu again: a file has come, gone or grown."""
        files = {}
        for name, ino, _kind, _cookie in list(self._fs.readdir(IOMMU_INO, 0)):
            inode = self._fs.inode(ino)
            if is_table_name(name) and inode.is_reg and inode.flags & INODE_FLAG_TABLE:
                files[name] = TableFile(ino, inode.size)
        names = files.keys() | self._files.keys()
        changed = {n for n in names if files.get(n) != self._files.get(n)}
        self._files = files
        if ROOT_PGTABLES in changed:
            self._open_root()
            changed |= files.keys()
        for name in changed - {ROOT_PGTABLES}:
            self._open_domain(name)
        self._map_is_old = True

    def _open_root(self) -> None:
        self._root = None
        self._config = Config()
        self._levels = (self._config.levels,)
        self._elsewhere = None
        self._damaged.pop(ROOT_PGTABLES, None)
        file = self._files.get(ROOT_PGTABLES)
        if file is None or not file.size:
            return
        self._levels = LEVELS
        try:
            self._adopt_addresses(file)
            memory = self._memory(file)
            self._config = load_config(memory)
            self._levels = (self._config.levels,)
            if self._config.home not in (0, config_page(memory)):
                self._elsewhere = self._say_elsewhere(memory)
                return
            self._root = RootTables(
                memory,
                self._fs.store.commit_words,
                walked=self._walking is not None,
                coherent=self._coherent,
            )
        except InvalidError:
            return  # a region without physical addresses: whoever wants to change it is told
        except PkernfsError as e:
            self._note_damage(ROOT_PGTABLES, e)

    def _open_domain(self, name: bytes) -> None:
        number = domain_number(name)
        self._domains.pop(number, None)
        self._trees.pop(number, None)
        self._damaged.pop(name, None)
        file = self._files.get(name)
        if file is None or not file.size or self._elsewhere is not None:
            return
        walking = self._walking
        try:
            if extents := self._extents(file):
                there = Memory(self._fs.region, extents)
                pool = TablePool(there.region, there.pieces)
                self._trees[number] = Tree(pool, there.first_page, self._levels)
            self._domains[number] = PageTable(
                self._memory(file),
                self._fs.store.commit_words,
                levels=self._config.levels,
                largest=LARGEST_LEAF_LEVEL if walking is None else walking.largest_leaf,
                walked=walking is not None,
                coherent=self._coherent,
            )
        except InvalidError:
            return
        except PkernfsError as e:
            self._note_damage(name, e)

    def _note_damage(self, name: bytes, error: PkernfsError) -> None:
        self._damaged[name] = str(error)
        log.error("iommu/%s: %s: it stays as it is", name.decode(), error)

    def _memory(self, file: TableFile) -> Memory:
        extents = self._extents(file)
        if sum(length for _at, length in extents) != file.size:
            raise TableDamageError(f"inode {file.ino}: a table file with holes")
        return Memory(self._fs.region, extents)

    def _extents(self, file: TableFile) -> list[tuple[int, int]]:
        return [(e.region_offset, e.length) for e in self._fs.extents(file.ino)]

    def _adopt_addresses(self, file: TableFile) -> None:
        """Give a region without addresses of its own those that its tables were made with."""
        for first in self._fs.extents(file.ino)[:1]:
            adopt_addresses(self._fs.region, first.region_offset + PAGE)

    def _say_elsewhere(self, memory: Memory) -> str:
        home = self._config.home
        reason = (
            f"root-pgtables: its tables were made for {home:#x}, but they are at "
            f"{config_page(memory):#x}"
        )
        if self._fs.region.phys_base is not None:
            base = max(home - config_offset(memory), 0)
            return f"{reason}: mount with phys_base={base:#x}, or remove the files of iommu/"
        return f"{reason}: the region's memory has moved: remove the files of iommu/"

    # ------------------------------------------------------------------ units that walk them

    @property
    def walking(self) -> Walking | None:
        """The units that walk these tables now; None: none does, as far as is known."""
        return self._walking

    @property
    def _coherent(self) -> bool:
        return self._walking is None or self._walking.coherent

    def set_walking(self, walking: Walking | None) -> None:
        """Units walk the tables from now on, and have nothing cached; or none does any more."""
        self._walking = walking
        self._open_root()
        for name in self._files.keys() - {ROOT_PGTABLES}:
            self._open_domain(name)

    def _check_domain_adopted(self, number: int) -> None:
        """:raises BusyError: a unit of the kernel's walks dom-N."""
        table = self.domain(number)
        if self.adopted is not None:
            self.adopted.check(f"dom-{number}", [table.root])

    def _check_device_adopted(self, source_id: int) -> None:
        """:raises BusyError: the kernel's own entry of a device leads to tables of the region."""
        if self.adopted is not None:
            tops = [self._memory(f).first_page for f in self._files.values() if f.size]
            self.adopted.check(f"device {bdf_text(source_id)}", tops, source_id)

    def adopted_by(self) -> dict[tuple[int, int], str]:
        """Units of the running kernel by source ids and page tables; without what is not seen."""
        if self.adopted is None:
            return {}
        try:
            return {(e.source_id, e.table): e.unit for e in self.adopted.entries()}
        except BusyError as e:
            log.warning("%s", e)
            return {}

    def ready_for_units(self) -> None:
        """Record in root-pgtables where it is, if that was not done: it cannot be done later."""
        self._check_writable()
        self._have_root()

    def memories(self) -> list[Memory]:
        """Where the pages of all table files are."""
        return [self.memory(name) for name in self.names]

    @contextmanager
    def _telling(self) -> Iterator[None]:
        """Units are told of a change; if one does not obey, nothing is changed any more.

        Memory that it may still reach would be used for something else otherwise.
        """
        try:
            yield
        except UnitError as e:
            self._fs.fail(str(e))
            raise

    def _tell_mapped(self, number: int) -> None:
        """Have the units forget what a change of dom-N has taken away, if it has."""
        walking, root, table = self._walking, self._root, self._domains[number]
        if walking is None or root is None:
            return
        ids = sorted({d.domain_id for d in root.devices() if d.table == table.root})
        with self._telling():
            if ids and (table.stale or walking.caches_absent):
                walking.forget_domains(root, ids)
            else:
                walking.written()
        table.invalidated()

    # ------------------------------------------------------------------ finding tables

    @property
    def config(self) -> Config:
        """Mode and levels."""
        return self._config

    @property
    def root(self) -> RootTables | None:
        """root-pgtables, if it is there, sized and sound."""
        return self._root

    @property
    def damaged(self) -> dict[bytes, str]:
        """Table files whose tables are not sound, and what was found first."""
        return self._damaged

    def devices(self) -> list[Device]:
        """What is attached, by source id."""
        return [] if self._root is None else self._root.devices()

    def root_memory(self) -> Memory:
        """Where root-pgtables is, sound or not.

        :raises NotFoundError, InvalidError, TableDamageError: missing, never sized, elsewhere.
        """
        return self._memory(self._sized(ROOT_PGTABLES))

    @property
    def domains(self) -> dict[int, PageTable]:
        """The page tables of each domain that is sized and sound, by number."""
        return self._domains

    @property
    def names(self) -> list[bytes]:
        """The files of /iommu that are sized, domains by number."""
        sized = (name for name, file in self._files.items() if file.size)
        return sorted(sized, key=lambda n: -1 if n == ROOT_PGTABLES else domain_number(n))

    def memory(self, name: bytes) -> Memory:
        """Where a table file's pages are.

        :raises InvalidError: no addresses, or never sized.
        """
        return self._memory(self._files[name])

    def check_place(self) -> None:
        """:raises InvalidError, TableDamageError: no addresses, or tables of another place."""
        if self._elsewhere is not None:
            raise TableDamageError(self._elsewhere)
        if self._fs.region.physical(0) is None:
            raise InvalidError(
                f"{self._fs.region.name}: the region has no physical addresses: "
                "mount it with phys_base="
            )

    def domain(self, number: int) -> PageTable:
        """The page tables of dom-N.

        :raises NotFoundError, InvalidError, TableDamageError: missing, never sized, or damaged.
        """
        name = b"dom-%d" % number
        self._sized(name)
        self._check_sound(name)
        return self._domains[number]

    def mappings(self, number: int) -> Iterator[Mapping]:
        """What dom-N maps, neighbours joined; its tables may change between two of them."""
        at = 0
        while batch := list(islice(self.domain(number).mappings(at), _MAPPINGS_AT_ONCE)):
            yield from batch
            at = batch[-1].iova + batch[-1].length

    def need_root(self) -> RootTables:
        """root-pgtables.

        :raises NotFoundError, InvalidError, TableDamageError: missing, never sized, or damaged.
        """
        self._sized(ROOT_PGTABLES)
        self._check_sound(ROOT_PGTABLES)
        assert self._root is not None
        return self._root

    def _sized(self, name: bytes) -> TableFile:
        file = self._files.get(name)
        if file is None:
            if name == ROOT_PGTABLES:
                raise NotFoundError("root-pgtables: there is none: no device is attached")
            raise NotFoundError(f"{name.decode()}: no such domain")
        if not file.size:
            raise InvalidError(f"{name.decode()}: it was never sized: truncate -s 2M")
        self.check_place()
        return file

    def _check_sound(self, name: bytes) -> None:
        if name in self._damaged:
            raise TableDamageError(f"iommu/{name.decode()}: damaged: {self._damaged[name]}")

    # ------------------------------------------------------------------ changes

    def create_root(self, config: Config = Config(), size: int = BLOCK) -> None:  # noqa: B008
        """Make root-pgtables if it is missing, and decide mode and levels.

        :raises BusyError: something is attached, or mapped with another number of levels.
        """
        self._check_writable()
        config_words(config)
        if size <= 0 or size % BLOCK:
            raise InvalidError(f"root-pgtables: bad size: got {size:#x}, expected steps of 2 MiB")
        self.check_place()
        if ROOT_PGTABLES not in self._files:
            self._fs.create(IOMMU_INO, ROOT_PGTABLES, 0o100400, 0, 0)
        if not self._files[ROOT_PGTABLES].size:
            self._size_root(size)
        self.need_root()
        self._configure(config)

    def _size_root(self, size: int) -> None:
        try:
            self._fs.setattr(self._files[ROOT_PGTABLES].ino, size=size)
        except (NoSpaceError, TooBigError):
            self._fs.unlink(IOMMU_INO, ROOT_PGTABLES)
            raise

    def _configure(self, config: Config) -> None:
        if self._walking is not None:
            raise BusyError(f"root-pgtables: in use: {self._walking.names} walks it")
        if config.levels != self._config.levels:
            mapped = self._mapped_domain()
            if mapped is not None:
                raise BusyError(f"{mapped}: its levels cannot change")
        root = self.need_root()
        configure(root.memory, self._fs.store.commit_words, config)
        self._open_root()
        for name in self._files.keys() - {ROOT_PGTABLES}:
            self._open_domain(name)

    def _have_root(self) -> RootTables:
        """root-pgtables, made now if it is missing, with a record of where it is."""
        file = self._files.get(ROOT_PGTABLES)
        if file is None or not file.size:  # a daemon that was stopped may have left an empty one
            self.create_root()
        root = self.need_root()
        if not self._config.home and not root.devices():
            self._configure(self._config)
        return self.need_root()

    def _check_writable(self) -> None:
        if self._fs.read_only:
            raise ReadOnlyError("read-only file system")
        if self.readers:
            raise BusyError("iommu: its tables are being checked: try again")

    def map_file(
        self, number: int, iova: int, ino: int, offset: int, length: int | None, perm: int
    ) -> int:
        """Map a range of a file; holes of it are allocated and zeroed. Returns the bytes.

        :param length: bytes; None: to the end of the file.
        :raises ExistsError: something of the range of addresses is mapped otherwise.
        :raises NoTablePagesError: the domain file must grow; it is as it was.
        :raises ZeroingNeeded: see :meth:`FileSystem.fallocate`.
        """
        self._check_writable()
        table = self.domain(number)
        length = self._check_file_range(ino, offset, length)
        table.check_perm(perm)
        table.check_range(iova, length)
        self._check_domain_adopted(number)
        self._have_root()
        if any(self._holes(ino, offset, length)):
            self._check_overlap(table, iova, ino, offset, length, perm)
            self._fs.fallocate(ino, _KEEP_SIZE, offset, length)
        pieces = [(at, count) for _low, at, count in self.file_pieces(ino, offset, length)]
        self._map_pieces(number, iova, pieces, perm)
        return length

    def _check_file_range(self, ino: int, offset: int, length: int | None) -> int:
        inode = self._fs.inode(ino)
        if not inode.is_reg:
            raise InvalidError("not a regular file")
        if inode.flags & INODE_FLAG_TABLE:
            raise PermissionDeniedError("a table file cannot be mapped")
        if not inode.nlink:
            raise NotFoundError("the file was removed")
        if length is None:
            length = max(inode.size - offset, 0)
        if offset < 0 or offset > inode.size or offset + length > inode.size:
            raise InvalidError(
                f"offset {offset:#x}: beyond the end of the file: "
                f"got {length:#x} bytes, expected an end up to {inode.size:#x}"
            )
        if length == 0:
            raise InvalidError("bad length: got 0, expected more")
        if offset % PAGE or length % PAGE:
            raise InvalidError(
                f"offset {offset:#x}: unaligned: got {length:#x} bytes, not whole pages"
            )
        return length

    def _check_overlap(
        self, table: PageTable, iova: int, ino: int, offset: int, length: int, perm: int
    ) -> None:
        """Look at a range of addresses before the file gets memory for it.

        :raises ExistsError: something there is mapped, and not just so.
        """
        pieces = list(self.file_pieces(ino, offset, length))
        starts = [low for low, _physical, _count in pieces]
        for m in table.mappings(iova, iova + length):
            at, end = max(m.iova, iova), min(m.iova + m.length, iova + length)
            while at < end:
                in_file = at - iova + offset
                number = bisect_right(starts, in_file) - 1
                low, physical, count = pieces[number] if number >= 0 else (0, 0, 0)
                same = physical + in_file - low == m.physical + at - m.iova and perm == m.perm
                if in_file >= low + count or not same:
                    raise ExistsError(f"iova {at:#x}: already mapped to something else")
                at += low + count - in_file

    def _holes(self, ino: int, offset: int, length: int) -> Iterator[tuple[int, int]]:
        at, end = offset, offset + length
        for low, _region_offset, count in self._fs.pieces(ino, offset, length):
            if low > at:
                yield at, low - at
            at = low + count
        if at < end:
            yield at, end - at

    def file_pieces(self, ino: int, offset: int, length: int) -> Iterator[tuple[int, int, int]]:
        """Offset in the file, physical address and bytes of what is allocated, in order."""
        region = self._fs.region
        for low, at, count in self._fs.pieces(ino, offset, length):
            for start, run, physical in region.physical_runs(at, count):
                if physical is None:
                    raise InvalidError(f"{region.name}: no physical address at {at:#x}")
                yield low + start - at, physical, run

    def map_bar(
        self, number: int, iova: int, bar: Bar, offset: int, length: int | None, perm: int
    ) -> int:
        """Map a range of a device's BAR. Returns the bytes.

        :raises InvalidError: beyond the BAR, or unaligned.
        :raises ExistsError, NoTablePagesError: as :meth:`map_file`.
        """
        self._check_writable()
        table = self.domain(number)
        length = bar.length - offset if length is None else length
        if offset < 0 or offset + length > bar.length:
            raise InvalidError(
                f"{bar.name}: offset {offset:#x}: beyond its end: got {length:#x} bytes, "
                f"expected an end up to {bar.length:#x}"
            )
        table.check_perm(perm)
        table.check_range(iova, length)
        if offset % PAGE:
            raise InvalidError(f"{bar.name}: offset {offset:#x}: unaligned: not whole pages")
        self._check_domain_adopted(number)
        self._record_bar(self._have_root(), bar)
        try:
            self._map_pieces(number, iova, [(bar.start + offset, length)], perm)
        except PkernfsError:
            self._forget_bars()
            raise
        return length

    def _record_bar(self, root: RootTables, bar: Bar) -> None:
        try:
            record_bar(root.memory, self._fs.store.commit_words, bar)
        except NoSpaceError:  # some may be of domains that were removed
            self._forget_bars()
            record_bar(root.memory, self._fs.store.commit_words, bar)

    def replace(
        self, number: int, wanted: Sequence[Mapping], bars: Sequence[Bar], largest: int
    ) -> None:
        """Have dom-N map ``wanted``, which is of live files and of ``bars``, and nothing else.

        :raises InvalidError, NoTablePagesError: see :meth:`PageTable.replace`; it is as it was.
        """
        self._check_writable()
        self._check_domain_adopted(number)
        root = self._have_root()
        try:
            for bar in bars:
                self._record_bar(root, bar)
            self.domain(number).replace(wanted, largest)
        except NoTablePagesError as e:
            raise NoTablePagesError(f"dom-{number}", e.missing) from None
        finally:
            self._map_is_old = True
            self._forget_bars()
        self._tell_mapped(number)

    def _map_pieces(self, number: int, iova: int, pieces: list[tuple[int, int]], perm: int) -> None:
        table = self.domain(number)
        try:
            table.map_pieces(iova, pieces, perm)
        except NoTablePagesError as e:
            raise NoTablePagesError(f"dom-{number}", e.missing) from None
        self._map_is_old = True
        self._tell_mapped(number)

    def unmap(self, number: int, iova: int, length: int) -> int:
        """Unmap all that is mapped there; returns how many bytes were.

        :raises NotFoundError: nothing is.
        """
        self._check_writable()
        table = self.domain(number)
        table.check_range(iova, length)
        self._check_domain_adopted(number)
        try:
            done = table.unmap(iova, length)
        except NoTablePagesError as e:
            raise NoTablePagesError(f"dom-{number}", e.missing) from None
        self._tell_mapped(number)
        if not done:
            raise NotFoundError(f"iova {iova:#x}: nothing is mapped there: got {length:#x} bytes")
        self._map_is_old = True
        self._forget_bars()
        return done

    def bars(self) -> list[Bar]:
        """The BARs that may be mapped."""
        return [] if self._root is None else load_bars(self._root.memory)

    def _forget_bars(self) -> None:
        """Drop the records of BARs that nothing maps any more."""
        for bar in self.bars():
            ranges = [(bar.start, bar.start + bar.length)]
            if all(tree.find(ranges) is None for tree in self._trees.values()):
                assert self._root is not None
                forget_bar(self._root.memory, self._fs.store.commit_words, bar)

    def attach(self, number: int, source_id: int, domain_id: int | None = None) -> int:
        """Have a device's requests translated by dom-N; returns the domain id of the entry.

        :param domain_id: which is free, or dom-N's already; None: one is chosen.
        :raises ExistsError: the device is attached.
        """
        self._check_writable()
        table = self.domain(number)
        check_source_id(source_id)
        if self._walking is not None:
            self._walking.admit(source_id)
        root = self._have_root()
        if domain_id is None:
            domain_id = self._domain_id(root, number, table.root)
        root.attach(source_id, table.root, domain_id)
        if self._walking is not None:
            with self._telling():
                if self._walking.caches_absent:
                    self._walking.forget_everything(root)
                else:
                    self._walking.written()
        return domain_id

    def _domain_id(self, root: RootTables, number: int, table: int) -> int:
        taken = {d.domain_id: d.table for d in root.devices()}
        for domain_id, other in taken.items():
            if other == table:
                return domain_id
        limit = MAX_DOMAIN_ID + 1 if self._walking is None else self._walking.domain_ids
        wanted = number + FIRST_DOMAIN_ID
        if wanted < limit and wanted not in taken:
            return wanted
        for domain_id in range(FIRST_DOMAIN_ID, limit):
            if domain_id not in taken:
                return domain_id
        raise NoSpaceError("root-pgtables: no free domain id")

    def detach(self, source_id: int) -> None:
        """End that.

        :raises NotFoundError: the device is not attached.
        """
        self._check_device_adopted(source_id)
        self._detach(source_id)

    def _detach(self, source_id: int) -> None:
        self._check_writable()
        root = self.need_root()
        device = next((d for d in root.devices() if d.source_id == source_id), None)
        table_gone = root.detach(source_id)
        if self._walking is None or device is None:
            return
        with self._telling():
            if table_gone:
                self._walking.forget_everything(root)
            else:
                self._walking.forget_device(root, source_id, device.domain_id)
        root.invalidated()

    def persist(self, source_id: int, on: bool) -> None:
        """Whether a handover keeps a device's entries (as it does unless told otherwise)."""
        self._check_writable()
        check_source_id(source_id)
        root = self._have_root()
        set_transient(root.memory, self._fs.store.commit_words, source_id, not on)

    def transient(self) -> set[int]:
        """Source ids of the devices whose entries a handover clears."""
        return set() if self._root is None else load_transient(self._root.memory)

    def clear_non_persistent(self) -> list[int]:
        """Detach the devices that are not to outlive a handover, while frozen; their source ids.

        :raises InvalidError: not frozen.
        """
        gone = [d.source_id for d in self.devices() if d.source_id in self.transient()]
        with self._fs.super.handing_over():
            for source_id in gone:
                self._detach(source_id)
        return gone

    # ------------------------------------------------------------------ pins

    def holder(self, extents: Iterable[tuple[int, int]]) -> str | None:
        """What maps a byte of these ``(region offset, length)``; None: nothing does."""
        if not self._trees:
            return None
        blocks = self._block_map()
        wanted = [e for e in extents if blocks.any(*e)]
        if not wanted:
            return None
        ranges = Memory(self._fs.region, wanted).ranges
        for number, tree in sorted(self._trees.items()):
            iova = tree.find(ranges)
            if iova is not None:
                return f"dom-{number} maps it at iova {iova:#x}"
        return None

    def may_be_mapped(self, offset: int, length: int) -> bool:
        """Whether something of the 2 MiB blocks of a range of the region is mapped."""
        return self._block_map().any(offset, length)

    def _block_map(self) -> BlockMap:
        """Which blocks are mapped; made again after a change, when it is asked for."""
        if self._map is None:
            self._map = BlockMap(self._fs.region, self.region_memory().pieces)
        if self._map_is_old:
            self._map.clear()
            for number, tree in self._trees.items():
                if not tree.mark(self._map):
                    log.error("iommu/dom-%d: damaged: not all that it maps is known", number)
            self._map_is_old = False
        return self._map

    def region_memory(self) -> Memory:
        """Where the region's physical addresses are."""
        if self._region_memory is None:
            self._region_memory = Memory.whole(self._fs.region)
        return self._region_memory

    def check_unused(self, ino: int) -> None:
        """:raises BusyError: a table file that must stay as it is, and why."""
        name = next((n for n, file in self._files.items() if file.ino == ino), None)
        if name is None:
            return
        if self.readers:
            raise BusyError(f"iommu/{name.decode()}: it is being checked: try again")
        holder = self._table_holder(name)
        if holder is not None:
            raise BusyError(f"iommu/{name.decode()}: in use: {holder}")

    def _table_holder(self, name: bytes) -> str | None:
        if self._elsewhere is not None or self._files[name].size == 0:
            return None  # no unit can be walking tables that are not where they say
        if ROOT_PGTABLES in self._damaged:
            return "root-pgtables is damaged, and may refer to it: run fsck.pkernfs"
        if self._root is None:
            return self._adopted_holder(name)
        devices = self._root.devices()
        if name != ROOT_PGTABLES:
            memory = Memory(self._fs.region, self._extents(self._files[name]))
            devices = [d for d in devices if memory.offset(d.table) is not None]
        if name == ROOT_PGTABLES and self._walking is not None:
            return f"{self._walking.names} walks it"
        if devices:
            return f"device {bdf_text(devices[0].source_id)} is attached"
        if name == ROOT_PGTABLES and (self._config.levels != Config().levels or self.bars()):
            return self._mapped_domain()  # what its tables are like is told nowhere else
        return self._adopted_holder(name)

    def _adopted_holder(self, name: bytes) -> str | None:
        """Which entry of the running kernel leads to a domain's tables."""
        if self.adopted is not None and name != ROOT_PGTABLES:
            top = self._memory(self._files[name]).first_page
            for entry in self.adopted.entries():
                if entry.table == top:
                    return f"{entry}, and the kernel has that unit"
        return None

    def _mapped_domain(self) -> str | None:
        """A domain that has mappings, in words."""
        for number, tree in sorted(self._trees.items()):
            if not tree.is_empty:
                return f"dom-{number} has mappings"
        return None


def domain_number(name: bytes) -> int:
    """N of ``dom-N``."""
    return int(name[4:])
