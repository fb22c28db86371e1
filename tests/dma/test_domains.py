"""Files and BARs mapped in domains, and unmapped."""

from __future__ import annotations

from functools import partial

import pytest

from pkernfs.dma.mount import mount_filesystem, tables_of
from pkernfs.errors import (
    BusyError,
    ExistsError,
    InvalidError,
    Needed,
    NoSpaceError,
    NoTablePagesError,
    NotFoundError,
    PermissionDeniedError,
    PkernfsError,
    RegionError,
)
from pkernfs.fs.mkfs import make_filesystem
from pkernfs.fs.names import ROOT_PGTABLES
from pkernfs.host.bars import Bar
from pkernfs.iommu.page_pool import Mapping
from pkernfs.iommu.page_walk import Code
from pkernfs.layout import IOMMU_INO, PAGE, ROOT_INO
from pkernfs.quantities import Ino, Iova, PhysAddr, SourceId
from pkernfs.region.region import Region
from support.checking import assert_clean
from support.memory_pool import POOL, MemoryPool
from support.table_files import (
    BAR,
    GIB,
    MIB,
    PUNCH,
    READ,
    RW,
    WRITE,
    Host,
    grow,
    ino_of,
    refused,
    table_ino,
    until_refused,
)

# ---------------------------------------------------------------------- the files


def test_a_table_file_is_not_mapped(mapped: Host) -> None:
    for name in (b"dom-0", ROOT_PGTABLES):
        ino = table_ino(mapped, name)
        refused(
            mapped,
            PermissionDeniedError,
            partial(mapped.tables.map_file, 0, Iova(0), ino, 0, None, RW),
        )


def test_a_file_that_gets_a_segment_is_not_mapped() -> None:
    """Its memory is not the region's: a device would reach the start of the region instead."""
    with MemoryPool() as pool, Region.anonymous(32 * MIB, phys_base=PhysAddr(GIB)) as region:
        make_filesystem(region, pool=POOL)
        fs = mount_filesystem(region, open_pool=pool.opener())
        tables = tables_of(fs)
        dom = fs.create(IOMMU_INO, b"dom-0", 0o100600, 0, 0).ino
        fs.run(lambda: fs.setattr(dom, size=2 * MIB))
        ino = fs.create(ROOT_INO, b"guest", 0o100600, 0, 0).ino
        fs.run(lambda: fs.write(ino, 4 * MIB - PAGE, bytes(PAGE)))
        fs.fallocate(ino, PUNCH, 0, 4 * MIB)  # it is all hole now
        for _ in range(2):
            with pytest.raises(InvalidError, match="no physical address that stays: have the VMM"):
                fs.run(lambda: tables.map_file(0, Iova(0), ino, 0, None, RW))
        assert not list(tables.domain(0).mappings(Iova(0), Iova(GIB)))


def test_a_segment_is_mapped_at_its_pieces(pooled: Host) -> None:
    ino = pooled.file_of("guest", 9 * MIB)
    pooled.dom(0)
    row = pooled.fs.segments.of(pooled.fs.inode(ino))
    assert len(row.pieces) > 2
    assert pooled.map(0, Iova(GIB), ino) == 9 * MIB
    assert pooled.map(0, Iova(0), ino, MIB + PAGE, 3 * MIB, READ) == 3 * MIB
    where = [at for piece in row.pieces for at in range(piece.start, piece.end, PAGE)]
    for page in range(9 * MIB // PAGE):
        assert pooled.at(0, Iova(GIB + page * PAGE)) == where[page]
    first = (MIB + PAGE) // PAGE
    for page in range(3 * MIB // PAGE):
        assert pooled.at(0, Iova(page * PAGE)) == where[first + page]
    assert pooled.at(0, Iova(GIB + 9 * MIB)) is None
    assert pooled.assert_check_clean().mapped_bytes == 12 * MIB


def test_what_is_refused_of_a_segment(pooled: Host) -> None:
    ino = pooled.file_of("guest", 5 * MIB)
    pooled.dom(0)
    segments, tables = pooled.fs.segments, pooled.tables
    for offset, length in ((0, 6 * MIB), (5 * MIB, PAGE), (6 * MIB, None), (0, 5 * MIB + PAGE)):
        change = partial(tables.map_file, 0, Iova(0), ino, offset, length, RW)
        refused(pooled, InvalidError, change, "beyond the end of the file|bad length")
    whole = partial(tables.map_file, 0, Iova(0), ino, 0, None, RW)
    row = segments.of(pooled.fs.inode(ino))
    segments.table.rows[row.number] = row._replace(valid=4 * MIB)
    refused(pooled, InvalidError, whole, "the file is larger: got an end at 0x500000, expected up")
    segments.table.rows[row.number] = row
    segments.lost[row.number] = "segment 1: its device is lost"
    refused(pooled, RegionError, whole, "its device is lost")
    del segments.lost[row.number]
    assert pooled.run(whole) == 5 * MIB


def test_a_file_that_gets_a_segment_just_now_is_not_mapped(pooled: Host) -> None:
    """A device would write what is not copied."""
    ino = pooled.file_of("guest", MIB)
    pooled.dom(0)
    conversions = pooled.fs.conversions
    with pytest.raises(Needed):
        conversions.on(ino)
    change = partial(pooled.tables.map_file, 0, Iova(0), ino, 0, None, RW)
    refused(pooled, BusyError, change, "it gets a segment, or loses it: try again")
    conversions.give_up(ino)
    assert pooled.run(change) == MIB
    refused(pooled, BusyError, lambda: conversions.on(ino), "mapped for DMA")


# ---------------------------------------------------------------------- map


def test_of_several_pieces(host: Host) -> None:
    """A file of many extents is one range of addresses."""
    a, b = host.file_of("a"), host.file_of("b")
    for at in range(0, 16 * PAGE, PAGE):
        for ino in (a, b):
            host.run(partial(host.fs.write, ino, at, bytes([ino, at // PAGE]) * 2048))
    assert len(host.fs.extents(a)) > 8
    host.dom(0)
    host.map(0, Iova(7 * PAGE), a)
    for at in range(0, 16 * PAGE, PAGE):
        assert host.at(0, Iova(7 * PAGE + at + 5)) == host.physical(a, at) + 5
    assert host.at(0, Iova(6 * PAGE)) is None
    assert host.at(0, Iova(23 * PAGE)) is None
    host.assert_check_clean()


def test_a_range_of_a_file(mapped: Host) -> None:
    other = ino_of(mapped, "other")
    assert mapped.map(0, Iova(0), other, PAGE, 2 * MIB, READ) == 2 * MIB
    assert mapped.mappings(0)[0] == (0, mapped.physical(other, PAGE), 2 * MIB, READ)
    assert mapped.map(0, Iova(4 * MIB), other, 3 * MIB, None, WRITE) == MIB
    assert mapped.mappings(0)[1] == (4 * MIB, mapped.physical(other, 3 * MIB), MIB, WRITE)


@pytest.mark.parametrize("size", [6 * PAGE, 5 * MIB])
def test_holes_are_filled_with_zeros(size: int) -> None:
    host = Host(poison=True)
    host.file_of("old", data=b"\xdb" * 8 * MIB)
    host.dom(0)
    host.fs.unlink(ROOT_INO, b"old")  # what is freed has old bytes
    ino = host.file_of("guest", data=b"first")
    host.run(lambda: host.fs.setattr(ino, size=size))
    host.run(lambda: host.fs.fallocate(ino, PUNCH, PAGE, size - PAGE))
    host.run(lambda: host.fs.write(ino, size - 4, b"last"))
    blocks = host.fs.inode(ino).blocks512
    host.map(0, Iova(0), ino)
    inode = host.fs.inode(ino)
    assert inode.blocks512 > blocks
    assert inode.blocks512 * 512 >= size
    content = b"".join(host.region.read(at, n) for _low, n, at in host.fs.pieces(ino, 0, size))
    assert content == b"first".ljust(size - 4, b"\0") + b"last"
    for at in range(0, size, PAGE):
        assert host.at(0, Iova(at)) == host.physical(ino, at)
    host.assert_check_clean()
    assert_clean(host.region)
    host.close()


def test_only_holes_of_the_range_are_filled(host: Host) -> None:
    host.dom(0)
    ino = host.sparse("guest", 12 * MIB)
    before = host.fs.inode(ino).blocks512
    host.map(0, Iova(0), ino, 2 * MIB, 2 * MIB)
    assert host.fs.inode(ino).blocks512 - before == 2 * MIB // 512


@pytest.mark.parametrize(
    ("iova", "length"),
    [
        (0xFEE0_0000, PAGE),
        (0xFEEF_F000, PAGE),
        (0xFEDF_F000, 2 * PAGE),
        (0xFEEF_F000, 2 * PAGE),
        (0xFEC0_0000, 8 * MIB),
    ],
)
def test_addresses_of_interrupts_are_refused(mapped: Host, iova: int, length: int) -> None:
    """Requests to 0xfee00000-0xfeefffff are interrupts, and never translated (VT-d, 3.15)."""
    ino = mapped.sparse("sparse", 8 * MIB)
    bar = Bar(SourceId(0x30), 2, PhysAddr(1 << 40), GIB)
    says = f"iova {iova:#x}: a unit takes requests to 0xfee00000-0xfeefffff for interrupts"
    wanted = [Mapping(Iova(iova), mapped.physical(ino_of(mapped, "guest")), length, RW)]
    for change in (
        lambda: mapped.tables.map_file(0, Iova(iova), ino, 0, length, RW),
        lambda: mapped.tables.map_bar(0, Iova(iova), bar, 0, length, RW),
        lambda: mapped.tables.replace(0, wanted, [], 3),
    ):
        refused(mapped, InvalidError, change, says)


def test_addresses_beside_those_of_interrupts_are_mapped(mapped: Host) -> None:
    ino = ino_of(mapped, "guest")
    mapped.map(0, Iova(0xFEDF_F000), ino, 0, PAGE)
    mapped.map(0, Iova(0xFEF0_0000), ino, PAGE, PAGE)
    mapped.assert_check_clean()


def test_holes_beside_something_mapped_stay_holes(mapped: Host) -> None:
    """The address range is looked at before memory is given to the file."""
    ino = mapped.sparse("sparse", 8 * MIB)
    refused(
        mapped,
        ExistsError,
        lambda: mapped.tables.map_file(0, Iova(GIB - 4 * MIB), ino, 0, None, RW),
        "iova 0x40000000: already mapped",
    )


@pytest.mark.parametrize(
    ("at", "offset", "perm"),
    [
        (0, 6 * MIB, RW),
        (6 * MIB, 2 * MIB, RW),
        (6 * MIB, 6 * MIB, READ),
        (6 * MIB - PAGE, 6 * MIB, RW),
    ],
)
def test_holes_behind_something_mapped_stay_holes(
    mapped: Host, at: int, offset: int, perm: int
) -> None:
    """Blocks of a file are mapped: in each other's place, otherwise, or beside their place."""
    ino = mapped.sparse("sparse", 8 * MIB)
    base = Iova(4 * GIB)
    mapped.map(0, Iova(base + at), ino, offset, 2 * MIB, perm)
    refused(
        mapped,
        ExistsError,
        lambda: mapped.tables.map_file(0, base, ino, 0, None, RW),
        f"iova {base + at:#x}: already mapped",
    )


def test_holes_beside_what_is_mapped_just_so_are_filled(mapped: Host) -> None:
    ino = mapped.sparse("sparse", 8 * MIB)
    mapped.map(0, Iova(4 * GIB + 7 * MIB), ino, 7 * MIB, MIB)
    mapped.map(0, Iova(4 * GIB), ino)
    assert sum(e.length for e in mapped.fs.extents(ino)) == 8 * MIB
    for at in range(0, 8 * MIB, PAGE):
        assert mapped.at(0, Iova(4 * GIB + at)) == mapped.physical(ino, at)
    mapped.assert_check_clean()


def test_a_full_file_system_fills_no_holes(host: Host) -> None:
    host.dom(0)
    host.tables.create_root()
    ino = host.sparse("guest", 60 * MIB)
    before = host.fs.extents(ino)
    with pytest.raises(NoSpaceError):
        host.map(0, Iova(0), ino)
    assert host.fs.extents(ino) == before
    assert host.mappings(0) == []


def test_identical_is_allowed_again(mapped: Host) -> None:
    guest = ino_of(mapped, "guest")
    before = mapped.state()
    mapped.map(0, Iova(GIB), guest)
    mapped.map(0, Iova(GIB + PAGE), guest, PAGE, PAGE)
    assert mapped.state() == before
    for perm, offset in ((READ, 0), (RW, PAGE)):
        refused(
            mapped,
            ExistsError,
            partial(mapped.tables.map_file, 0, Iova(GIB), guest, offset, PAGE, perm),
            "already mapped to something else",
        )


BAD_MAPS = {
    "unaligned iova": ((0x123, 0, PAGE, RW), "iova 0x123: unaligned"),
    "unaligned length": ((0, 0, 100, RW), "offset 0x0: bad length: got 0x64 bytes"),
    "unaligned offset": ((0, 12, PAGE, RW), "offset 0xc: unaligned"),
    "length 0": ((0, 0, 0, RW), "bad length: got 0"),
    "from the end on": ((0, 4 * MIB, None, RW), "bad length: got 0"),
    "negative length": ((0, 0, -PAGE, RW), "bad length"),
    "negative offset": ((0, -PAGE, PAGE, RW), "offset -0x1000"),
    "beyond the file": ((0, 0, 5 * MIB, RW), "beyond the end of the file"),
    "behind the file": ((0, 8 * MIB, None, RW), "offset 0x800000: beyond the end of the file"),
    "beyond the width": (((1 << 48) - PAGE, 0, 2 * PAGE, RW), "beyond 48 bits"),
    "not canonical": ((1 << 48, 0, PAGE, RW), "not canonical for 48 bits"),
    "beyond 64 bits": ((1 << 64, 0, PAGE, RW), "not an address of 64 bits"),
    "negative iova": ((-PAGE, 0, PAGE, RW), "not an address"),
    "no permission": ((0, 0, PAGE, 0), "expected r, w or rw"),
    "too much permission": ((0, 0, PAGE, 7), "expected r, w or rw"),
}


@pytest.mark.parametrize("case", BAD_MAPS)
def test_bad_map(mapped: Host, case: str) -> None:
    (iova, offset, length, perm), match = BAD_MAPS[case]
    ino = ino_of(mapped, "other")
    refused(
        mapped,
        InvalidError,
        lambda: mapped.tables.map_file(0, Iova(iova), ino, offset, length, perm),
        match,
    )


def test_bad_map_of_a_new_domain_makes_no_root_pgtables(host: Host) -> None:
    ino = host.file_of("guest", MIB)
    host.dom(0)
    refused(host, InvalidError, lambda: host.tables.map_file(0, Iova(1), ino, 0, None, RW))
    refused(host, InvalidError, lambda: host.tables.map_bar(0, Iova(1), BAR, 0, None, RW))
    refused(
        host, InvalidError, lambda: host.tables.attach(0, SourceId(0x10000)), "source id 0x10000"
    )
    refused(host, InvalidError, lambda: host.tables.attach(0, SourceId(-1)), "source id")


def test_what_is_no_file_is_not_mapped(mapped: Host) -> None:
    directory = mapped.fs.mkdir(ROOT_INO, b"d", 0o755, 0, 0).ino
    fifo = mapped.fs.create(ROOT_INO, b"fifo", 0o010600, 0, 0).ino
    for ino in (directory, fifo):
        refused(
            mapped, InvalidError, partial(mapped.tables.map_file, 0, Iova(0), ino, 0, PAGE, RW),
            "not a regular file",
        )  # fmt: skip
    refused(
        mapped, NotFoundError, lambda: mapped.tables.map_file(0, Iova(0), Ino(4711), 0, PAGE, RW)
    )
    refused(
        mapped,
        NotFoundError,
        lambda: mapped.tables.map_file(1, Iova(0), Ino(4), 0, PAGE, RW),
        "dom-1",
    )


def test_an_open_but_removed_file_is_not_mapped(mapped: Host) -> None:
    ino = ino_of(mapped, "other")
    mapped.fs.open(ino)
    mapped.fs.unlink(ROOT_INO, b"other")
    refused(mapped, NotFoundError, lambda: mapped.tables.map_file(0, Iova(0), ino, 0, None, RW))
    mapped.fs.release(ino)


def test_out_of_table_pages(mapped: Host) -> None:
    """ENOSPC says how much the file must grow; with just that much more it works."""
    other = ino_of(mapped, "other")
    # A lonely page takes two tables of its own.
    maps = [
        partial(mapped.map, 0, Iova(at), other, 0, PAGE) for at in range(4 * GIB, 1024 * GIB, GIB)
    ]
    says, number = until_refused(NoTablePagesError, mapped, maps)
    assert says == "dom-0: no free page for tables: it must grow by 2 MiB: truncate -s +2M"
    grow(mapped, 2)
    maps[number]()
    mapped.assert_check_clean()


def test_out_of_table_pages_by_far(host: Host) -> None:
    host.dom(0)
    host.tables.create_root()
    before = host.state()
    far = Bar(SourceId(0x30), 2, PhysAddr(1 << 40), 4 * GIB)

    def change() -> int:  # 4 KiB leaves, because the addresses differ by a page
        return host.tables.map_bar(0, Iova(8 * GIB + PAGE), far, 0, None, RW)

    with pytest.raises(NoTablePagesError, match="must grow by 8 MiB"):
        change()
    assert host.state() == before
    grow(host, 6)
    with pytest.raises(NoTablePagesError, match="must grow by 2 MiB"):
        change()
    assert host.state() == before
    grow(host, 2)
    assert change() == 4 * GIB
    host.assert_check_clean()


def test_an_unmap_may_need_table_pages(host: Host) -> None:
    """Cutting a piece out of a superpage takes a table."""
    host.dom(0)
    far = Bar(SourceId(0x30), 2, PhysAddr(1 << 40), 508 * GIB)
    base = 4 * GIB  # behind the addresses of interrupts
    host.tables.map_bar(0, Iova(base), far, 0, None, RW)
    assert host.tables.domain(0).used_pages == 2
    starts = range(base + MIB, base + 508 * GIB, GIB)
    cuts = [partial(host.tables.unmap, 0, Iova(at), PAGE) for at in starts]
    _says, number = until_refused(NoTablePagesError, host, cuts)
    assert number > 250
    grow(host, 2)
    assert cuts[number]() == PAGE
    at = starts[number]
    assert host.at(0, Iova(at)) is None
    assert host.at(0, Iova(at + PAGE)) == far.start + at + PAGE - base
    host.assert_check_clean()


# ---------------------------------------------------------------------- unmap


def test_unmap(mapped: Host) -> None:
    guest = mapped.physical(ino_of(mapped, "guest"))
    assert mapped.tables.unmap(0, Iova(GIB + MIB), MIB) == MIB
    assert mapped.mappings(0) == [
        (GIB, guest, MIB, RW),
        (GIB + 2 * MIB, guest + 2 * MIB, 2 * MIB, RW),
    ]
    assert mapped.tables.unmap(0, Iova(0), 1 << 48) == 3 * MIB
    assert mapped.mappings(0) == []
    assert mapped.tables.domain(0).used_pages == 1
    mapped.fs.unlink(ROOT_INO, b"guest")


@pytest.mark.parametrize(
    ("iova", "length", "error"),
    [
        (0, MIB, NotFoundError),
        (GIB + 4 * MIB, PAGE, NotFoundError),
        (GIB, 0, InvalidError),
        (GIB, -PAGE, InvalidError),
        (GIB + 1, PAGE, InvalidError),
        (GIB, 12, InvalidError),
        (1 << 48, PAGE, InvalidError),
        (-PAGE, PAGE, InvalidError),
    ],
)
def test_bad_unmap(mapped: Host, iova: Iova, length: int, error: type[PkernfsError]) -> None:
    refused(mapped, error, lambda: mapped.tables.unmap(0, iova, length))


# ---------------------------------------------------------------------- BARs


def test_a_bar_is_recorded_while_it_is_mapped(mapped: Host) -> None:
    mapped.dom(1)
    assert mapped.tables.map_bar(0, Iova(0), BAR, 0, None, RW) == 16 * MIB
    assert mapped.tables.map_bar(1, Iova(0), BAR, MIB, PAGE, READ) == PAGE
    assert mapped.tables.bars() == [BAR]
    assert mapped.at(0, Iova(5)) == BAR.start + 5
    assert mapped.at(1, Iova(5)) == BAR.start + MIB + 5
    mapped.assert_check_clean()
    mapped.remount()
    assert mapped.tables.bars() == [BAR]
    mapped.assert_check_clean()
    mapped.tables.unmap(0, Iova(0), 16 * MIB)
    assert mapped.tables.bars() == [BAR]
    mapped.tables.unmap(1, Iova(0), PAGE)
    assert mapped.tables.bars() == []
    mapped.assert_check_clean()


def test_a_bar_that_is_not_recorded_is_found(mapped: Host) -> None:
    mapped.tables.domain(0).map(Iova(0), BAR.start, PAGE, RW)
    assert [f.code for f in mapped.check().findings] == [Code.LEAF_OUTSIDE]
    mapped.tables.unmap(0, Iova(0), PAGE)


def test_bad_bar_range(mapped: Host) -> None:
    for offset, length, match in (
        (16 * MIB, PAGE, "beyond its end"),
        (0, 17 * MIB, "beyond its end"),
        (-PAGE, PAGE, "beyond its end"),
        (0, 0, "bad length"),
        (16 * MIB, None, "bad length"),
        (17 * MIB, None, "bad length|beyond"),
        (1, PAGE, "unaligned"),
        (0, 1, "bad length"),
    ):
        refused(
            mapped,
            InvalidError,
            partial(mapped.tables.map_bar, 0, Iova(0), BAR, offset, length, RW),
            match,
        )


def test_a_bar_that_cannot_be_mapped_is_not_recorded(mapped: Host) -> None:
    with pytest.raises(ExistsError):
        mapped.tables.map_bar(0, Iova(GIB - MIB), BAR, 0, None, RW)
    assert mapped.tables.bars() == []


def test_records_of_bars_run_out(mapped: Host) -> None:
    """Those of domains that are gone make room."""
    mapped.dom(1)
    bars = [Bar(SourceId(0x100 + i), i % 6, PhysAddr((1 << 40) + i * MIB), MIB) for i in range(130)]
    maps = [
        partial(mapped.tables.map_bar, 1, Iova(at * MIB), bar, 0, None, RW)
        for at, bar in enumerate(bars)
    ]
    says, number = until_refused(NoSpaceError, mapped, maps)
    assert number > 50
    assert says == f"{bars[number].name}: {number} BARs are mapped already"
    mapped.fs.unlink(IOMMU_INO, b"dom-1")
    mapped.tables.map_bar(0, Iova(0), bars[number], 0, None, RW)
    assert mapped.tables.bars() == [bars[number]]
    mapped.assert_check_clean()
