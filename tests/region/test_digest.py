"""Digests: known answers, any way to cut a message, and bounds."""

from __future__ import annotations

import random
from array import array

import pytest

from pkernfs.errors import RegionError
from pkernfs.layout import PAGE
from pkernfs.quantities import RegionOff
from pkernfs.region import digest
from pkernfs.region.checksum import crc32c, page_checksum
from pkernfs.region.digest import Part
from pkernfs.region.region import Region

MIB = 1 << 20


def by_bits(data: bytes) -> int:
    """CRC-64/NVME, as its definition has it."""
    crc = (1 << 64) - 1
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x9A6C9329AC4BC9B5 if crc & 1 else 0)
    return crc ^ (1 << 64) - 1


def test_known_answers() -> None:
    assert digest.crc64(b"123456789") == 0xAE8B14860A799888
    assert digest.crc64(b"") == 0
    # Those of the Linux kernel's documentation and of the NVMe specification: 4 KiB of each.
    assert digest.crc64(bytes(4096)) == 0x6482D367EB22B64E
    assert digest.crc64(b"\xff" * 4096) == 0xC0DDBA7302ECA3AC


@pytest.mark.parametrize("length", [1, 7, 8, 127, 128, 255, 256, 257, 383, 384, 1000, 5000])
def test_as_defined_however_it_is_cut(length: int) -> None:
    data = random.Random(length).randbytes(length)
    expected = by_bits(data)
    assert digest.crc64(data) == expected
    for cut in {0, 1, length // 3, length - 1}:
        assert digest.crc64(data[cut:], digest.crc64(data[:cut])) == expected


@pytest.fixture
def region() -> Region:
    found = Region.anonymous(8 * MIB)
    for at in range(0, 4 * MIB, MIB):
        found.copy_in(RegionOff(at), random.Random(at).randbytes(MIB))
    return found


def test_chunks_of_several_parts(region: Region) -> None:
    data = region.read(RegionOff(0), 8 * MIB)
    chunks = [
        [Part(RegionOff(0), MIB), Part(RegionOff(3 * MIB), 100)],
        [],
        [Part(digest.ZEROS, 70_000), Part(RegionOff(5), 7), Part(digest.ZEROS, 3)],
        [Part(RegionOff(8 * MIB - 1), 1)],
    ]
    expected = [
        digest.crc64(data[:MIB] + data[3 * MIB : 3 * MIB + 100]),
        0,
        digest.crc64(bytes(70_000) + data[5:12] + bytes(3)),
        digest.crc64(b"\0"),
    ]
    assert list(digest.digests(region, chunks)) == expected
    told: list[int] = []
    many = chunks * 3000
    assert list(digest.digest_all(region, many, threads=3, tell=told.append)) == expected * 3000
    assert sum(told) == sum(length for chunk in many for _, length in chunk)
    assert list(digest.digest_all(region, [])) == []


@pytest.mark.parametrize(
    ("offset", "length"), [(8 * MIB, 1), (0, 8 * MIB + 1), (1 << 63, 1), (8, (1 << 64) - 8)]
)
def test_nothing_outside_the_region_is_read(region: Region, offset: RegionOff, length: int) -> None:
    chunks = [[Part(RegionOff(0), 8)], [Part(offset, length)]]
    with pytest.raises(RegionError, match="out of the region"):
        digest.digests(region, chunks)
    with pytest.raises(RegionError, match="out of the region"):
        digest.digest_all(region, chunks)


def test_sums_of_pages(region: Region) -> None:
    pages = array("Q", [0, 7, 2047])
    checksum = page_checksum(region.read(RegionOff(7 * PAGE), PAGE))
    region.copy_in(RegionOff(7 * PAGE + 4), checksum.to_bytes(4, "little"))
    images = [region.read(RegionOff(page * PAGE), PAGE) for page in pages]
    sums = [page_checksum(image) for image in images]
    assert list(digest.page_sums(region, pages)) == [
        ~sums[0] & 0xFFFFFFFF,
        sums[1],
        sums[2] ^ 0xFFFFFFFF,
    ]
    assert list(digest.slot_sums(region, pages)) == [
        crc32c(image[at : at + 256]) for image in images for at in range(0, PAGE, 256)
    ]
    assert not digest.page_sums(region, array("Q"))
    with pytest.raises(RegionError, match="out of the region"):
        digest.page_sums(region, array("Q", [2048]))


@pytest.mark.parametrize("kind", ["I", "B", "d"])
def test_numbers_of_pages_are_words_of_8_bytes(region: Region, kind: str) -> None:
    """Narrower ones would be read beyond their end."""
    with pytest.raises(TypeError, match="page numbers: got items"):
        digest.page_sums(region, array(kind, [0, 1]))
    with pytest.raises(TypeError, match="page numbers: got items"):
        digest.slot_sums(region, array(kind, [0, 1]))
