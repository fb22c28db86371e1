"""Records for VMMs: what follows each other is one, and pieces say where the memory is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest

from pkernfs.host.bars import Bar
from pkernfs.iommu import export
from pkernfs.iommu.config import Config
from pkernfs.iommu.context_walk import Mode
from pkernfs.iommu.export import Record, Split, Target
from pkernfs.iommu.page_pool import Mapping
from pkernfs.layout import PAGE
from pkernfs.quantities import Iova, PhysAddr, RegionOff
from pkernfs.region.region import Place
from support.table_host import DEVICE, TableHost

BAR = Bar(DEVICE, 1, PhysAddr(1 << 44), 16 * PAGE)


def splitting(*targets: Target) -> Split:
    """A split of physical memory as a file system knows it."""

    def split(physical: PhysAddr, length: int) -> Iterator[Target]:
        for t in targets:
            start, end = max(physical, t.physical), min(physical + length, t.physical + t.length)
            if start < end:
                at = start - t.physical
                inside = None if t.region_offset is None else RegionOff(t.region_offset + at)
                yield Target(start, end - start, t.path, t.offset + at, inside, t.bar)

    return split


def mapped(split: Split, *found: Sequence[int]) -> list[Record]:
    """What mappings of ``(iova, physical, pages, perm)`` come to."""
    mappings = [
        Mapping(Iova(iova), PhysAddr(physical), pages * PAGE, perm)
        for iova, physical, pages, perm in found
    ]
    return list(export.mappings(mappings, split))


FILE = splitting(
    Target(PhysAddr(0x10_0000), 4 * PAGE, "/ram", 0, RegionOff(0), None),
    Target(PhysAddr(0x20_0000), 4 * PAGE, "/ram", 4 * PAGE, RegionOff(0x10_0000), None),
    Target(PhysAddr(0x30_0000), 4 * PAGE, "/other", 0, RegionOff(0x20_0000), None),
    Target(PhysAddr(1 << 44), 16 * PAGE, None, 0, None, BAR),
    Target(PhysAddr(1 << 45), 16 * PAGE, None, 0, None, None),
)


def test_a_file_in_two_places_is_one_mapping() -> None:
    [record] = mapped(FILE, (0, 0x10_0000, 4, 3), (4 * PAGE, 0x20_0000, 4, 3))
    assert (record["iova"], record["length"]) == (0, 8 * PAGE)
    assert (record["file"], record["offset"], record["physical"]) == ("/ram", 0, 0x10_0000)
    assert record["pieces"] == [
        {"length": 4 * PAGE, "physical": 0x10_0000, "region_offset": 0},
        {"length": 4 * PAGE, "physical": 0x20_0000, "region_offset": 0x10_0000},
    ]


def test_pieces_that_go_on_are_one() -> None:
    [record] = mapped(FILE, (0, 0x10_0000, 1, 3), (PAGE, 0x10_0000 + PAGE, 2, 3))
    assert record["pieces"] == [{"length": 3 * PAGE, "physical": 0x10_0000, "region_offset": 0}]


@pytest.mark.parametrize(
    "second",
    [
        (2 * PAGE, 0x10_0000 + PAGE, 1, 3),  # not the next address
        (PAGE, 0x10_0000 + PAGE, 1, 1),  # other permissions
        (PAGE, 0x10_0000 + 2 * PAGE, 1, 3),  # not the next byte of the file
        (PAGE, 0x30_0000, 1, 3),  # another file
        (PAGE, 1 << 45, 1, 3),  # nobody's memory
    ],
)
def test_what_is_not_one_mapping(second: tuple[int, int, int, int]) -> None:
    assert len(mapped(FILE, (0, 0x10_0000, 1, 3), second)) == 2


@pytest.mark.parametrize(
    ("perm", "readable", "writeable", "iommufd", "vfio"),
    [(1, True, False, 5, 1), (2, False, True, 3, 2), (3, True, True, 7, 3)],
)
def test_flags(perm: int, readable: bool, writeable: bool, iommufd: int, vfio: int) -> None:
    [record] = mapped(FILE, (0, 0x10_0000, 1, perm))
    assert (record["readable"], record["writeable"]) == (readable, writeable)
    assert (record["iommufd_flags"], record["vfio_flags"]) == (iommufd, vfio)


def test_a_bar_and_memory_of_nobody() -> None:
    bar, nobody = mapped(FILE, (0, 1 << 44, 2, 3), (GIB := 1 << 30, 1 << 45, 1, 3))
    assert bar["bar"] == {"device": "0000:00:05.0", "number": 1}
    assert bar["pieces"][0]["region_offset"] is None
    assert nobody["iova"] == GIB
    assert not {"file", "bar", "offset"} & set(nobody)


def test_a_record_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has to fit into a message: so many pieces, and then another one."""
    count = 9
    monkeypatch.setattr(export, "_MOST_PIECES", 4)
    split = splitting(
        *(Target(PhysAddr(2 * i * PAGE), PAGE, "/ram", i * PAGE, None, None) for i in range(count))
    )
    found = mapped(split, *((i * PAGE, 2 * i * PAGE, 1, 3) for i in range(count)))
    assert [len(record["pieces"]) for record in found] == [4, 4, 1]


def test_what_stands_for_a_domain(host: TableHost) -> None:
    devices = host.tables.devices()
    table = host.first.root
    hwpt = export.hwpt("dom-0", table, 4, devices)
    assert (hwpt["domain_id"], hwpt["ioas"], hwpt["file"]) == (2, "dom-0", "/iommu/dom-0")
    assert export.hwpt("dom-9", PhysAddr(0x1000), 4, devices)["domain_id"] is None
    assert export.container("dom-0", table, devices) == {
        "id": "dom-0", "type": 3, "ioas": "dom-0", "devices": ["0000:00:05.0"],
    }  # fmt: skip
    record = export.device(devices[0], "dom-0", None)
    assert (record["device"], record["hwpt"], record["domain_id"]) == ("0000:00:05.0", "dom-0", 2)
    assert record["pasid"] == (0 if host.mode is Mode.SCALABLE else None)


def test_a_document_from_its_records() -> None:
    region = export.region("r", 8, Place("/r", 4))
    head = export.head(Config(), None, bytes(16), region, {"dom-3": "x"})
    assert head["region"]["mmap"] == {"path": "/r", "offset": 4, "length": 8}
    assert head["unit"] == {
        "mode": "legacy", "levels": 4, "address_width": 48, "root_table": None,
    }  # fmt: skip
    stream = [
        head,
        {"in": "ioas", "record": {"id": "dom-0", "mappings": []}},
        {"in": "mappings", "record": {"iova": 0}},
        {"in": "devices", "record": {"device": "d"}},
        {"in": "mappings", "record": {"iova": 1}},
    ]
    document = export.assemble(stream)
    assert document["ioas"] == [{"id": "dom-0", "mappings": [{"iova": 0}, {"iova": 1}]}]
    assert document["devices"] == [{"device": "d"}]
    assert export.assemble([]) == {}
