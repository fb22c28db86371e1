"""Root, context and PASID tables as they are read: which device leads to which page tables."""

from __future__ import annotations

import pytest

from pkernfs.errors import TableDamageError
from pkernfs.iommu.context_walk import KNOWN_PGTT, ContextReader, Device, Mode, join
from pkernfs.iommu.page_walk import Code, Finding
from pkernfs.iommu.root_tables import RootTables
from pkernfs.layout import PAGE
from pkernfs.quantities import Iova, RegionOff
from pkernfs.vtd import entries
from pkernfs.vtd.entries import (
    PGTT_FIRST_STAGE,
    PGTT_NESTED,
    PGTT_PASS_THROUGH,
    PGTT_SECOND_STAGE,
    ContextEntry,
    PasidTableEntry,
)
from support.page_tables import PHYS_BASE
from support.table_host import DATA, DEVICE, ROOT, TableHost, codes


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
    at = RegionOff(device.where - PHYS_BASE)
    upper = RegionOff(at + 8)
    low, high = host.word(at), host.word(upper)
    pointer = entries.ADDRESS_MASK
    for where, word, code in (
        (at, low & ~pointer | host.first.root + PAGE, Code.UNKNOWN_DOMAIN),
        (at, low & ~pointer | PHYS_BASE + DATA, Code.UNKNOWN_DOMAIN),
        (upper, high & 0xFF | 3 if host.mode else high & 7 | 3 << 8, Code.DOMAIN_ID),
        (upper, high | 1 << 63, Code.RESERVED_BITS),
    ):
        if host.mode is Mode.SCALABLE and code is Code.RESERVED_BITS:
            continue
        host.store(where, word)
        assert code in codes(host.check())
        host.store(at, low)
        host.store(upper, high)
    assert host.check().clean


# ---------------------------------------------------------------------- the walk


def read(
    host: TableHost, *, kinds: tuple[int, ...] = KNOWN_PGTT
) -> tuple[list[Device], list[Finding]]:
    """The devices, and what is wrong."""
    wrong: list[Finding] = []
    reader = ContextReader(host.root, host.root.first_page, host.mode, wrong.append, kinds=kinds)
    return list(reader.devices()), wrong


def test_devices_and_what_leads_to_them(host: TableHost) -> None:
    devices, wrong = read(host)
    assert not wrong
    assert [(d.source_id, d.domain_id, d.table) for d in devices] == [
        (DEVICE, 2, host.first.root),
        (0x1F8, 3, host.domains["dom-1"].first_page),
    ]
    scalable = host.mode is Mode.SCALABLE
    for device in devices:
        assert (device.levels, device.pasid) == (4, 0 if scalable else None)
        assert device.kind == PGTT_SECOND_STAGE
        assert len(device.context_words) == (4 if scalable else 2)
        words = device.pasid_words if scalable else device.context_words
        assert host.root.words(device.where, len(words)) == words
    assert join((1, 2, 3)) == 1 | 2 << 64 | 3 << 128


def test_each_table_is_read_once(host: TableHost) -> None:
    reader = ContextReader(host.root, host.root.first_page, host.mode, lambda finding: None)
    assert len(list(reader.devices())) == 2
    per_device = 3 if host.mode is Mode.SCALABLE else 1
    assert len(reader.pages) == 1 + 2 * per_device
    assert host.tables.used_pages == len(reader.pages) + 1


@pytest.mark.parametrize(
    "kind", [PGTT_FIRST_STAGE, PGTT_NESTED, PGTT_PASS_THROUGH, PGTT_SECOND_STAGE, 0, 7]
)
def test_kinds_of_entries_in_scalable_mode(kind: int) -> None:
    host = TableHost(Mode.SCALABLE)
    device = host.tables.devices()[0]
    at = RegionOff(device.where - PHYS_BASE)
    word = host.word(at) & ~PasidTableEntry.PGTT.mask
    host.store(at, word | PasidTableEntry.PGTT.put("PGTT", kind))
    found, wrong = read(host)
    if kind not in KNOWN_PGTT:
        assert [d.source_id for d in found] == [0x1F8]
        assert [f.code for f in wrong] == [Code.CONTEXT_INVALID]
        return
    assert (found[0].kind, wrong) == (kind, [])
    no_table = kind in (PGTT_FIRST_STAGE, PGTT_NESTED, PGTT_PASS_THROUGH)  # FSPTPTR is zero
    assert found[0].table == (0 if no_table else host.first.root)
    only, wrong = read(host, kinds=(PGTT_SECOND_STAGE,))
    assert len(only) + len(wrong) == 2


@pytest.mark.parametrize("field", ["TT", "AW"])
def test_entries_of_no_kind_in_legacy_mode(field: str) -> None:
    host = TableHost(Mode.LEGACY)
    at = host.tables.devices()[0].where - PHYS_BASE
    where, bits = (RegionOff(at), 3 << 2) if field == "TT" else (RegionOff(at + 8), 7)
    host.store(where, host.word(where) | bits)
    found, wrong = read(host)
    assert [d.source_id for d in found] == [0x1F8]
    assert [f.code for f in wrong] == [Code.CONTEXT_INVALID]
    assert "context entry of 0000:00:05.0" in wrong[0].message


def test_requests_that_pass_through_have_no_table() -> None:
    host = TableHost(Mode.LEGACY)
    at = RegionOff(host.tables.devices()[0].where - PHYS_BASE)
    host.store(at, host.word(at) | ContextEntry.TT.put("TT", entries.TT_PASS_THROUGH))
    found, wrong = read(host)
    assert (found[0].table, found[0].kind, wrong) == (0, PGTT_PASS_THROUGH, [])


def test_a_large_directory_elsewhere_is_told_once() -> None:
    """It may have 32 pages, for each device."""
    host = TableHost(Mode.SCALABLE)
    step = next(s for s in host.walk(Iova(0)).steps if s.name == "context entry")
    at = RegionOff(step.address - PHYS_BASE)
    word = host.word(at) & ~entries.ScalableContextEntry.PASIDDIRPTR.mask
    host.store(at, word | 1 << 45 | 7 << 9)
    found, wrong = read(host)
    assert [d.source_id for d in found] == [0x1F8]
    assert [f.code for f in wrong] == [Code.TABLE_OUTSIDE]
