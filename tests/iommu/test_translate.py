"""One translation, step by step, and the fault that each damage leads to."""

from __future__ import annotations

import pytest

from pkernfs.iommu.context_walk import Mode
from pkernfs.iommu.memory import Memory
from pkernfs.iommu.translate import translate
from pkernfs.quantities import Iova, RegionOff, SourceId
from pkernfs.vtd.entries import READ, WRITE, FaultReason
from support.page_tables import DAMAGE, GIB, MIB, PHYS_BASE, Damage, damage_name
from support.table_host import DATA, DEVICE, TableHost


def test_walk_step_by_step(host: TableHost) -> None:
    found = host.walk(Iova(2 * MIB + 0x1234))
    assert found.physical == PHYS_BASE + DATA + 2 * MIB + 0x1234
    assert (found.perm, found.level, found.domain_id) == (3, 2, 2)
    names = [s.name for s in found.steps]
    assert names[0] == "root entry"
    assert names[-3:] == ["PML4E", "PDPE", "PDE"]
    assert len(names) == (7 if host.mode is Mode.SCALABLE else 5)


def test_faults(host: TableHost) -> None:
    prefix = "SM_" if host.mode is Mode.SCALABLE else ""

    def fault(iova: Iova, source_id: SourceId = DEVICE, access: int = 0) -> str:
        reason = host.walk(iova, source_id, access).fault
        assert reason is not None
        assert isinstance(reason, FaultReason)
        assert reason.name.startswith(prefix)
        return reason.name.removeprefix(prefix)

    assert fault(Iova(0), SourceId(0xFF00)) == "ROOT_ENTRY_P"
    assert fault(Iova(0), SourceId(DEVICE + 1)) == "CONTEXT_ENTRY_P"
    # A unit in scalable mode tells an entry that allows nothing from one that allows too little.
    nothing = ("PAGING_ENTRY_P",) * 2 if prefix else ("READ", "WRITE")
    assert (fault(Iova(MIB)), fault(Iova(MIB), access=WRITE)) == nothing
    assert fault(Iova(GIB), SourceId(0x1F8), WRITE) == "WRITE"
    assert host.walk(Iova(GIB), SourceId(0x1F8), READ).physical == PHYS_BASE + DATA
    assert fault(Iova(1 << 48)) == "ADDR_BEYOND_MGAW"
    assert host.walk(Iova(0xFEE00000)).interrupt
    at = host.entry(Iova(0), 1)
    host.store(at, 0xFEE00000 | 3)
    assert fault(Iova(0)) == "INTERRUPT_ADDR"
    at = host.entry(Iova(2 * MIB), 3)
    host.store(at, 1 << 50 | 3)
    assert fault(Iova(0)) == "PAGING_ENTRY_INV"


@pytest.mark.parametrize("damage", DAMAGE, ids=damage_name)
def test_the_fault_that_each_damage_leads_to(damage: Damage) -> None:
    host = TableHost(damage.mode)
    step = next(s for s in host.walk(Iova(0)).steps if s.name == damage.step)
    word = step.words[damage.word] & ~damage.clear
    host.store(RegionOff(step.address + 8 * damage.word - PHYS_BASE), word | damage.set)
    fault = host.walk(Iova(0), access=READ).fault
    assert fault is not None
    assert fault.name == damage.reason


def test_requests_with_pasid(host: TableHost) -> None:
    def fault(pasid: int) -> FaultReason | None:
        memory, root = Memory.whole(host.region), host.root.first_page
        return translate(memory, root, DEVICE, Iova(0), mode=host.mode, pasid=pasid).fault

    if host.mode is Mode.LEGACY:
        assert fault(1) is FaultReason.LEGACY_PASID
        return
    assert fault(1) is FaultReason.SM_PASID_DISABLED
    context = next(s for s in host.walk(Iova(0)).steps if s.name == "context entry")
    host.store(RegionOff(context.address - PHYS_BASE), context.words[0] | 1 << 3)
    assert fault(0) is FaultReason.SM_PASID_IS_RID_PASID
    assert fault(1) is FaultReason.SM_PASID_ENTRY_P
    assert fault(64) is FaultReason.SM_PASID_DIR_ENTRY_P
    assert fault(1 << 13) is FaultReason.SM_PASID_TOO_LARGE


def test_pass_through(host: TableHost) -> None:
    legacy = host.mode is Mode.LEGACY
    name = "context entry" if legacy else "PASID table entry"
    step = next(s for s in host.walk(Iova(0)).steps if s.name == name)
    clear, kind = (3 << 2, 2 << 2) if legacy else (7 << 6, 4 << 6)
    host.store(RegionOff(step.address - PHYS_BASE), step.words[0] & ~clear | kind)
    assert host.walk(Iova(0x1234)).physical == 0x1234
    beyond = FaultReason.ADDR_BEYOND_MGAW if legacy else FaultReason.SM_ADDR_BEYOND_HAW
    assert host.walk(Iova(1 << 52)).fault is beyond
