"""Pass 9: the counts of the state page, and the list of inode pages with free slots."""

from __future__ import annotations

from pkernfs.fs.fsck import Code
from pkernfs.quantities import Ino
from support.damage import Damage
from support.fsck_cases import Case, Cases
from support.repairs import repair_and_check

case = Cases()


@case(Code.INODE_FREE_LIST)
def free_list_head(d: Damage) -> None:
    d.set_state(free_inode_page=1000)


@case(Code.INODE_FREE_LIST)
def free_list_cycle(d: Damage) -> None:
    index = d.state().free_inode_page - 1
    d.set_inode_page(Ino(index * 16 + 1), 1, index + 1)


@case(Code.INODE_FREE_LIST)
def free_list_flag(d: Damage) -> None:
    index = d.state().free_inode_page - 1
    d.set_inode_page(Ino(index * 16 + 1), 4, 0)


@case(Code.INODE_PAGE_COUNT)
def inode_page_count(d: Damage) -> None:
    d.set_state(inode_pages=d.state().inode_pages + 3)


@case(Code.INODES_USED)
def inodes_used(d: Damage) -> None:
    d.set_state(inodes_used=5)


@case.each
def test_found_and_repaired(damage: Damage, code: Code, function: Case) -> None:
    function(damage)
    repair_and_check(damage.region, code)
