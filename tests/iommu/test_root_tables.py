"""root-pgtables: devices come and go, and its pages with them."""

from __future__ import annotations

import pytest

from pkernfs.errors import BusyError, ExistsError, InvalidError, NoSpaceError, NotFoundError
from pkernfs.iommu.config import Config, configure
from pkernfs.iommu.context_walk import Mode
from pkernfs.iommu.root_tables import RootTables
from pkernfs.layout import PAGE
from pkernfs.quantities import Iova, PhysAddr, SourceId
from support.table_host import DEVICE, ROOT, TableHost


def test_attach_and_detach(host: TableHost) -> None:
    with pytest.raises(ExistsError, match=r"0000:00:05\.0"):
        host.tables.attach(DEVICE, host.first.root, 2)
    with pytest.raises(NotFoundError):
        host.tables.detach(SourceId(0x30))
    for source_id, table, did in ((1 << 16, host.first.root, 1), (1, host.first.root, 1 << 16),
                                  (1, 17, 1), (1, 1 << 52, 1), (-1, 0, 1)):  # fmt: skip
        with pytest.raises(InvalidError):
            host.tables.attach(SourceId(source_id), PhysAddr(table), did)
    with pytest.raises(BusyError):
        configure(host.root, host.commit, Config())
    host.tables.detach(DEVICE)
    assert host.walk(Iova(0)).fault is not None
    host.tables.detach(SourceId(0x1F8))
    assert host.tables.used_pages == 2
    assert host.region.is_zero(ROOT, PAGE)
    assert RootTables(host.root, host.commit).config[:2] == (host.mode, 4)


def test_root_pgtables_is_full(host: TableHost) -> None:
    per_device = 3 if host.mode is Mode.SCALABLE else 1
    count = (16 - host.tables.used_pages) // per_device
    for bus in range(2, 2 + count):
        host.tables.attach(SourceId(bus << 8), host.first.root, 2)
    with pytest.raises(NoSpaceError, match=r"grow by \d+ MiB"):
        host.tables.attach(SourceId(0xFF00), host.first.root, 2)
    assert len(RootTables(host.root, host.commit).devices()) == 2 + count
    assert host.check().clean
    for bus in range(2, 2 + count):
        host.tables.detach(SourceId(bus << 8))
    assert host.tables.used_pages == RootTables(host.root, host.commit).used_pages
