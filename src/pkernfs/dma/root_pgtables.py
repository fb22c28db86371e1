"""Changes of root-pgtables: what the tables are like, and which device has which domain."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pkernfs.dma.open_tables import OpenTables
from pkernfs.dma.unit_notices import UnitNotices
from pkernfs.errors import BusyError, InvalidError, NoSpaceError, TooBigError
from pkernfs.fs.names import ROOT_PGTABLES
from pkernfs.iommu.config import Config, config_words, configure, set_non_persistent
from pkernfs.iommu.root_tables import MAX_DOMAIN_ID, RootTables
from pkernfs.layout import BLOCK, IOMMU_INO
from pkernfs.quantities import PhysAddr, SourceId
from pkernfs.vtd.entries import check_source_id

if TYPE_CHECKING:
    from pkernfs.fs.filesystem import FileSystem

#: 0 is reserved with CAP.CM, and the kernel keeps 0 and 1 for itself.
FIRST_DOMAIN_ID = 2


class RootPgtables:
    """Makes and changes root-pgtables of one mounted file system.

    Each change runs to its end without giving way, through
    :meth:`pkernfs.journal.PageStore.commit_words`.
    """

    def __init__(self, fs: FileSystem, tables: OpenTables, units: UnitNotices) -> None:
        self._fs = fs
        self._tables = tables
        self._units = units

    # ------------------------------------------------------------------ the file

    def create(self, config: Config = Config(), size: int = BLOCK) -> None:  # noqa: B008
        """Make root-pgtables if it is missing, and decide mode and levels.

        :raises BusyError: something is attached, or mapped with another number of levels.
        """
        self._tables.check_writable()
        config_words(config)
        if size <= 0 or size % BLOCK:
            raise InvalidError(f"root-pgtables: bad size: got {size:#x}, expected steps of 2 MiB")
        self._tables.check_place()
        if ROOT_PGTABLES not in self._tables.files:
            self._fs.create(IOMMU_INO, ROOT_PGTABLES, 0o100400, 0, 0)
        if not self._tables.files[ROOT_PGTABLES].size:
            self._size(size)
        self._tables.need_root()
        self._configure(config)

    def _size(self, size: int) -> None:
        try:
            self._fs.setattr(self._tables.files[ROOT_PGTABLES].ino, size=size)
        except (NoSpaceError, TooBigError):
            self._fs.unlink(IOMMU_INO, ROOT_PGTABLES)
            raise

    def _configure(self, config: Config) -> None:
        if self._tables.active_units is not None:
            raise BusyError(f"root-pgtables: in use: {self._tables.active_units.names} walks it")
        if config.levels != self._tables.config.levels:
            mapped = self._tables.mapped_domain()
            if mapped is not None:
                raise BusyError(f"{mapped}: its levels cannot change")
        root = self._tables.need_root()
        configure(root.memory, self._fs.store.commit_words, config)
        self._tables.reopen()

    def have(self) -> RootTables:
        """root-pgtables, made now if it is missing, with a record of where it is."""
        file = self._tables.files.get(ROOT_PGTABLES)
        if file is None or not file.size:  # a daemon that was stopped may have left an empty one
            self.create()
        root = self._tables.need_root()
        if not self._tables.config.home and not root.devices():
            self._configure(self._tables.config)
        return self._tables.need_root()

    def ready_for_units(self) -> None:
        """Record in root-pgtables where it is, if that was not done: it cannot be done later."""
        self._tables.check_writable()
        self.have()

    # ------------------------------------------------------------------ devices

    def attach(self, number: int, source_id: SourceId, domain_id: int | None = None) -> int:
        """Have a device's requests translated by dom-N; returns the domain id of the entry.

        :param domain_id: which is free, or dom-N's already; None: one is chosen.
        :raises ExistsError: the device is attached.
        """
        self._tables.check_writable()
        table = self._tables.domain(number)
        check_source_id(source_id)
        if self._tables.active_units is not None:
            self._tables.active_units.admit(source_id)
        root = self.have()
        if domain_id is None:
            domain_id = self._domain_id(root, number, table.root)
        root.attach(source_id, table.root, domain_id)
        self._units.attached()
        return domain_id

    def _domain_id(self, root: RootTables, number: int, table: PhysAddr) -> int:
        taken = {d.domain_id: d.table for d in root.devices()}
        for domain_id, other in taken.items():
            if other == table:
                return domain_id
        active_units = self._tables.active_units
        limit = MAX_DOMAIN_ID + 1 if active_units is None else active_units.domain_ids
        wanted = number + FIRST_DOMAIN_ID
        if wanted < limit and wanted not in taken:
            return wanted
        for domain_id in range(FIRST_DOMAIN_ID, limit):
            if domain_id not in taken:
                return domain_id
        raise NoSpaceError("root-pgtables: no free domain id")

    def detach(self, source_id: SourceId) -> None:
        """End the translation of a device's requests.

        :raises NotFoundError: the device is not attached.
        """
        self._units.check_device(source_id)
        self._detach(source_id)

    def _detach(self, source_id: SourceId) -> None:
        self._tables.check_writable()
        root = self._tables.need_root()
        device = next((d for d in root.devices() if d.source_id == source_id), None)
        table_gone = root.detach(source_id)
        if device is not None:
            self._units.detached(device, table_gone=table_gone)

    def persist(self, source_id: SourceId, on: bool) -> None:
        """Have a handover keep a device's entries (as it does unless told otherwise), or not."""
        self._tables.check_writable()
        check_source_id(source_id)
        root = self.have()
        set_non_persistent(root.memory, self._fs.store.commit_words, source_id, not on)

    def clear_non_persistent(self) -> list[SourceId]:
        """Detach the devices that are not to outlive a handover, while frozen; return them.

        :raises InvalidError: not frozen.
        """
        chosen = self._tables.non_persistent()
        gone = [d.source_id for d in self._tables.devices() if d.source_id in chosen]
        with self._fs.super.handing_over():
            for source_id in gone:
                self._detach(source_id)
        return gone
