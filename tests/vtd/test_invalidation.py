"""What a unit is told to forget: words by hand from 6.5 of the specification."""

from __future__ import annotations

import pytest

from pkernfs.quantities import PhysAddr, SourceId
from pkernfs.vtd.invalidation import (
    Cache,
    Descriptor,
    Invalidation,
    descriptor,
    device,
    domain,
    everything,
    queue_image,
    register_steps,
    wait_descriptor,
)
from pkernfs.vtd.registers import Granularity, Step, StepKind

IOTLB_AT = 0xF0
BUSY = 1 << 63
EDU, OTHER = SourceId(0x28), SourceId(0xFFFE)


def test_what_is_forgotten_when() -> None:
    context, pasid, iotlb = (Invalidation(cache) for cache in Cache)
    assert everything(scalable=False) == [context, iotlb]
    assert everything(scalable=True) == [context, pasid, iotlb]
    of_domain = Invalidation(Cache.IOTLB, Granularity.DOMAIN, 7)
    assert domain(7) == [of_domain]
    of_device = Invalidation(Cache.CONTEXT, Granularity.SELECTIVE, 7, EDU)
    assert device(EDU, 7, scalable=False) == [of_device, of_domain]
    of_pasids = Invalidation(Cache.PASID, Granularity.DOMAIN, 7)
    assert device(EDU, 7, scalable=True) == [of_device, of_pasids, of_domain]
    assert [str(one) for one in (context, of_domain, of_device)] == [
        "context cache, global",
        "IOTLB, domain",
        "context cache, selective",
    ]


@pytest.mark.parametrize(
    ("what", "word"),
    [
        (Invalidation(Cache.CONTEXT), 0x11),
        (Invalidation(Cache.CONTEXT, Granularity.DOMAIN, 0x1234), 0x1234_0021),
        (Invalidation(Cache.CONTEXT, Granularity.SELECTIVE, 0x12, OTHER), 0xFFFE_0012_0031),
        (Invalidation(Cache.PASID), 0x37),
        (Invalidation(Cache.PASID, Granularity.DOMAIN, 0xFFFF), 0xFFFF_0007),
        (Invalidation(Cache.IOTLB), 0xD2),
        (Invalidation(Cache.IOTLB, Granularity.DOMAIN, 5), 0x5_00E2),
    ],
)
def test_descriptors(what: Invalidation, word: int) -> None:
    assert descriptor(what) == (word, 0)


def test_a_wait_stores_what_it_is_told() -> None:
    assert wait_descriptor(PhysAddr(0x1234_5000), 7) == (0x7_0000_0025, 0x1234_5000)


def test_commands_to_registers() -> None:
    what = Invalidation(Cache.CONTEXT, Granularity.SELECTIVE, 2, EDU)
    command = BUSY | 3 << 61 | 0x28 << 16 | 2
    assert register_steps(what, IOTLB_AT) == [
        Step(StepKind.WRITE_64, 0x28, command),
        Step(StepKind.WAIT_64, 0x28, 0, BUSY),
    ]
    command = BUSY | 2 << 60 | 3 << 48 | 7 << 32
    assert register_steps(domain(7)[0], IOTLB_AT) == [
        Step(StepKind.WRITE_64, IOTLB_AT + 8, command),
        Step(StepKind.WAIT_64, IOTLB_AT + 8, 0, BUSY),
    ]


@pytest.mark.parametrize(("iqa", "size", "count"), [(0, 16, 256), (2, 16, 1024), (2048, 32, 128)])
def test_a_queue_is_full_of_descriptors(iqa: int, size: int, count: int) -> None:
    image = queue_image(Descriptor(1, 2), Descriptor(3, 4), 0x4000 | iqa)
    assert len(image) == size * count
    words = memoryview(image).cast("Q")
    assert words[:2].tolist() == [1, 2]
    step = size // 8
    assert set(words[step::step]) == {3}
    assert set(words[step + 1 :: step]) == {4}
    assert not any(words[i] for i in range(len(words)) if i % step > 1)
