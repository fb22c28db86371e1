"""What mkfs writes, figure by figure as docs/format.md has it, and what it finds out before."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pkernfs.dma.mount import mount_filesystem
from pkernfs.errors import CorruptionError, FormatError, PkernfsError, RegionError, UsageError
from pkernfs.fs import fsck, superblock
from pkernfs.fs.mkfs import Content, Probe, make_filesystem, probe
from pkernfs.host.iomem import Span
from pkernfs.layout import (
    BACKUP_PAGE,
    BLOCK,
    MAX_PIECES,
    PAGE,
    PLACEMENT_OFFSET,
    ROOT_INO,
    SUPERBLOCK_PAGE,
    page_offset,
)
from pkernfs.quantities import PageNo, PhysAddr, RegionOff
from pkernfs.region.checksum import page_checksum
from pkernfs.region.dax import Device
from pkernfs.region.region import Region
from pkernfs.region.trace import Store, trace_start, trace_stop
from support.checking import MemoryFile, assert_clean
from support.files import MIB, make

SIZE = 16 * MIB
UUID = bytes(range(16))
NOW = 1_700_000_000_123_456_789
#: Blocks for which one block map has bits, and block maps that have room in block 0.
IN_A_MAP, IN_BLOCK_0 = 10752, 510


def formatted(region: Region, label: str = "") -> None:
    make_filesystem(region, label=label, uuid=UUID, clock=lambda: NOW)


@pytest.fixture
def region() -> Iterator[Region]:
    with Region.anonymous(SIZE) as made:
        yield made


def page_of(region: Region, number: int, magic: bytes, owner: int = 0) -> bytes:
    """A metadata page whose header is as section 2 has it."""
    page = region.read(RegionOff(number * 4096), 4096)
    assert struct.unpack_from("<4sIQQ16s", page) == (
        magic, page_checksum(page), number, owner, UUID,
    )  # fmt: skip
    return page


def bits(page: bytes, offset: int, count: int) -> list[int]:
    """The bits that are set of a bitmap in a page; there is none beyond ``count``."""
    value = int.from_bytes(page[offset : offset + 1344], "little")
    assert value >> count == 0
    return [bit for bit in range(count) if value >> bit & 1]


# ------------------------------------------------------------------------------ the layout


@pytest.mark.parametrize(
    ("size", "blocks", "maps", "first_map", "static"),
    [
        (8 * MIB, 4, 1, 2, 2),
        (10 * MIB - 4096, 4, 1, 2, 2),
        (10 * MIB, 5, 1, 2, 2),
        (IN_A_MAP * BLOCK, IN_A_MAP, 1, 2, 2),
        ((IN_A_MAP + 1) * BLOCK, IN_A_MAP + 1, 2, 2, 2),
        (IN_BLOCK_0 * IN_A_MAP * BLOCK, IN_BLOCK_0 * IN_A_MAP, 510, 2, 2),
        ((IN_BLOCK_0 * IN_A_MAP + 1) * BLOCK, IN_BLOCK_0 * IN_A_MAP + 1, 511, 1024, 3),
        ((512 * IN_A_MAP + 1) * BLOCK, 512 * IN_A_MAP + 1, 513, 1024, 4),
    ],
)
def test_figures_by_size(size: int, blocks: int, maps: int, first_map: int, static: int) -> None:
    """Sections 1, 3 and 5: ranges and block maps, which may take blocks of their own."""
    with MemoryFile(size) as memory, memory.open() as region:
        formatted(region)
        page = page_of(region, 0, b"PKSB")
        assert struct.unpack_from("<Q", page, 112) == (blocks * BLOCK,)
        assert struct.unpack_from("<QQQQQI", page, 512) == (
            0, blocks, 2**64 - 1, first_map, maps, 2**32 - 1,
        )  # fmt: skip
        for index in range(maps):
            page = page_of(region, first_map + index, b"PKBM")
            first, count = struct.unpack_from("<QQ", page, 40)
            assert (first, count) == (index * 10752, min(10752, blocks - index * 10752))
            if index in (0, maps - 1):
                used = list(range(static + 1)) if index == 0 else []
                assert bits(page, 64, count) == used
                assert bits(page, 1408, count) == used[-1:]
                assert len(bits(page, 2752, count)) == count - len(used)  # a sparse file
        page_of(region, static * 512, b"PKPM")
        page_of(region, static * 512 + 1, b"PKTR")


def test_superblocks_are_the_same_but_for_their_place(region: Region) -> None:
    formatted(region, "here")
    first, backup = page_of(region, 0, b"PKSB"), page_of(region, 512, b"PKSB")
    assert first[16:] == backup[16:]
    assert first[64:72] == b"pkernfs\0"
    assert struct.unpack_from("<HHIII", first, 72) == (1, 0, 4096, 2097152, 1)
    assert struct.unpack_from("<7Q", first, 88) == (0, 0, 0, SIZE, NOW, 513, 511)
    assert first[160:224] == b"here" + bytes(60)
    assert first[224:512] == bytes(288)


def test_the_state_page(region: Region) -> None:
    formatted(region)
    page = page_of(region, 1, b"PKST")
    tree, pages, free_head, used = 1025, 1, 1, 2
    assert struct.unpack_from("<IIQQQ16sQQQQQQ", page, 64) == (
        1, 0, 0, 0, 0, bytes(16), tree, pages, free_head, used, 0, 0,
    )  # fmt: skip
    assert not any(page[160:])


def test_the_journal_has_no_record(region: Region) -> None:
    region.copy_in(RegionOff(513 * 4096), b"x" * 4096)
    formatted(region)
    assert region.is_zero(RegionOff(513 * 4096), 4096)


def test_the_first_carved_block(region: Region) -> None:
    """Sections 5 to 7: a page map, the inode table's tree, its first page, the root's names."""
    formatted(region)
    page = page_of(region, 1024, b"PKPM")
    assert struct.unpack_from("<I", page, 40) == (1,)
    assert page[64:128] == b"\x0f" + bytes(63)
    page = page_of(region, 1025, b"PKTR")
    assert struct.unpack_from("<BBHHH", page, 40) == (1, 0, 1, 4096, 0)
    assert struct.unpack_from("<QQQ", page, 64) == (0, 1026, 1)
    page = page_of(region, 1027, b"PKTR", owner=1)
    assert struct.unpack_from("<BBHHH", page, 40) == (2, 0, 1, 4096 - 14, 0)
    key, at, length, zero = struct.unpack_from("<QHHI", page, 64)
    assert (at, length, zero) == (4096 - 14, 14, 0)
    assert page[at:] == struct.pack("<QB", 2, 4) + b"iommu"
    hash_key = region.read(RegionOff(144), 16)
    digest = hashlib.blake2b(b"iommu", key=hash_key, digest_size=8).digest()
    assert key == int.from_bytes(digest, "little") % (1 << 52) << 11


def test_the_first_inodes(region: Region) -> None:
    """Section 6: / and /iommu."""
    formatted(region)
    page = page_of(region, 1026, b"PKIN")
    assert struct.unpack_from("<QQHHHHI", page, 40) == (0, 0, 0b110, 0, 1, 0, 1)
    inode = struct.Struct("<QIIIIIIQqqqqIIQQQQQQ")
    flags, body = 1, 1027
    times = (NOW,) * 4
    assert inode.unpack_from(page, 256) == (
        1, 0, 0o40755, 0, 0, 3, flags, 1, *times, 0, 0, 0, 0, 0, 0, 1, body,
    )  # fmt: skip
    assert inode.unpack_from(page, 512) == (
        2, 0, 0o40755, 0, 0, 2, 0, 0, *times, 0, 0, 0, 0, 0, 0, 1, 0,
    )  # fmt: skip
    assert not any(page[256 + 128 : 512])
    assert not any(page[512 + 128 :])


def test_nothing_else_is_written(region: Region) -> None:
    region.copy_in(RegionOff(0), b"\xdb" * SIZE)
    formatted(region)
    written = {0, 1, 2, 512, 513, 1024, 1025, 1026, 1027}
    for number in range(SIZE // 4096):
        page = region.read(RegionOff(number * 4096), 4096)
        assert (page != b"\xdb" * 4096) == (number in written)
    assert_clean(region)


@pytest.mark.parametrize("stored_at", [3, 5, 7])
def test_blocks_that_are_known_to_be_zero(stored_at: int) -> None:
    with MemoryFile(SIZE) as memory, memory.open() as sparse:
        sparse.copy_in(RegionOff(stored_at * BLOCK + 5000), b"x")
        formatted(sparse)
        page = page_of(sparse, 2, b"PKBM")
        assert bits(page, 2752, 8) == [block for block in range(3, 8) if block != stored_at]
        assert_clean(sparse)
    with Region.anonymous(SIZE) as unknown:
        formatted(unknown)
        assert bits(page_of(unknown, 2, b"PKBM"), 2752, 8) == []


def test_where_the_region_is() -> None:
    with Region.anonymous(SIZE, phys_base=PhysAddr(1 << 40)) as region:
        region._backing.node = 3
        formatted(region)
        page = page_of(region, 0, b"PKSB")
        assert struct.unpack_from("<QQQQQI", page, 512) == (0, 8, 1 << 40, 2, 1, 3)


def dax(*pieces: tuple[int, int]) -> Device:
    spans = tuple(Span(PhysAddr(start), size) for start, size in pieces)
    return Device("dax0.1", SIZE, BLOCK, spans, None, None, "")


def test_the_device_that_it_is_in(region: Region) -> None:
    region._backing.dax = dax((1 << 32, 2 * BLOCK), (1 << 33, 6 * BLOCK))
    formatted(region)
    for number in (0, 512):
        page = page_of(region, number, b"PKSB")
        assert struct.unpack_from("<HHI24s", page, 224) == (1, 2, BLOCK, b"dax0.1".ljust(24, b"\0"))
        assert struct.unpack_from("<4Q", page, 256) == (1 << 32, 2 * BLOCK, 1 << 33, 6 * BLOCK)
        assert PLACEMENT_OFFSET == 224


def test_two_of_them_are_two(region: Region) -> None:
    make_filesystem(region)
    first = superblock.load(region)
    make_filesystem(region)
    second = superblock.load(region)
    assert first.uuid != second.uuid
    assert first.fields.hash_key != second.fields.hash_key


labels = st.text(max_size=70).map(lambda label: label.replace("\0", ""))


@pytest.mark.slow("formats a region for each example")
@given(label=labels)
def test_labels(label: str) -> None:
    with Region.anonymous(8 * MIB) as region:
        if len(label.encode()) <= 64:
            formatted(region, label)
            assert superblock.load(region).label == label
        else:
            with pytest.raises(UsageError, match=r"label too long: got \d+ bytes, expected at m"):
                formatted(region, label)


def test_an_older_file_system_is_gone(region: Region) -> None:
    make_filesystem(region, label="old")
    fs = mount_filesystem(region)
    for number in range(40):
        make(fs, b"%d" % number, b"old" * 3000)
    fs.unmount()
    make_filesystem(region, label="new")
    assert_clean(region)
    fs = mount_filesystem(region)
    assert [name for name, *_ in fs.readdir(ROOT_INO, 0)] == [b"iommu"]
    for number in range(40):
        make(fs, b"%d" % number, b"new" * 3000)
    fs.unmount()
    assert_clean(region)


# ------------------------------------------------------------------------------ cut short


def apply(image: Region, store: Store) -> None:
    offset, length, data = store
    if data is None:
        image.zero(offset, length)
    else:
        image.copy_in(offset, data)


def label_in(region: Region) -> str | None:
    """The label of the file system that a mount would find; None: it finds none."""
    try:
        return superblock.load(region).label
    except (FormatError, CorruptionError):
        return None


def test_cut_short_it_is_the_old_one_or_none(region: Region) -> None:
    """Both signatures go first, and the superblock comes last."""
    make_filesystem(region, label="old")
    with Region.anonymous(SIZE) as image:
        image.copy_in(RegionOff(0), region.read(RegionOff(0), SIZE))
        before = image.read(RegionOff(BLOCK + PAGE), SIZE - BLOCK - PAGE)
        trace_start()
        try:
            make_filesystem(region, label="new")
        finally:
            stores = trace_stop()
        found = [label_in(image)]
        for store in stores:
            if found[-1] == "old":
                assert image.read(RegionOff(BLOCK + PAGE), SIZE - BLOCK - PAGE) == before
            apply(image, store)
            found.append(label_in(image))
            if found[-1] == "new":
                report = fsck.check(image, repair=False)
                assert set(report.counts) <= {fsck.Code.SUPERBLOCK_DAMAGED}  # page 0 is to come
        assert image.read(RegionOff(0), SIZE) == region.read(RegionOff(0), SIZE)
    count = len(stores)
    assert count > 8
    assert found == ["old"] * 2 + [None] * (count - 3) + ["new"] * 2


# ------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("size", "label", "error", "message"),
    [
        (8 * MIB - 4096, "", RegionError, "region too small: got 8384512 bytes, expected at least"),
        (4096, "", RegionError, "anonymous: region too small: got 4096 bytes, expected at least 8"),
        (SIZE, "x" * 65, UsageError, "label too long: got 65 bytes, expected at most 64"),
        (SIZE, "\u00e9" * 33, UsageError, "label too long: got 66 bytes, expected at most 64"),
    ],
    ids=["a page less", "one page", "65 characters", "66 bytes"],
)
def test_what_is_refused(size: int, label: str, error: type[PkernfsError], message: str) -> None:
    with Region.anonymous(size) as region:
        region.copy_in(RegionOff(0), b"\xdb" * size)
        with pytest.raises(error, match=message):
            make_filesystem(region, label=label)
        assert region.read(RegionOff(0), size) == b"\xdb" * size


def test_a_region_that_is_not_writable() -> None:
    with MemoryFile(SIZE) as memory:
        with (
            memory.open(write=False) as region,
            pytest.raises(RegionError, match="read-only region"),
        ):
            make_filesystem(region)
        with memory.open() as region:
            assert region.is_zero(RegionOff(0), SIZE)


def test_a_device_of_too_many_ranges(region: Region) -> None:
    make_filesystem(region, label="kept")
    region._backing.dax = dax(*[(n << 32, BLOCK) for n in range(MAX_PIECES + 1)])
    with pytest.raises(
        RegionError, match=r"^/dev/dax0\.1: too many ranges: got 17, expected up to"
    ):
        make_filesystem(region)
    assert superblock.load(region).label == "kept"
    region._backing.dax = dax(*[(n << 32, BLOCK) for n in range(MAX_PIECES)])
    make_filesystem(region)


# ------------------------------------------------------------------------------ the look before


SIGNATURES = [
    (1024 + 56, b"\x53\xef", "ext2/3/4"),
    (0, b"XFSB", "xfs"),
    (64 << 10 | 64, b"_BHRfS_M", "btrfs"),
    (0, b"hsqs", "squashfs"),
    (32769, b"CD001", "iso9660"),
    (0, b"LUKS\xba\xbe", "LUKS"),
    (512 + 24, b"LVM2 001", "LVM"),
    (510, b"\x55\xaa", "a partition table or FAT"),
    (1024 + 2, b"\x10\x20\xf5\xf2", "f2fs"),
    (0, b"QFI\xfb", "qcow2"),
    (0, b"\x7fELF", "an ELF file"),
]


@pytest.mark.parametrize(
    ("at", "data", "name"), SIGNATURES, ids=[name for _, _, name in SIGNATURES]
)
@pytest.mark.parametrize("around", [b"\0", b"\x11"], ids=["zeros", "data"])
def test_other_file_systems_by_name(
    region: Region, at: RegionOff, data: bytes, name: str, around: bytes
) -> None:
    region.copy_in(RegionOff(0), around * MIB)
    region.copy_in(at, data)
    before = region.read(RegionOff(0), SIZE)
    assert probe(region) == Probe(Content.FOREIGN, name)
    assert region.read(RegionOff(0), SIZE) == before
    region.copy_in(at, bytes(1))
    assert probe(region).content is not Content.FOREIGN


@pytest.mark.parametrize("at", [0, 5000, MIB - 1, BLOCK, BLOCK + PAGE - 1])
def test_data_of_an_unknown_kind(region: Region, at: RegionOff) -> None:
    """In the first MiB, or where the backup would be."""
    region.copy_in(at, b"x")
    assert probe(region) == Probe(Content.DATA, "data of an unknown kind")


@pytest.mark.parametrize("at", [MIB, BLOCK - 1, BLOCK + PAGE, SIZE - 1])
def test_what_is_elsewhere_is_not_looked_at(region: Region, at: RegionOff) -> None:
    region.copy_in(at, b"x")
    assert probe(region) == Probe(Content.EMPTY, "nothing")


def test_a_file_without_memory_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading would give it some."""
    with MemoryFile(SIZE) as memory, memory.open() as sparse:
        monkeypatch.setattr(Region, "read", lambda *_: pytest.fail("read"))
        monkeypatch.setattr(Region, "view", lambda *_: pytest.fail("read"))
        assert probe(sparse) == Probe(Content.EMPTY, "nothing")


@pytest.mark.parametrize("size", [PAGE, 2 * PAGE, MIB, BLOCK, BLOCK + PAGE])
def test_regions_that_are_too_small_to_hold_one(size: int) -> None:
    with Region.anonymous(size) as small:
        assert probe(small).content is Content.EMPTY
        small.copy_in(RegionOff(size - 1), b"x")
        assert probe(small).content is (Content.DATA if size <= MIB else Content.EMPTY)


def test_a_pkernfs(region: Region) -> None:
    make_filesystem(region)
    assert probe(region) == Probe(Content.PKERNFS, "a pkernfs")
    make_filesystem(region, label="it's")
    assert probe(region) == Probe(Content.PKERNFS, 'a pkernfs (label "it\'s")')


def erase(region: Region, number: PageNo) -> None:
    region.zero(page_offset(number), PAGE)


def flip(region: Region, number: PageNo) -> None:
    at = RegionOff(number * PAGE + 200)
    region.copy_in(at, bytes([region.read(at, 1)[0] ^ 1]))


@pytest.mark.parametrize("harm", [erase, flip])
@pytest.mark.parametrize("number", [SUPERBLOCK_PAGE, BACKUP_PAGE])
def test_a_pkernfs_of_one_copy(
    region: Region, harm: Callable[[Region, PageNo], None], number: PageNo
) -> None:
    make_filesystem(region, label="here")
    harm(region, number)
    assert probe(region) == Probe(Content.PKERNFS, "a pkernfs (label 'here')")


@pytest.mark.parametrize(("first", "second"), [(flip, flip), (erase, flip), (flip, erase)])
def test_a_damaged_pkernfs(
    region: Region,
    first: Callable[[Region, PageNo], None],
    second: Callable[[Region, PageNo], None],
) -> None:
    make_filesystem(region, label="here")
    first(region, SUPERBLOCK_PAGE)
    second(region, BACKUP_PAGE)
    assert probe(region) == Probe(Content.DAMAGED, "a damaged or newer pkernfs")


def test_a_pkernfs_without_any_superblock(region: Region) -> None:
    """Its state page and maps are data that nobody knows."""
    make_filesystem(region)
    erase(region, SUPERBLOCK_PAGE)
    erase(region, BACKUP_PAGE)
    assert probe(region).content is Content.DATA
