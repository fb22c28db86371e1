"""Units are told of each change of the tables that they walk, before it returns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import pytest

from pkernfs.errors import UnitError
from pkernfs.fs.super import Access
from pkernfs.iommu.root_tables import RootTables
from pkernfs.layout import PAGE
from pkernfs.quantities import Iova, SourceId
from pkernfs.units.unit_set import ActiveUnits
from pkernfs.vtd.entries import LARGEST_LEAF_LEVEL
from support.table_files import DEVICE, GIB, MIB, Host, ino_of


class Told:
    """Stands for units: it records what they are told, or they do not obey."""

    names = "dmar0"
    coherent = True
    largest_leaf = LARGEST_LEAF_LEVEL
    domain_ids = 1 << 16

    def __init__(self, *, caches_absent: bool, obeys: bool = True) -> None:
        self.caches_absent = caches_absent
        self.said: list[tuple[Any, ...]] = []
        self._obeys = obeys

    def admit(self, source_id: SourceId) -> None:
        """Every device may be attached."""

    def _note(self, *what: Any) -> None:
        self.said.append(what)
        if not self._obeys:
            raise UnitError("dmar0: no answer")

    def invalidate_all(self, root: RootTables) -> None:
        self._note("all")

    def invalidate_domains(self, root: RootTables, domain_ids: Sequence[int]) -> None:
        self._note("domains", *domain_ids)

    def invalidate_device(self, root: RootTables, source_id: SourceId, domain_id: int) -> None:
        self._note("device", source_id, domain_id)

    def flush_write_buffers(self) -> None:
        self._note("write buffers")


def walked(host: Host, **how: bool) -> Told:
    """DEVICE and its neighbour are attached to dom-0 with domain id 2; units walk the tables."""
    assert host.attach(0) == 2
    host.attach(0, SourceId(DEVICE + 1))
    told = Told(**how)
    host.tables.set_active_units(cast("ActiveUnits", told))
    return told


def change(host: Host, told: Told, operation: Callable[[], object]) -> list[tuple[Any, ...]]:
    """What the units are told of a change."""
    told.said.clear()
    host.run(operation)
    return list(told.said)


@pytest.mark.parametrize("caches_absent", [False, True])
def test_each_change_is_told(mapped: Host, caches_absent: bool) -> None:
    """Of what was not present nothing is cached, unless a unit caches that as well."""
    told, tables = walked(mapped, caches_absent=caches_absent), mapped.tables
    other = ino_of(mapped, "other")
    new: list[tuple[Any, ...]] = [("domains", 2) if caches_absent else ("write buffers",)]
    assert change(mapped, told, lambda: mapped.map(0, Iova(2 * GIB), other, 0, MIB)) == new
    assert change(mapped, told, lambda: tables.unmap(0, Iova(2 * GIB), PAGE)) == [("domains", 2)]
    assert change(mapped, told, lambda: tables.unmap(0, Iova(2 * GIB), GIB)) == [("domains", 2)]
    new = [("all",) if caches_absent else ("write buffers",)]
    assert change(mapped, told, lambda: mapped.attach(0, SourceId(DEVICE + 2))) == new
    found = change(mapped, told, lambda: tables.detach(SourceId(DEVICE + 2)))
    assert found == [("device", DEVICE + 2, 2)]
    tables.detach(SourceId(DEVICE + 1))
    assert change(mapped, told, lambda: tables.detach(DEVICE)) == [("all",)]  # and its table goes
    tables.set_active_units(None)


def test_a_domain_without_devices_is_cached_nowhere(mapped: Host) -> None:
    told = walked(mapped, caches_absent=True)
    mapped.dom(1)
    other = ino_of(mapped, "other")
    assert change(mapped, told, lambda: mapped.map(1, Iova(0), other)) == [("write buffers",)]
    found = change(mapped, told, lambda: mapped.tables.unmap(1, Iova(0), GIB))
    assert found == [("write buffers",)]
    mapped.tables.set_active_units(None)


@pytest.mark.parametrize(
    "operation",
    [
        lambda h: h.tables.unmap(0, GIB, PAGE),
        lambda h: h.map(0, 2 * GIB, ino_of(h, "other")),
        lambda h: h.tables.detach(DEVICE),
        lambda h: h.attach(0, DEVICE + 2),
    ],
    ids=["unmap", "map", "detach", "attach"],
)
def test_a_unit_that_does_not_obey_ends_all_changes(
    mapped: Host, operation: Callable[[Host], object]
) -> None:
    """Memory that it may still reach is used for nothing else."""
    walked(mapped, caches_absent=False, obeys=False)
    with pytest.raises(UnitError, match="no answer"):
        operation(mapped)
    assert mapped.fs.super.access is Access.FAILED
    assert mapped.fs.super.failure == "dmar0: no answer"
    mapped.remount(clean=False)
