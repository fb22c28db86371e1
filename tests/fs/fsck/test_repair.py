"""Pass 11: data that lies where it cannot stay gets a copy, or becomes a hole."""

from __future__ import annotations

from pkernfs.fs.fsck import Code, check
from pkernfs.layout import PAGE
from support.damage import Damage
from support.repairs import fill_up, repair_and_check


def test_both_files_keep_the_data_of_a_double_claim(damage: Damage) -> None:
    damage.set_extents(damage.inos["other"], damage.extents(damage.inos["small"]))
    fields = damage.inode(damage.inos["small"])
    damage.set_inode(damage.inos["other"], size=fields.size, data_pages=fields.data_pages)
    _, tree = repair_and_check(damage.region, Code.DOUBLE_CLAIM)
    assert tree[b"small"] == tree[b"other"] == b"small " * 700


def test_misplaced_blocks_are_copied(damage: Damage) -> None:
    extents = damage.extents(damage.inos["guest"])
    damage.set_extents(damage.inos["guest"], [(f + 1, p, n) for f, p, n in extents])
    damage.set_inode(damage.inos["guest"], size=(8 << 20) + PAGE)
    _, tree = repair_and_check(damage.region, Code.EXTENT_SHAPE)
    data = tree[b"guest"]
    assert isinstance(data, bytes)
    start = (4 << 20) + PAGE
    assert data[start : start + 6000] == b"guest " * 1000
    assert not data[:start].strip(b"\0")


def test_double_claim_without_room_becomes_a_hole(damage: Damage) -> None:
    fill_up(damage)
    extents = damage.extents(damage.inos["guest"])
    damage.set_extents(damage.inos["guest"], [*extents, (1 << 20, extents[0][1], 512)])
    damage.set_inode(damage.inos["guest"], size=1 << 33)
    report = check(damage.region, repair=True)
    assert report.counts[Code.DOUBLE_CLAIM] == 1
    assert any("no space" in problem.remedy for problem in report.problems)
    assert check(damage.region, repair=False).clean
