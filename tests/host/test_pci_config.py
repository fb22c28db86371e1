"""The walk of a list of capabilities, also of one that is broken."""

from __future__ import annotations

import pytest

from pkernfs.host.pci_config import CAPABILITIES, EXPRESS, find_capability


def space(*capabilities: tuple[int, int, int]) -> bytearray:
    """Configuration space with capabilities: offset, id and offset of the next."""
    data = bytearray(256)
    data[CAPABILITIES] = capabilities[0][0] if capabilities else 0
    for at, wanted, following in capabilities:
        data[at : at + 2] = bytes([wanted, following])
    return data


def find(data: bytearray, wanted: int) -> int:
    return find_capability(lambda at: int.from_bytes(data[at : at + 2], "little"), wanted)


def test_the_list_is_walked() -> None:
    data = space((0x50, 0x05, 0x40), (0x40, 0x01, 0x70), (0x70, EXPRESS, 0))
    assert [find(data, wanted) for wanted in (0x05, 0x01, EXPRESS, 0x11)] == [0x50, 0x40, 0x70, 0]
    assert find(space(), EXPRESS) == 0


def test_the_low_bits_of_a_pointer_are_reserved() -> None:
    data = space((0x50, 0x05, 0x73), (0x70, EXPRESS, 0))
    data[CAPABILITIES] |= 3
    assert find(data, EXPRESS) == 0x70


@pytest.mark.parametrize(
    "data",
    [
        space((0x40, 0x05, 0x40)),
        space((0x40, 0x05, 0x50), (0x50, 0x05, 0x40)),
        space((0x40, 0x05, 0x10)),  # into the header
        bytearray(b"\xff" * 256),  # nothing answers
    ],
)
def test_a_broken_list_ends(data: bytearray) -> None:
    assert find(data, EXPRESS) == 0
