"""Root, context and PASID tables as they are read: which device leads to which page tables."""

from __future__ import annotations

import pytest

from pkernfs.errors import TableDamageError
from pkernfs.iommu.context_walk import Mode
from pkernfs.iommu.page_walk import Code
from pkernfs.iommu.root_tables import RootTables
from pkernfs.layout import PAGE
from pkernfs.vtd import entries
from support.page_tables import PHYS_BASE
from support.table_host import DATA, ROOT, TableHost, codes


def test_damaged_root_and_context_entries(host: TableHost) -> None:
    root_word = host.word(ROOT)
    for word, code in (
        (root_word | 1 << 5, Code.RESERVED_BITS),
        (host.first.root | 1, Code.TABLE_OUTSIDE),
        (host.root.first_page | 1, Code.TABLE_TWICE),
    ):
        host.store(ROOT, word)
        assert code in codes(host.check())
        with pytest.raises(TableDamageError):
            RootTables(host.root, host.commit)
    host.store(ROOT, root_word)
    device = host.tables.devices()[0]
    at = device.where - PHYS_BASE
    low, high = host.word(at), host.word(at + 8)
    pointer = entries.ADDRESS_MASK
    for where, word, code in (
        (at, low & ~pointer | host.first.root + PAGE, Code.UNKNOWN_DOMAIN),
        (at, low & ~pointer | PHYS_BASE + DATA, Code.UNKNOWN_DOMAIN),
        (at + 8, high & 0xFF | 3 if host.mode else high & 7 | 3 << 8, Code.DOMAIN_ID),
        (at + 8, high | 1 << 63, Code.RESERVED_BITS),
    ):
        if host.mode is Mode.SCALABLE and code is Code.RESERVED_BITS:
            continue
        host.store(where, word)
        assert code in codes(host.check())
        host.store(at, low)
        host.store(at + 8, high)
    assert host.check().clean
