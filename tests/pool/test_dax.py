"""Segments on device-dax, by a made-up kernel: made, changed, lost, and whose a device is."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pkernfs.errors import BusyError, LockedError, NoSpaceError, RegionError
from pkernfs.host.holders import Look, Target
from pkernfs.host.iomem import Span
from pkernfs.host.mappings import maps_device
from pkernfs.layout import POOL_DAX, SEGMENT_IN_USE
from pkernfs.pool import dax as pool_dax
from pkernfs.pool.dax import DaxPool
from pkernfs.pool.pool import Holder, Owner, Pool, Segment
from pkernfs.quantities import Ino, PhysAddr, RegionOff, SegmentNo
from pkernfs.region import dax_making, dax_node
from pkernfs.region.dax import device_names, read_device
from pkernfs.region.region import Region
from support.made_up_dax import REGION, G, M, MadeUpDax
from support.made_up_host import Machine, add_dax, make_machine

BASE = 64 * M
START = RegionOff(0)


def span(start: int, size: int) -> Span:
    return Span(PhysAddr(start), size)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return make_machine(tmp_path, command_line="memmap=512M%1G-1+0xefffffff")


@pytest.fixture
def kernel(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> MadeUpDax:
    """A dax region of 512 MiB, of which the base has the first 64."""
    made = MadeUpDax(machine)
    made.install(monkeypatch)
    dax_making.keep_base("dax0.0", BASE, machine)
    return made


@pytest.fixture
def pool(kernel: MadeUpDax, machine: Machine) -> DaxPool:
    return DaxPool(read_device("dax0.0", machine), write=True, host=machine)


def wanted(length: int, number: int = 1, *pieces: Span) -> Segment:
    return Segment(SegmentNo(number), Ino(number + 1), POOL_DAX, length, pieces=pieces)


def make(pool: Pool, length: int, number: int = 1, others: tuple[Segment, ...] = ()) -> Segment:
    """A segment, as the file system makes it."""
    made = pool.create(pool.plan(wanted(length, number), list(others)))
    return made._replace(state=SEGMENT_IN_USE)


def fill(pool: Pool, row: Segment, byte: bytes) -> None:
    with pool.open(row, write=True) as memory:
        memory.copy_in(START, byte * row.length)


def bytes_of(pool: Pool, row: Segment) -> set[int]:
    with pool.open(row, write=False) as memory:
        return set(memory.read(START, row.length))


def next_kernel(kernel: MadeUpDax, pool: Pool) -> DaxPool:
    """A kexec: the devices are forgotten, and that of the base is put back."""
    pool.close()
    kernel.boot()
    dax_making.keep_base("dax0.0", BASE, kernel.machine)
    return DaxPool(read_device("dax0.0", kernel.machine), write=True, host=kernel.machine)


# ---------------------------------------------------------------------- made and taken apart


def test_a_segment_is_a_device_of_its_own(pool: Pool, kernel: MadeUpDax, machine: Machine) -> None:
    row = make(pool, 8 * M)
    assert (row.name, row.valid, row.align, row.node) == ("dax0.1", 8 * M, 2 * M, 1)
    device = read_device(row.name, machine)
    assert (device.pieces, device.driver) == (row.pieces, "device_dax")
    assert kernel.access[row.name] == dax_node.FOR_ROOT
    assert pool.native_path(row) == machine.path("dev/dax0.1")
    assert bytes_of(pool, row) == {0}
    pool.set_owner(row, Owner(1000, 100, 0o751))
    assert kernel.access[row.name] == (1000, 100, 0o640)
    pool.destroy(row)
    pool.destroy(row)  # there is nothing
    assert device_names(machine) == ["dax0.0"]
    assert pool.space().free == 448 * M


def test_memory_is_zeroed_before_it_is_used_again(pool: Pool) -> None:
    first = make(pool, 4 * M)
    fill(pool, first, b"s")
    pool.destroy(first)
    again = make(pool, 4 * M, 2)
    assert again.pieces == first.pieces
    assert bytes_of(pool, again) == {0}


def test_a_kernel_that_binds_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = make_machine(tmp_path)
    kernel = MadeUpDax(machine, takes_all=True)
    kernel.install(monkeypatch)
    dax_making.keep_base("dax0.0", BASE, machine)
    pool = DaxPool(read_device("dax0.0", machine), write=True, host=machine)
    row = make(pool, 4 * M)
    pool = next_kernel(kernel, pool)
    assert pool.restore(row) == row


def test_pages_of_one_gib_where_the_base_has_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = make_machine(tmp_path)
    kernel = MadeUpDax(machine, 4 * G)
    kernel.install(monkeypatch)
    dax_making.set_align("dax0.0", G, "x", machine)
    with pytest.raises(RegionError, match="bad size: got 67108864, expected a multiple of 1G"):
        dax_making.keep_base("dax0.0", BASE, machine)
    dax_making.keep_base("dax0.0", G, machine)
    pool = DaxPool(read_device("dax0.0", machine), write=True, host=machine)
    row = pool.plan(wanted(G), [])
    assert (row.align, row.pieces[0].start % G) == (G, 0)
    row = pool.create(row._replace(valid=row.length))
    assert read_device(row.name, machine).align == G
    longer = pool.plan(row._replace(length=G + 2 * M), [])
    assert longer.align == 2 * M
    grown = pool.resize(longer)
    assert (grown.align, read_device(row.name, machine).align) == (2 * M, 2 * M)


# ---------------------------------------------------------------------- planning


def test_rows_whose_device_is_not_there_count(pool: Pool) -> None:
    other = pool.plan(wanted(440 * M, 7), [])
    assert pool.space() == (512 * M, 8 * M, 8 * M)  # it is promised
    row = pool.plan(wanted(8 * M), [other])
    assert row.pieces == (span(G + 504 * M, 8 * M),)
    with pytest.raises(NoSpaceError, match=r"no room for 2M: 0 free in NUMA node 1$"):
        pool.plan(wanted(2 * M, 2), [other, row])


def test_fragmented(pool: Pool, kernel: MadeUpDax) -> None:
    kernel.foreign(*(span(G + 64 * M + i * 4 * M, 2 * M) for i in range(112)))
    assert pool.space().free == 224 * M
    most = pool.plan(wanted(128 * M), [])
    assert len(most.pieces) == 64
    with pytest.raises(NoSpaceError) as caught:
        pool.plan(wanted(130 * M), [])
    assert str(caught.value) == (
        "the dax region of /dev/dax0.0: no room for 130M: 224M free in NUMA node 1, "
        "the largest piece 2M, and it may have 64 pieces"
    )


def test_growth_continues_what_is_there(pool: Pool) -> None:
    row = make(pool, 4 * M)
    for length in range(6 * M, 200 * M, 2 * M):  # more often than there may be pieces
        row = pool.plan(row._replace(length=length), [])
    assert row.pieces == (span(G + 64 * M, 198 * M),)
    other = make(pool, 2 * M, 2, (row,))
    longer = pool.plan(row._replace(length=210 * M), [other])
    assert longer.pieces == (row.pieces[0], span(other.pieces[0].end, 12 * M))


def test_where_a_full_dax_region_begins(kernel: MadeUpDax, machine: Machine) -> None:
    """The kernel makes no device there that would tell."""
    kernel.foreign(span(G + BASE, 448 * M))
    pool = DaxPool(read_device("dax0.0", machine), write=True, host=machine)
    assert pool.space() == (512 * M, 0, 0)
    with pytest.raises(NoSpaceError, match="no room for 2M: 0 free"):
        pool.plan(wanted(2 * M), [])
    assert pool.capacity() == 448 * M
    assert device_names(machine) == ["dax0.0", "dax0.1"]


# ---------------------------------------------------------------------- others in the way


def test_memory_that_somebody_takes_meanwhile(
    pool: Pool, kernel: MadeUpDax, machine: Machine
) -> None:
    row = pool.plan(wanted(8 * M), [])
    theirs = kernel.foreign(span(row.pieces[0].start + 4 * M, 2 * M))
    with pytest.raises(RegionError, match=r"^segment 1: /dev/dax0.1 has memory of it$"):
        pool.create(row)
    assert device_names(machine) == ["dax0.0", theirs]
    with pytest.raises(RegionError, match=r"segment 1: its device is lost: /dev/dax0.1 has memory"):
        pool.destroy(row)
    assert read_device(theirs, machine).size == 2 * M
    again = pool.create(pool.plan(wanted(8 * M, 2), []))
    assert again.pieces == (span(G + 70 * M, 8 * M),)


@pytest.mark.parametrize("attribute", ["mapping", "new_id", "align"])
def test_what_was_made_of_it_is_taken_apart(
    pool: Pool, kernel: MadeUpDax, machine: Machine, attribute: str
) -> None:
    row = pool.plan(wanted(4 * M), [])
    kernel.refuses = attribute
    if attribute == "align":  # nothing to set, so nothing to refuse
        assert pool.create(row).valid == 4 * M
        return
    with pytest.raises(RegionError, match=r"cannot write .*: Invalid argument"):
        pool.create(row)
    assert device_names(machine) == ["dax0.0"]
    assert pool.space().free == 448 * M


def test_a_mapping_that_the_kernel_ignores(pool: Pool, machine: Machine) -> None:
    """It says nothing of what is not aligned."""
    row = wanted(3 * M, 1, span(G + 64 * M, 3 * M))
    with pytest.raises(RegionError, match="segment 1: the kernel made 0 bytes of 3145728"):
        pool.create(row)
    assert device_names(machine) == ["dax0.0"]


def test_another_driver(pool: Pool, machine: Machine) -> None:
    row = make(pool, 4 * M)
    link = Path(machine.path(f"{REGION}/{row.name}/driver"))
    link.unlink()
    link.symlink_to("/drivers/kmem")
    for act in (pool.destroy, pool.restore, pool.check_unused):
        with pytest.raises(RegionError, match="it is in system-ram mode"):
            act(row)


@pytest.mark.usefixtures("impatient")
def test_nobody_makes_a_region_of_a_segment(pool: Pool, machine: Machine) -> None:
    row = make(pool, 8 * M)
    path = pool.native_path(row)
    with pytest.raises(LockedError, match="in use: it is mounted"):
        Region.open(path, write=True, host=machine)
    pool.close()
    with Region.open(path, write=True, host=machine) as theirs:
        theirs.serving(True)
        again = DaxPool(read_device("dax0.0", machine), write=True, host=machine)
        for act in (again.restore, lambda row: again.open(row, write=False)):
            with pytest.raises(LockedError, match="in use"):
                act(row)
        again.close()


def test_a_segment_that_is_destroyed_is_locked_no_more(pool: Pool, kernel: MadeUpDax) -> None:
    row = make(pool, 8 * M)
    pool.destroy(row)
    theirs = kernel.foreign(*row.pieces)
    Region.open(kernel.machine.path(f"dev/{theirs}"), write=True, host=kernel.machine).close()


# ---------------------------------------------------------------------- after a kexec


def test_segments_are_made_again(pool: Pool, kernel: MadeUpDax, machine: Machine) -> None:
    first, second = make(pool, 4 * M), make(pool, 8 * M, 2)
    fill(pool, first, b"1")
    fill(pool, second, b"2")
    pool = next_kernel(kernel, pool)
    assert device_names(machine) == ["dax0.0"]
    now = pool.restore(second)  # and gets the name of the other
    assert now == second._replace(name="dax0.1")
    assert pool.restore(first).name == "dax0.2"
    assert bytes_of(pool, now) == {ord("2")}
    assert bytes_of(pool, first) == {ord("1")}
    assert pool.restore(now) == now  # it is there
    assert pool.strays([first, second]) == []


def test_names_prove_nothing(pool: Pool, kernel: MadeUpDax, machine: Machine) -> None:
    row = make(pool, 8 * M)
    pool = next_kernel(kernel, pool)
    theirs = kernel.foreign(span(row.pieces[0].start, 4 * M))
    assert theirs == row.name
    with pytest.raises(RegionError, match=r"segment 1: /dev/dax0.1 has memory of it"):
        pool.restore(row)
    for act in (pool.resize, pool.destroy, lambda row: pool.open(row, write=True)):
        with pytest.raises(RegionError, match=r"segment 1: its device is lost: /dev/dax0.1 has"):
            act(row)
    assert pool.holders(row) == []
    assert pool.strays([row]) == []
    assert read_device(theirs, machine).size == 4 * M


def test_paths_are_by_the_names_of_this_kernel(
    pool: DaxPool, kernel: MadeUpDax, machine: Machine
) -> None:
    """Also for who has restored nothing, as a read-only mount beside a daemon that was killed."""
    one, two, lost = make(pool, 4 * M), make(pool, 2 * M, 2), make(pool, 2 * M, 3)
    pool = next_kernel(kernel, pool)
    pool.restore(two)
    pool.restore(one)
    reader = DaxPool(read_device("dax0.0", machine), write=False, lock=False, host=machine)
    for asked in (pool, reader):
        assert asked.native_path(one) == machine.path(f"dev/{two.name}")
        assert asked.native_path(two) == machine.path(f"dev/{one.name}")
        with pytest.raises(RegionError, match="segment 3: its device is not there"):
            asked.native_path(lost)


def test_the_base_is_no_segment(pool: Pool) -> None:
    row = wanted(BASE, 1, span(G, BASE))
    with pytest.raises(RegionError, match=r"its device is lost: /dev/dax0.0 has memory of it"):
        pool.destroy(row)


def test_a_row_that_says_nothing(pool: Pool) -> None:
    with pytest.raises(RegionError, match="segment 1: it is not recorded where it is"):
        pool.restore(wanted(2 * M))


@pytest.mark.parametrize("stop", ["mapping", "bind", "new_id", "delete", "size"])
def test_a_mount_that_is_killed_while_it_makes_one(
    pool: Pool, kernel: MadeUpDax, machine: Machine, stop: str
) -> None:
    """The next mount destroys what there is of it: its node says whose it is."""
    row = pool.plan(wanted(4 * M), [])
    destroyed = stop in ("delete", "size")
    if destroyed:
        row = pool.create(row)

    def die(attribute: str) -> None:
        if attribute == stop:
            raise KeyboardInterrupt

    kernel.between = die
    act = pool.destroy if destroyed else pool.create
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(DaxPool, "_take_apart", lambda pool, name: None)
        with pytest.raises(KeyboardInterrupt):
            act(row)
    kernel.between = lambda attribute: None
    assert len(device_names(machine)) == 2
    pool.close()
    pool = DaxPool(read_device("dax0.0", machine), write=True, host=machine)
    pool.destroy(row)
    assert pool.strays([]) == []
    assert device_names(machine) == ["dax0.0"]


def test_devices_that_no_row_knows(pool: Pool, kernel: MadeUpDax, machine: Machine) -> None:
    """One that a mount has made is named, and stays; those of others are their own business."""
    row = make(pool, 4 * M)
    kernel.foreign(span(G + 128 * M, 4 * M))
    assert pool.strays([row]) == []
    assert pool.strays([]) == [
        "/dev/dax0.1: made as a segment that the file system does not know: "
        "daxctl destroy-device -f dax0.1"
    ]
    assert len(device_names(machine)) == 3


# ---------------------------------------------------------------------- longer and shorter


def test_longer_and_shorter(pool: Pool, kernel: MadeUpDax, machine: Machine) -> None:
    row = make(pool, 4 * M)
    other = make(pool, 2 * M, 2, (row,))
    fill(pool, row, b"x")
    pool.set_owner(row, Owner(1000, 100, 0o640))
    planned = pool.plan(row._replace(length=10 * M), [other])
    grown = pool.resize(planned._replace(valid=row.length))
    assert (grown.valid, grown.name) == (10 * M, row.name)
    assert read_device(row.name, machine).pieces == planned.pieces
    with pool.open(grown, write=False) as memory:
        assert set(memory.read(START, 4 * M)) == {ord("x")}
        assert memory.is_zero(RegionOff(4 * M), 6 * M)
    fill(pool, grown, b"y")
    shorter = grown._replace(length=2 * M, valid=2 * M, pieces=(span(G + 64 * M, 2 * M),))
    assert pool.resize(shorter) == shorter
    assert bytes_of(pool, shorter) == {ord("y")}
    assert kernel.access[row.name] == (1000, 100, 0o640)
    again = pool.plan(shorter._replace(length=4 * M), [other])
    assert bytes_of(pool, pool.resize(again)) == {0, ord("y")}


def test_growth_in_place_is_the_same_after_a_kexec(pool: Pool, kernel: MadeUpDax) -> None:
    """The kernel has two ranges then, that touch; the row has one piece."""
    row = make(pool, 4 * M)
    grown = pool.resize(pool.plan(row._replace(length=8 * M), []))
    assert len(grown.pieces) == 1
    assert len(read_device(row.name, kernel.machine).pieces) == 2
    fill(pool, grown, b"x")
    assert pool.restore(grown) == grown
    pool = next_kernel(kernel, pool)
    assert pool.restore(grown) == grown
    assert bytes_of(pool, grown) == {ord("x")}


@pytest.mark.parametrize("attribute", ["mapping", "new_id", "unbind"])
def test_growth_that_fails(pool: Pool, kernel: MadeUpDax, machine: Machine, attribute: str) -> None:
    row = make(pool, 4 * M)
    fill(pool, row, b"x")
    planned = pool.plan(row._replace(length=8 * M), [])
    refused: list[str] = []

    def once(written: str) -> None:
        kernel.refuses = attribute if written == attribute and not refused else ""
        refused.extend([attribute] if written == attribute else [])

    kernel.between = once
    with pytest.raises(RegionError, match="Invalid argument"):
        pool.resize(planned)
    assert bytes_of(pool, row) == {ord("x")}
    assert pool.space().free == 444 * M


def test_growth_into_memory_that_somebody_takes(
    pool: Pool, kernel: MadeUpDax, machine: Machine
) -> None:
    row = make(pool, 4 * M)
    fill(pool, row, b"x")
    planned = pool.plan(row._replace(length=8 * M), [])
    kernel.foreign(span(row.pieces[0].end, 2 * M))
    with pytest.raises(RegionError, match=r"segment 1: /dev/dax0.2 has memory of it"):
        pool.resize(planned)
    assert bytes_of(pool, row) == {ord("x")}


@pytest.mark.parametrize("kexec", [False, True])
def test_an_interrupted_growth_is_completed(
    pool: Pool, kernel: MadeUpDax, machine: Machine, kexec: bool
) -> None:
    row = make(pool, 4 * M)
    kernel.memory[G + 68 * M] = b"secret!!" * (2 * M // 8)
    fill(pool, row, b"x")
    planned = pool.plan(row._replace(length=8 * M), [])._replace(valid=row.length)
    pool.close()  # killed here
    pool = DaxPool(read_device("dax0.0", machine), write=True, host=machine)
    if kexec:
        pool = next_kernel(kernel, pool)
    now = pool.restore(planned)
    assert now == planned._replace(valid=8 * M)
    assert bytes_of(pool, now) == {0, ord("x")}


def test_an_interrupted_cut_is_completed(pool: Pool, kernel: MadeUpDax, machine: Machine) -> None:
    """In the same kernel: the node says that the longer device is the segment's."""
    row = make(pool, 8 * M)
    fill(pool, row, b"x")
    shorter = row._replace(length=4 * M, valid=4 * M, pieces=(span(G + 64 * M, 4 * M),))
    assert pool.restore(shorter) == shorter
    assert read_device(row.name, machine).pieces == shorter.pieces
    assert bytes_of(pool, shorter) == {ord("x")}
    kernel.labels.clear()
    shortest = row._replace(length=2 * M, valid=2 * M, pieces=(span(G + 64 * M, 2 * M),))
    with pytest.raises(RegionError, match="has memory of it"):
        pool.restore(shortest)  # somebody else's, for all that is known


def test_a_device_without_its_driver(pool: Pool, kernel: MadeUpDax, machine: Machine) -> None:
    row = make(pool, 4 * M)
    fill(pool, row, b"x")
    dax_making.unbind(row.name, machine)
    with pytest.raises(RegionError, match=r"segment 1: /dev/dax0.1 is not whole: mount again"):
        pool.open(row, write=False)
    pool.close()
    pool = DaxPool(read_device("dax0.0", machine), write=True, host=machine)
    assert pool.restore(row) == row
    assert bytes_of(pool, row) == {ord("x")}


# ---------------------------------------------------------------------- holders


def test_what_is_held_stays(pool: Pool, kernel: MadeUpDax, machine: Machine) -> None:
    row = make(pool, 8 * M)
    fill(pool, row, b"x")
    pool.set_owner(row, Owner(1000, 100, 0o640))
    shorter = row._replace(length=4 * M, valid=4 * M, pieces=(span(G + 64 * M, 4 * M),))
    kernel.hold(77, row.name)
    kernel.hold(78, row.name)
    assert pool.holders(row) == [Holder(77, "qemu", "maps"), Holder(78, "qemu", "maps")]
    for act in (
        lambda: pool.check_unused(row),
        lambda: pool.resize(shorter),
        lambda: pool.resize(pool.plan(row._replace(length=16 * M), [])),
        lambda: pool.punch(row, 0, 2 * M),
    ):
        with pytest.raises(
            BusyError, match=r"^segment 1: busy: process 77 \(qemu\) maps it, and 1 more$"
        ):
            act()
    assert kernel.access[row.name] == (1000, 100, 0o640)
    with pytest.raises(BusyError, match="segment 1: busy: process 77"):
        pool.destroy(row)
    assert kernel.access[row.name] == dax_node.FOR_ROOT  # nobody else comes to it
    assert bytes_of(pool, row) == {ord("x")}
    kernel.end(77)
    kernel.end(78)
    pool.punch(row, 2 * M, 4 * M)
    with pool.open(row, write=False) as memory:
        assert memory.is_zero(RegionOff(2 * M), 2 * M)
        assert not memory.is_zero(RegionOff(4 * M), 2 * M)
    pool.destroy(row)
    pool.check_unused(row)


def test_a_cut_that_somebody_prevents(
    pool: DaxPool, kernel: MadeUpDax, machine: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    """The device stays longer; when the segment grows again, it is by what it has already."""
    row = make(pool, 8 * M)
    other = make(pool, 2 * M, 2, (row,))
    fill(pool, row, b"x")
    shorter = row._replace(length=4 * M, valid=4 * M, pieces=(span(G + 64 * M, 4 * M),))
    kernel.hold(77, row.name)
    assert pool.restore(shorter) == shorter
    assert "maps it: it stays longer than it should be" in caplog.text
    caplog.clear()
    assert bytes_of(pool, shorter) == {ord("x")}
    pool.set_owner(shorter, Owner(1000, 100, 0o600))
    planned = pool.plan(shorter._replace(length=6 * M), [other])
    assert planned.pieces == (span(G + 64 * M, 6 * M),)
    with pytest.raises(BusyError):
        pool.resize(planned)
    whole = pool.plan(shorter._replace(length=8 * M), [other])
    now = pool.resize(whole)  # nothing is made for it
    assert now.valid == 8 * M
    assert bytes_of(pool, now) == {0, ord("x")}
    kernel.end(77)
    longer = pool.plan(shorter._replace(length=12 * M), [other])
    assert longer.pieces == (span(G + 64 * M, 8 * M), span(G + 74 * M, 4 * M))
    assert bytes_of(pool, pool.resize(longer)) == {0, ord("x")}
    pool = next_kernel(kernel, pool)
    assert pool.restore(shorter).length == 4 * M


def test_who_comes_between(pool: Pool, kernel: MadeUpDax) -> None:
    """Only root opens a device while it is changed; who has come before that is seen."""
    row = make(pool, 8 * M)
    pool.set_owner(row, Owner(1000, 100, 0o640))
    during = []
    kernel.between = lambda attribute: during.append(kernel.access[row.name].mode)
    pool.resize(row._replace(length=4 * M, valid=4 * M, pieces=(span(G + 64 * M, 4 * M),)))
    assert set(during) == {0o600}
    assert kernel.access[row.name].mode == 0o640


def test_a_file_of_a_mount_by_which_it_is_reached(
    pool: Pool, kernel: MadeUpDax, machine: Machine
) -> None:
    row = make(pool, 4 * M)
    link = machine.write("file", b"")
    pool.passed = lambda row: Target.of(os.stat(link), "")
    found = link.stat()
    line = f"7f00-7f01 rw-s 0000 {maps_device(found.st_dev)} {found.st_ino} /mnt/guest\n"
    machine.write("proc/79/maps", line)
    machine.write("proc/79/comm", "vmm\n")
    Path(machine.path("proc/79/fd")).mkdir()
    assert pool.holders(row) == [Holder(79, "vmm", "maps")]


def test_who_lets_nobody_look(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    row = make(pool, 4 * M)
    monkeypatch.setattr(pool_dax, "look", lambda targets, host: Look([], 2))
    with pytest.raises(BusyError, match=r"busy: one of the processes that .* \(2\) may have it"):
        pool.check_unused(row)


def test_segments_of_an_earlier_file_system(
    pool: DaxPool, kernel: MadeUpDax, machine: Machine
) -> None:
    make(pool, 4 * M)
    second = make(pool, 4 * M, 2)
    kernel.foreign(span(G + 128 * M, 4 * M))
    assert pool.segment_names() == ["dax0.1", "dax0.2"]
    pool.close()  # that was another process
    pool = DaxPool(read_device("dax0.0", machine), write=True, host=machine)
    kernel.hold(77, second.name)
    pool.remove("dax0.1")
    with pytest.raises(BusyError, match=r"/dev/dax0.2: in use by qemu \(77\)"):
        pool.remove("dax0.2")
    assert device_names(machine) == ["dax0.0", "dax0.2", "dax0.3"]


def test_a_dax_region_that_cannot_be_divided(machine: Machine) -> None:
    add_dax(machine, "dax1.0", (G, 8 * M))
    with pytest.raises(RegionError, match=r"/dev/dax1.0: its dax region cannot be divided"):
        DaxPool(read_device("dax1.0", machine), write=True, host=machine)


def test_memory_in_front_of_the_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A base that was made by hand: where the dax region begins, the kernel tells."""
    machine = make_machine(tmp_path)
    kernel = MadeUpDax(machine)
    kernel.install(monkeypatch)
    for empty_is_there in (True, False):
        kernel.boot()
        dax_making.set_size("dax0.0", 0, "x", machine)
        if not empty_is_there:
            dax_making.add_piece("dax0.0", span(G + 500 * M, 2 * M), "x", machine)
        base = kernel.foreign(span(G + 256 * M, BASE))
        pool = DaxPool(read_device(base, machine), write=True, host=machine)
        assert pool.plan(wanted(200 * M), []).pieces == (span(G, 200 * M),)
        assert "dax0.2" not in device_names(machine)
        pool.close()


def test_what_a_device_under_vfio_reaches_is_busy(pool: DaxPool) -> None:
    """No process has it: /proc shows nothing of that."""
    row = make(pool, 8 * M)
    asked: list[tuple[Span, ...]] = []

    def reached(pieces: tuple[Span, ...]) -> str | None:
        asked.append(pieces)
        return "device 0000:00:05.0"

    pool.reached = reached
    message = "segment 1: busy: device 0000:00:05.0, under VFIO, reaches it"
    for change in (
        lambda: pool.check_unused(row),
        lambda: pool.resize(row._replace(length=4 * M, pieces=(span(row.pieces[0].start, 4 * M),))),
        lambda: pool.punch(row, 0, 4096),
        lambda: pool.destroy(row),
    ):
        with pytest.raises(BusyError, match=message):
            change()
    assert set(asked) == {row.pieces}
    assert pool.holders(row) == [Holder(0, "device 0000:00:05.0, under VFIO,", "reaches")]
    pool.reached = lambda pieces: None
    pool.destroy(row)
