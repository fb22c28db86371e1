"""What tables ask of a unit, and what keeps a device from depending on them."""

from __future__ import annotations

import pytest

from pkernfs.host.dmar import ENDPOINT, Dmar, parse
from pkernfs.host.pci import PciDevice
from pkernfs.iommu.config import Config
from pkernfs.iommu.context_walk import Mode
from pkernfs.layout import PAGE
from pkernfs.quantities import Iova, PhysAddr, SourceId
from pkernfs.units.requirements import (
    Requirements,
    cut_off,
    largest_leaf,
    unfit_reason,
    unmet_requirements,
)
from pkernfs.vtd.registers import Capabilities
from support.dmar_tables import drhd, rmrr, scope, table
from support.page_tables import GIB, MIB, Domain

DATA = 1 << 40
EDU = SourceId(0x28)

#: QEMU's unit, with scalable mode: 48 bits, 3 and 4 levels, leaves up to 1 GiB, 65536 domain ids.
ABLE = Capabilities(0x10, 0xD2008C222F0606, 0xF42 | 1 << 43 | 1 << 46)
MODEST = Requirements(Config(Mode.LEGACY, 4), [1], 1, Iova(GIB), PhysAddr(GIB))


def test_modest_tables_on_a_good_unit() -> None:
    assert list(unmet_requirements(ABLE, MODEST, 46)) == []
    assert (
        list(unmet_requirements(ABLE, MODEST._replace(config=Config(Mode.SCALABLE, 3)), 46)) == []
    )
    most = Requirements(Config(Mode.LEGACY, 4), [0xFFFF], 3, Iova(1 << 48), PhysAddr(1 << 46))
    assert list(unmet_requirements(ABLE, most, 46)) == []


@pytest.mark.parametrize(
    ("wanted", "reason"),
    [
        ({"config": Config(Mode.LEGACY, 5)}, "no tables of 5 levels (CAP.SAGAW): it walks 3, 4"),
        ({"end": (1 << 48) + PAGE}, "mapped up to 0x1000000001000, but addresses have 48 bits"),
        ({"physical_end": (1 << 46) + PAGE}, "memory up to 0x400000001000, but it reaches 46 bits"),
        ({"domain_ids": [1, 1 << 16]}, "domain id 65536: it has 65536 (CAP.ND)"),
    ],
)
def test_what_tables_may_ask_too_much(wanted: dict[str, object], reason: str) -> None:
    [found] = unmet_requirements(ABLE, MODEST._replace(**wanted), 46)  # type: ignore[arg-type]
    assert found.startswith(reason)


@pytest.mark.parametrize(
    ("able", "reason"),
    [
        (ABLE._replace(version=0), "unknown version: got 0x0"),
        (ABLE._replace(version=0x110), "unknown version: got 0x110"),
        (ABLE._replace(ecap=ABLE.ecap & ~(1 << 43)), "no scalable mode (ECAP.SMTS)"),
        (ABLE._replace(ecap=ABLE.ecap & ~(1 << 46)), "no second stage in scalable mode"),
        (ABLE._replace(ecap=ABLE.ecap & ~(1 << 1)), "no invalidation queue, which scalable mode"),
        (ABLE._replace(cap=ABLE.cap & ~(1 << 35)), "no pages of 1 GiB, which are mapped"),
        (ABLE._replace(cap=ABLE.cap & ~(3 << 34)), "no pages of 1 GiB, which are mapped"),
        (ABLE._replace(cap=ABLE.cap & ~(0x1F << 8)), "no tables of 4 levels (CAP.SAGAW): it walks"),
        (ABLE._replace(cap=ABLE.cap | 1 << 7), "domain id 0 is reserved (CAP.CM)"),
    ],
)
def test_what_a_unit_may_lack(able: Capabilities, reason: str) -> None:
    wanted = Requirements(Config(Mode.SCALABLE, 4), [0], 3, Iova(GIB), PhysAddr(GIB))
    [found] = unmet_requirements(able, wanted, 46)
    assert found.startswith(reason)


# ---------------------------------------------------------------------- leaves


@pytest.mark.parametrize("levels", [3, 4, 5])
def test_the_largest_leaf(levels: int) -> None:
    domain = Domain(levels)
    found = []
    for iova, length in ((0, 0), (PAGE, PAGE), (2 * MIB, 2 * MIB), (GIB, GIB)):
        if length:
            domain.table.map(Iova(iova), PhysAddr(DATA + iova), length, 3)
        found.append(largest_leaf(domain.memory, domain.table.root, levels))
    assert found == [1, 1, 2, 3]
    domain.close()


# ---------------------------------------------------------------------- devices


def device(**changed: object) -> PciDevice:
    """A device that may depend on tables."""
    values = {
        "segment": 0, "source_id": EDU, "chain": (EDU,), "driver": "edu", "bridge": False,
        "bus_master": True, "aliased": False, "ats": False, "pasid": False,
    }  # fmt: skip
    return PciDevice(**{**values, **changed})  # type: ignore[arg-type]


@pytest.fixture
def dmar() -> Dmar:
    """One unit for all devices, and memory that the firmware has 00:06.0 use."""
    reserved = rmrr(0x10_0000, 0x1F_FFFF, scope(ENDPOINT, 0, (6, 0)))
    return parse(table(drhd(0xFED9_0000, flags=1), reserved))


def test_a_device_that_may_depend_on_tables(dmar: Dmar) -> None:
    assert unfit_reason(dmar, device(), EDU) is None


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"segment": 1}, "below no unit"),
        ({"aliased": True}, "a bridge to conventional PCI is above it"),
        ({"chain": (0x30,)}, "the firmware has it use memory at 0x100000-0x1fffff (RMRR)"),
        ({"ats": True}, "ATS is enabled"),
        ({"known": False}, "the kernel shows too little of its configuration space"),
        ({"pasid": True}, "PASID is enabled"),
    ],
)
def test_devices_that_must_not(dmar: Dmar, changed: dict[str, object], reason: str) -> None:
    found = unfit_reason(dmar, device(**changed), EDU)
    assert found is not None
    assert found.startswith(f"device 0000:00:05.0: {reason}")


def test_a_device_that_is_not_there(dmar: Dmar) -> None:
    assert unfit_reason(dmar, None, EDU) == "device 0000:00:05.0: there is none: detach it"


def test_devices_at_work_that_the_tables_do_not_know(dmar: Dmar) -> None:
    units = dmar.units
    other = SourceId(0x38)
    attached = device(source_id=other, chain=(other,))
    idle = [device(driver=None), device(bus_master=False), device(bridge=True)]
    elsewhere = device(segment=1)
    everything = [device(), attached, *idle, elsewhere]
    assert cut_off(dmar, units, everything, {other}) == [device()]
    assert cut_off(dmar, units, everything, {other, EDU}) == []
    assert cut_off(dmar, [], everything, set()) == []
