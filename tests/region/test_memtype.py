"""The memory type of a mapping: by the kernel's list, or by its speed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pkernfs.errors import RegionError
from pkernfs.region import memtype
from pkernfs.region.opening import open_backing
from support.made_up_host import Machine
from support.made_up_regions import PAT, PAT_LIST, G, M, dev_mem_machine, open_region


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return dev_mem_machine(tmp_path)


@pytest.mark.parametrize("write", [True, False])
def test_a_mapping_round_the_caches_is_refused(machine: Machine, write: bool) -> None:
    machine.write(PAT, PAT_LIST.format(G + 510 * M, G + 520 * M, "uncached-minus"))
    with pytest.raises(RegionError) as caught:
        open_region("512M!1G", machine, write=write)
    assert str(caught.value) == (
        "512M!1G: the kernel maps it uncached-minus, not write-back: end what else has "
        "mapped it through /dev/mem, or boot with nopat"
    )
    open_region("256M!1G", machine, write=write).close()


def test_without_the_kernels_list_reading_is_timed(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.unlink(machine.path(PAT))
    open_region("512M!1G", machine).close()
    backing = open_backing("512M!1G", write=True, phys_base=None, lock=True, host=machine)
    ticks = iter(range(1000))
    # As if each read of the mapping took a second; the other half is this process's own memory.
    monkeypatch.setattr(memtype, "_fastest", lambda read: 100.0 if next(ticks) == 0 else 1.0)
    with pytest.raises(RegionError, match="the kernel maps it uncached, by its speed, not"):
        backing.verify_mapping(lambda: None)
    backing.close()
