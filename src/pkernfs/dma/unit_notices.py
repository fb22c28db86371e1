"""Units that walk the tables: those that are told of each change, those that cannot be told.

Units of the running kernel are not ours to tell. Tables that one of those walks do not change.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from pkernfs.dma.kernel_adopted import Adopted, KernelAdopted
from pkernfs.dma.open_tables import OpenTables
from pkernfs.errors import BusyError, UnitError
from pkernfs.iommu.context_walk import Device
from pkernfs.quantities import SourceId
from pkernfs.vtd.entries import bdf_text

if TYPE_CHECKING:
    from pkernfs.fs.filesystem import FileSystem

log = logging.getLogger(__name__)


class UnitNotices:
    """Has units forget what a change has taken away, before the change returns."""

    def __init__(self, fs: FileSystem, tables: OpenTables) -> None:
        self._fs = fs
        self._tables = tables
        #: Tables that the running kernel's own entries lead to; None: it has adopted none.
        self.kernel_adopted: KernelAdopted | None = None

    # ------------------------------------------------------------------ units that cannot be told

    def check_domain(self, number: int) -> None:
        """:raises BusyError: a unit of the kernel's walks dom-N."""
        table = self._tables.domain(number)
        if self.kernel_adopted is not None:
            self.kernel_adopted.check(f"dom-{number}", [table.root])

    def check_device(self, source_id: SourceId) -> None:
        """:raises BusyError: the kernel's own entry of a device leads to tables of the region."""
        if self.kernel_adopted is not None:
            files = [f for f in self._tables.files.values() if f.size]
            tops = [self._tables.memory_of(f).first_page for f in files]
            self.kernel_adopted.check(f"device {bdf_text(source_id)}", tops, source_id)

    def adopted_by(self) -> dict[Adopted, str]:
        """Units of the running kernel by what they have adopted; without what is not seen."""
        if self.kernel_adopted is None:
            return {}
        try:
            return {Adopted(e.source_id, e.table): e.unit for e in self.kernel_adopted.entries()}
        except BusyError as e:
            log.warning("%s", e)
            return {}

    # ------------------------------------------------------------------ units that are told

    @contextmanager
    def _invalidating(self) -> Iterator[None]:
        """Units are told of a change; if one does not obey, nothing is changed any more.

        Memory that it may still reach would be used for something else otherwise.
        """
        try:
            yield
        except UnitError as e:
            self._fs.fail(str(e))
            raise

    def mapped(self, number: int) -> None:
        """Have the units forget what a change of dom-N has taken away, if it has."""
        active_units, root, table = (
            self._tables.active_units,
            self._tables.root,
            self._tables.domains[number],
        )
        if active_units is None or root is None:
            return
        ids = sorted({d.domain_id for d in root.devices() if d.table == table.root})
        with self._invalidating():
            if ids and (table.stale or active_units.caches_absent):
                active_units.invalidate_domains(root, ids)
            else:
                active_units.flush_write_buffers()
        table.invalidated()

    def attached(self) -> None:
        """A device was attached: nothing was present before."""
        active_units = self._tables.active_units
        if active_units is None:
            return
        root = self._tables.need_root()
        with self._invalidating():
            if active_units.caches_absent:
                active_units.invalidate_all(root)
            else:
                active_units.flush_write_buffers()

    def detached(self, device: Device, *, table_gone: bool) -> None:
        """A device was detached; ``table_gone``: the table of its entry is free."""
        active_units = self._tables.active_units
        if active_units is None:
            return
        root = self._tables.need_root()
        with self._invalidating():
            if table_gone:
                active_units.invalidate_all(root)
            else:
                active_units.invalidate_device(root, device.source_id, device.domain_id)
        root.invalidated()
