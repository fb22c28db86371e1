"""The tables of a mounted file system, put together from their parts.

The parts share one :class:`~pkernfs.dma.open_tables.OpenTables`. All of them run to their end
without giving way.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pkernfs.dma.domains import Domains
from pkernfs.dma.kernel_adopted import KernelAdopted
from pkernfs.dma.open_tables import OpenTables
from pkernfs.dma.pinned import Pinned
from pkernfs.dma.root_pgtables import RootPgtables
from pkernfs.dma.unit_notices import UnitNotices
from pkernfs.iommu.config import Config
from pkernfs.iommu.page_table import PageTable
from pkernfs.iommu.root_tables import RootTables
from pkernfs.units.unit_set import ActiveUnits

if TYPE_CHECKING:
    from pkernfs.fs.filesystem import FileSystem


class TableFiles:
    """The tables of one mounted file system; :func:`pkernfs.dma.mount.tables_of` has them.

    The operations are those of the parts, bound here.
    """

    def __init__(self, fs: FileSystem) -> None:
        tables = self._tables = OpenTables(fs)
        units = self._units = UnitNotices(fs, tables)
        root = RootPgtables(fs, tables, units)
        domains = Domains(fs, tables, units, root)
        pinned = Pinned(fs.region, tables, units)

        self.refresh = tables.refresh
        self.reading = tables.reading
        self.set_active_units = tables.set_active_units
        self.check_place = tables.check_place
        self.root_memory = tables.root_memory
        self.memory = tables.memory
        self.memories = tables.memories
        self.region_memory = tables.region_memory
        self.need_root = tables.need_root
        self.domain = tables.domain
        self.mappings = tables.mappings
        self.devices = tables.devices
        self.bars = tables.bars
        self.non_persistent = tables.non_persistent
        self.adopted_by = units.adopted_by

        self.create_root = root.create
        self.ready_for_units = root.ready_for_units
        self.attach = root.attach
        self.detach = root.detach
        self.persist = root.persist
        self.clear_non_persistent = root.clear_non_persistent

        self.map_file = domains.map_file
        self.map_bar = domains.map_bar
        self.replace = domains.replace
        self.unmap = domains.unmap
        self.file_pieces = domains.file_pieces

        self.holder = pinned.holder
        self.holder_of_memory = pinned.holder_of_memory
        self.held_memory = pinned.held_memory
        self.may_be_mapped = pinned.may_be_mapped
        self.check_unused = pinned.check_unused

    @property
    def config(self) -> Config:
        """Mode and levels."""
        return self._tables.config

    @property
    def root(self) -> RootTables | None:
        """root-pgtables, if it is there, sized and sound."""
        return self._tables.root

    @property
    def domains(self) -> dict[int, PageTable]:
        """The page tables of each domain that is sized and sound, by number."""
        return self._tables.domains

    @property
    def damaged(self) -> dict[bytes, str]:
        """Table files whose tables are not sound, and what was found first."""
        return self._tables.damaged

    @property
    def names(self) -> list[bytes]:
        """The files of /iommu that are sized, domains by number."""
        return self._tables.names

    @property
    def active_units(self) -> ActiveUnits | None:
        """The units that walk these tables now; None: none does, as far as is known."""
        return self._tables.active_units

    @property
    def kernel_adopted(self) -> KernelAdopted | None:
        """Tables that the running kernel's own entries lead to; None: it has adopted none."""
        return self._units.kernel_adopted

    @kernel_adopted.setter
    def kernel_adopted(self, adopted: KernelAdopted | None) -> None:
        self._units.kernel_adopted = adopted
