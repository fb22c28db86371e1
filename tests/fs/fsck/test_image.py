"""The overlay: flipped bits, and repairs that are stopped at any store."""

from __future__ import annotations

import pytest

from pkernfs.dma.mount import mount_filesystem
from pkernfs.errors import PkernfsError
from pkernfs.fs.fsck import Code, check
from pkernfs.layout import BLOCK, ROOT_INO, STATE_PAGE
from pkernfs.quantities import BlockNo, PageNo, RegionOff
from pkernfs.region.region import Region
from pkernfs.region.trace import trace_start, trace_stop
from support.damage import REG, REGION_BYTES, Damage
from support.fsck_cases import Case, Cases
from support.repairs import Pristine, read_all, repair_and_check, tree_of

case = Cases()


@case(Code.BIT_FLIPPED)
def flipped_bit_in_state(d: Damage) -> None:
    d.flip(STATE_PAGE, 8 * 120 + 3)


@case(Code.BIT_FLIPPED)
def flipped_bit_in_inodes(d: Damage) -> None:
    d.flip(d.inode_page(d.inos["guest"]), 8 * 2000 + 5)


@case(Code.BIT_FLIPPED)
def flipped_bit_in_checksum(d: Damage) -> None:
    d.flip(d.inode(d.inos["many"]).body, 8 * 5 + 1)


@case.each
def test_found_and_repaired(damage: Damage, code: Code, function: Case) -> None:
    function(damage)
    repair_and_check(damage.region, code)


@pytest.mark.parametrize("page", range(3, 40, 3))
def test_a_flipped_bit_costs_nothing(damage: Damage, pristine: Pristine, page: int) -> None:
    number = PageNo(damage.inode_page(ROOT_INO) - 2 + page)
    if damage.page(number)[:2] != b"PK":
        number = STATE_PAGE
    damage.flip(number, 8 * (37 * page) + page % 8)
    _, tree = repair_and_check(damage.region, Code.BIT_FLIPPED)
    assert tree == tree_of(pristine)


def several(d: Damage) -> None:
    """Damage that needs new pages, copies, and changes all over the region."""
    d.smash(d.inode(d.inos["many"]).body)  # an inner node
    d.set_extents(d.inos["other"], d.extents(d.inos["small"]))  # two files with the same pages
    fields = d.inode(d.inos["small"])
    d.set_inode(d.inos["other"], size=fields.size, data_pages=fields.data_pages)
    d.set_map(d.free_block(), used=1, zero=0)
    d.set_page_used(d.free_page(), 1)
    d.rename(ROOT_INO, b"dir", None)
    extents = d.extents(d.inos["guest"])
    d.set_extents(d.inos["guest"], [*extents, (1 << 20, *extents[0][1:])])  # a block twice
    d.set_inode(d.inos["guest"], size=1 << 33)
    for block in map(BlockNo, range(2, d.region.size // BLOCK)):
        if not d.block_bits(block)[0] and d.region.is_zero(RegionOff(block * BLOCK), BLOCK):
            d.set_map(block, zero=1)


def files_in(tree: dict[bytes, object]) -> list[tuple[bytes, object]]:
    """Name and contents of all that is no directory, wherever it is."""
    found: list[tuple[bytes, object]] = []
    for name, what in tree.items():
        found += files_in(what) if isinstance(what, dict) else [(name, what)]
    return sorted(found, key=repr)


def use(region: Region) -> None:
    """Mount what a stopped repair left, if that works, and take up space in it."""
    try:
        fs = mount_filesystem(region)
        fs.write(fs.create(ROOT_INO, b"in between", REG, 0, 0).ino, 0, b"in between" * 50000)
        fs.write(fs.create(ROOT_INO, b"large", REG, 0, 0).ino, 0, b"large" * BLOCK)
        fs.unmount()
    except PkernfsError:
        pass


@pytest.mark.slow("each of 30 stops is three checks and a mount")
@pytest.mark.parametrize("mount", [False, True])
@pytest.mark.parametrize("batch", [400, 2])
def test_a_repair_may_be_stopped_at_any_store(
    damage: Damage, monkeypatch: pytest.MonkeyPatch, batch: int, mount: bool
) -> None:
    """Stopped and started over, it comes to the same end: every file is there.

    In between two transactions lost+found may have lost its name, and comes back in a new one.
    """
    monkeypatch.setattr("pkernfs.fs.fsck.image._BATCH", batch)
    several(damage)
    region = damage.region
    before = region.read(RegionOff(0), REGION_BYTES)
    trace_start()
    check(region, repair=True)
    stores = trace_stop()
    assert len(stores) > 40
    fs = mount_filesystem(region)
    expected = files_in(read_all(fs))
    fs.unmount()
    for cut in sorted({*range(0, len(stores), max(1, len(stores) // 30)), len(stores) - 1}):
        region.copy_in(RegionOff(0), before)
        for offset, length, data in stores[:cut]:
            region.copy_in(offset, data if data is not None else bytes(length))
        if mount:
            use(region)
        report = check(region, repair=True, verify_zero=True)
        assert not report.left
        assert not report.counts[Code.ZERO_NOT_ZERO], cut
        again = check(region, repair=False)
        assert again.clean, (cut, [str(p) for p in again.problems])
        fs = mount_filesystem(region)
        found = [f for f in files_in(read_all(fs)) if f[0] not in (b"in between", b"large")]
        assert found == expected, cut
        fs.unmount()
