"""Segments on device-dax, on real kernels: made, changed, held, owned, and made again by the next.

The pool itself runs in the machine, with a base range of which only the device is there.
"""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from kexeclab.guest import Guest
from kexeclab.runner import Lab
from pkernfs.errors import BusyError, NoSpaceError, PkernfsError, RegionError
from pkernfs.host.iomem import Span
from pkernfs.host.sysroot import HOST
from pkernfs.layout import POOL_DAX
from pkernfs.pool.dax import DaxPool
from pkernfs.pool.pool import Owner, Segment
from pkernfs.quantities import Ino, PhysAddr, RegionOff, SegmentNo
from pkernfs.region.dax import bind, read_device
from pkernfs.region.dax_devices import region_devices
from pkernfs.region.dax_making import add_piece, create, keep_base

pytestmark = pytest.mark.lab

M = 1 << 20
G = 1 << 30
BASE = 256 * M
FIRST = 4 * G  # where the soft-reserved memory begins
SIZE = 2560 * M
MANY = 1000
OTHER = "/root/dax0.1"  # another node of a device
HOLD = (
    "import mmap, os, sys\n"
    "fd = os.open(sys.argv[1], os.O_RDWR)\n"
    "if sys.argv[2] == 'map':\n"
    "    held = mmap.mmap(fd, 2 << 20)\n"
    "    os.close(fd)\n"
    "print('ready', flush=True)\n"
    "sys.stdin.read()\n"
)


# ---------------------------------------------------------------------- steps


def open_pool(guest: Guest) -> DaxPool:
    """The pool beside the first 256 MiB, as a mount opens it; in the next kernel again."""
    guest.run("modprobe", "-a", "device_dax", "dax_hmem")
    return DaxPool(keep_base("dax0.0", BASE, HOST), write=True)


def row(number: int, length: int) -> Segment:
    return Segment(SegmentNo(number), Ino(number), POOL_DAX, length)


def note_rows(guest: Guest, rows: list[Segment]) -> None:
    """Have the rows in the next kernel, as the table of segments would."""
    guest.note("rows", [r._asdict() for r in rows])


def noted_rows(guest: Guest) -> list[Segment]:
    found = []
    for fields in guest.notes["rows"]:
        pieces = tuple(Span(PhysAddr(start), size) for start, size in fields.pop("pieces"))
        found.append(Segment(**fields, pieces=pieces))
    return found


def fill(pool: DaxPool, segment: Segment, byte: bytes) -> None:
    with pool.open(segment, write=True) as memory:
        memory.copy_in(RegionOff(0), byte * segment.length)


def holds(pool: DaxPool, segment: Segment, byte: bytes) -> bool:
    """Whether all bytes of a segment, by its own device, are ``byte``."""
    fd = os.open(pool.native_path(segment), os.O_RDONLY)
    try:
        with mmap.mmap(fd, segment.length, prot=mmap.PROT_READ) as memory:
            return memory[:] == byte * segment.length
    finally:
        os.close(fd)


def refused(kind: type[PkernfsError], says: str, act: Callable[[], object]) -> None:
    with pytest.raises(kind) as caught:
        act()
    assert says in str(caught.value), caught.value


@contextmanager
def holder(path: str, how: str, *before: str) -> Iterator[int]:
    """Another process that has a device open (``open``), or mapped and not open (``map``)."""
    process = subprocess.Popen(
        [*before, sys.executable, "-c", HOLD, path, how],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    assert process.stdout.readline() == "ready\n"
    try:
        yield process.pid
    finally:
        process.communicate(timeout=20)


def as_user(*command: str) -> tuple[str, ...]:
    return ("setpriv", "--reuid=1000", "--regid=1000", "--clear-groups", *command)


# ---------------------------------------------------------------------- the first kernel


def use(guest: Guest) -> None:
    """Segments come and go; then the next kernel, with three and the plans of a thousand."""
    pool = open_pool(guest)
    assert pool.space() == (SIZE, SIZE - BASE, SIZE - BASE)
    with guest.step("create of 64 MiB, zeroed"):
        first = pool.create(pool.plan(row(1, 64 * M), []))
    assert first.pieces == (Span(PhysAddr(FIRST + BASE), 64 * M),)
    fill(pool, first, b"1")
    check_owner(guest, pool, first)
    check_holders(guest, pool, first)
    rows = change(guest, pool, first)
    refuse(guest, pool, rows)
    rows += plan_many(pool, rows)
    note_rows(guest, rows)
    guest.kexec()


def check_owner(guest: Guest, pool: DaxPool, first: Segment) -> None:
    """The owner reaches the segment, and nothing else of the memory."""
    path = pool.native_path(first)
    guest.run(*as_user("dd", f"if={path}", "count=0"), status=1)
    pool.set_owner(first, Owner(1000, 1000, 0o700))
    found = os.stat(path)
    assert (found.st_uid, found.st_gid, found.st_mode & 0o777) == (1000, 1000, 0o600)
    with holder(path, "map", *as_user()) as pid:
        assert [h.pid for h in pool.holders(first)] == [pid]
    for other in ("/dev/dax0.0", "/dev/mem"):
        guest.run(*as_user("dd", f"if={other}", "count=0"), status=1)
    beyond = (
        f"import mmap, os; fd = os.open('{path}', os.O_RDONLY)\n"
        f"print(mmap.mmap(fd, {2 * M}, prot=mmap.PROT_READ, offset={64 * M})[0])"
    )
    guest.run(*as_user(sys.executable, "-c", beyond), status=-7)  # SIGBUS


def check_holders(guest: Guest, pool: DaxPool, first: Segment) -> None:
    """While somebody has it, it stays as it is; whatever name the device was opened by."""
    path = pool.native_path(first)
    number = os.stat(path).st_rdev
    guest.run("mknod", OTHER, "c", str(os.major(number)), str(os.minor(number)))
    for node, how, says in (
        (path, "open", "has opened it"),
        (path, "map", "maps it"),
        (OTHER, "open", "has opened it"),
        (OTHER, "map", "maps it"),
    ):
        with holder(node, how) as pid:
            name = Path(f"/proc/{pid}/comm").read_text().strip()
            message = f"segment 1: busy: process {pid} ({name}) {says}"
            shorter = first._replace(length=32 * M, pieces=(first.pieces[0]._replace(size=32 * M),))
            refused(BusyError, message, lambda row=shorter: pool.resize(row))  # type: ignore[misc]
            refused(BusyError, message, lambda: pool.check_unused(first))
            refused(BusyError, message, lambda: pool.punch(first, 0, 2 * M))
    assert os.stat(path).st_uid == 1000
    pool.check_unused(first)
    assert holds(pool, first, b"1")


def change(guest: Guest, pool: DaxPool, first: Segment) -> list[Segment]:
    """Growth in place and elsewhere, cuts, punches; the bytes stay, and what is gained is zero."""
    with guest.step("growth by 64 MiB, zeroed"):
        grown = pool.resize(pool.plan(first._replace(length=128 * M), []))
    assert grown.pieces == (Span(PhysAddr(FIRST + BASE), 128 * M),)
    assert len(read_device(grown.name, HOST).pieces) == 2
    second = pool.create(pool.plan(row(2, 2 * M), [grown]))
    fill(pool, second, b"2")
    more = pool.resize(pool.plan(grown._replace(length=130 * M), [second]))
    assert len(more.pieces) == 2
    with pool.open(more, write=True) as memory:
        assert memory.read(RegionOff(62 * M), 2 * M) == b"1" * (2 * M)
        assert memory.is_zero(RegionOff(64 * M), 66 * M)
        memory.copy_in(RegionOff(0), b"x" * (130 * M))
    pool.punch(more, 2 * M, 4 * M)
    with guest.step("cut to 4 MiB"):
        cut = more._replace(length=4 * M, valid=4 * M, pieces=(Span(more.pieces[0].start, 4 * M),))
        assert pool.resize(cut) == cut
    with pool.open(cut, write=True) as memory:
        assert memory.is_zero(RegionOff(2 * M), 2 * M)
        memory.zero(RegionOff(0), 4 * M)
        memory.copy_in(RegionOff(0), b"1" * (4 * M))
    found = os.stat(pool.native_path(cut))
    assert (found.st_uid, found.st_mode & 0o777) == (1000, 0o600)
    return [cut, second]


def refuse(guest: Guest, pool: DaxPool, rows: list[Segment]) -> None:
    """Memory that others have, segments as regions, segments that no row knows."""
    where = "/sys/bus/dax/devices/dax0.0/../dax_region"
    planned = pool.plan(row(3, 64 * M), rows)
    region = read_device("dax0.0", HOST).region
    theirs = create(region, "test", HOST)
    add_piece(theirs, Span(PhysAddr(planned.pieces[0].start + 2 * M), 2 * M), "test", HOST)
    refused(RegionError, f"segment 3: /dev/{theirs} has memory of it", lambda: pool.create(planned))
    assert [d.size for d in region_devices(region, HOST) if d.name == theirs] == [2 * M]
    third = pool.create(pool.plan(row(3, 64 * M), rows))
    assert third.pieces[0].start != planned.pieces[0].start
    refused(NoSpaceError, "no room for 3G: ", lambda: pool.plan(row(4, 3 * G), [*rows, third]))
    said = guest.run("mkfs.pkernfs", "-f", pool.native_path(third), status=1)
    assert "in use: it is mounted" in said, said
    assert pool.strays([*rows, third]) == []
    assert [line.split(":")[0] for line in pool.strays(rows)] == [pool.native_path(third)]
    with guest.step("destruction"):
        pool.destroy(third)
    pool.destroy(third)
    guest.log(f"left of it: {Path(where, 'available_size').read_text().strip()} bytes free")
    bind(read_device(theirs, HOST), HOST)  # it is as good as before


def plan_many(pool: DaxPool, rows: list[Segment]) -> list[Segment]:
    """Rows of a thousand segments of 2 MiB, which no device has yet."""
    planned: list[Segment] = []
    at = pool.plan(row(100, MANY * 2 * M), rows)
    start = at.pieces[0].start
    assert len(at.pieces) == 1
    for i in range(MANY):
        piece = Span(PhysAddr(start + i * 2 * M), 2 * M)
        planned.append(row(100 + i, 2 * M)._replace(pieces=(piece,), valid=2 * M))
    return planned


# ---------------------------------------------------------------------- the next one


def find_again(guest: Guest) -> None:
    """All devices are forgotten; each segment is made again at its own memory."""
    pool = open_pool(guest)
    first, second, *many = noted_rows(guest)
    lost = many.pop()
    region = read_device("dax0.0", HOST).region
    theirs = create(region, "test", HOST)
    add_piece(theirs, lost.pieces[0], "test", HOST)
    add_piece(theirs, Span(PhysAddr(lost.pieces[0].end), 2 * M), "test", HOST)
    rows = [pool.restore(segment) for segment in (second, first)]
    assert (rows[0].name, rows[1].name) == ("dax0.2", "dax0.3")
    refused(RegionError, f"/dev/{theirs} has memory of it", lambda: pool.restore(lost))
    assert holds(pool, rows[1], b"1")
    assert holds(pool, rows[0], b"2")
    restore_many(guest, pool, many)
    assert pool.strays([*rows, *many]) == []
    assert read_device(theirs, HOST).size == 4 * M
    pool.close()
    start = time.monotonic()
    again = DaxPool(read_device("dax0.0", HOST), write=True)
    for segment in many:
        again.restore(segment)
    guest.figure(f"{len(many)} segments that are there, found", time.monotonic() - start, "s")


def restore_many(guest: Guest, pool: DaxPool, many: list[Segment]) -> None:
    """What a thousand segments take after a kexec: their memory first, then a device each."""
    free = pool.space().free
    start = time.monotonic()
    order = pool.park(many)
    guest.figure(f"memory of {len(many)} segments taken", time.monotonic() - start, "s")
    assert len(order) == len(many)
    assert free - pool.space().free == len(many) * 2 * M
    by_number = {segment.number: segment for segment in many}
    for number in (order[-1], order[500], order[0]):  # others are behind it: they stay parked
        pool.restore(by_number[number])
        assert free - pool.space().free == len(many) * 2 * M
    start = time.monotonic()
    for at, number in enumerate(order, 1):
        pool.restore(by_number[number])
        if at in (100, len(many)):
            seconds = time.monotonic() - start
            guest.figure(f"{at} segments made again", seconds, "s")
            guest.figure(f"each of {at}", seconds / at * 1000, "ms")


@pytest.mark.parametrize("kernel", ["6.1", "7"])
def test_dax_pool(lab: Lab, kernel: str) -> None:
    """Segments on device-dax: owners, holders, growth and cuts; a thousand after a kexec."""
    machine: Any = lab.machine(
        kernel=kernel,
        memory=7168,
        cmdline=["memmap=2560M%4G-1+0xefffffff", "modprobe.blacklist=kmem"],
    )
    lab.run(use, find_again, machine=machine, seconds=400)
