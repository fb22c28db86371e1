"""Kinds of mounts and the history, as the state page has them."""

from __future__ import annotations

from pkernfs.dma.mount import mount_filesystem
from pkernfs.fs import state_page, superblock
from pkernfs.fs.mkfs import make_filesystem
from pkernfs.layout import (
    ARRIVAL_FIRST_BOOT,
    ARRIVAL_LIVE_UPDATE,
    ARRIVAL_REMOUNT,
    HISTORY_ENTRIES,
)
from pkernfs.region.region import Region
from support.checking import assert_clean
from support.handed import MIB, boot
from support.handover import hand_over, verify


def test_kinds_of_mounts() -> None:
    with Region.anonymous(16 * MIB) as region:
        make_filesystem(region)
        assert superblock.describe(region)["arrival"] is None
        expected: list[tuple[int, bool]] = []
        for number, kind, handing in (
            (1, ARRIVAL_FIRST_BOOT, False),
            (1, ARRIVAL_REMOUNT, False),
            (2, ARRIVAL_LIVE_UPDATE, True),
            (3, ARRIVAL_LIVE_UPDATE, True),
            (3, ARRIVAL_REMOUNT, False),
            (4, ARRIVAL_LIVE_UPDATE, False),
        ):
            with boot(number):
                fs = mount_filesystem(region)
                assert fs.mount_report is not None
                assert fs.mount_report.kind == kind
                if kind == ARRIVAL_LIVE_UPDATE or fs.mount_report.record:
                    expected.insert(0, (kind, fs.mount_report.record is not None))
                verify(fs)
                if handing:
                    hand_over(fs, digests=False)
                fs.unmount()
            assert_clean(region)
        facts = superblock.describe(region)
        assert facts["arrival"] == "live update"
        found = [(e["arrival"], e["handover"] is not None) for e in facts["history"]]
        assert found == [(state_page.MOUNT_KINDS[kind], had) for kind, had in expected]
        assert facts["history"][0]["gap_ns"] is None


def test_the_history_keeps_the_last_ones() -> None:
    with Region.anonymous(16 * MIB) as region:
        make_filesystem(region)
        for number in range(HISTORY_ENTRIES + 5):
            with boot(number + 1):
                fs = mount_filesystem(region)
                verify(fs)
                assert hand_over(fs, digests=False) == number + 1
                fs.unmount()
        history = superblock.describe(region)["history"]
        assert len(history) == HISTORY_ENTRIES
        numbers = [entry["handover"] for entry in history]
        assert numbers == sorted(numbers, reverse=True)
        assert numbers[0] == HISTORY_ENTRIES + 4
        assert_clean(region)
