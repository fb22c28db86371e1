"""The state that passes share: inodes by number, and changes of inodes in the overlay."""

from __future__ import annotations

import pytest

from pkernfs.fs.fsck.context import Context, Inodes, at
from pkernfs.fs.fsck.problems import Report
from pkernfs.fs.fsck.structures import T_DIR, T_REG
from pkernfs.fs.fsck.superblocks import load_block_maps, load_state, open_image
from pkernfs.fs.fsck.table import check_inodes, load_table
from pkernfs.layout import INODE_INLINE_BYTES, INODE_INLINE_OFFSET, PAGE, ROOT_INO
from pkernfs.quantities import Ino, PageNo
from support.damage import Damage


@pytest.fixture
def ctx(damage: Damage) -> Context:
    """The context of a check that has come to the inodes."""
    found = open_image(damage.region, Report(), lambda stage, fraction: None, repair=False)
    load_state(found)
    load_block_maps(found)
    load_table(found)
    check_inodes(found)
    return found


def test_inodes_have_rows_in_the_order_in_which_pages_come() -> None:
    inodes = Inodes()
    inodes.add_page(3, PageNo(700))
    inodes.add_page(0, PageNo(600))
    inodes.type[inodes.row_of[3] + 5] = T_REG
    inodes.type[inodes.row_of[0] + 1] = T_DIR
    assert inodes.row(Ino(3 * 16 + 5)) == 5
    assert inodes.row(Ino(1)) == 17
    assert inodes.row(Ino(2)) == inodes.row(Ino(16)) == -1
    assert [inodes.type_of(ino) for ino in map(Ino, (53, 1, 54))] == [T_REG, T_DIR, 0]
    assert list(inodes.of_type(T_REG)) == [53]


def test_every_inode_is_found(ctx: Context, damage: Damage) -> None:
    assert set(damage.inos.values()) - {0} <= {
        index * 16 + slot
        for index, row in ctx.inodes.row_of.items()
        for slot in range(16)
        if ctx.inodes.type[row + slot]
    }
    assert ctx.fields(damage.inos["small"]) == damage.inode(damage.inos["small"])
    assert ctx.inodes.type_of(ROOT_INO) == T_DIR


def test_changes_stay_out_of_the_region(ctx: Context, damage: Damage) -> None:
    ino = damage.inos["small"]
    before = damage.page(damage.inode_page(ino))
    ctx.set_fields(ino, nlink=9)
    ctx.set_inline(ino, b"inline")
    assert ctx.fields(ino).nlink == 9
    start = (ino & 15) * 256 + INODE_INLINE_OFFSET
    inline = bytes(ctx.inode_page(ino)[start : start + INODE_INLINE_BYTES])
    assert inline == b"inline".ljust(INODE_INLINE_BYTES, b"\0")
    ctx.drop_inode(ino)
    assert ctx.inodes.row(ino) == -1
    assert damage.page(damage.inode_page(ino)) == before


def test_where_things_are(ctx: Context, damage: Damage) -> None:
    ino = damage.inos["small"]
    offset = damage.inode_page(ino) * PAGE + (ino & 15) * 256
    assert ctx.file(ino) == f"inode {ino} at {offset:#x}"
    assert ctx.file(Ino(1 << 40)) == f"inode {1 << 40}"
    assert at(PageNo(3)) == "0x3000"
