"""Pass 1: superblocks, the journal, the state page, block maps; and regions that are refused."""

from __future__ import annotations

import pytest

from pkernfs import layout
from pkernfs.errors import FormatError
from pkernfs.fs.fsck import Code, check
from pkernfs.layout import (
    BACKUP_PAGE,
    BLOCK,
    FIRST_MAP_PAGE,
    HEADER,
    JOURNAL_PAGE,
    PAGE,
    POOL_DAX,
    POOL_DIRECTORY,
    POOL_NONE,
    RECORD,
    RUN,
    STATE_FLAG_ERROR,
    STATE_MOUNTED,
    STATE_PAGE,
    SUPERBLOCK_PAGE,
    page_offset,
)
from pkernfs.quantities import BlockNo, RegionOff
from pkernfs.region.checksum import crc32c
from pkernfs.region.region import Region
from support.damage import REGION_BYTES, Damage
from support.fsck_cases import Case, Cases
from support.repairs import Pristine, repair_and_check, tree_of
from support.segments import set_pool

case = Cases()


@case(Code.SUPERBLOCK_DAMAGED, lossless=True)
def primary_superblock(d: Damage) -> None:
    d.smash(SUPERBLOCK_PAGE)


@case(Code.SUPERBLOCK_DAMAGED)
def backup_superblock(d: Damage) -> None:
    d.smash(BACKUP_PAGE, 600, 40)


@case(Code.SUPERBLOCKS_DIFFER)
def different_superblocks(d: Damage) -> None:
    with d.edit(BACKUP_PAGE) as page:
        page[160:170] = b"otherlabel"


def write_record(d: Damage, runs: list[tuple[int, bytes]], *, valid: bool = True) -> None:
    body = b"".join(RUN.pack(offset, len(data) // 8) + data for offset, data in runs)
    uuid = HEADER.unpack_from(d.page(SUPERBLOCK_PAGE))[4]
    head = [7, layout.MAGIC_RECORD, 0, 7, len(body), len(runs), uuid, 0]
    head[2] = crc32c(RECORD.pack(*head)[16:] + body) ^ (not valid)
    d.region.copy_in(page_offset(JOURNAL_PAGE), RECORD.pack(*head) + body)


@case(Code.JOURNAL_PENDING)
def pending_record(d: Damage) -> None:
    before = d.page(STATE_PAGE)
    d.set_state(mounts=41)
    after = d.page(STATE_PAGE)
    d.region.copy_in(page_offset(STATE_PAGE), before)
    write_record(d, [(STATE_PAGE * PAGE, after[:256])])


@case(Code.JOURNAL_DAMAGED)
def damaged_record(d: Damage) -> None:
    write_record(d, [(STATE_PAGE * PAGE, bytes(256))], valid=False)


@case(Code.STATE_DAMAGED, Code.INODE_PAGE_FOUND, lossless=True)
def state_page(d: Damage) -> None:
    d.smash(STATE_PAGE, 64, 64)


@case(Code.STATE_DAMAGED)
def unknown_state(d: Damage) -> None:
    d.set_state(state=9)


@case(Code.STATE_ERROR_FLAG)
def error_flag(d: Damage) -> None:
    d.set_state(flags=STATE_FLAG_ERROR)


@case(Code.NOT_UNMOUNTED)
def not_unmounted(d: Damage) -> None:
    d.set_state(state=STATE_MOUNTED)


@case(Code.BLOCK_MAP_DAMAGED, lossless=True)
def block_map(d: Damage) -> None:
    d.smash(FIRST_MAP_PAGE)


@case(Code.BLOCK_MAP_DAMAGED)
def block_map_of_other_blocks(d: Damage) -> None:
    with d.edit(FIRST_MAP_PAGE) as page:
        page[40] = 7


@case(Code.BLOCK_MAP_UNTIDY)
def untidy_block_map(d: Damage) -> None:
    d.set_map(BlockNo(9000), used=1)


def assert_refused(region: Region, words: str) -> None:
    before = region.read(RegionOff(0), region.size)
    for repair in (False, True):
        with pytest.raises(FormatError, match=words):
            check(region, repair=repair)
    assert region.read(RegionOff(0), region.size) == before


@case.each
def test_found_and_repaired(damage: Damage, code: Code, function: Case) -> None:
    function(damage)
    repair_and_check(damage.region, code)


@case.each_lossless
def test_nothing_is_lost(damage: Damage, pristine: Pristine, function: Case) -> None:
    function(damage)
    _, tree = repair_and_check(damage.region)
    assert tree == tree_of(pristine)


@pytest.mark.parametrize(
    ("offset", "value", "words"),
    [
        (72, 2, "unsupported version"),
        (96, 1 << 7, "unknown feature_ro_compat"),
        (104, 2, "unknown feature_incompat"),
    ],
)
def test_what_it_does_not_know_is_not_touched(
    damage: Damage, offset: int, value: int, words: str
) -> None:
    for number in (SUPERBLOCK_PAGE, BACKUP_PAGE):
        with damage.edit(number) as page:
            page[offset] = value
    assert_refused(damage.region, words)


@pytest.mark.parametrize(
    ("kind", "granule", "feature", "words"),
    [
        (3, BLOCK, True, r"bad pool: got 3, expected 0\.\.2"),
        (POOL_DAX, BLOCK, False, "bad pool: got 2, but the feature bit 0"),
        (POOL_NONE, 0, True, "bad pool: got 0, but the feature bit 1"),
        (POOL_NONE, BLOCK, False, "bad granule without a pool"),
        (POOL_DAX, BLOCK // 2, True, "bad granule: got 0x100000"),
        (POOL_DIRECTORY, 3 * BLOCK, True, "bad granule: got 0x600000"),
        (POOL_DIRECTORY, 0, True, "bad granule: got 0x0"),
    ],
)
def test_a_pool_that_cannot_be(
    damage: Damage, kind: int, granule: int, feature: bool, words: str
) -> None:
    """With both copies so, there is no file system; the other copy puts one right."""
    good = damage.page(BACKUP_PAGE)
    set_pool(damage, kind, granule, feature=feature)
    assert_refused(damage.region, words)
    damage.region.copy_in(page_offset(BACKUP_PAGE), good)
    repair_and_check(damage.region, Code.SUPERBLOCK_DAMAGED)


@pytest.mark.parametrize("kind", [POOL_DIRECTORY, POOL_DAX])
@pytest.mark.parametrize("granule", [BLOCK, 1 << 30])
def test_a_pool(damage: Damage, kind: int, granule: int) -> None:
    set_pool(damage, kind, granule)
    assert check(damage.region, repair=False).clean


def test_both_superblocks_damaged(damage: Damage) -> None:
    damage.smash(SUPERBLOCK_PAGE, 64, 100)
    damage.smash(BACKUP_PAGE, 64, 100)
    assert_refused(damage.region, "both superblocks are damaged")


@pytest.mark.parametrize("size", [PAGE, 1 << 20, 8 << 20, 16 << 20])
def test_no_file_system(size: int) -> None:
    with Region.anonymous(size) as region:
        assert_refused(region, "not a pkernfs|too small")


def test_truncated_region(pristine: Pristine) -> None:
    with Region.anonymous(REGION_BYTES - BLOCK) as region:
        region.copy_in(RegionOff(0), pristine[0][: REGION_BYTES - BLOCK])
        assert_refused(region, "truncated")
