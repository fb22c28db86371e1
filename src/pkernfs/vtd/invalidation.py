"""Invalidations: as commands to registers, and as descriptors of the invalidation queue.

6.5 of the VT-d specification, revision 5.10; descriptors are those of 6.5.2. Nothing here touches a
unit.
"""

from __future__ import annotations

import enum
from typing import NamedTuple

from pkernfs.quantities import PhysAddr, SourceId
from pkernfs.vtd.registers import ContextCommand, Granularity, Iotlb, QueueAddress, Step, StepKind

#: Bytes of a descriptor, by IQA.DW.
DESCRIPTOR_BYTES = (16, 32)

_CONTEXT, _IOTLB, _WAIT, _PASID = 1, 2, 5, 7
_PASID_GRANULARITY = {Granularity.GLOBAL: 3, Granularity.DOMAIN: 0}  # 6.5.2.2
_DRAIN_WRITES, _DRAIN_READS = 1 << 6, 1 << 7
_STATUS_WRITE = 1 << 5


class Cache(enum.Enum):
    """The caches of a unit."""

    CONTEXT = "context cache"
    PASID = "PASID cache"
    IOTLB = "IOTLB"


class Invalidation(NamedTuple):
    """Entries to forget: all, a domain's, or (context cache) a device's in a domain."""

    cache: Cache
    granularity: Granularity = Granularity.GLOBAL
    domain_id: int = 0
    source_id: SourceId = SourceId(0)

    def __str__(self) -> str:
        return f"{self.cache.value}, {self.granularity.name.lower()}"


def everything(*, scalable: bool) -> list[Invalidation]:
    """All caches, in the order that a new root table asks for (6.6)."""
    pasid = [Invalidation(Cache.PASID)] if scalable else []
    return [Invalidation(Cache.CONTEXT), *pasid, Invalidation(Cache.IOTLB)]


def domain(domain_id: int) -> list[Invalidation]:
    """After a change of a domain's page tables that a unit may have cached (6.5.3.3)."""
    return [Invalidation(Cache.IOTLB, Granularity.DOMAIN, domain_id)]


def device(source_id: SourceId, domain_id: int, *, scalable: bool) -> list[Invalidation]:
    """After a change of a present context entry (6.5.3.3)."""
    context = Invalidation(Cache.CONTEXT, Granularity.SELECTIVE, domain_id, source_id)
    pasid = [Invalidation(Cache.PASID, Granularity.DOMAIN, domain_id)] if scalable else []
    return [context, *pasid, *domain(domain_id)]


def register_steps(what: Invalidation, iotlb_offset: int) -> list[Step]:
    """The same by CCMD_REG or IOTLB_REG, draining what is under way (11.4.6)."""
    if what.cache is Cache.CONTEXT:
        command = (
            ContextCommand.ICC.mask
            | ContextCommand.CIRG.put("CIRG", what.granularity)
            | ContextCommand.SID.put("SID", what.source_id)
            | ContextCommand.DID.put("DID", what.domain_id)
        )
        at, busy = ContextCommand.OFFSET, ContextCommand.ICC.mask
    else:
        assert what.cache is Cache.IOTLB
        command = (
            Iotlb.IVT.mask
            | Iotlb.IIRG.put("IIRG", what.granularity)
            | Iotlb.DR.mask
            | Iotlb.DW.mask
            | Iotlb.DID.put("DID", what.domain_id)
        )
        at, busy = iotlb_offset + Iotlb.OFFSET, Iotlb.IVT.mask
    return [Step(StepKind.WRITE_64, at, command), Step(StepKind.WAIT_64, at, 0, busy)]


class Descriptor(NamedTuple):
    """A descriptor of the queue: its low and its high word."""

    low: int
    high: int


def descriptor(what: Invalidation) -> Descriptor:
    """The same as a descriptor of the queue."""
    if what.cache is Cache.CONTEXT:
        word = what.granularity << 4 | what.domain_id << 16 | what.source_id << 32
        return Descriptor(_CONTEXT | word, 0)
    if what.cache is Cache.PASID:
        granularity = _PASID_GRANULARITY[what.granularity]
        return Descriptor(_PASID | granularity << 4 | what.domain_id << 16, 0)
    drain = _DRAIN_READS | _DRAIN_WRITES
    return Descriptor(_IOTLB | what.granularity << 4 | drain | what.domain_id << 16, 0)


def wait_descriptor(address: PhysAddr, data: int) -> Descriptor:
    """Store 4 bytes at a physical address when all before it is done (6.5.2.8)."""
    return Descriptor(_WAIT | _STATUS_WRITE | data << 32, address)


def queue_image(first: Descriptor, rest: Descriptor, iqa: int) -> bytes:
    """A queue of the size and width that IQA has: one descriptor, and others behind it."""
    size = DESCRIPTOR_BYTES[QueueAddress.DW.get(iqa)]
    count = (4096 << QueueAddress.QS.get(iqa)) // size
    padding = bytes(size - 16)

    def pack(words: Descriptor) -> bytes:
        return b"".join(w.to_bytes(8, "little") for w in words) + padding

    return pack(first) + pack(rest) * (count - 1)
