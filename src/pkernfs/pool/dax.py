"""Segments on device-dax: each is a device of the dax region that the base range's device is in.

A kexec forgets the devices, and gives other names to those that are made again. So a device is a
segment's if it has exactly the segment's bytes in their order. Or if its node says that a mount of
this base has made it for the segment: that tells of one whose making was interrupted.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from collections.abc import Callable, Iterable

from pkernfs.errors import BusyError, PkernfsError, RegionError
from pkernfs.host.holders import look
from pkernfs.host.iomem import Span, overlap
from pkernfs.host.sysroot import HOST, Host
from pkernfs.layout import BLOCK, POOL_DAX
from pkernfs.pool import pieces as spans
from pkernfs.pool.dax_index import DaxIndex
from pkernfs.pool.dax_parking import DaxParking
from pkernfs.pool.dax_space import DaxSpace
from pkernfs.pool.pieces import Pieces
from pkernfs.pool.pool import (
    Holder,
    Owner,
    Passed,
    Segment,
    Space,
    nothing_is_passed,
    refuse_holders,
)
from pkernfs.quantities import RegionOff, SegmentNo
from pkernfs.region import dax, dax_making, dax_node
from pkernfs.region.backing import Backing, open_path
from pkernfs.region.dax import Device
from pkernfs.region.dax_devices import unused
from pkernfs.region.dax_node import Access
from pkernfs.region.locks import NoPhysicalLocks, PhysicalLocks
from pkernfs.region.region import Region

log = logging.getLogger(__name__)

_DRIVER = os.path.basename(dax.DRIVER)
_ZERO_STEP_BYTES = 1 << 30
_PARKED = "parked"
_MAY, _REACHES = "may have", "reaches"


class _Memory(Backing):
    """The device of a segment, as memory. The pool has its lock, for as long as it knows it.

    Of one that is longer than its row, only the row's part, as far as its pages allow.
    """

    real_addresses = True
    may_vanish = True
    gone = "its device is gone, or its memory is broken"

    def __init__(self, device: Device, length: int, path: str, *, write: bool) -> None:
        size = min(device.size, -(-length // device.align) * device.align)
        super().__init__(path, size, list(spans.head(device.pieces, size)))
        self.fd = open_path(path, write=write)
        self._fds.append(self.fd)
        self.page_bytes = device.align
        self.node = device.node
        self.dax = device


class DaxPool:
    """The pool of the file system in the dax device ``base``.

    Nobody else makes a region of a segment: the pool has a lock on the memory of each that it has
    made, found or opened.

    :param write: segments may be made and changed.
    :param lock: take those locks; without, another process has them, and nothing is changed here.
    :raises RegionError: its dax region cannot be divided.
    """

    kind = POOL_DAX
    granule = BLOCK
    #: FUSE passes mappings through to regular files only.
    passes = False

    def __init__(self, base: Device, *, write: bool, lock: bool = True, host: Host = HOST) -> None:
        self.name = f"the dax region of /dev/{base.name}"
        self.passed: Passed = nothing_is_passed
        #: Names a device that reaches memory by tables of the kernel; None: none is seen to.
        self.reached: Callable[[Pieces], str | None] = lambda pieces: None
        self._base = base
        self._host = host
        self._region = base.region
        if not dax_making.is_divisible(self._region, host):
            raise RegionError(
                f"/dev/{base.name}: its dax region cannot be divided: it is no soft-reserved one"
            )
        self._write = write
        self._index = DaxIndex(self._region, host)
        self._new_align = int(host.find(f"{self._region}/dax_region/align") or BLOCK)
        self._locks = (
            PhysicalLocks(f"/dev/{base.name}", host, exclusive=write) if lock else NoPhysicalLocks()
        )
        self._space = DaxSpace(base, self._index, self.name, host)
        self._parking = DaxParking(base, self._label(_PARKED), self._index, self._locks, host)

    def close(self) -> None:
        """Let go of the pool; the segments stay."""
        self._locks.close()

    # ------------------------------------------------------------------ free memory

    def capacity(self) -> int:
        """Return the memory of the dax region without that of the base, in bytes."""
        return self._index.total - self._base.size

    def space(self) -> Space:
        """Return how much memory the dax region has, what no device or plan has, and in one piece.

        Another program's changes of the largest piece show at the next :meth:`plan`.
        """
        return self._space.look()

    def plan(self, wanted: Segment, others: list[Segment]) -> Segment:
        """Choose the memory of a new segment, or of one that grows to ``wanted.length``.

        What it has stays the first. Memory that lies right behind it makes its last piece longer.

        :param others: every other row of the table: their memory is not to be had.
        :raises NoSpaceError: full, or too fragmented: the message says the largest piece.
        """
        has = self._has(wanted)
        taken = (piece for row in others for piece in row.pieces)
        more = self._space.choose(wanted.number, has, wanted.length, taken)
        pieces = spans.merged((*has, *more))
        return wanted._replace(pieces=pieces, node=self._base.node, align=self._align(pieces))

    def _has(self, row: Segment) -> Pieces:
        """What a segment has of its new length: with what a cut would have taken, was it not held.

        It cannot go on elsewhere, for its device goes on there.
        """
        pieces = spans.merged(row.pieces)
        device = self._find(row) if pieces else None
        if device is None or device.size <= spans.size_of(pieces):
            return pieces
        return spans.head(device.pieces, row.length)

    def _align(self, pieces: Pieces) -> int:
        """The page size of a device: that of the base if all pieces can have it.

        Who wants pages of 1 GiB says so by the base. They would keep a program from mapping less.
        """
        align = self._base.align
        return align if align > BLOCK and spans.are_aligned(pieces, align) else BLOCK

    # ------------------------------------------------------------------ which device is whose

    def _find(self, row: Segment, *, again: bool = True) -> Device | None:
        """The device that provably is a segment's; None if there is none.

        :param again: look at it again, and not only at what was seen last.
        :raises RegionError: another driver has it.
        """
        if not row.pieces:
            raise RegionError(f"{_where(row)}: it is not recorded where it is")
        for _ in range(2):
            device = self._index.at(row.pieces[0].start)
            if device is not None and again:
                device = self._index.look(device.name)
            if device is not None and self._is_of(device, row):
                if device.driver not in (None, _DRIVER):
                    dax.bind(device, self._host)  # which says why not
                return device
            if not again:
                break
            self._index.refresh()
        return None

    def _is_of(self, device: Device, row: Segment) -> bool:
        if device.name == self._base.name:
            return False
        label = dax_node.read_label(device.name, self._host)
        if spans.merged(device.pieces) == spans.merged(row.pieces):
            return label != self._label(_PARKED)
        if label != self._label(row.number):
            return False
        return spans.begins_with(device.pieces, row.pieces) or spans.begins_with(
            row.pieces, device.pieces
        )

    def _label(self, what: SegmentNo | str) -> str:
        """What the node of a device says: the base's address, and the number of the row."""
        return f"{self._base.pieces[0].start:#x} {what}"

    def _there(self, row: Segment, *, again: bool = True) -> Device:
        """The device of a segment, whole and with its driver; it is longer if a cut was prevented.

        :raises RegionError: it is not there, or not what it was.
        """
        device = self._find(row, again=again)
        if device is None:
            raise RegionError(f"{_where(row)}: its device is lost{self._instead(row.pieces)}")
        if device.size < row.length or device.driver is None:
            raise RegionError(f"{_where(row)}: /dev/{device.name} is not whole: mount again")
        return device

    def _instead(self, pieces: Iterable[Span]) -> str:
        """Words for who has a part of some memory; empty if nobody has."""
        wanted = list(pieces)
        self._index.forget()
        for device in self._index.all():
            if any(overlap(one, other) for one in device.pieces for other in wanted):
                by = f", driver {device.driver}" if device.driver not in (None, _DRIVER) else ""
                return f": /dev/{device.name} has memory of it{by}"
        return ""

    # ------------------------------------------------------------------ making one

    def create(self, segment: Segment) -> Segment:
        """Make what the row says: all zero, for root only. Returns it with its device's name.

        :raises RegionError: somebody has taken a part of its memory, or the kernel refuses.
        """
        try:
            return self._make(segment)
        finally:
            self._space.settle(segment.number)

    def park(self, rows: list[Segment]) -> list[SegmentNo]:
        """Keep the memory of segments that are not there from all others.

        It is theirs by parking devices, until :meth:`restore` makes their own.
        """
        self._parking.clear()
        return self._parking.park(row for row in rows if self._is_missing(row))

    def _is_missing(self, row: Segment) -> bool:
        """Tell if a segment has no device. One that another driver has is for a restore to tell."""
        try:
            return self._find(row, again=False) is None
        except RegionError as e:
            log.debug("%s: not parked: %s", _where(row), e)
            return False

    def restore(self, segment: Segment) -> Segment:
        """Make a segment again if a kexec has forgotten it, or complete a change of it.

        If that fails, what was parked is parked again, as far as nobody else has it.

        :raises RegionError: another device has a part of its memory, or the kernel refuses.
        :raises LockedError: it is mounted as a region.
        """
        device = self._find(segment, again=False)
        if device is None:
            return self._make(segment)
        self._locks.take(device.pieces)
        dax_node.set_label(device.name, self._label(segment.number), self._host)
        if device.size > segment.length:
            device = self._cut_unless_held(segment, device)
        elif device.size < segment.length:
            device = self._remade(segment, device)
        elif device.driver is None:
            device = self._bound(segment, device.name, device.align)
        return self._filled(segment, device)

    def _cut_unless_held(self, row: Segment, device: Device) -> Device:
        """A device that is longer than its row, cut; who has it need not lose it for that."""
        try:
            return self._remade(row, device)
        except BusyError as e:
            log.warning("%s: it stays longer than it should be", e)
            return device

    def _make(self, row: Segment) -> Segment:
        was_parked = self._parking.holds(row.number)
        self._locks.take(row.pieces)
        name = ""
        try:
            name = dax_making.create(self._region, _where(row), self._host)
            dax_node.set_label(name, self._label(row.number), self._host)
            if (align := self._align(row.pieces)) != self._new_align:
                dax_making.set_align(name, align, _where(row), self._host)
            with self._parking.taken_out(row):
                for piece in row.pieces:
                    dax_making.add_piece(name, piece, _where(row), self._host)
            return self._filled(row, self._bound(row, name, align))
        except BaseException as e:
            self._take_apart(name)
            reason = self._instead(row.pieces) if isinstance(e, RegionError) else ""
            if was_parked and not self._parking.holds(row.number):
                self._parking.park([row])
            if not self._parking.holds(row.number):
                self._locks.let_go(row.pieces)
            if reason:
                raise RegionError(f"{_where(row)}{reason}", errno.EBUSY) from e
            raise

    def _bound(self, row: Segment, name: str, align: int) -> Device:
        """Have the driver take a device that has the memory of a row, and nothing else.

        Its size tells: the kernel gives a device just the ranges that it is told, or none.

        :raises RegionError: it is not what the row says.
        """
        size = dax_making.size_of(name, self._host)
        if size != row.length:
            raise RegionError(f"{_where(row)}: the kernel made {size} bytes of {row.length}")
        made = Device(name, size, align, row.pieces, self._base.node, None, self._region)
        bound = dax.bind(made, self._host)
        self._index.put(bound)
        return bound

    def _filled(self, row: Segment, device: Device) -> Segment:
        """The row of a device that is whole; what of it is not valid gets zero."""
        row = row._replace(name=device.name, align=device.align, node=device.node)
        if row.valid < row.length:
            with self._mapped(row, device, write=True) as memory:
                _zero(memory, row.valid, row.length)
        return row._replace(valid=row.length)

    def _take_apart(self, name: str) -> None:
        """What was being made goes; whatever fails, nothing else is touched."""
        if name:
            with contextlib.suppress(RegionError):
                self._delete(name)

    def _delete(self, name: str) -> None:
        self._index.drop(name)
        dax_making.unbind(name, self._host)
        dax_making.set_size(name, 0, f"/dev/{name}", self._host)
        dax_making.delete(name, self._region, self._host)

    # ------------------------------------------------------------------ changing one

    def resize(self, segment: Segment) -> Segment:
        """Make a segment as long as its row says. What it gains is zero.

        The kernel changes only a device without a driver, which ends all mappings.

        :raises BusyError: somebody has it open or mapped.
        :raises RegionError: it is lost, somebody has taken the memory, or the kernel refuses.
        """
        try:
            device = self._find(segment)
            if device is None:
                raise RegionError(
                    f"{_where(segment)}: its device is lost{self._instead(segment.pieces)}"
                )
            if device.size != segment.length:
                device = self._remade(segment, device)
            return self._filled(segment, device)
        finally:
            self._space.settle(segment.number)

    def _remade(self, row: Segment, device: Device) -> Device:
        """The device of a row, with the row's memory; nobody can open it meanwhile.

        :raises BusyError: somebody has it open or mapped.
        :raises RegionError: somebody has taken the memory, or the kernel refuses.
        """
        self._check_unused(row, device)
        with dax_node.closed(device.name, self._host):
            self._check_unused(row, device)  # and who has come since
            dax_making.unbind(device.name, self._host)
            try:
                self._change(row, device)
                made = self._bound(row, device.name, min(device.align, self._align(row.pieces)))
            except BaseException as e:
                self._change_back(row, device)
                if isinstance(e, RegionError) and (
                    reason := self._instead(spans.tail(row.pieces, device.size))
                ):
                    raise RegionError(f"{_where(row)}{reason}", errno.EBUSY) from e
                raise
        if device.size > row.length:
            self._locks.let_go(spans.tail(device.pieces, row.length))
        return made

    def _change(self, row: Segment, device: Device) -> None:
        """Give a device without driver the memory of its row: at its end it differs."""
        align = self._align(row.pieces)
        if align < device.align:
            dax_making.set_align(device.name, align, _where(row), self._host)
        if device.size > row.length:
            dax_making.set_size(device.name, row.length, _where(row), self._host)
        more = spans.tail(row.pieces, device.size)
        self._locks.take(more)
        for piece in more:
            dax_making.add_piece(device.name, piece, _where(row), self._host)

    def _change_back(self, row: Segment, device: Device) -> None:
        """A device that did not get what it should have has again what it had."""
        size = min(device.size, row.length)
        self._locks.let_go(spans.tail(row.pieces, size))
        with contextlib.suppress(PkernfsError):
            dax_making.unbind(device.name, self._host)
            dax_making.set_size(device.name, size, _where(row), self._host)
            dax.bind(dax.read_device(device.name, self._host), self._host)
        self._index.look(device.name)

    def destroy(self, segment: Segment) -> None:
        """Give the memory back. It is no error if there is nothing.

        :raises BusyError: somebody has it open or mapped.
        :raises RegionError: what is there is not ours.
        """
        self._space.settle(segment.number)
        if self._parking.holds(segment.number):
            with self._parking.taken_out(segment):
                self._locks.let_go(segment.pieces)
            return
        device = self._find(segment)
        if device is None:
            if other := self._instead(segment.pieces):
                raise RegionError(f"{_where(segment)}: its device is lost{other}")
            self._locks.let_go(segment.pieces)
            return
        dax_node.set_access(device.name, dax_node.FOR_ROOT, self._host)  # nobody is to come to it
        self._check_unused(segment, device)
        self._delete(device.name)
        self._locks.let_go(device.pieces)

    def punch(self, segment: Segment, start: int, end: int) -> None:
        """Zero bytes start..end-1.

        :raises BusyError: somebody has it open or mapped.
        """
        device = self._there(segment)
        self._check_unused(segment, device)
        with self._mapped(segment, device, write=True) as memory:
            _zero(memory, start, end)

    def strays(self, known: list[Segment]) -> list[str]:
        """Name the devices that a mount of this base has made, and no row knows.

        They stay: the row may be what was damaged. Those without memory are deleted.
        """
        labels = {self._label(row.number) for row in known}
        found = []
        for name in self.segment_names():
            if self._write and not dax_making.size_of(name, self._host):
                self._take_apart(name)
            elif self._parking.is_parking(name):
                continue
            elif dax_node.read_label(name, self._host) not in labels:
                found.append(
                    f"/dev/{name}: made as a segment that the file system does not know: "
                    f"daxctl destroy-device -f {name}"
                )
        return found

    def segment_names(self) -> list[str]:
        """Return the names of all devices that a mount of this base has made, by their numbers."""
        ours = self._label(SegmentNo(0)).split()[0]
        labels = {d.name: dax_node.read_label(d.name, self._host) or "" for d in self._index.all()}
        names = [name for name, label in labels.items() if label.split()[:1] == [ours]]
        return sorted(names, key=dax.device_number)

    def remove(self, name: str) -> None:
        """Delete one of :meth:`segment_names`: its file system is formatted anew.

        :raises BusyError: somebody has it open or mapped.
        :raises RegionError: the kernel refuses.
        """
        device = dax.read_device(name, self._host)
        with unused(device, "", self._host):
            self._delete(name)

    # ------------------------------------------------------------------ who has it

    def check_unused(self, segment: Segment) -> None:
        """:raises BusyError: somebody has it open or mapped; the message says who."""
        device = self._find(segment)
        if device is not None:
            self._check_unused(segment, device)

    def _check_unused(self, row: Segment, device: Device) -> None:
        refuse_holders(_where(row), self._holders(row, device))

    def holders(self, segment: Segment) -> list[Holder]:
        """Ask the kernel who has it open or mapped, but for this process."""
        device = self._find(segment)
        return [] if device is None else self._holders(segment, device)

    def _holders(self, row: Segment, device: Device) -> list[Holder]:
        """Those of its node, and of the file of a mount by which it is reached; devices if none."""
        passed = self.passed(row)
        node = dax_node.target(device.name, self._host)
        targets = [node] if passed is None else [node, passed]
        seen = look(targets, self._host)
        if not seen.found and (name := self.reached(device.pieces)) is not None:
            return [Holder(0, f"{name}, under VFIO,", _REACHES)]
        if not seen.found and seen.hidden:
            return [Holder(0, f"one of the processes that let nobody look ({seen.hidden})", _MAY)]
        return [Holder.of(process) for process in seen.found]

    # ------------------------------------------------------------------ the node

    def native_path(self, segment: Segment) -> str:
        """The path by which other programs open the segment: by the name that its device has now.

        That in the row is of the kernel that made it: there it may be another segment's.

        :raises RegionError: it is not there.
        """
        device = self._find(segment, again=False)
        if device is None:
            raise RegionError(f"{_where(segment)}: its device is not there", errno.EIO)
        return dax_node.path_of(device.name, self._host)

    def set_owner(self, segment: Segment, owner: Owner) -> None:
        """Let ``owner`` open the segment, and nobody else but root.

        udev has a say as well: its rules for the device may run later, and set another mode.

        :raises RegionError: it is not there.
        """
        if self._parking.holds(segment.number):
            return  # nobody but root can open it before it is restored
        device = self._there(segment, again=False)
        access = Access(owner.uid, owner.gid, owner.mode & 0o666)
        dax_node.set_access(device.name, access, self._host)

    # ------------------------------------------------------------------ its bytes

    def open(self, segment: Segment, *, write: bool) -> Region:
        """Map a segment.

        :raises RegionError: it is not there, or not what it was.
        :raises LockedError: it is mounted as a region.
        """
        device = self._there(segment)
        self._locks.take(device.pieces)
        return self._mapped(segment, device, write=write)

    def _mapped(self, row: Segment, device: Device, *, write: bool) -> Region:
        dax_node.read_access(device.name, self._host)  # is it the node of this device?
        path = dax_node.path_of(device.name, self._host)
        backing = _Memory(device, row.length, path, write=write)
        try:
            return Region(backing, writable=write)
        except BaseException:
            backing.close()
            raise


def _zero(memory: Region, start: int, end: int) -> None:
    for at in range(start, end, _ZERO_STEP_BYTES):
        memory.zero(RegionOff(at), min(_ZERO_STEP_BYTES, end - at))


def _where(row: Segment) -> str:
    return f"segment {row.number}"
