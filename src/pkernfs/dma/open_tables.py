"""root-pgtables and dom-N of a mounted file system: opened, and found sound or not.

The files are ordinary ones whose contents are :mod:`pkernfs.iommu`'s. Nothing is changed here.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

from pkernfs.errors import (
    BusyError,
    InvalidError,
    NotFoundError,
    PkernfsError,
    ReadOnlyError,
    TableDamageError,
)
from pkernfs.fs.names import ROOT_PGTABLES, is_table_name
from pkernfs.host.bars import Bar
from pkernfs.iommu.config import (
    Config,
    assume_addresses,
    base_of,
    config_offset,
    config_page,
    load_bars,
    load_config,
    load_non_persistent,
)
from pkernfs.iommu.context_walk import Device
from pkernfs.iommu.memory import Memory
from pkernfs.iommu.page_pool import Mapping, TablePool
from pkernfs.iommu.page_table import PageTable
from pkernfs.iommu.page_walk import Tree
from pkernfs.iommu.root_tables import RootTables
from pkernfs.layout import INODE_FLAG_TABLE, IOMMU_INO, PAGE
from pkernfs.quantities import Ino, Iova, RegionOff, RegionRun, SourceId
from pkernfs.units.unit_set import ActiveUnits
from pkernfs.vtd.entries import LARGEST_LEAF_LEVEL, LEVELS

if TYPE_CHECKING:
    from pkernfs.fs.filesystem import FileSystem

log = logging.getLogger(__name__)

_MAPPINGS_AT_ONCE = 256


class TableFile(NamedTuple):
    """A file of /iommu as it was when its tables were opened."""

    ino: Ino
    size: int


class OpenTables:
    """The table files of one mounted file system, as all that changes them sees them."""

    def __init__(self, fs: FileSystem) -> None:
        self._fs = fs
        self.files: dict[bytes, TableFile] = {}
        #: The page tables of each domain that is sized and sound, by number.
        self.domains: dict[int, PageTable] = {}
        #: Those of each domain that is sized, sound or not: nothing that one maps may be freed.
        self.trees: dict[int, Tree] = {}
        #: Table files whose tables are not sound, and what was found first.
        self.damaged: dict[bytes, str] = {}
        #: root-pgtables, if it is there, sized and sound.
        self.root: RootTables | None = None
        #: Mode and levels.
        self.config = Config()
        #: How many levels the domains' tables have; all that there are, if that is not known.
        self._levels: tuple[int, ...] = (self.config.levels,)
        #: Why the tables are of no use where they are, if they were made for another place.
        self.relocated: str | None = None
        #: Bytes from where the region is said to be to where relocated tables say it; None: its
        #: memory has moved for good, and nothing can be at what they map.
        self.shift: int | None = 0
        #: The units that walk the tables now. They are told of each change before it returns.
        self.active_units: ActiveUnits | None = None
        self._readers = 0
        #: Counts the changes of what is mapped.
        self.generation = 0
        self._region_memory: Memory | None = None
        self.refresh()

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Keep the tables as they are, while they are read outside the event loop."""
        self._readers += 1
        try:
            yield
        finally:
            self._readers -= 1

    @property
    def being_read(self) -> bool:
        """Somebody reads them outside the event loop."""
        return self._readers > 0

    # ------------------------------------------------------------------ opening

    def refresh(self) -> None:
        """Look at /iommu again: a file has come, gone or grown."""
        files = {}
        for name, ino, _kind, _cookie in list(self._fs.readdir(IOMMU_INO, 0)):
            inode = self._fs.inode(ino)
            if is_table_name(name) and inode.is_reg and inode.flags & INODE_FLAG_TABLE:
                files[name] = TableFile(ino, inode.size)
        names = files.keys() | self.files.keys()
        changed = {n for n in names if files.get(n) != self.files.get(n)}
        self.files = files
        if ROOT_PGTABLES in changed:
            self._open_root()
            changed |= files.keys()
        for name in changed - {ROOT_PGTABLES}:
            self._open_domain(name)
        self.generation += 1

    def set_active_units(self, active_units: ActiveUnits | None) -> None:
        """Units walk the tables from now on, and have nothing cached; or none does any more."""
        self.active_units = active_units
        self.reopen()

    def reopen(self) -> None:
        """Look at what is in the files again: what they are like, or who walks them, is new."""
        self._open_root()
        for name in self.files.keys() - {ROOT_PGTABLES}:
            self._open_domain(name)
        self.generation += 1

    def _open_root(self) -> None:
        self.root = None
        self.config = Config()
        self._levels = (self.config.levels,)
        self.relocated = None
        self.shift = 0
        self.damaged.pop(ROOT_PGTABLES, None)
        file = self.files.get(ROOT_PGTABLES)
        if file is None or not file.size:
            return
        self._levels = LEVELS
        try:
            self._assume_addresses(file)
            memory = self.memory_of(file)
            self.config = load_config(memory)
            self._levels = (self.config.levels,)
            if self.config.home not in (0, config_page(memory)):
                self.shift = self._find_shift(memory)
                self.relocated = self._say_relocated(memory)
                return
            self.root = RootTables(
                memory,
                self._fs.store.commit_words,
                walked=self.active_units is not None,
                coherent=self._coherent,
            )
        except InvalidError:
            return  # a region without physical addresses: whoever wants to change it is told
        except PkernfsError as e:
            self._note_damage(ROOT_PGTABLES, e)

    def _open_domain(self, name: bytes) -> None:
        number = domain_number(name)
        self.domains.pop(number, None)
        self.trees.pop(number, None)
        self.damaged.pop(name, None)
        file = self.files.get(name)
        if file is None or not file.size or self.shift is None:
            return
        active_units = self.active_units
        try:
            if extents := self.extents_of(file):
                there = Memory(self._fs.region, extents, self.shift)
                pool = TablePool(there.region, there.pieces)
                self.trees[number] = Tree(pool, there.first_page, self._levels)
            if self.relocated is not None:
                return
            self.domains[number] = PageTable(
                self.memory_of(file),
                self._fs.store.commit_words,
                levels=self.config.levels,
                largest=LARGEST_LEAF_LEVEL if active_units is None else active_units.largest_leaf,
                walked=active_units is not None,
                coherent=self._coherent,
            )
        except InvalidError:
            return
        except PkernfsError as e:
            self._note_damage(name, e)

    def _note_damage(self, name: bytes, error: PkernfsError) -> None:
        self.damaged[name] = str(error)
        log.error("iommu/%s: %s: it stays as it is", name.decode(), error)

    def memory_of(self, file: TableFile) -> Memory:
        """The pages of a table file.

        :raises TableDamageError: it has holes.
        :raises InvalidError: the region has no physical addresses.
        """
        extents = self.extents_of(file)
        if sum(length for _at, length in extents) != file.size:
            raise TableDamageError(f"inode {file.ino}: a table file with holes")
        return Memory(self._fs.region, extents)

    def extents_of(self, file: TableFile) -> list[RegionRun]:
        """The memory that a table file has, in the order of the file."""
        return [RegionRun(e.region_offset, e.length) for e in self._fs.extents(file.ino)]

    def _assume_addresses(self, file: TableFile) -> None:
        """Give a region without addresses of its own those that its tables were made with."""
        for first in self._fs.extents(file.ino)[:1]:
            assume_addresses(self._fs.region, RegionOff(first.region_offset + PAGE))

    def _find_shift(self, memory: Memory) -> int | None:
        """How far off an assumed address is. What they map is held: the right one may come next."""
        region = self._fs.region
        if region.real_addresses or region.phys_base is None:
            return None
        base = base_of(region, self.config.home, config_offset(memory))
        return None if base is None else base - region.phys_base

    def _say_relocated(self, memory: Memory) -> str:
        home = self.config.home
        reason = (
            f"root-pgtables: its tables were made for {home:#x}, but they are at "
            f"{config_page(memory):#x}"
        )
        if self.shift is not None and self._fs.region.phys_base is not None:
            return f"{reason}: mount with phys_base={self._fs.region.phys_base + self.shift:#x}"
        return f"{reason}: the region's memory has moved: remove the files of iommu/"

    @property
    def _coherent(self) -> bool:
        return self.active_units is None or self.active_units.coherent

    # ------------------------------------------------------------------ where they are

    @property
    def names(self) -> list[bytes]:
        """The files of /iommu that are sized, domains by number."""
        sized = (name for name, file in self.files.items() if file.size)
        return sorted(sized, key=lambda n: -1 if n == ROOT_PGTABLES else domain_number(n))

    def memory(self, name: bytes) -> Memory:
        """The pages of a table file, by its name.

        :raises InvalidError: no addresses, or never sized.
        """
        return self.memory_of(self.files[name])

    def memories(self) -> list[Memory]:
        """The pages of each table file that is sized."""
        return [self.memory(name) for name in self.names]

    def root_memory(self) -> Memory:
        """The pages of root-pgtables, sound or not.

        :raises NotFoundError, InvalidError, TableDamageError: missing, never sized, elsewhere.
        """
        return self.memory_of(self._sized(ROOT_PGTABLES))

    def region_memory(self) -> Memory:
        """The whole region, by physical addresses."""
        if self._region_memory is None:
            self._region_memory = Memory.whole(self._fs.region)
        return self._region_memory

    # ------------------------------------------------------------------ what may be done

    def check_place(self) -> None:
        """:raises InvalidError, TableDamageError: no addresses, or tables of another place."""
        if self.relocated is not None:
            raise TableDamageError(self.relocated)
        if self._fs.region.physical(RegionOff(0)) is None:
            raise InvalidError(
                f"{self._fs.region.name}: the region has no physical addresses: "
                "mount it with phys_base="
            )

    def check_writable(self) -> None:
        """:raises ReadOnlyError, BusyError: the tables must not change now."""
        if self._fs.read_only:
            raise ReadOnlyError("read-only file system")
        if self.being_read:
            raise BusyError("iommu: its tables are being checked: try again")

    def _sized(self, name: bytes) -> TableFile:
        file = self.files.get(name)
        if file is None:
            if name == ROOT_PGTABLES:
                raise NotFoundError("root-pgtables: there is none: no device is attached")
            raise NotFoundError(f"{name.decode()}: no such domain")
        if not file.size:
            raise InvalidError(f"{name.decode()}: it was never sized: truncate -s 2M")
        self.check_place()
        return file

    def _check_sound(self, name: bytes) -> None:
        if name in self.damaged:
            raise TableDamageError(f"iommu/{name.decode()}: damaged: {self.damaged[name]}")

    def need_root(self) -> RootTables:
        """root-pgtables.

        :raises NotFoundError, InvalidError, TableDamageError: missing, never sized, or damaged.
        """
        self._sized(ROOT_PGTABLES)
        self._check_sound(ROOT_PGTABLES)
        assert self.root is not None
        return self.root

    def domain(self, number: int) -> PageTable:
        """The page tables of dom-N.

        :raises NotFoundError, InvalidError, TableDamageError: missing, never sized, or damaged.
        """
        name = b"dom-%d" % number
        self._sized(name)
        self._check_sound(name)
        return self.domains[number]

    # ------------------------------------------------------------------ what is in them

    def devices(self) -> list[Device]:
        """List the devices that are attached, by source id."""
        return [] if self.root is None else self.root.devices()

    def non_persistent(self) -> set[SourceId]:
        """Source ids of the devices whose entries a handover clears."""
        return set() if self.root is None else load_non_persistent(self.root.memory)

    def bars(self) -> list[Bar]:
        """The BARs that may be mapped."""
        return [] if self.root is None else load_bars(self.root.memory)

    def mappings(self, number: int) -> Iterator[Mapping]:
        """List what dom-N maps, neighbours joined; its tables may change between two of them."""
        at = Iova(0)
        while batch := list(islice(self.domain(number).mappings(at), _MAPPINGS_AT_ONCE)):
            yield from batch
            at = Iova(batch[-1].iova + batch[-1].length)

    def mapped_domain(self) -> str | None:
        """A domain that has mappings, in words."""
        for number, tree in sorted(self.trees.items()):
            if not tree.is_empty:
                return f"dom-{number} has mappings"
        return None


def domain_number(name: bytes) -> int:
    """N of ``dom-N``."""
    return int(name[4:])
