"""pkernfs iommu persist: which devices a handover cuts off, and which go on."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from pkernfs.dma.mount import mount_filesystem, tables_of
from pkernfs.errors import NoSpaceError
from pkernfs.fs.mkfs import make_filesystem
from pkernfs.host.bars import Bar
from pkernfs.iommu.config import load_bars, record_bar
from pkernfs.quantities import PhysAddr, SourceId
from pkernfs.region.region import Region
from support.mounting import MIB, Mounted, run_pkernfs

KEPT, CUT, OTHER = "0000:00:05.0", "0000:00:06.0", "0000:01:00.0"


def pkernfs(*words: object) -> str:
    done = run_pkernfs(*map(str, words))
    assert done.returncode == 0, done.stderr
    return done.stdout


def devices(mount: Path) -> dict[str, bool]:
    """What is attached, and whether a handover keeps it."""
    shown = json.loads(pkernfs("iommu", "show", mount, "--json"))
    return {d["device"]: d["persistent"] for d in shown["devices"]}


@pytest.mark.fuse
def test_a_handover_cuts_off_what_is_not_to_persist() -> None:
    with Mounted(options="phys_base=0x100000000") as mounted:
        guest, dom = mounted.path / "guest-ram", mounted.path / "iommu/dom-0"
        for path, size in ((guest, 8 * MIB), (dom, 2 * MIB)):
            path.touch()
            os.truncate(path, size)
        pkernfs("iommu", "map", dom, 0, guest)
        for device in (KEPT, CUT, OTHER):
            pkernfs("iommu", "attach", dom, device)
        pkernfs("iommu", "persist", CUT, "off", mounted.path)
        pkernfs("iommu", "persist", OTHER, "off", mounted.path)
        assert devices(mounted.path) == {KEPT: True, CUT: False, OTHER: False}
        pkernfs("iommu", "persist", OTHER, "on", mounted.path)
        pkernfs("handover", mounted.path, "--digest", "--force")
        assert devices(mounted.path) == {KEPT: True, OTHER: True}
        assert run_pkernfs("iommu", "translate", str(mounted.path), CUT, "0").returncode == 1
        assert run_pkernfs("iommu", "translate", str(mounted.path), KEPT, "0").returncode == 0
        refused = run_pkernfs("iommu", "attach", str(dom), CUT)
        assert (refused.returncode, refused.stdout) == (1, "")
        assert "read-only" in refused.stderr
        mounted.unmount()
        mounted.start()
        info = json.loads(pkernfs("info", mounted.path, "--json"))
        assert info["verification"]["changes"] == []
        assert devices(mounted.path) == {KEPT: True, OTHER: True}
        pkernfs("iommu", "attach", dom, CUT)
        assert devices(mounted.path)[CUT] is False  # the record stays


def test_records_do_not_run_into_each_other() -> None:
    with Region.anonymous(64 * MIB, phys_base=PhysAddr(1 << 40)) as region:
        make_filesystem(region)
        fs = mount_filesystem(region)
        tables_of(fs).create_root()
        memory, commit = tables_of(fs).root_memory(), fs.store.commit_words
        bars = [Bar(SourceId(number), 0, PhysAddr(0x1000), 0x1000) for number in range(62)]
        for bar in bars:
            record_bar(memory, commit, bar)
        with pytest.raises(NoSpaceError, match="BARs are mapped already"):
            record_bar(memory, commit, Bar(SourceId(99), 0, PhysAddr(0x1000), 0x1000))
        switched = {SourceId(3 * number) for number in range(256)}
        for source_id in switched:
            tables_of(fs).persist(source_id, False)
        with pytest.raises(NoSpaceError, match="devices are switched off already"):
            tables_of(fs).persist(SourceId(1), False)
        assert load_bars(memory) == bars
        assert tables_of(fs).non_persistent() == switched
        tables_of(fs).persist(SourceId(3), True)
        tables_of(fs).persist(SourceId(3), True)
        assert tables_of(fs).non_persistent() == switched - {3}
        assert tables_of(fs).config.levels == 4
        fs.unmount()
        again = mount_filesystem(region)
        assert tables_of(again).non_persistent() == switched - {3}
