"""The record of the dax device that a file system is in. Putting devices back: tests/lab."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pkernfs.dma.mount import mount_filesystem
from pkernfs.errors import RegionError
from pkernfs.fs import placement
from pkernfs.fs.mkfs import make_filesystem
from pkernfs.fs.placement import Placement, encode, open_region, parse, read
from pkernfs.host.iomem import Span
from pkernfs.layout import (
    BACKUP_PAGE,
    BLOCK,
    MAX_PIECES,
    PAGE,
    PLACEMENT_OFFSET,
    POOL_DAX,
    PoolFields,
    page_offset,
)
from pkernfs.quantities import PhysAddr, RegionOff
from pkernfs.region.checksum import page_checksum
from pkernfs.region.dax import read_device
from pkernfs.region.dax_devices import regions
from pkernfs.region.dax_making import keep_base
from pkernfs.region.region import Region
from support.made_up_dax import MadeUpDax
from support.made_up_host import Machine, add_dax, make_machine

M = 1 << 20
G = 1 << 30


def span(start: int, size: int) -> Span:
    return Span(PhysAddr(start), size)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return make_machine(tmp_path, command_line="memmap=512M%1G-1+0xefffffff")


def make(machine: Machine, name: str, *pieces: tuple[int, int]) -> Path:
    """A device with a file system in it."""
    path = add_dax(machine, name, *pieces)
    with Region.open(str(path), write=True, host=machine) as region:
        make_filesystem(region)
    return path


def as_page(record: bytes) -> bytes:
    return bytes(PLACEMENT_OFFSET) + record + bytes(PAGE)


blocks = st.integers(1, 1 << 20).map(lambda n: n * BLOCK)
placements = st.builds(
    Placement,
    st.builds("dax{}.{}".format, st.integers(0, 99999), st.integers(0, 99999)),
    st.sampled_from([4096, 2 * M, G]),
    st.lists(st.builds(span, blocks, blocks), min_size=1, max_size=MAX_PIECES).map(tuple),
)


@given(placements)
def test_a_record_is_read_as_it_was_written(it: Placement) -> None:
    assert parse(as_page(encode(it))) == it


@given(st.binary(min_size=288, max_size=288))
def test_any_bytes(record: bytes) -> None:
    parse(as_page(record))
    parse(as_page(b"\1\0\1\0" + record[4:]))


def test_records_that_make_no_sense() -> None:
    good = Placement("dax0.1", 2 * M, (span(G, 8 * M),))
    assert parse(as_page(encode(None))) is None
    for bad in (
        Placement("dax0", 2 * M, good.pieces),
        Placement("", 2 * M, good.pieces),
        Placement("dax0.1", 3 * M, good.pieces),
        Placement("dax0.1", 0, good.pieces),
        Placement("dax0.1", 2 * M, (span(G + 4096, 8 * M),)),
        Placement("dax0.1", 2 * M, (span(G, 0),)),
        Placement("dax0.1", 2 * M, (span(1 << 52, 8 * M),)),
    ):
        assert parse(as_page(encode(bad))) is None
    with pytest.raises(RegionError, match="too many ranges: got 17, expected up to 16"):
        encode(Placement("dax0.1", 2 * M, (span(G, 8 * M),) * 17))


def test_mkfs_records_it(machine: Machine) -> None:
    path = make(machine, "dax0.1", (G + 64 * M, 6 * M), (G, 4 * M))
    expected = Placement("dax0.1", 2 * M, (span(G + 64 * M, 6 * M), span(G, 4 * M)))
    with open_region(str(path), write=True, host=machine) as region:
        assert read(region) == expected
        assert read(region, RegionOff(PAGE)) is None
        assert parse(region.read(page_offset(BACKUP_PAGE), PAGE)) == expected
    with Region.anonymous(8 * M) as region:
        make_filesystem(region)
        assert read(region) is None


def test_a_mount_records_what_has_changed(machine: Machine) -> None:
    path = make(machine, "dax0.1", (G, 8 * M))
    other = add_dax(machine, "dax0.2", (G + 64 * M, 10 * M))
    with path.open("rb") as source, other.open("r+b") as target:
        target.write(source.read())  # moved
    with open_region(str(other), write=True, host=machine) as region:
        fs = mount_filesystem(region, read_only=True)
        placement.record(fs.super)
        assert read(region) == Placement("dax0.1", 2 * M, (span(G, 8 * M),))
        fs = mount_filesystem(region)
        placement.record(fs.super)
        fs.unmount()
        assert read(region) == Placement("dax0.2", 2 * M, (span(G + 64 * M, 10 * M),))
        assert read(region) == parse(region.read(page_offset(BACKUP_PAGE), PAGE))


def test_a_device_that_is_not_what_it_was(machine: Machine, tmp_path: Path) -> None:
    path = make(machine, "dax0.1", (G, 8 * M), (G + 64 * M, 4 * M))
    contents = path.read_bytes()
    for number, (pieces, fits) in enumerate(
        (
            (((G, 8 * M), (G + 64 * M, 4 * M)), True),
            (((G, 8 * M), (G + 64 * M, 8 * M)), True),
            (((G, 8 * M), (G + 64 * M, 4 * M), (G + 32 * M, 2 * M)), True),
            (((G, 8 * M), (G + 32 * M, 4 * M)), False),
            (((G, 12 * M),), False),
        )
    ):
        machine = make_machine(tmp_path / str(number), command_line="memmap=512M%1G-1+0xefffffff")
        path = add_dax(machine, "dax0.1", *pieces)
        with path.open("r+b") as file:
            file.write(contents)
        if fits:
            open_region(str(path), write=True, host=machine).close()
            continue
        with pytest.raises(RegionError) as caught:
            open_region(str(path), write=True, host=machine)
        assert str(caught.value).endswith(
            "the file system in it is that of /dev/dax0.1 at 8M!1G and 4M!1088M"
        )


def test_records_are_found_where_they_say_they_are(machine: Machine) -> None:
    """As after a kexec: one device over all of the memory that several were made of."""
    first = make(machine, "dax0.1", (G + 4 * M, 8 * M), (G + 32 * M, 8 * M))
    second = make(machine, "dax0.2", (G + 16 * M, 8 * M))
    with first.open("rb") as file:
        pieces = (file.read(8 * M), file.read(8 * M))
    forged = second.read_bytes()
    whole = add_dax(machine, "dax0.0", (G, 64 * M))
    with whole.open("r+b") as file:
        file.seek(4 * M)
        file.write(pieces[0])
        file.seek(32 * M)
        file.write(pieces[1][: 4 * M])
        file.write(forged[: 4 * M])  # a file's contents, at 36 MiB: not where it says
        file.seek(48 * M)
        file.write(pieces[0])  # a copy
        file.seek(16 * M)
        file.write(forged)
    assert regions(machine) == []
    found = list(placement._search(read_device("dax0.0", machine), machine))
    assert [p.name for p in found] == ["dax0.1", "dax0.2"]
    assert found[0].pieces == (span(G + 4 * M, 8 * M), span(G + 32 * M, 8 * M))


def test_what_lies_in_a_file_system_is_not_believed(machine: Machine) -> None:
    path = make(machine, "dax0.0", (G, 64 * M))
    inner = Placement("dax0.9", 2 * M, (span(G + 32 * M, 8 * M),))
    with Region.anonymous(8 * M) as region:
        make_filesystem(region)
        page = bytearray(region.read(RegionOff(0), PAGE))
    page[PLACEMENT_OFFSET : PLACEMENT_OFFSET + 288] = encode(inner)
    page[4:8] = page_checksum(page).to_bytes(4, "little")
    with Region.open(str(path), write=True, host=machine) as region:
        region.copy_in(RegionOff(32 * M), page)
        assert read(region, RegionOff(32 * M)) == inner
    device = read_device("dax0.0", machine)
    assert [p.name for p in placement._search(device, machine)] == ["dax0.0"]


def test_a_base_range_is_put_back_without_the_memory_of_segments(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a kexec one device has all; what a guest has written into a segment is not asked."""
    kernel = MadeUpDax(machine)
    kernel.install(monkeypatch)
    keep_base("dax0.0", 64 * M, machine)
    path = machine.path("dev/dax0.0")
    with Region.open(path, write=True, host=machine) as region:
        make_filesystem(region, pool=PoolFields(POOL_DAX, BLOCK))
        page = region.read(RegionOff(0), PAGE)
    kernel.boot()
    forged = Placement("dax0.0", 2 * M, (span(G + 128 * M, 8 * M),))
    image = bytearray(page)
    image[PLACEMENT_OFFSET : PLACEMENT_OFFSET + 288] = encode(forged)
    image[4:8] = page_checksum(image).to_bytes(4, "little")
    kernel.memory[G + 128 * M] = bytes(image) + bytes(BLOCK - PAGE)
    assert placement._put_back(path, "dax0.0", machine) == path
    with open_region(path, write=True, host=machine) as region:
        assert region.size == 64 * M
        recorded = read(region)
        assert recorded is not None
        assert recorded.exact
    assert read_device("dax0.0", machine).pieces == (span(G, 64 * M),)


@pytest.mark.parametrize("readable", [True, False])
def test_a_large_device_gets_no_driver_only_to_be_cut(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, readable: bool
) -> None:
    """Where /dev/mem can be read: a driver would prepare the pages of all its memory first."""
    kernel = MadeUpDax(machine)
    kernel.install(monkeypatch)
    keep_base("dax0.0", 64 * M, machine)
    path = machine.path("dev/dax0.0")
    with Region.open(path, write=True, host=machine) as region:
        make_filesystem(region, pool=PoolFields(POOL_DAX, BLOCK))
        page = region.read(RegionOff(0), PAGE)
    kernel.boot()
    memory = Path(machine.path("dev/mem"))
    with memory.open("wb") as file:
        file.seek(G if readable else 0)
        file.write(page)
    written: list[str] = []
    kernel.between = written.append
    assert placement._put_back(path, "dax0.0", machine) == path
    assert read_device("dax0.0", machine).pieces == (span(G, 64 * M),)
    assert written.count("unbind") == (0 if readable else 1)
    written.clear()
    assert placement._put_back(path, "dax0.0", machine) == path  # it is itself
    assert written == []


def test_a_base_range_does_not_grow(machine: Machine) -> None:
    """The memory behind it may be that of segments."""
    path = add_dax(machine, "dax0.1", (G, 8 * M))
    with Region.open(str(path), write=True, host=machine) as region:
        make_filesystem(region, pool=PoolFields(POOL_DAX, BLOCK))
    other = make_machine(Path(machine.path("other")))
    longer = add_dax(other, "dax0.1", (G, 16 * M))
    with longer.open("r+b") as file:
        file.write(path.read_bytes())
    with pytest.raises(RegionError, match=r"file system in it is that of /dev/dax0.1 at 8M!1G"):
        placement._check(Region.open(str(longer), write=False, host=other))
