"""Pass 10: links, parents, orphans, the root, lost+found."""

from __future__ import annotations

import stat

import pytest

from pkernfs.dma.mount import mount_filesystem
from pkernfs.fs.fsck import Code, check
from pkernfs.fs.fsck.trees import Allocator, NoRoomError
from pkernfs.layout import ROOT_INO, STATE_MOUNTED
from pkernfs.quantities import Ino, RegionOff
from support.damage import REGION_BYTES, Damage, make_orphan, name_item
from support.fsck_cases import Case, Cases
from support.repairs import Pristine, repair_and_check, tree_of

case = Cases()


@case(Code.INODE_LINKS)
def wrong_links(d: Damage) -> None:
    d.set_inode(d.inos["small"], nlink=7)


@case(Code.INODE_LINKS)
def wrong_links_of_directory(d: Damage) -> None:
    d.set_inode(d.inos["dir"], nlink=2)


@case(Code.INODE_LINKS, Code.INODE_PAGE_MASKS)
def no_links_but_a_name(d: Damage) -> None:
    d.set_inode(d.inos["small"], nlink=0)


@case(Code.INODE_PARENT)
def wrong_parent(d: Damage) -> None:
    d.set_inode(d.inos["dir/sub"], parent=d.inos["empty"])


@case(Code.DIRECTORY_SIZE)
def wrong_directory_size(d: Damage) -> None:
    d.set_inode(d.inos["many"], size=1)


@case(Code.ORPHAN)
def orphans(d: Damage) -> None:
    for path in ("other", "guest", "xattr", "long-link"):
        make_orphan(d, path)
    pending: dict[int, int] = {}
    for path in ("other", "guest", "xattr", "long-link"):
        ino = d.inos[path]
        pending[ino >> 4] = pending.get(ino >> 4, 0) | 1 << (ino & 15)
    for index, mask in pending.items():
        d.set_inode_page(Ino(index * 16 + 1), 3, mask)
    d.set_state(state=STATE_MOUNTED)


@case(Code.ORPHAN_LEFT)
def orphan_after_unmount(d: Damage) -> None:
    make_orphan(d, "guest")


@case(Code.INODE_PAGE_DAMAGED, Code.ROOT_MISSING, Code.IOMMU_MISSING)
def first_inode_page_without_leaves(d: Damage) -> None:
    """The root is gone with all its names."""
    d.smash(d.inode(ROOT_INO).body)
    d.smash(d.inode_page(ROOT_INO))


@case(Code.ROOT_MISSING)
def root_missing(d: Damage) -> None:
    first_inode_page_without_leaves(d)


@case(Code.IOMMU_MISSING, lossless=True)
def iommu_missing(d: Damage) -> None:
    d.rename(ROOT_INO, b"iommu", None)


@case(Code.IOMMU_MISSING)
def iommu_is_something_else(d: Damage) -> None:
    d.rename(ROOT_INO, b"iommu", name_item(d.inos["fifo"], 1, b"iommu"))


@case(Code.DIRECTORY_LOOP)
def directory_loop(d: Damage) -> None:
    """dir leaves the root and comes back below its own grandchild."""
    d.rename(ROOT_INO, b"dir", None)
    item = name_item(d.inos["dir"], 4, b"file")
    d.rename(d.inos["dir/sub/deep"], b"file", item)


@case(Code.UNREACHABLE)
def nameless(d: Damage) -> None:
    for name in (b"dir", b"small", b"long-link", b"fifo"):
        d.rename(ROOT_INO, name, None)
    d.rename(d.inos["dir"], b"linked", None)


@case.each
def test_found_and_repaired(damage: Damage, code: Code, function: Case) -> None:
    function(damage)
    repair_and_check(damage.region, code)


@case.each_lossless
def test_nothing_is_lost(damage: Damage, pristine: Pristine, function: Case) -> None:
    function(damage)
    _, tree = repair_and_check(damage.region)
    assert tree == tree_of(pristine)


def test_nameless_goes_to_lost_found(damage: Damage) -> None:
    nameless(damage)
    _, tree = repair_and_check(damage.region, Code.UNREACHABLE)
    lost = tree[b"lost+found"]
    assert isinstance(lost, dict)
    assert lost[b"#%d" % damage.inos["small"]] == b"small " * 700
    assert lost[b"#%d" % damage.inos["dir"]][b"sub"][b"deep"] == {b"file": b"at the bottom"}
    fs = mount_filesystem(damage.region)
    assert stat.S_IMODE(fs.lookup(ROOT_INO, b"lost+found").mode) == 0o700
    fs.unmount()
    # And once more, into the one that is there.
    damage.rename(ROOT_INO, b"xattr", None)
    _, tree = repair_and_check(damage.region, Code.UNREACHABLE)
    assert set(tree[b"lost+found"]) == {*lost, b"#%d" % damage.inos["xattr"]}  # type: ignore[call-overload]


def test_no_room_changes_nothing(damage: Damage, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(_: Allocator) -> int:
        raise NoRoomError

    nameless(damage)
    monkeypatch.setattr(Allocator, "page", none)
    before = damage.region.read(RegionOff(0), REGION_BYTES)
    report = check(damage.region, repair=True)
    assert report.counts[Code.NO_ROOM]
    assert report.left == len(report.problems)
    assert damage.region.read(RegionOff(0), REGION_BYTES) == before
