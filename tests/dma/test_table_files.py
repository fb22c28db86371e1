"""root-pgtables and dom-N as files of a file system, and what their tables pin."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import pytest

from pkernfs.dma import reports
from pkernfs.dma.mount import mount_filesystem, tables_of
from pkernfs.dma.output import Pause, Text
from pkernfs.dma.table_files import TableFiles
from pkernfs.errors import (
    BusyError,
    ExistsError,
    InvalidError,
    NoSpaceError,
    NoTablePagesError,
    NotFoundError,
    PermissionDeniedError,
    PkernfsError,
    ReadOnlyError,
    TableDamageError,
)
from pkernfs.fs.file import FALLOC_KEEP_SIZE, FALLOC_PUNCH_HOLE, FALLOC_ZERO_RANGE
from pkernfs.fs.filesystem import FileSystem
from pkernfs.fs.namei import RENAME_EXCHANGE
from pkernfs.fs.names import ROOT_PGTABLES
from pkernfs.host.bars import Bar
from pkernfs.iommu.config import Config
from pkernfs.iommu.context_walk import Mode
from pkernfs.iommu.page_walk import Code
from pkernfs.layout import BLOCK, IOMMU_INO, PAGE, ROOT_INO
from pkernfs.ratelimit import BURST, SECONDS, Quiet
from pkernfs.region.checksum import crc32c
from support.checking import assert_clean
from support.table_files import DEVICE, MIB, PHYS_BASE, READ, RW, WRITE, Host, drain

GIB = 1 << 30
PUNCH = FALLOC_PUNCH_HOLE | FALLOC_KEEP_SIZE
BAR = Bar(0x30, 0, 0xFC00_0000, 16 * MIB)


@pytest.fixture
def host(request: pytest.FixtureRequest) -> Iterator[Host]:
    made = Host(getattr(request, "param", 64 * MIB))
    yield made
    assert_clean(made.region)
    made.fs.unmount()
    assert_clean(made.region)
    made.close()


@pytest.fixture
def mapped(host: Host) -> Host:
    """guest, 4 MiB, is mapped at 1 GiB in dom-0; other, 4 MiB, is not."""
    host.file_of("guest", 4 * MIB)
    host.file_of("other", 4 * MIB)
    host.dom(0)
    host.map(0, GIB, ino_of(host, "guest"))
    return host


def ino_of(host: Host, name: str) -> int:
    found: int = host.fs.lookup(ROOT_INO, name.encode()).ino
    return found


def table_ino(host: Host, name: bytes) -> int:
    found: int = host.fs.lookup(IOMMU_INO, name).ino
    return found


def refused(
    host: Host, error: type[PkernfsError], operation: Callable[[], Any], match: str = ""
) -> None:
    """``operation`` fails, in one line, and nothing of the region has changed."""
    before = crc32c(host.region.view(0, host.region.size))
    with pytest.raises(error, match=match or None) as caught:
        host.run(operation)
    assert "\n" not in str(caught.value)
    assert crc32c(host.region.view(0, host.region.size)) == before


def until_refused(
    error: type[PkernfsError], host: Host, operations: Iterable[Callable[[], object]]
) -> tuple[str, int]:
    """Run them until one fails, and leaves the tables as they were; what it says, and which."""
    for number, operation in enumerate(operations):
        before = host.state()
        try:
            host.run(operation)
        except error as e:
            assert host.state() == before
            return str(e), number
    pytest.fail("none of them failed")


# ---------------------------------------------------------------------- the files


def test_files_of_a_new_file_system_are_nobodys(host: Host) -> None:
    tables = host.tables
    assert (tables.domains, tables.root, tables.devices(), tables.bars()) == ({}, None, [], [])
    assert tables.names == []
    assert host.assert_check_clean().tables == 0


def test_a_mount_without_tables_does_not_load_them(host: Host) -> None:
    host.remount()
    assert not host.fs.pins.active


def test_made_with_touch_and_sized_with_truncate(host: Host) -> None:
    ino = host.dom(3, 0)
    assert host.fs.inode(ino).mode == 0o100400
    refused(host, InvalidError, lambda: host.tables.domain(3), "never sized: truncate -s 2M")
    host.run(lambda: host.fs.setattr(ino, size=2 * MIB))
    table = host.tables.domain(3)
    assert (table.used_pages, table.free_pages) == (1, 511)
    assert table.root == host.physical(ino)
    assert host.tables.names == [b"dom-3"]


def test_the_first_map_makes_root_pgtables(host: Host) -> None:
    ino = host.file_of("guest", 4 * MIB)
    host.dom(0)
    assert host.map(0, 0, ino) == 4 * MIB
    root = host.fs.inode(table_ino(host, ROOT_PGTABLES))
    assert (root.size, root.mode) == (2 * MIB, 0o100400)
    assert host.tables.config == Config(Mode.LEGACY, 4, host.physical(root.ino, PAGE))
    assert host.mappings(0) == [(0, host.physical(ino), 4 * MIB, RW)]
    assert host.at(0, 0x1234) == host.physical(ino) + 0x1234


def test_names_by_number(host: Host) -> None:
    for number in (10, 2, 65535):
        host.dom(number)
    host.tables.create_root()
    assert host.tables.names == [b"root-pgtables", b"dom-2", b"dom-10", b"dom-65535"]


def test_raw_bytes_are_the_tables(mapped: Host) -> None:
    """Page 0 of dom-0 is the top-level table; what it leads to is in the file as well."""
    ino = table_ino(mapped, b"dom-0")
    raw = bytes(mapped.fs.read(ino, 0, 2 * MIB))
    base = mapped.physical(ino)
    table = memoryview(raw).cast("Q")
    entry = table[0]
    for index in (1, 0):  # 1 GiB: PDPE 1, PDE 0
        at = (entry & ~0xFFF) - base
        entry = table[at // 8 + index]
    assert entry == mapped.physical(ino_of(mapped, "guest")) | 0x83


def test_growth_keeps_mappings(mapped: Host) -> None:
    before = mapped.mappings(0)
    table = mapped.tables.domain(0)
    free = table.free_pages
    ino = table_ino(mapped, b"dom-0")
    mapped.run(lambda: mapped.fs.setattr(ino, size=6 * MIB))
    assert mapped.mappings(0) == before
    assert mapped.tables.domain(0).free_pages == free + 1024
    mapped.remount()
    assert mapped.mappings(0) == before
    mapped.assert_check_clean()


def test_growth_of_root_pgtables_keeps_devices(mapped: Host) -> None:
    mapped.attach(0)
    ino = table_ino(mapped, ROOT_PGTABLES)
    before = mapped.state()
    mapped.run(lambda: mapped.fs.setattr(ino, size=4 * MIB))
    assert mapped.state() == before
    mapped.attach(0, 0x100)
    mapped.assert_check_clean()


@pytest.mark.parametrize("name", [b"dom-0", ROOT_PGTABLES])
@pytest.mark.parametrize(
    "change",
    [
        lambda fs, ino: fs.write(ino, 0, b"garbage"),
        lambda fs, ino: fs.write(ino, 2 * MIB, b"garbage"),
        lambda fs, ino: fs.setattr(ino, size=0),
        lambda fs, ino: fs.setattr(ino, size=2 * MIB - PAGE),
        lambda fs, ino: fs.setattr(ino, size=3 * MIB),
        lambda fs, ino: fs.fallocate(ino, PUNCH, 0, PAGE),
        lambda fs, ino: fs.fallocate(ino, FALLOC_ZERO_RANGE, 0, PAGE),
        lambda fs, ino: fs.fallocate(ino, 0, 2 * MIB, 2 * MIB),
        lambda fs, ino: fs.link(ino, IOMMU_INO, b"dom-1"),
        lambda fs, ino: fs.link(ino, ROOT_INO, b"link"),
    ],
)
def test_no_garbage_into_tables(
    mapped: Host, name: bytes, change: Callable[[FileSystem, int], object]
) -> None:
    ino = table_ino(mapped, name)
    refused(mapped, PermissionDeniedError, lambda: change(mapped.fs, ino))


def test_a_table_file_is_not_mapped(mapped: Host) -> None:
    for name in (b"dom-0", ROOT_PGTABLES):
        ino = table_ino(mapped, name)
        refused(
            mapped,
            PermissionDeniedError,
            partial(mapped.tables.map_file, 0, 0, ino, 0, None, RW),
        )


# ---------------------------------------------------------------------- map


def test_of_several_pieces(host: Host) -> None:
    """A file of many extents is one range of addresses."""
    a, b = host.file_of("a"), host.file_of("b")
    for at in range(0, 16 * PAGE, PAGE):
        for ino in (a, b):
            host.run(partial(host.fs.write, ino, at, bytes([ino, at // PAGE]) * 2048))
    assert len(host.fs.extents(a)) > 8
    host.dom(0)
    host.map(0, 7 * PAGE, a)
    for at in range(0, 16 * PAGE, PAGE):
        assert host.at(0, 7 * PAGE + at + 5) == host.physical(a, at) + 5
    assert host.at(0, 6 * PAGE) is None
    assert host.at(0, 23 * PAGE) is None
    host.assert_check_clean()


def test_a_range_of_a_file(mapped: Host) -> None:
    other = ino_of(mapped, "other")
    assert mapped.map(0, 0, other, PAGE, 2 * MIB, READ) == 2 * MIB
    assert mapped.mappings(0)[0] == (0, mapped.physical(other, PAGE), 2 * MIB, READ)
    assert mapped.map(0, 4 * MIB, other, 3 * MIB, None, WRITE) == MIB
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
    host.map(0, 0, ino)
    inode = host.fs.inode(ino)
    assert inode.blocks512 > blocks
    assert inode.blocks512 * 512 >= size
    content = b"".join(host.region.read(at, n) for _low, at, n in host.fs.pieces(ino, 0, size))
    assert content == b"first".ljust(size - 4, b"\0") + b"last"
    for at in range(0, size, PAGE):
        assert host.at(0, at) == host.physical(ino, at)
    host.assert_check_clean()
    assert_clean(host.region)
    host.close()


def test_only_holes_of_the_range_are_filled(host: Host) -> None:
    host.dom(0)
    ino = host.sparse("guest", 12 * MIB)
    before = host.fs.inode(ino).blocks512
    host.map(0, 0, ino, 2 * MIB, 2 * MIB)
    assert host.fs.inode(ino).blocks512 - before == 2 * MIB // 512


def test_holes_beside_something_mapped_stay_holes(mapped: Host) -> None:
    """The address range is looked at before memory is given to the file."""
    ino = mapped.sparse("sparse", 8 * MIB)
    refused(
        mapped,
        ExistsError,
        lambda: mapped.tables.map_file(0, GIB - 4 * MIB, ino, 0, None, RW),
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
    base = 4 * GIB
    mapped.map(0, base + at, ino, offset, 2 * MIB, perm)
    refused(
        mapped,
        ExistsError,
        lambda: mapped.tables.map_file(0, base, ino, 0, None, RW),
        f"iova {base + at:#x}: already mapped",
    )


def test_holes_beside_what_is_mapped_just_so_are_filled(mapped: Host) -> None:
    ino = mapped.sparse("sparse", 8 * MIB)
    mapped.map(0, 4 * GIB + 7 * MIB, ino, 7 * MIB, MIB)
    mapped.map(0, 4 * GIB, ino)
    assert sum(e.length for e in mapped.fs.extents(ino)) == 8 * MIB
    for at in range(0, 8 * MIB, PAGE):
        assert mapped.at(0, 4 * GIB + at) == mapped.physical(ino, at)
    mapped.assert_check_clean()


def test_a_full_file_system_fills_no_holes(host: Host) -> None:
    host.dom(0)
    host.tables.create_root()
    ino = host.sparse("guest", 60 * MIB)
    before = host.fs.extents(ino)
    with pytest.raises(NoSpaceError):
        host.map(0, 0, ino)
    assert host.fs.extents(ino) == before
    assert host.mappings(0) == []


def test_identical_is_allowed_again(mapped: Host) -> None:
    guest = ino_of(mapped, "guest")
    before = mapped.state()
    mapped.map(0, GIB, guest)
    mapped.map(0, GIB + PAGE, guest, PAGE, PAGE)
    assert mapped.state() == before
    for perm, offset in ((READ, 0), (RW, PAGE)):
        refused(
            mapped,
            ExistsError,
            partial(mapped.tables.map_file, 0, GIB, guest, offset, PAGE, perm),
            "already mapped to something else",
        )


BAD_MAPS = {
    "unaligned iova": ((0x123, 0, PAGE, RW), "iova 0x123: unaligned"),
    "unaligned length": ((0, 0, 100, RW), "unaligned: got 0x64 bytes"),
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
        lambda: mapped.tables.map_file(0, iova, ino, offset, length, perm),
        match,
    )


def test_bad_map_of_a_new_domain_makes_no_root_pgtables(host: Host) -> None:
    ino = host.file_of("guest", MIB)
    host.dom(0)
    refused(host, InvalidError, lambda: host.tables.map_file(0, 1, ino, 0, None, RW))
    refused(host, InvalidError, lambda: host.tables.map_bar(0, 1, BAR, 0, None, RW))
    refused(host, InvalidError, lambda: host.tables.attach(0, 0x10000), "source id 0x10000")
    refused(host, InvalidError, lambda: host.tables.attach(0, -1), "source id")


def test_what_is_no_file_is_not_mapped(mapped: Host) -> None:
    directory = mapped.fs.mkdir(ROOT_INO, b"d", 0o755, 0, 0).ino
    fifo = mapped.fs.create(ROOT_INO, b"fifo", 0o010600, 0, 0).ino
    for ino in (directory, fifo):
        refused(
            mapped, InvalidError, partial(mapped.tables.map_file, 0, 0, ino, 0, PAGE, RW),
            "not a regular file",
        )  # fmt: skip
    refused(mapped, NotFoundError, lambda: mapped.tables.map_file(0, 0, 4711, 0, PAGE, RW))
    refused(mapped, NotFoundError, lambda: mapped.tables.map_file(1, 0, 4, 0, PAGE, RW), "dom-1")


def test_an_open_but_removed_file_is_not_mapped(mapped: Host) -> None:
    ino = ino_of(mapped, "other")
    mapped.fs.open(ino)
    mapped.fs.unlink(ROOT_INO, b"other")
    refused(mapped, NotFoundError, lambda: mapped.tables.map_file(0, 0, ino, 0, None, RW))
    mapped.fs.release(ino)


def test_out_of_table_pages(mapped: Host) -> None:
    """ENOSPC says how much the file must grow; with just that much more it works."""
    other = ino_of(mapped, "other")
    # A lonely page takes two tables of its own.
    maps = [partial(mapped.map, 0, at, other, 0, PAGE) for at in range(4 * GIB, 1024 * GIB, GIB)]
    says, number = until_refused(NoTablePagesError, mapped, maps)
    assert says == "dom-0: no free page for tables: it must grow by 2 MiB: truncate -s +2M"
    grow(mapped, 2)
    maps[number]()
    mapped.assert_check_clean()


def test_out_of_table_pages_by_far(host: Host) -> None:
    host.dom(0)
    host.tables.create_root()
    before = host.state()
    far = Bar(0x30, 2, 1 << 40, 4 * GIB)

    def change() -> int:  # 4 KiB leaves, because the addresses differ by a page
        return host.tables.map_bar(0, 8 * GIB + PAGE, far, 0, None, RW)

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
    far = Bar(0x30, 2, 1 << 40, 508 * GIB)
    host.tables.map_bar(0, 0, far, 0, None, RW)
    assert host.tables.domain(0).used_pages == 2
    cuts = [partial(host.tables.unmap, 0, at + MIB, PAGE) for at in range(0, 508 * GIB, GIB)]
    _says, number = until_refused(NoTablePagesError, host, cuts)
    assert number > 250
    grow(host, 2)
    assert cuts[number]() == PAGE
    at = number * GIB + MIB
    assert host.at(0, at) is None
    assert host.at(0, at + PAGE) == far.start + at + PAGE
    host.assert_check_clean()


def grow(host: Host, mib: int, name: bytes = b"dom-0") -> None:
    inode = host.fs.inode(table_ino(host, name))
    size = inode.size + mib * MIB
    host.run(lambda: host.fs.setattr(inode.ino, size=size))


# ---------------------------------------------------------------------- unmap


def test_unmap(mapped: Host) -> None:
    guest = mapped.physical(ino_of(mapped, "guest"))
    assert mapped.tables.unmap(0, GIB + MIB, MIB) == MIB
    assert mapped.mappings(0) == [
        (GIB, guest, MIB, RW),
        (GIB + 2 * MIB, guest + 2 * MIB, 2 * MIB, RW),
    ]
    assert mapped.tables.unmap(0, 0, 1 << 48) == 3 * MIB
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
def test_bad_unmap(mapped: Host, iova: int, length: int, error: type[PkernfsError]) -> None:
    refused(mapped, error, lambda: mapped.tables.unmap(0, iova, length))


# ---------------------------------------------------------------------- attach


def test_domain_ids(mapped: Host) -> None:
    """N + 2 if that is free; one for each domain."""
    for number in (1, 65533, 65534):
        mapped.dom(number)
    assert mapped.attach(0, 0x28) == 2
    assert mapped.attach(1, 0x30) == 3
    assert mapped.attach(0, 0x31) == 2
    assert mapped.attach(65533, 0x32) == 65535
    assert mapped.attach(65534, 0x33) == 4  # 65536 is none; the lowest that is free
    mapped.dom(2)
    assert mapped.attach(2, 0x34) == 5  # 4 is taken
    mapped.tables.detach(0x33)
    mapped.dom(3)
    assert mapped.attach(3, 0x35) == 4
    assert [d.source_id for d in mapped.tables.devices()] == [0x28, 0x30, 0x31, 0x32, 0x34, 0x35]
    mapped.assert_check_clean()


def test_attach_makes_root_pgtables(host: Host) -> None:
    host.dom(7)
    assert host.attach(7) == 9
    assert host.fs.find(IOMMU_INO, ROOT_PGTABLES)
    refused(host, ExistsError, lambda: host.tables.attach(7, DEVICE), "attached already")
    host.tables.detach(DEVICE)
    refused(host, NotFoundError, lambda: host.tables.detach(DEVICE), "not attached")
    host.assert_check_clean()


def test_detach_without_root_pgtables(host: Host) -> None:
    refused(host, NotFoundError, lambda: host.tables.detach(DEVICE), "no device is attached")


def test_root_pgtables_is_used_up(host: Host) -> None:
    """In scalable mode each device takes two pages."""
    host.tables.create_root(Config(Mode.SCALABLE, 4))
    host.dom(0)
    for source_id in range(250):
        host.attach(0, source_id)
    attach = [partial(host.attach, 0, source_id) for source_id in range(250, 260)]
    says, number = until_refused(NoTablePagesError, host, attach)
    assert "root-pgtables: no free page for tables: it must grow by 2 MiB" in says
    grow(host, 2, ROOT_PGTABLES)
    attach[number]()
    host.assert_check_clean()


# ---------------------------------------------------------------------- create


@pytest.mark.parametrize("levels", [3, 4, 5])
@pytest.mark.parametrize("mode", list(Mode))
def test_create_decides_mode_and_levels(host: Host, mode: Mode, levels: int) -> None:
    host.tables.create_root(Config(mode, levels), 4 * MIB)
    host.dom(0)
    host.map(0, (1 << 9 * levels + 12) - 4 * MIB, host.file_of("guest", 4 * MIB))
    host.attach(0)
    assert host.fs.inode(table_ino(host, ROOT_PGTABLES)).size == 4 * MIB
    before = host.state()
    assert (before["config"].mode, before["config"].levels) == (mode, levels)
    host.remount()
    assert host.state() == before
    host.assert_check_clean()
    text, _records, status = host.answer(
        "translate", device=DEVICE, iova=(1 << 9 * levels + 12) - PAGE
    )
    assert status == 0, text


def test_create_in_use(mapped: Host) -> None:
    refused(mapped, BusyError, lambda: mapped.tables.create_root(Config(Mode.LEGACY, 5)), "levels")
    mapped.tables.create_root(Config(Mode.SCALABLE, 4))  # the mode is no business of the domains
    mapped.attach(0)
    refused(mapped, BusyError, lambda: mapped.tables.create_root(Config(Mode.LEGACY, 4)), "in use")
    assert mapped.tables.config.mode is Mode.SCALABLE


@pytest.mark.parametrize(
    ("levels", "size"), [(2, 2 * MIB), (6, 2 * MIB), (4, 0), (4, 3 * MIB), (4, -2 * MIB)]
)
def test_bad_create(host: Host, levels: int, size: int) -> None:
    refused(host, InvalidError, lambda: host.tables.create_root(Config(Mode.LEGACY, levels), size))


@pytest.mark.parametrize("size", [1 << 30, 1 << 50, 1 << 63])
def test_create_too_large_leaves_no_file(host: Host, size: int) -> None:
    with pytest.raises(PkernfsError):
        host.run(lambda: host.tables.create_root(Config(), size))
    assert host.tables.names == []
    assert host.fs.find(IOMMU_INO, ROOT_PGTABLES) == 0


# ---------------------------------------------------------------------- pins


def link_twice(host: Host) -> None:
    host.fs.link(ino_of(host, "guest"), ROOT_INO, b"second")
    host.fs.unlink(ROOT_INO, b"guest")
    host.fs.rename(ROOT_INO, b"second", ROOT_INO, b"guest", 0)


PINNED: dict[str, Callable[[Host], object]] = {
    "unlink": lambda h: h.fs.unlink(ROOT_INO, b"guest"),
    "rename over it": lambda h: h.fs.rename(ROOT_INO, b"other", ROOT_INO, b"guest", 0),
    "shrink": lambda h: h.fs.setattr(ino_of(h, "guest"), size=MIB),
    "shrink by a byte": lambda h: h.fs.setattr(ino_of(h, "guest"), size=4 * MIB - 1),
    "to nothing": lambda h: h.fs.setattr(ino_of(h, "guest"), size=0),
    "punch": lambda h: h.fs.fallocate(ino_of(h, "guest"), PUNCH, MIB, PAGE),
    "punch part of a page": lambda h: h.fs.fallocate(ino_of(h, "guest"), PUNCH, 5, 10),
    "punch beyond": lambda h: h.fs.fallocate(ino_of(h, "guest"), PUNCH, 4 * MIB - 1, 9 * MIB),
    "unlink dom-0, attached": lambda h: h.fs.unlink(IOMMU_INO, b"dom-0"),
    "rename dom-0, attached": lambda h: h.fs.rename(IOMMU_INO, b"dom-0", IOMMU_INO, b"dom-1", 0),
    "exchange dom-0, attached": lambda h: h.fs.rename(
        IOMMU_INO, b"dom-5", IOMMU_INO, b"dom-0", RENAME_EXCHANGE
    ),
    "rename over dom-0, attached": lambda h: h.fs.rename(
        IOMMU_INO, b"dom-5", IOMMU_INO, b"dom-0", 0
    ),
    "unlink root-pgtables": lambda h: h.fs.unlink(IOMMU_INO, ROOT_PGTABLES),
}  # fmt: skip


@pytest.mark.parametrize("again", [False, True], ids=["", "remounted"])
@pytest.mark.parametrize("what", PINNED)
def test_pinned(mapped: Host, what: str, again: bool, caplog: pytest.LogCaptureFixture) -> None:
    """EBUSY, and the holder is named in the log."""
    mapped.dom(5)
    mapped.attach(0)
    if again:
        mapped.remount(clean=False)
    caplog.clear()
    refused(mapped, BusyError, lambda: PINNED[what](mapped))
    said = "\n".join(r.getMessage() for r in caplog.records)
    if "attached" in what or "root" in what:
        assert "in use: device 0000:00:05.0 is attached" in said
    else:
        assert f"inode {ino_of(mapped, 'guest')}: busy: dom-0 maps it at iova 0x40" in said
    mapped.assert_check_clean()
    mapped.tables.detach(DEVICE)
    mapped.tables.unmap(0, 0, 1 << 48)
    mapped.run(lambda: PINNED[what](mapped))


def test_refusals_do_not_fill_the_log(mapped: Host, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(300):
        with pytest.raises(BusyError):
            mapped.fs.unlink(ROOT_INO, b"guest")
    assert len(caplog.records) == BURST + 1
    assert caplog.records[-1].getMessage() == "more of these: not logged for up to 10 seconds"


def test_the_log_goes_on_later(caplog: pytest.LogCaptureFixture) -> None:
    now = 0.0
    quiet = Quiet(logging.getLogger("pkernfs.test"), lambda: now)
    for number in range(BURST + 5):
        quiet.warning(f"first {number}")
    now = SECONDS
    quiet.warning("second")
    said = [r.getMessage() for r in caplog.records]
    assert said[:BURST] == [f"first {number}" for number in range(BURST)]
    assert said[BURST + 1 :] == ["second"]


def test_the_last_of_two_names_is_pinned(mapped: Host) -> None:
    guest = ino_of(mapped, "guest")
    mapped.fs.link(guest, ROOT_INO, b"second")
    mapped.fs.unlink(ROOT_INO, b"guest")
    refused(mapped, BusyError, lambda: mapped.fs.unlink(ROOT_INO, b"second"), "mapped for DMA")
    mapped.fs.link(guest, ROOT_INO, b"third")
    mapped.fs.rename(ROOT_INO, b"other", ROOT_INO, b"second", 0)  # over one of two
    refused(mapped, BusyError, lambda: mapped.fs.rename(ROOT_INO, b"second", ROOT_INO, b"third", 0))


ALLOWED: dict[str, Callable[[Host], object]] = {
    "write": lambda h: h.fs.write(ino_of(h, "guest"), 100, b"x" * 9000),
    "append": lambda h: h.fs.write(ino_of(h, "guest"), 4 * MIB, b"x" * 9000),
    "grow": lambda h: h.fs.setattr(ino_of(h, "guest"), size=9 * MIB),
    "allocate": lambda h: h.fs.fallocate(ino_of(h, "guest"), 0, 0, 9 * MIB),
    "zero": lambda h: h.fs.fallocate(ino_of(h, "guest"), FALLOC_ZERO_RANGE, 0, 4 * MIB),
    "rename": lambda h: h.fs.rename(ROOT_INO, b"guest", ROOT_INO, b"new", 0),
    "rename over another": lambda h: h.fs.rename(ROOT_INO, b"guest", ROOT_INO, b"other", 0),
    "exchange": lambda h: h.fs.rename(ROOT_INO, b"guest", ROOT_INO, b"other", RENAME_EXCHANGE),
    "chmod": lambda h: h.fs.setattr(ino_of(h, "guest"), mode=0o644, uid=5, gid=6),
    "the same size": lambda h: h.fs.setattr(ino_of(h, "guest"), size=4 * MIB),
    "punch another": lambda h: h.fs.fallocate(ino_of(h, "other"), PUNCH, 0, MIB),
    "remove another": lambda h: h.fs.unlink(ROOT_INO, b"other"),
    "shrink another": lambda h: h.fs.setattr(ino_of(h, "other"), size=1),
    "rename an unattached domain": lambda h: h.fs.rename(
        IOMMU_INO, b"dom-0", IOMMU_INO, b"dom-9", 0
    ),
    "grow the domain": lambda h: grow(h, 2),
}


@pytest.mark.parametrize("what", ALLOWED)
def test_not_pinned(mapped: Host, what: str) -> None:
    before = [m[:4] for m in mapped.mappings(0)]
    mapped.run(lambda: ALLOWED[what](mapped))
    (number,) = mapped.tables.domains
    assert mapped.mappings(number) == before
    mapped.assert_check_clean()


def test_only_the_mapped_part_is_pinned(host: Host) -> None:
    host.dom(0)
    ino = host.file_of("guest", 8 * MIB)
    host.map(0, 0, ino, 2 * MIB, PAGE)
    host.run(lambda: host.fs.fallocate(ino, PUNCH, 0, 2 * MIB))
    host.run(lambda: host.fs.fallocate(ino, PUNCH, 2 * MIB + PAGE, MIB))
    refused(host, BusyError, lambda: host.fs.fallocate(ino, PUNCH, 2 * MIB + PAGE - 1, MIB))
    refused(host, BusyError, lambda: host.fs.setattr(ino, size=2 * MIB + PAGE - 1))
    host.run(lambda: host.fs.setattr(ino, size=2 * MIB + PAGE))
    host.assert_check_clean()
    host.tables.unmap(0, 0, PAGE)
    host.run(lambda: host.fs.setattr(ino, size=0))


def test_small_files_beside_a_mapped_one_are_not_pinned(host: Host) -> None:
    """They share its 2 MiB block."""
    host.dom(0)
    one, two = host.file_of("one", 3 * PAGE), host.file_of("two", 3 * PAGE)
    assert host.physical(one) // BLOCK == host.physical(two) // BLOCK
    host.map(0, 0, one)
    host.fs.unlink(ROOT_INO, b"two")
    refused(host, BusyError, lambda: host.fs.unlink(ROOT_INO, b"one"))


def test_a_mapped_small_file_stays_where_it_is(
    host: Host, caplog: pytest.LogCaptureFixture
) -> None:
    """A file that outgrows 4 KiB pages moves into a block, unless a device may reach it."""
    host.dom(0)
    for name, is_mapped in (("free", False), ("guest", True)):
        ino = host.file_of(name, data=b"x" * 3 * PAGE)
        at = host.physical(ino)
        if is_mapped:
            host.map(0, 0, ino)
        host.run(partial(host.fs.setattr, ino, size=5 * MIB))
        host.run(partial(host.fs.write, ino, 5 * MIB, b"end"))
        assert (host.physical(ino) == at) == is_mapped
        assert bytes(host.fs.read(ino, 0, 4 * PAGE)) == b"x" * 3 * PAGE + bytes(PAGE)
    assert not caplog.records  # nobody was refused anything
    host.assert_check_clean()
    host.tables.unmap(0, 0, 1 << 48)
    host.fs.unlink(ROOT_INO, b"guest")


def test_two_domains_pin(mapped: Host) -> None:
    mapped.dom(1)
    guest = ino_of(mapped, "guest")
    mapped.map(1, 0, guest, 3 * MIB, MIB)
    mapped.tables.unmap(0, 0, 1 << 48)
    refused(mapped, BusyError, lambda: mapped.fs.unlink(ROOT_INO, b"guest"))
    mapped.run(lambda: mapped.fs.setattr(guest, size=4 * MIB))
    mapped.run(lambda: mapped.fs.fallocate(guest, PUNCH, 0, 3 * MIB))
    mapped.tables.unmap(1, 0, MIB)
    mapped.fs.unlink(ROOT_INO, b"guest")


def test_an_unused_domain_goes_with_its_pins(mapped: Host) -> None:
    mapped.fs.unlink(IOMMU_INO, b"dom-0")
    mapped.fs.unlink(ROOT_INO, b"guest")
    mapped.fs.unlink(IOMMU_INO, ROOT_PGTABLES)
    assert mapped.state() == Host.state(mapped)
    assert (mapped.tables.domains, mapped.tables.root) == ({}, None)


def test_root_pgtables_stays_while_nothing_else_tells_of_the_tables(mapped: Host) -> None:
    bar = Bar(0x28, 0, 1 << 41, MIB)
    mapped.tables.map_bar(0, 1 << 40, bar, 0, None, RW)
    refused(
        mapped, BusyError, lambda: mapped.fs.unlink(IOMMU_INO, ROOT_PGTABLES), "dom-0 has mappings"
    )
    mapped.tables.unmap(0, 0, 1 << 48)
    mapped.tables.create_root(Config(levels=5))
    mapped.map(0, 0, ino_of(mapped, "guest"))
    refused(
        mapped, BusyError, lambda: mapped.fs.unlink(IOMMU_INO, ROOT_PGTABLES), "dom-0 has mappings"
    )
    mapped.tables.unmap(0, 0, 1 << 57)
    mapped.fs.unlink(IOMMU_INO, ROOT_PGTABLES)


def test_a_domain_that_replaces_another(mapped: Host) -> None:
    mapped.dom(1)
    mapped.map(1, 0, ino_of(mapped, "other"))
    mapped.fs.rename(IOMMU_INO, b"dom-1", IOMMU_INO, b"dom-0", 0)
    assert list(mapped.tables.domains) == [0]
    assert mapped.mappings(0)[0][0] == 0
    mapped.fs.unlink(ROOT_INO, b"guest")
    refused(mapped, BusyError, lambda: mapped.fs.unlink(ROOT_INO, b"other"))


def test_domains_change_places(mapped: Host) -> None:
    mapped.dom(1)
    mapped.map(1, 0, ino_of(mapped, "other"))
    one, other = mapped.mappings(0), mapped.mappings(1)
    mapped.fs.rename(IOMMU_INO, b"dom-1", IOMMU_INO, b"dom-0", RENAME_EXCHANGE)
    assert (mapped.mappings(1), mapped.mappings(0)) == (one, other)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"dom-0", ROOT_PGTABLES),
        (ROOT_PGTABLES, b"dom-1"),
        (b"dom-0", b"dom-65536"),
        (b"dom-0", b"dom-01"),
    ],
)
def test_names_that_table_files_cannot_have(mapped: Host, old: bytes, new: bytes) -> None:
    for flags in (0, RENAME_EXCHANGE) if mapped.fs.find(IOMMU_INO, new) else (0,):
        refused(
            mapped,
            PermissionDeniedError,
            partial(mapped.fs.rename, IOMMU_INO, old, IOMMU_INO, new, flags),
        )


def test_open_files_are_pinned_as_well(mapped: Host) -> None:
    guest = ino_of(mapped, "guest")
    mapped.fs.open(guest)
    refused(mapped, BusyError, lambda: mapped.fs.unlink(ROOT_INO, b"guest"))
    mapped.fs.release(guest)
    mapped.assert_check_clean()


def test_tables_being_checked_stay(mapped: Host) -> None:
    with mapped.tables.reading():
        other = ino_of(mapped, "other")
        for operation in (
            lambda: mapped.tables.map_file(0, 0, other, 0, None, RW),
            lambda: mapped.tables.unmap(0, GIB, PAGE),
            lambda: mapped.tables.attach(0, DEVICE),
            lambda: mapped.tables.create_root(),
            lambda: mapped.fs.unlink(IOMMU_INO, b"dom-0"),
        ):
            refused(mapped, BusyError, operation, "try again")
    mapped.map(0, 0, other)


# ---------------------------------------------------------------------- BARs


def test_a_bar_is_recorded_while_it_is_mapped(mapped: Host) -> None:
    mapped.dom(1)
    assert mapped.tables.map_bar(0, 0, BAR, 0, None, RW) == 16 * MIB
    assert mapped.tables.map_bar(1, 0, BAR, MIB, PAGE, READ) == PAGE
    assert mapped.tables.bars() == [BAR]
    assert mapped.at(0, 5) == BAR.start + 5
    assert mapped.at(1, 5) == BAR.start + MIB + 5
    mapped.assert_check_clean()
    mapped.remount()
    assert mapped.tables.bars() == [BAR]
    mapped.assert_check_clean()
    mapped.tables.unmap(0, 0, 16 * MIB)
    assert mapped.tables.bars() == [BAR]
    mapped.tables.unmap(1, 0, PAGE)
    assert mapped.tables.bars() == []
    mapped.assert_check_clean()


def test_a_bar_that_is_not_recorded_is_found(mapped: Host) -> None:
    mapped.tables.domain(0).map(0, BAR.start, PAGE, RW)
    assert [f.code for f in mapped.check().findings] == [Code.LEAF_OUTSIDE]
    mapped.tables.unmap(0, 0, PAGE)


def test_bad_bar_range(mapped: Host) -> None:
    for offset, length, match in (
        (16 * MIB, PAGE, "beyond its end"),
        (0, 17 * MIB, "beyond its end"),
        (-PAGE, PAGE, "beyond its end"),
        (0, 0, "bad length"),
        (16 * MIB, None, "bad length"),
        (17 * MIB, None, "bad length|beyond"),
        (1, PAGE, "unaligned"),
        (0, 1, "unaligned"),
    ):
        refused(
            mapped,
            InvalidError,
            partial(mapped.tables.map_bar, 0, 0, BAR, offset, length, RW),
            match,
        )


def test_a_bar_that_cannot_be_mapped_is_not_recorded(mapped: Host) -> None:
    with pytest.raises(ExistsError):
        mapped.tables.map_bar(0, GIB - MIB, BAR, 0, None, RW)
    assert mapped.tables.bars() == []


def test_records_of_bars_run_out(mapped: Host) -> None:
    """Those of domains that are gone make room."""
    mapped.dom(1)
    bars = [Bar(0x100 + i, i % 6, (1 << 40) + i * MIB, MIB) for i in range(130)]
    maps = [
        partial(mapped.tables.map_bar, 1, at * MIB, bar, 0, None, RW) for at, bar in enumerate(bars)
    ]
    says, number = until_refused(NoSpaceError, mapped, maps)
    assert number > 50
    assert says == f"{bars[number].name}: {number} BARs are mapped already"
    mapped.fs.unlink(IOMMU_INO, b"dom-1")
    mapped.tables.map_bar(0, 0, bars[number], 0, None, RW)
    assert mapped.tables.bars() == [bars[number]]
    mapped.assert_check_clean()


# ---------------------------------------------------------------------- where tables are good


def test_a_region_without_addresses_gets_them_back(mapped: Host) -> None:
    mapped.attach(0)
    before = mapped.state()
    mapped.remount(None)
    assert mapped.region.physical(0) == PHYS_BASE
    assert mapped.state() == before
    refused(mapped, BusyError, lambda: mapped.fs.unlink(ROOT_INO, b"guest"))
    mapped.assert_check_clean()


def test_tables_of_another_place_are_refused(
    mapped: Host, caplog: pytest.LogCaptureFixture
) -> None:
    mapped.attach(0)
    image = mapped.region.read(0, mapped.region.size)
    mapped.remount(2 * PHYS_BASE)
    home = PHYS_BASE + (mapped.physical(table_ino(mapped, ROOT_PGTABLES), PAGE) - 2 * PHYS_BASE)
    says = f"root-pgtables: its tables were made for {home:#x}"
    other = ino_of(mapped, "other")
    for operation in (
        lambda: mapped.tables.map_file(0, 0, other, 0, None, RW),
        lambda: mapped.tables.unmap(0, GIB, PAGE),
        lambda: mapped.tables.attach(0, 0x99),
        lambda: mapped.tables.detach(DEVICE),
        lambda: mapped.tables.create_root(),
        lambda: mapped.answer("show"),
        lambda: mapped.answer("export"),
        lambda: mapped.answer("check"),
        lambda: mapped.answer("translate", device=DEVICE, iova=0),
    ):
        refused(mapped, TableDamageError, operation, says)
        refused(mapped, TableDamageError, operation, f"mount with phys_base={PHYS_BASE:#x}")
    # Nothing is pinned: no unit can be walking tables that are not where they say.
    mapped.run(lambda: mapped.fs.setattr(ino_of(mapped, "guest"), size=0))
    mapped.fs.unlink(IOMMU_INO, b"dom-0")
    mapped.fs.unlink(IOMMU_INO, ROOT_PGTABLES)
    mapped.dom(0)
    mapped.map(0, 0, other)
    mapped.assert_check_clean()
    # Mounted at the right place, the old tables are as they were.
    mapped.fs.unmount()
    mapped.region.copy_in(0, image)
    mapped.region.close()
    mapped.region = mapped.file.open(phys_base=PHYS_BASE)
    mapped.fs = mount_filesystem(mapped.region)
    refused(mapped, BusyError, lambda: mapped.fs.unlink(ROOT_INO, b"guest"))
    mapped.assert_check_clean()


def test_a_region_that_never_had_addresses(host: Host) -> None:
    host.remount(None)
    ino = host.file_of("guest", MIB)
    host.dom(0)
    for operation in (
        lambda: host.tables.map_file(0, 0, ino, 0, None, RW),
        lambda: host.tables.map_bar(0, 0, BAR, 0, None, RW),
        lambda: host.tables.unmap(0, 0, PAGE),
        lambda: host.tables.attach(0, DEVICE),
        lambda: host.tables.create_root(),
        lambda: host.answer("show"),
        lambda: host.answer("export"),
        lambda: host.answer("check"),
        lambda: host.answer("translate", device=DEVICE, iova=0),
    ):
        refused(host, InvalidError, operation, "no physical addresses: (mount it with|give) phys")
    host.run(lambda: host.fs.setattr(ino, size=0))
    host.fs.unlink(IOMMU_INO, b"dom-0")


def test_a_read_only_mount(mapped: Host) -> None:
    mapped.attach(0)
    before = mapped.state()
    mapped.fs.unmount()
    mapped.region.close()
    mapped.region = mapped.file.open(write=False, phys_base=None)
    fs = mapped.fs = mount_filesystem(mapped.region, read_only=True)
    assert mapped.state() == before
    mapped.assert_check_clean()
    for operation in (
        lambda: tables_of(fs).map_file(0, 0, 5, 0, None, RW),
        lambda: tables_of(fs).unmap(0, GIB, PAGE),
        lambda: tables_of(fs).attach(0, 5),
        lambda: tables_of(fs).detach(DEVICE),
        lambda: tables_of(fs).create_root(),
    ):
        refused(mapped, ReadOnlyError, operation, "read-only")
    mapped.region.close()
    mapped.region = mapped.file.open(phys_base=PHYS_BASE)
    mapped.fs = mount_filesystem(mapped.region)


# ---------------------------------------------------------------------- questions


def test_show_goes_on_while_tables_change(mapped: Host) -> None:
    """Each step walks from the top: what it prints was right when it was printed."""
    ino = mapped.file_of("pages")
    for at in range(0, 600 * PAGE, 2 * PAGE):
        mapped.run(partial(mapped.fs.write, ino, at, b"x"))
    mapped.run(lambda: mapped.fs.setattr(ino, size=600 * PAGE))
    mapped.map(0, PAGE, ino)
    lines: list[str] = []
    for steps, item in enumerate(reports.show_text(mapped.fs, 0), 1):
        assert isinstance(item, Text)
        lines += item.text.splitlines()
        if steps == 3:  # the tables that are being shown go, and others take their pages
            mapped.tables.unmap(0, 0, GIB)
            mapped.map(0, 100 * GIB, ino)
            mapped.map(0, 300 * PAGE, ino, 0, 2 * PAGE)
        if steps == 5:
            grow(mapped, 2)
    shown = [int(line.split()[0], 16) for line in lines if line.startswith("0x")]
    assert shown == sorted(set(shown))
    assert shown[0] == 1
    assert shown[-1] == (100 * GIB) // PAGE + 599
    assert not mapped.fs.read_only


def test_walk_ends_where_directories_are_a_loop(mapped: Host) -> None:
    d = mapped.fs.mkdir(ROOT_INO, b"d", 0o755, 0, 0).ino
    e = mapped.fs.mkdir(d, b"e", 0o755, 0, 0).ino
    directory = mapped.fs.inode(e)
    with mapped.fs.store:  # as a scribbled region has it
        mapped.fs.super.inodes.touch(directory)
        mapped.fs._namei._names.add(directory, b"back", d, 4)
        mapped.fs.super.inodes.save(directory)
    found = [item for item in reports.walk_files(mapped.fs) if not isinstance(item, Pause)]
    assert sorted(path for path, _ino in found) == [
        "/guest", "/iommu/dom-0", "/iommu/root-pgtables", "/other"
    ]  # fmt: skip
    with mapped.fs.store:
        mapped.fs.super.inodes.touch(directory)
        found_name = mapped.fs._namei._names.locate(directory, b"back")
        assert found_name is not None
        mapped.fs._namei._names.remove(directory, b"back", found_name[0])
        mapped.fs.super.inodes.save(directory)


def test_two_names_are_one_file(mapped: Host) -> None:
    mapped.fs.link(ino_of(mapped, "guest"), ROOT_INO, b"second")
    mapped.assert_check_clean()
    _text, whole, _status = mapped.answer("export")
    (mapping,) = whole["ioas"][0]["mappings"]
    assert mapping["file"] in ("/guest", "/second")


def test_a_rename_does_not_hide_a_file(mapped: Host) -> None:
    """A check goes by inodes: a name that moves from where it has not looked to where it has."""
    for at in range(100):
        mapped.fs.mkdir(ROOT_INO, b"%d" % at, 0o755, 0, 0)
    first, last = mapped.fs.find(ROOT_INO, b"0"), mapped.fs.find(ROOT_INO, b"99")
    homes = itertools.cycle([ROOT_INO, first, last])
    moves = itertools.pairwise(homes)

    def move() -> None:
        source, target = next(moves)
        mapped.fs.rename(source, b"guest", target, b"guest", 0)

    assert drain(reports.prepare_check(mapped.fs), move).run().clean
    assert next(moves)[0] != ROOT_INO  # it has moved


@pytest.mark.parametrize(
    "bad",
    [
        {"device": -1, "iova": 0},
        {"device": 0x10000, "iova": 0},
        {"device": 5, "iova": -1},
        {"device": 5, "iova": 1 << 64},
        {"device": 5, "iova": 0, "pasid": -1},
        {"device": 5, "iova": 0, "pasid": 1 << 20},
        {"device": 5, "iova": 0, "access": 4},
        {"device": 5, "iova": 0, "access": -1},
        {"device": None, "iova": 0},
        {"device": 5, "iova": None},
    ],
)
def test_no_request_is_like_that(mapped: Host, bad: dict[str, Any]) -> None:
    refused(mapped, InvalidError, lambda: mapped.answer("translate", **bad))


def test_translate_says_whose_memory_it_is(mapped: Host) -> None:
    mapped.attach(0)
    mapped.tables.map_bar(0, 0, BAR, 0, None, READ)
    assert isinstance(mapped.tables, TableFiles)
    text, _, status = mapped.answer("translate", device=DEVICE, iova=GIB + 0x1234)
    assert status == 0
    at = mapped.physical(ino_of(mapped, "guest"), 0x1000) + 0x234
    assert text.splitlines()[-1] == (
        f"physical {at:#x} rw, 2 MiB page, domain id 2, /guest + 0x1234"
    )
    text, _, status = mapped.answer("translate", device=DEVICE, iova=0x5678)
    assert text.splitlines()[-1].endswith(
        "r, 2 MiB page, domain id 2, BAR 0 of 0000:00:06.0 + 0x5678"
    )
    text, _, status = mapped.answer("translate", device=DEVICE, iova=0x5678, access=2)
    assert status == 1
    assert text.splitlines()[-1].startswith("fault 0x05 WRITE")
    text, _, status = mapped.answer("translate", device=DEVICE, iova=0xFEE0_0000)
    assert status == 0
    assert text.splitlines()[-1].startswith("interrupt")
