"""The configuration page: what it says, and what is believed of it."""

from __future__ import annotations

import pytest

from pkernfs.errors import InvalidError, TableDamageError
from pkernfs.iommu.config import Config, configure
from pkernfs.iommu.context_walk import Mode
from pkernfs.iommu.memory import Memory, store_words
from pkernfs.iommu.page_walk import Code
from pkernfs.iommu.root_tables import RootTables
from pkernfs.layout import PAGE
from pkernfs.region.region import Region
from support.page_tables import MIB, PHYS_BASE
from support.table_host import ROOT, TableHost, codes


def test_zeros_are_a_legacy_table_of_4_levels() -> None:
    region = Region.anonymous(2 * MIB, phys_base=PHYS_BASE)
    root = RootTables(Memory(region, [(0, 2 * MIB)]), store_words(region))
    assert root.config == Config(Mode.LEGACY, 4)
    with pytest.raises(InvalidError):
        configure(root.memory, store_words(region), Config(Mode.LEGACY, 2))


def test_a_damaged_configuration(host: TableHost) -> None:
    host.store(ROOT + PAGE + 8, host.word(ROOT + PAGE + 8) ^ 1 << 20)
    assert Code.CONFIGURATION in codes(host.check())
    with pytest.raises(TableDamageError, match="configuration"):
        RootTables(host.root, host.commit)
