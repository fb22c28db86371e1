"""The memory of segments, kept by parking devices until their own are made, by a made-up kernel."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pkernfs.errors import LockedError, RegionError
from pkernfs.host.iomem import Span
from pkernfs.layout import POOL_DAX, SEGMENT_IN_USE
from pkernfs.pool import dax_parking
from pkernfs.pool.dax import DaxPool
from pkernfs.pool.pool import Owner, Segment
from pkernfs.quantities import Ino, PhysAddr, RegionOff, SegmentNo
from pkernfs.region import dax_making, dax_node
from pkernfs.region.dax import DRIVER, device_names, read_device
from pkernfs.region.locks import PhysicalLocks
from support.made_up_dax import REGION, G, M, MadeUpDax
from support.made_up_host import Machine, make_machine

BASE = 64 * M
START = RegionOff(0)
SIZES = (4 * M, 2 * M, 6 * M, 2 * M, 4 * M)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return make_machine(tmp_path, command_line="memmap=512M%1G-1+0xefffffff")


@pytest.fixture
def kernel(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> MadeUpDax:
    """A dax region of 512 MiB, of which the base has the first 64; three segments in a device."""
    made = MadeUpDax(machine)
    made.install(monkeypatch)
    monkeypatch.setattr(dax_parking, "MOST_SEGMENTS", 3)
    dax_making.keep_base("dax0.0", BASE, machine)
    return made


def open_pool(machine: Machine) -> DaxPool:
    return DaxPool(read_device("dax0.0", machine), write=True, host=machine)


def boot(kernel: MadeUpDax) -> DaxPool:
    """The next kernel has forgotten the devices; that of the base is put back."""
    kernel.boot()
    dax_making.keep_base("dax0.0", BASE, kernel.machine)
    return open_pool(kernel.machine)


@pytest.fixture
def rows(kernel: MadeUpDax) -> list[Segment]:
    """Segments that each hold their number, and a kexec after that; one is of two pieces."""
    pool = open_pool(kernel.machine)
    made: list[Segment] = []
    for number, size in enumerate(SIZES, 1):
        row = Segment(SegmentNo(number), Ino(number + 1), POOL_DAX, size)
        made.append(pool.create(pool.plan(row, made))._replace(state=SEGMENT_IN_USE))
    made[1] = pool.resize(pool.plan(made[1]._replace(length=4 * M), made))
    assert len(made[1].pieces) == 2
    for row in made:
        with pool.open(row, write=True) as memory:
            memory.copy_in(START, bytes([row.number]) * row.length)
    pool.close()
    return made


@pytest.fixture
def pool(kernel: MadeUpDax, rows: list[Segment]) -> Iterator[DaxPool]:
    pool = boot(kernel)
    yield pool
    pool.close()


def bytes_of(pool: DaxPool, row: Segment) -> set[int]:
    with pool.open(row, write=False) as memory:
        return set(memory.read(START, row.length))


def parking(machine: Machine) -> list[str]:
    return [n for n in device_names(machine) if n != "dax0.0" and _driver(machine, n) is None]


def _driver(machine: Machine, name: str) -> str | None:
    return read_device(name, machine).driver


def all_there(machine: Machine, pool: DaxPool, rows: list[Segment]) -> None:
    """Every segment has a device with its bytes, and there is no other device."""
    for row in rows:
        assert bytes_of(pool, row) == {row.number}
    assert pool.strays(rows) == []
    assert len(device_names(machine)) == 1 + len(rows)
    assert pool.space().free == 512 * M - BASE - sum(row.length for row in rows)


# ---------------------------------------------------------------------- kept, and given back


@pytest.mark.parametrize("order", [(5, 4, 3, 2, 1), (1, 2, 3, 4, 5), (3, 1, 5, 2, 4)])
def test_nobody_else_gets_the_memory(
    pool: DaxPool, kernel: MadeUpDax, machine: Machine, rows: list[Segment], order: tuple[int, ...]
) -> None:
    free = 512 * M - BASE - sum(row.length for row in rows)
    assert sorted(pool.park(rows)) == [1, 2, 3, 4, 5]
    assert len(parking(machine)) == 2
    for at, number in enumerate(order):
        left = order[at:]
        assert pool.space() == (512 * M, free, free)
        assert len(parking(machine)) <= 2
        for row in rows:
            if row.number in left:
                with pytest.raises(OSError, match="Cannot allocate"):
                    kernel.foreign(Span(row.pieces[-1].start, 2 * M))
                dax_making.delete(kernel_last(machine), REGION, machine)
        now = pool.restore(rows[number - 1])
        assert (now.valid, now.pieces) == (rows[number - 1].length, rows[number - 1].pieces)
        assert bytes_of(pool, now) == {number}
    all_there(machine, pool, rows)
    assert pool.park(rows) == []  # they are there


def kernel_last(machine: Machine) -> str:
    """The device that a program has just made, and that got no memory."""
    return next(n for n in device_names(machine) if not read_device(n, machine).size)


def test_the_best_order_parks_nothing_again(
    pool: DaxPool, kernel: MadeUpDax, rows: list[Segment]
) -> None:
    order = pool.park(rows)
    seen: list[str] = []
    kernel.between = seen.append
    for number in order:
        pool.restore(rows[number - 1])
    assert seen.count("mapping") == sum(len(row.pieces) for row in rows)


def test_what_is_parked_cannot_be_opened_and_is_nobodys(
    pool: DaxPool, machine: Machine, rows: list[Segment]
) -> None:
    pool.park(rows)
    row = rows[0]
    with pytest.raises(RegionError, match=r"its device is lost: /dev/dax0.\d has memory of it"):
        pool.open(row, write=False)
    pool.set_owner(row, Owner(1000, 1000, 0o644))  # it is told again when there is a node
    assert pool.holders(row) == []
    pool.check_unused(row)
    assert pool.strays(rows) == []
    for name in parking(machine):
        assert dax_node.read_label(name, machine) == f"{G:#x} parked"
    assert bytes_of(pool, pool.restore(row)) == {1}


def test_what_is_parked_can_be_destroyed(
    pool: DaxPool, machine: Machine, rows: list[Segment]
) -> None:
    free = pool.space().free
    pool.park(rows)
    for row in rows:
        pool.destroy(row)
        pool.destroy(row)
    assert device_names(machine) == ["dax0.0"]
    assert pool.space().free == free
    again = pool.create(pool.plan(Segment(SegmentNo(9), Ino(9), POOL_DAX, 8 * M), []))
    assert bytes_of(pool, again) == {0}


def test_a_file_system_that_is_formatted_anew(
    pool: DaxPool, machine: Machine, rows: list[Segment]
) -> None:
    pool.park(rows)
    pool.close()
    again = open_pool(machine)
    for name in again.segment_names():
        again.remove(name)
    assert device_names(machine) == ["dax0.0"]


# ---------------------------------------------------------------------- killed at any step


class Killed(BaseException):
    """No handler sees it: the program is not there any more."""


def run_until(kernel: MadeUpDax, rows: list[Segment], stop: int) -> bool:
    """A mount after a kexec that is killed before its ``stop``-th write; False if it was not."""
    pool = boot(kernel)
    seen: list[str] = []

    def step(attribute: str) -> None:
        if len(seen) >= stop:
            raise Killed  # at each further write as well: nothing is taken apart
        seen.append(attribute)

    kernel.between = step
    try:
        pool.park(rows)
        pool.restore(rows[0])
    except Killed:
        return True
    finally:
        kernel.between = lambda attribute: None
        pool.close()
    return False


@pytest.mark.parametrize("stop", range(8))
def test_a_mount_that_is_killed_at_any_step(
    kernel: MadeUpDax, machine: Machine, rows: list[Segment], stop: int
) -> None:
    """The next one finds by the labels what is its own, and makes every device whole."""
    rows = rows[:3]
    while run_until(kernel, rows, stop):
        pool = open_pool(machine)
        parked = pool.park(rows)
        for row in rows:
            pool.restore(row)
        assert set(parked) >= {3}
        pool.strays(rows)  # what has no memory goes
        _drop_unlabelled(machine)
        all_there(machine, pool, rows)
        pool.close()
        stop += 8
    assert stop > 8


def _drop_unlabelled(machine: Machine) -> None:
    """A device that was made, and not yet labelled, has no memory, and is in nobody's way."""
    for name in device_names(machine):
        if not read_device(name, machine).size and dax_node.read_label(name, machine) is None:
            dax_making.delete(name, REGION, machine)


def test_what_an_earlier_mount_has_parked_is_found(
    pool: DaxPool, kernel: MadeUpDax, machine: Machine, rows: list[Segment]
) -> None:
    pool.park(rows)
    kernel.takes_all = True
    kernel.write(f"{DRIVER}/bind", parking(machine)[0], "a program", machine)
    pool.close()
    again = open_pool(machine)
    assert again.park([]) == []  # a mount that parks nothing takes it apart as well
    assert device_names(machine) == ["dax0.0"]
    for row in rows:
        again.restore(row)
    all_there(machine, again, rows)
    again.close()


# ---------------------------------------------------------------------- others in the way


def test_somebody_has_a_part_of_one(
    pool: DaxPool, kernel: MadeUpDax, machine: Machine, rows: list[Segment]
) -> None:
    """Those that would be parked with it are made at once; what is not ours stays."""
    theirs = kernel.foreign(Span(PhysAddr(rows[2].pieces[0].start + 2 * M), 2 * M))
    parked = pool.park(rows)
    assert set(parked) == {4, 5}
    with pytest.raises(RegionError, match=f"segment 3: /dev/{theirs} has memory of it"):
        pool.restore(rows[2])
    for row in rows:
        if row.number != 3:
            assert bytes_of(pool, pool.restore(row)) == {row.number}
    assert read_device(theirs, machine).size == 2 * M


def test_another_driver_has_the_device_of_one(
    pool: DaxPool, machine: Machine, rows: list[Segment]
) -> None:
    """That segment alone is lost: the others are parked, and made."""
    driver = Path(machine.path(f"{REGION}/{pool.restore(rows[2]).name}/driver"))
    driver.unlink()
    driver.symlink_to("/drivers/kmem")
    pool.close()
    again = open_pool(machine)
    assert sorted(again.park([*rows, rows[0]._replace(number=SegmentNo(9), pieces=())])) == [
        1,
        2,
        4,
        5,
    ]
    with pytest.raises(RegionError, match="it is in system-ram mode"):
        again.restore(rows[2])
    for row in rows:
        if row.number != 3:
            assert bytes_of(again, again.restore(row)) == {row.number}
    again.close()


def test_somebody_takes_some_while_another_is_taken_out(
    pool: DaxPool, kernel: MadeUpDax, machine: Machine, rows: list[Segment]
) -> None:
    """The others stay parked, each alone."""
    pool.park(rows)
    taken: list[str] = []

    def between(attribute: str) -> None:
        if attribute == "mapping" and not taken:
            taken.append("")  # not again for this one itself
            taken.append(kernel.foreign(Span(rows[1].pieces[0].start, 2 * M)))

    kernel.between = between
    assert bytes_of(pool, pool.restore(rows[0])) == {1}
    kernel.between = lambda attribute: None
    with pytest.raises(RegionError, match=f"segment 2: /dev/{taken[1]} has memory of it"):
        pool.restore(rows[1])
    assert [pool._parking.holds(row.number) for row in rows[1:]] == [False, True, True, True]
    with pytest.raises(OSError, match="Cannot allocate"):
        kernel.foreign(Span(rows[2].pieces[-1].start, 2 * M))
    dax_making.delete(kernel_last(machine), REGION, machine)
    for row in rows[2:]:
        assert bytes_of(pool, pool.restore(row)) == {row.number}


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("attribute", ["create", "mapping", "bind"])
def test_what_cannot_be_restored_stays_parked(
    pool: DaxPool, kernel: MadeUpDax, machine: Machine, rows: list[Segment], attribute: str
) -> None:
    """Its file is lost until the next mount, and nobody gets its memory meanwhile."""
    pool.park(rows)
    row = rows[0]
    fail_once(kernel, attribute)
    with pytest.raises(RegionError, match=r"a test|/dev/dax0.\d has memory of it"):
        pool.restore(row)
    assert all(pool._parking.holds(one.number) for one in rows)
    with pytest.raises(OSError, match="Cannot allocate"):
        kernel.foreign(Span(row.pieces[0].start, 2 * M))
    dax_making.delete(kernel_last(machine), REGION, machine)
    with pytest.raises(LockedError, match="in use"):
        PhysicalLocks("another", machine, exclusive=True).take(row.pieces)
    pool.close()
    again = open_pool(machine)
    assert len(again.park(rows)) == len(rows)
    for one in rows:
        again.restore(one)
    all_there(machine, again, rows)
    again.close()


def fail_once(kernel: MadeUpDax, attribute: str) -> None:
    """Have the kernel refuse the next write of an attribute."""

    def between(written: str) -> None:
        if written == attribute:
            kernel.between = lambda attribute: None
            raise RegionError("a test")

    kernel.between = between


def test_without_labels_nothing_is_parked(
    pool: DaxPool, machine: Machine, rows: list[Segment], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A later mount could not know the devices."""
    monkeypatch.setattr(dax_node, "set_label", lambda name, text, host: None)
    assert pool.park(rows) == []
    assert device_names(machine) == ["dax0.0"]


@pytest.mark.parametrize("attribute", ["create", "mapping"])
def test_a_kernel_that_refuses(
    pool: DaxPool, kernel: MadeUpDax, machine: Machine, rows: list[Segment], attribute: str
) -> None:
    kernel.refuses = attribute
    assert pool.park(rows) == []
    kernel.refuses = ""
    assert device_names(machine) == ["dax0.0"]
    for row in rows:
        pool.restore(row)
    all_there(machine, pool, rows)


def test_a_kernel_that_does_not_cut(
    pool: DaxPool, kernel: MadeUpDax, machine: Machine, rows: list[Segment]
) -> None:
    """It stays parked, and can be had later."""
    pool.park(rows)
    kernel.refuses = "size"
    with pytest.raises(RegionError, match=r"segment 1: /dev/dax0.\d has memory of it"):
        pool.restore(rows[0])
    kernel.refuses = ""
    for row in rows:
        pool.restore(row)
    pool.strays(rows)
    all_there(machine, pool, rows)
