"""Digests: known answers, any way to cut a message, and bounds."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from pkernfs.errors import RegionError
from pkernfs.layout import PAGE
from pkernfs.quantities import RegionOff
from pkernfs.region import digest
from pkernfs.region.checksum import crc32c, page_checksum
from pkernfs.region.digest import Part, Source
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


def memories(count: int) -> list[Region]:
    """Small regions of different bytes."""
    found = []
    for number in range(count):
        memory = Region.anonymous(2 * MIB)
        memory.copy_in(RegionOff(0), random.Random(number).randbytes(2 * MIB))
        found.append(memory)
    return found


class Opening:
    """Counts how many memories are open."""

    def __init__(self) -> None:
        self.now = self.most = self.closed = 0
        self._lock = threading.Lock()

    @contextmanager
    def open(self, memory: Region) -> Iterator[Region]:
        with self._lock:
            self.now += 1
            self.most = max(self.most, self.now)
        yield memory
        with self._lock:
            self.now -= 1
            self.closed += 1


@pytest.mark.parametrize("threads", [1, 3])
def test_memories_are_opened_when_their_turn_comes(threads: int) -> None:
    regions = memories(12)
    opening = Opening()
    chunks = [[Part(RegionOff(at), 65536)] for at in range(0, 2 * MIB, 65536)]
    sources = [Source(partial(opening.open, r), lambda _: iter(chunks)) for r in regions]
    sources.insert(7, Source(partial(opening.open, regions[0]), lambda _: ()))
    told: list[int] = []
    found = digest.digest_sources(sources, threads=threads, tell=told.append)
    assert found.pop(7) == array("Q")
    assert found == [digest.digest_all(r, chunks, threads=1) for r in regions]
    assert (opening.now, opening.closed) == (0, 13)
    assert opening.most <= 2 * threads + 1
    assert sum(told) == 24 * MIB


@pytest.mark.parametrize("threads", [1, 2])
def test_an_error_is_that_of_its_memory_alone(threads: int) -> None:
    opening = Opening()
    one, other = memories(2)

    def refuse() -> Region:
        raise RegionError("gone")

    def amid(_: Region) -> Iterator[list[Part]]:
        yield [Part(RegionOff(0), 5)]
        raise RegionError("lost")

    good = [[Part(RegionOff(0), 2 * MIB)]]
    bad = [[Part(RegionOff(0), MIB)]] * 100 + [[Part(RegionOff(MIB), MIB + 1)]] * 100
    sources = [
        Source(refuse, lambda _: good),
        Source(partial(opening.open, one), lambda _: good),
        Source(partial(opening.open, one), lambda _: bad),
        Source(partial(opening.open, one), amid),
        Source(partial(opening.open, other), lambda _: good),
    ]
    found = digest.digest_sources(sources, threads=threads)
    assert [str(found[i]) for i in (0, 3)] == ["gone", "lost"]
    assert "out of the region" in str(found[2])
    assert [found[1], found[4]] == [digest.digest_all(r, good) for r in (one, other)]
    assert opening.now == 0


def test_any_other_error_ends_it_and_leaves_nothing_open() -> None:
    opening = Opening()
    (memory,) = memories(1)

    def fail(_: int) -> None:
        raise KeyError("a bug")

    chunks = [[Part(RegionOff(0), 2 * MIB)]] * 100
    sources = [Source(partial(opening.open, memory), lambda _: iter(chunks))] * 3
    with pytest.raises(KeyError, match="a bug"):
        digest.digest_sources(sources, threads=2, tell=fail)
    assert opening.now == 0


CUT = """
import os, sys
from pkernfs.errors import RegionError
from pkernfs.region import digest
from pkernfs.region.bus_error import exit_on_bus_error
from pkernfs.region.files import OpenFileBacking
from pkernfs.region.region import Region
exit_on_bus_error("a fault", 9)
for may_vanish in (True, False):
    fd = os.open(sys.argv[1], os.O_RDWR)
    os.truncate(fd, 8 << 20)
    backing = OpenFileBacking(fd, "segment")
    backing.may_vanish = may_vanish
    region = Region(backing, writable=False)
    chunks = [[digest.Part(at, 1 << 20)] for at in range(0, 8 << 20, 1 << 20)]
    whole = digest.digests(region, chunks)
    os.truncate(fd, 4096)
    try:
        digest.digests(region, chunks)
    except RegionError as e:
        print(e, flush=True)
    os.truncate(fd, 8 << 20)
    assert digest.digests(region, chunks) == whole, "the guard is as it was"
    os.truncate(fd, 4096)
digest.digest_all(region, chunks, threads=3)
"""


def test_memory_that_is_gone_is_the_end_but_for_a_segment(tmp_path: Path) -> None:
    path = tmp_path / "segment"
    path.touch()
    done = subprocess.run([sys.executable, "-c", CUT, path], capture_output=True, text=True)
    assert done.stdout == "segment: cut behind pkernfs's back\n"
    assert done.returncode == 9
    assert done.stderr.startswith("a fault: bus error: ")


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
