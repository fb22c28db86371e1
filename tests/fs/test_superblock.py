"""The superblock: each field that is refused, the backup, and what `pkernfs info` tells of it."""

from __future__ import annotations

import logging
import struct
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pkernfs import layout
from pkernfs.dma.mount import mount_filesystem
from pkernfs.errors import CorruptionError, FormatError, PkernfsError
from pkernfs.fs import superblock
from pkernfs.fs.mkfs import make_filesystem
from pkernfs.fs.superblock import Superblock, check_features, describe, is_trace, load, parse
from pkernfs.layout import (
    BACKUP_PAGE,
    BLOCK,
    FEATURE_SEGMENTS,
    HEADER,
    MAGIC_STATE,
    NO_NODE,
    NO_PHYSICAL,
    PAGE,
    STATE_OFFSET,
    STATE_PAGE,
    SUPERBLOCK_PAGE,
    RangeFields,
    SuperblockFields,
    page_offset,
)
from pkernfs.quantities import BlockNo, PageNo, PhysAddr, RegionOff
from pkernfs.region.checksum import page_checksum
from pkernfs.region.region import Region

MIB = 1 << 20
SIZE = 16 * MIB
BLOCKS = SIZE // BLOCK
UUID = bytes(range(16))
FIELDS = SuperblockFields(
    signature=b"pkernfs\0",
    version_major=1,
    version_minor=0,
    page_size=4096,
    block_size=2097152,
    range_count=1,
    feature_compat=0,
    feature_ro_compat=0,
    feature_incompat=0,
    region_bytes=SIZE,
    created=10**18,
    journal_page=PageNo(513),
    journal_pages=511,
    hash_key=b"k" * 16,
    label=b"here",
)
RANGE = RangeFields(
    first_block=BlockNo(0),
    blocks=BLOCKS,
    phys_base=NO_PHYSICAL,
    map_page=PageNo(2),
    map_pages=1,
    node=NO_NODE,
)


def encoded(
    number: int = 0,
    ranges: tuple[RangeFields, ...] = (RANGE,),
    uuid: bytes = UUID,
    pool: layout.PoolFields = layout.NO_POOL,
    **fields: Any,
) -> bytes:
    """The image of a superblock with some other fields; its checksum is good."""
    return superblock.encode(
        uuid, FIELDS._replace(**fields), list(ranges), PageNo(number), pool=pool
    )


def sealed(page: bytes, at: int, data: bytes) -> bytes:
    """A page with some other bytes, and the checksum that goes with them."""
    image = bytearray(page)
    image[at : at + len(data)] = data
    image[4:8] = page_checksum(image).to_bytes(4, "little")
    return bytes(image)


NONE = bytes(PAGE)
DAMAGED = encoded()[:-1] + b"x"
NEWER = encoded(version_major=2)
NEWER_BACKUP = encoded(BACKUP_PAGE, version_major=2)


def state_page_of(state: int) -> bytes:
    """A state page whose checksum is good, with a state that may not exist."""
    page = bytearray(PAGE)
    HEADER.pack_into(page, 0, MAGIC_STATE, 0, STATE_PAGE, 0, UUID)
    return sealed(bytes(page), STATE_OFFSET, state.to_bytes(4, "little"))


@pytest.fixture
def region() -> Iterator[Region]:
    with Region.anonymous(SIZE) as made:
        yield made


@pytest.fixture
def formatted(region: Region) -> Region:
    make_filesystem(region, label="here", uuid=UUID, clock=lambda: 10**18)
    return region


# ------------------------------------------------------------------------------ one copy


texts = st.binary(max_size=64).map(lambda label: label.rstrip(b"\0"))
words = st.integers(0, (1 << 64) - 1)


@given(
    uuid=st.binary(min_size=16, max_size=16),
    hash_key=st.binary(min_size=16, max_size=16),
    label=texts,
    minor=st.integers(0, 0xFFFF),
    compat=words,
    ro_compat=words,
    incompat=words.map(lambda word: word & ~FEATURE_SEGMENTS),  # with it, there is a pool
    created=words,
    blocks=st.integers(4, 1 << 40),
    physical=words,
    node=st.integers(0, NO_NODE),
    number=st.sampled_from([SUPERBLOCK_PAGE, BACKUP_PAGE]),
)
def test_what_is_encoded_is_parsed(
    uuid: bytes, hash_key: bytes, label: bytes, minor: int, compat: int, ro_compat: int,
    incompat: int, created: int, blocks: int, physical: PhysAddr, node: int, number: PageNo,
) -> None:  # fmt: skip
    ranges = (RANGE._replace(blocks=blocks, phys_base=physical, node=node),)
    page = encoded(
        number, ranges, uuid,
        hash_key=hash_key, label=label, version_minor=minor, feature_compat=compat,
        feature_ro_compat=ro_compat, feature_incompat=incompat, created=created,
        region_bytes=blocks * BLOCK,
    )  # fmt: skip
    found = parse(page, number)
    assert len(page) == PAGE
    assert (found.uuid, found.ranges, found.from_backup) == (uuid, ranges, False)
    assert found.total_blocks == blocks
    assert found.label == label.decode("utf-8", "replace")
    assert found.fields.label == label.ljust(64, b"\0")
    assert (found.fields.hash_key, found.fields.created) == (hash_key, created)
    assert found.fields.version_minor == minor
    assert found.fields[6:9] == (compat, ro_compat, incompat)


def test_a_page_as_the_format_has_it() -> None:
    """Typed out by docs/format.md, sections 2 and 3."""
    page = superblock.encode(UUID, FIELDS, [RANGE], BACKUP_PAGE, b"placement")
    magic, checksum, itself, owner, uuid = struct.unpack_from("<IIQQ16s", page)
    assert (magic, itself, owner, uuid) == (0x42534B50, 512, 0, UUID)
    assert checksum == page_checksum(page)
    assert page[64:72] == b"pkernfs\0"
    assert struct.unpack_from("<HHIII", page, 72) == (1, 0, 4096, 2097152, 1)
    assert struct.unpack_from("<7Q", page, 88) == (0, 0, 0, SIZE, 10**18, 513, 511)
    assert page[144:160] == b"k" * 16
    assert page[160:224] == b"here" + bytes(60)
    assert page[224:512] == b"placement" + bytes(279)
    assert struct.unpack_from("<QQQQQI", page, 512) == (0, BLOCKS, 2**64 - 1, 2, 1, 2**32 - 1)
    assert not any(page[512 + 44 :])


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"version_major": 0}, FormatError, "format version 0: this program knows 1"),
        ({"version_major": 2}, FormatError, "format version 2: this program knows 1"),
        ({"page_size": 8192}, FormatError, "page or block size: got 8192, 2097152"),
        ({"block_size": 1 << 30}, FormatError, "page or block size: got 4096, 1073741824"),
        ({"range_count": 0}, CorruptionError, "bad range count: got 0"),
        ({"range_count": 51}, CorruptionError, "bad range count: got 51"),
        ({"range_count": 2}, CorruptionError, r"bad range 1: got 0\+0"),
        ({"region_bytes": SIZE - 1}, CorruptionError, f"bad size: got {SIZE - 1}"),
        ({"region_bytes": SIZE + BLOCK}, CorruptionError, f"bad size: got {SIZE + BLOCK}"),
        ({"region_bytes": 0}, CorruptionError, "bad size: got 0"),
        ({"journal_page": 512}, CorruptionError, "bad journal: got 512"),
        ({"journal_page": 1 << 60}, CorruptionError, "bad journal: got"),
        ({"journal_pages": 510}, CorruptionError, "bad journal: got 513"),
    ],
)
@pytest.mark.parametrize("number", [SUPERBLOCK_PAGE, BACKUP_PAGE])
def test_fields_that_are_refused(
    fields: dict[str, Any], error: type[PkernfsError], message: str, number: PageNo
) -> None:
    with pytest.raises(error, match=f"^superblock at {number * PAGE:#x}: {message}"):
        parse(encoded(number, **fields), number)


@pytest.mark.parametrize(
    "changes",
    [
        {"first_block": 1},
        {"blocks": 0},
        {"map_page": BLOCKS * 512},
        {"map_pages": BLOCKS * 512},
        {"map_page": 1 << 63, "map_pages": 1 << 63},
    ],
)
def test_ranges_that_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(CorruptionError, match="superblock at 0x0: bad range 0: got "):
        parse(encoded(ranges=(RANGE._replace(**changes),)), SUPERBLOCK_PAGE)


def test_ranges_have_no_gap_and_do_not_overlap() -> None:
    first = RANGE._replace(blocks=4)
    for start in (0, 3, 5):
        ranges = (first, RANGE._replace(first_block=BlockNo(start), blocks=4))
        with pytest.raises(CorruptionError, match=rf"bad range 1: got {start}\+4"):
            parse(encoded(ranges=ranges, range_count=2), SUPERBLOCK_PAGE)


@pytest.mark.parametrize("page", [4 * 512, 6 * 512, 8 * 512 - 1])
def test_the_map_of_a_second_range_is_in_its_own_blocks(page: int) -> None:
    """Its page is counted from the begin of the region, as every page is."""
    second = RANGE._replace(first_block=BlockNo(4), blocks=4, map_page=PageNo(page))
    ranges = (RANGE._replace(blocks=4), second)
    found = parse(encoded(ranges=ranges, range_count=2), SUPERBLOCK_PAGE)
    assert (found.ranges, found.total_blocks) == (ranges, 8)


@pytest.mark.parametrize(("page", "count"), [(2, 1), (4 * 512 - 1, 1), (8 * 512 - 1, 2)])
def test_a_map_outside_of_its_range_is_refused(page: int, count: int) -> None:
    second = RANGE._replace(
        first_block=BlockNo(4), blocks=4, map_page=PageNo(page), map_pages=count
    )
    with pytest.raises(CorruptionError, match=rf"bad range 1: got its map at page {page}\+{count}"):
        parse(encoded(ranges=(RANGE._replace(blocks=4), second), range_count=2), SUPERBLOCK_PAGE)


def test_the_smallest_region() -> None:
    for blocks in (4, 3):
        page = encoded(ranges=(RANGE._replace(blocks=blocks),), region_bytes=blocks * BLOCK)
        if blocks == 4:
            assert parse(page, SUPERBLOCK_PAGE).total_blocks == 4
        else:
            with pytest.raises(CorruptionError, match="bad size: got 6291456"):
                parse(page, SUPERBLOCK_PAGE)


@pytest.mark.parametrize(
    ("at", "data"), [(0, b"PKST"), (64, b"pkernfs!"), (8, (512).to_bytes(8, "little"))]
)
def test_another_page_is_no_superblock(at: int, data: bytes) -> None:
    """Of another kind, without its signature, or one that belongs elsewhere."""
    with pytest.raises(CorruptionError, match="superblock at 0x0: bad signature"):
        parse(sealed(encoded(), at, data), SUPERBLOCK_PAGE)


def test_no_trace_of_a_pkernfs() -> None:
    for page in (bytes(PAGE), b"\xff" * PAGE, encoded()[1:] + b"\0"):
        assert not is_trace(page)
        with pytest.raises(FormatError, match="superblock at 0x200000: not a pkernfs"):
            parse(page, BACKUP_PAGE)
    page = encoded()
    assert is_trace(page)
    assert is_trace(memoryview(page))
    assert is_trace(page[:4] + bytes(PAGE - 4))
    assert is_trace(bytes(64) + page[64:72] + bytes(PAGE - 72))


@given(bit=st.integers(0, PAGE * 8 - 1))
def test_a_flipped_bit_is_damage(bit: int) -> None:
    page = bytearray(encoded())
    page[bit >> 3] ^= 1 << (bit & 7)
    with pytest.raises(CorruptionError, match=r"bad checksum: got 0x.*, expected 0x"):
        parse(bytes(page), SUPERBLOCK_PAGE)


# ------------------------------------------------------------------------------ two copies


def put(region: Region, number: PageNo, page: bytes) -> None:
    region.copy_in(page_offset(number), page)


def test_the_first_copy_is_taken(formatted: Region, caplog: pytest.LogCaptureFixture) -> None:
    put(formatted, BACKUP_PAGE, encoded(BACKUP_PAGE, label=b"other"))
    found = load(formatted)
    assert (found.label, found.uuid, found.from_backup) == ("here", UUID, False)
    assert not caplog.records


@pytest.mark.parametrize("first", [NONE, DAMAGED, sealed(DAMAGED, 8, b"\1")])
def test_the_backup_is_taken_instead(
    first: bytes, formatted: Region, caplog: pytest.LogCaptureFixture
) -> None:
    put(formatted, SUPERBLOCK_PAGE, first)
    with caplog.at_level(logging.WARNING, logger="pkernfs"):
        found = load(formatted)
    assert (found.label, found.uuid, found.from_backup) == ("here", UUID, True)
    [record] = caplog.records
    assert record.getMessage().startswith("superblock at 0x0: ")
    assert record.getMessage().endswith("; the backup at 0x200000 is used: run fsck.pkernfs -y")


@pytest.mark.parametrize(
    ("first", "backup", "error", "messages"),
    [
        (NONE, NONE, FormatError, ["at 0x0: not a pkernfs"]),
        (NEWER, NONE, FormatError, ["at 0x0: format version 2"]),
        (NEWER, NEWER_BACKUP, FormatError, ["at 0x0: format version 2"]),
        (DAMAGED, NONE, CorruptionError, ["at 0x0: bad checksum"]),
        (NONE, DAMAGED, CorruptionError, ["at 0x200000: bad checksum"]),
        (DAMAGED, DAMAGED, CorruptionError, ["at 0x0: bad checksum", "at 0x200000: bad checksum"]),
    ],
)
def test_neither_copy_is_good(
    first: bytes, backup: bytes, error: type[PkernfsError], messages: list[str], region: Region
) -> None:
    put(region, SUPERBLOCK_PAGE, first)
    put(region, BACKUP_PAGE, backup)
    with pytest.raises(error) as caught:
        load(region)
    assert all(message in str(caught.value) for message in messages)
    assert str(caught.value).count("superblock at") == len(messages)


@pytest.mark.parametrize("change", [{"version_major": 2}, {"page_size": 1 << 14}])
def test_an_intact_copy_of_another_format_is_final(
    change: dict[str, Any], formatted: Region
) -> None:
    """The backup, which is of this format, is an older state: nobody may write by it."""
    put(formatted, SUPERBLOCK_PAGE, encoded(**change))
    with pytest.raises(FormatError, match=r"superblock at 0x0: (format version 2|page or block)"):
        load(formatted)
    assert parse(formatted.read(page_offset(BACKUP_PAGE), PAGE), BACKUP_PAGE)


def test_a_region_that_has_no_room_for_a_backup() -> None:
    for size in (PAGE, BLOCK):
        with Region.anonymous(size) as small:
            with pytest.raises(FormatError, match="superblock at 0x0: not a pkernfs"):
                load(small)
            put(small, SUPERBLOCK_PAGE, DAMAGED)
            with pytest.raises(CorruptionError, match="superblock at 0x0: bad checksum"):
                load(small)


@pytest.mark.parametrize("by", [PAGE, BLOCK, SIZE - 2 * BLOCK])
def test_a_region_that_is_shorter_than_it_was(formatted: Region, by: int) -> None:
    with Region.anonymous(SIZE - by) as shorter:
        shorter.copy_in(RegionOff(0), formatted.read(RegionOff(0), SIZE - by))
        message = f"anonymous: region is truncated: got {SIZE - by} bytes, expected {SIZE}"
        with pytest.raises(CorruptionError, match=message):
            load(shorter)


# ------------------------------------------------------------------------------ features


def with_features(compat: int = 0, ro_compat: int = 0, incompat: int = 0) -> Superblock:
    page = encoded(feature_compat=compat, feature_ro_compat=ro_compat, feature_incompat=incompat)
    return parse(page, SUPERBLOCK_PAGE)


def test_features_that_nobody_knows() -> None:
    assert check_features(with_features())
    assert check_features(with_features(compat=(1 << 64) - 1))
    for bit in (1, 31, 63):
        assert not check_features(with_features(ro_compat=1 << bit))
        message = f"superblock: unknown incompat features: got {1 << bit:#x}"
        with pytest.raises(FormatError, match=message):
            check_features(with_features(incompat=1 << bit, ro_compat=1))


@pytest.mark.parametrize("kind", [layout.POOL_DIRECTORY, layout.POOL_DAX])
@pytest.mark.parametrize("granule", [BLOCK, 1 << 30])
def test_the_pool_is_parsed(kind: int, granule: int) -> None:
    pool = layout.PoolFields(kind, granule)
    page = encoded(SUPERBLOCK_PAGE, pool=pool, feature_incompat=FEATURE_SEGMENTS)
    found = parse(page, SUPERBLOCK_PAGE)
    assert found.pool == pool
    assert check_features(found)
    # Without the feature nothing is read there.
    assert parse(encoded(SUPERBLOCK_PAGE, pool=pool), SUPERBLOCK_PAGE).pool == layout.NO_POOL


@pytest.mark.parametrize(
    "pool", [(0, BLOCK), (3, BLOCK), (1, 0), (1, BLOCK // 2), (2, BLOCK + 4096), (1, 3 * BLOCK)]
)
def test_a_bad_pool_is_damage(pool: tuple[int, int]) -> None:
    fields = layout.PoolFields(*pool)
    page = encoded(SUPERBLOCK_PAGE, pool=fields, feature_incompat=FEATURE_SEGMENTS)
    with pytest.raises(CorruptionError, match="bad pool"):
        parse(page, SUPERBLOCK_PAGE)


# ------------------------------------------------------------------------------ described


def test_what_is_told_of_a_new_file_system(formatted: Region) -> None:
    assert describe(formatted) == {
        "label": "here",
        "uuid": "00010203-0405-0607-0809-0a0b0c0d0e0f",
        "version": "1.0",
        "region_bytes": SIZE,
        "page_bytes": 4096,
        "block_bytes": 2097152,
        "created_ns": 10**18,
        "features": {"compat": 0, "ro_compat": 0, "incompat": 0},
        "superblock": "primary",
        "ranges": [
            {"offset": 0, "length": SIZE, "physical": None, "physical_at_mkfs": None, "node": None}
        ],
        "state": "clean",
        "errors": False,
        "mounts": 0,
        "mounted_ns": 0,
        "unmounted_ns": 0,
        "boot_id": "00000000-0000-0000-0000-000000000000",
        "arrival": None,
        "handover": None,
        "history": [],
    }


def test_what_is_told_while_it_is_mounted(formatted: Region) -> None:
    fs = mount_filesystem(formatted, clock=lambda: 5)
    facts = describe(formatted)
    assert (facts["state"], facts["mounts"], facts["mounted_ns"]) == ("mounted", 1, 5)
    assert (facts["arrival"], facts["errors"]) == ("first boot", False)
    fs.fail("a test")
    assert describe(formatted)["errors"] is True


def test_where_it_was_and_where_it_is() -> None:
    with Region.anonymous(SIZE, phys_base=PhysAddr(1 << 40)) as region:
        make_filesystem(region)
        [found] = describe(region)["ranges"]
        assert (found["physical"], found["physical_at_mkfs"]) == (1 << 40, 1 << 40)
        with Region.anonymous(SIZE, phys_base=PhysAddr(1 << 41)) as moved:
            moved.copy_in(RegionOff(0), region.read(RegionOff(0), SIZE))
            [found] = describe(moved)["ranges"]
            assert (found["physical"], found["physical_at_mkfs"]) == (1 << 41, 1 << 40)


def test_ranges_are_told_one_by_one(formatted: Region) -> None:
    ranges = (
        RANGE._replace(blocks=3, node=1),
        RANGE._replace(
            first_block=BlockNo(3), blocks=5, phys_base=PhysAddr(0), map_page=PageNo(5 * 512)
        ),
    )
    put(formatted, SUPERBLOCK_PAGE, encoded(ranges=ranges, range_count=2, feature_compat=8))
    facts = describe(formatted)
    assert facts["features"]["compat"] == 8
    assert [(r["offset"], r["length"], r["node"]) for r in facts["ranges"]] == [
        (0, 3 * BLOCK, 1),
        (3 * BLOCK, 5 * BLOCK, None),
    ]
    assert [r["physical_at_mkfs"] for r in facts["ranges"]] == [None, 0]


def test_what_is_told_of_a_damaged_one(formatted: Region) -> None:
    put(formatted, SUPERBLOCK_PAGE, DAMAGED)
    assert describe(formatted)["superblock"] == "backup"
    put(formatted, BACKUP_PAGE, DAMAGED)
    with pytest.raises(CorruptionError):
        describe(formatted)
    put(formatted, SUPERBLOCK_PAGE, NEWER)
    put(formatted, BACKUP_PAGE, NEWER_BACKUP)
    with pytest.raises(FormatError):
        describe(formatted)


@pytest.mark.parametrize(
    "page", [bytes(PAGE), encoded(STATE_PAGE), b"\xff" * PAGE, state_page_of(9)]
)
def test_what_is_told_of_a_damaged_state_page(formatted: Region, page: bytes) -> None:
    put(formatted, STATE_PAGE, page)
    facts = describe(formatted)
    assert (facts["label"], facts["state"]) == ("here", "damaged")
    assert "mounts" not in facts


def test_a_label_that_is_no_text() -> None:
    found = parse(encoded(label=b"a\xffb"), SUPERBLOCK_PAGE)
    assert found.label == "a\ufffdb"
