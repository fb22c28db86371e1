"""Pass 6: the handover record and its list."""

from __future__ import annotations

from pkernfs import layout
from pkernfs.fs.fsck import Code
from pkernfs.layout import STATE_FROZEN, STATE_PAGE
from pkernfs.quantities import Ino
from support.damage import Damage, make_orphan
from support.fsck_cases import Case, Cases
from support.repairs import repair_and_check

case = Cases()


@case(Code.HANDOVER_STRAY)
def record_without_a_handover(d: Damage) -> None:
    with d.edit(STATE_PAGE) as page:
        page[160:168] = (1).to_bytes(8, "little")


def frozen_with_list(d: Damage, ino: Ino, size: int, crc: int) -> None:
    d.set_state(state=STATE_FROZEN)
    record = layout.HandoverFields(1, 5, bytes(16), ino, size, crc, 0, layout.NO_PHYSICAL)
    with d.edit(STATE_PAGE) as page:
        layout.HANDOVER.pack_into(page, layout.HANDOVER_OFFSET, *record)


@case(Code.HANDOVER_LIST)
def list_of_no_inode(d: Damage) -> None:
    frozen_with_list(d, Ino(16 * 3000 + 1), 64, 0)


@case(Code.HANDOVER_LIST)
def list_with_a_name(d: Damage) -> None:
    frozen_with_list(d, d.inos["guest"], 64, 0)


@case(Code.HANDOVER_LIST)
def list_of_another_length(d: Damage) -> None:
    make_orphan(d, "other")
    frozen_with_list(d, d.inos["other"], 64, 0)


@case(Code.HANDOVER_LIST)
def list_with_another_digest(d: Damage) -> None:
    make_orphan(d, "other")
    frozen_with_list(d, d.inos["other"], d.inode(d.inos["other"]).size, 12345)


@case.each
def test_found_and_repaired(damage: Damage, code: Code, function: Case) -> None:
    function(damage)
    repair_and_check(damage.region, code)
