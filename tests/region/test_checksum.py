"""CRC-32C: known answers, any way to cut a message, and a page's own field."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from pkernfs.layout import PAGE
from pkernfs.quantities import PageNo, RegionOff
from pkernfs.region.checksum import crc32c, page_checksum
from pkernfs.region.region import Region


def test_crc32c_known_answers() -> None:
    # RFC 3720, B.4, and the usual check value
    assert crc32c(b"") == 0
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(bytes(32)) == 0x8A9136AA
    assert crc32c(b"\xff" * 32) == 0x62A8AB43
    assert crc32c(bytes(range(32))) == 0x46DD794E
    assert crc32c(bytes(range(31, -1, -1))) == 0x113FDB5C
    assert crc32c(memoryview(bytearray(b"123456789"))) == 0xE3069283


def _slow_crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


@given(data=st.binary(max_size=200), cut=st.integers(0, 200))
def test_crc32c_is_what_it_is_and_can_be_continued(data: bytes, cut: int) -> None:
    assert crc32c(data) == _slow_crc32c(data)
    assert crc32c(data[cut:], crc32c(data[:cut])) == crc32c(data)


def test_page_checksums_leave_their_own_field_out() -> None:
    page = bytearray(random.Random(1).randbytes(PAGE))
    expected = crc32c(bytes(page[:4]) + bytes(4) + bytes(page[8:]))
    assert page_checksum(page) == expected
    page[4:8] = b"abcd"
    assert page_checksum(page) == expected
    page[8] ^= 1
    assert page_checksum(page) != expected
    with Region.anonymous(2 * PAGE) as region:
        region.copy_in(RegionOff(PAGE), page)
        assert region.page_checksum(PageNo(1)) == page_checksum(page)
