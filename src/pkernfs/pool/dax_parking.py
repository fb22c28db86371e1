"""Keeping the memory of segments from everybody else before their own devices are made.

To make a device takes the kernel milliseconds, to give one a range a tenth of that. So at a mount
few *parking devices* get the memory of all segments that are to be made again. They have no driver:
nobody can open them. Each segment's memory is taken out when its own device is made.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator

from pkernfs.errors import PkernfsError, RegionError
from pkernfs.host.sysroot import Host
from pkernfs.layout import BLOCK
from pkernfs.pool import pieces as spans
from pkernfs.pool.dax_index import DaxIndex
from pkernfs.pool.pieces import Pieces
from pkernfs.pool.pool import Segment
from pkernfs.quantities import SegmentNo
from pkernfs.region import dax_making, dax_node
from pkernfs.region.dax import Device
from pkernfs.region.locks import PhysicalLocks

log = logging.getLogger(__name__)

#: So many segments have their memory in one parking device. It says how much is parked again when
#: one of them is taken out.
MOST_SEGMENTS = 128


class DaxParking:
    """The parking devices of one mount.

    Any thread may ask :meth:`holds` and :meth:`is_parking`; the rest is one thread's at a time.

    :param base: the device of the base range, in whose dax region they are.
    :param label: what their nodes say: it tells a later mount that they are its own.
    """

    def __init__(
        self, base: Device, label: str, index: DaxIndex, locks: PhysicalLocks, host: Host
    ) -> None:
        self._base = base
        self._label = label
        self._index = index
        self._locks = locks
        self._host = host
        self._parked: dict[str, list[Segment]] = {}
        self._device_of: dict[SegmentNo, str] = {}

    def holds(self, number: SegmentNo) -> bool:
        """Tell whether the memory of a segment is parked."""
        return number in self._device_of

    def is_parking(self, name: str) -> bool:
        """Tell whether a device is a parking device of a mount of this base, or was one."""
        return dax_node.read_label(name, self._host) == self._label

    def clear(self) -> None:
        """Take apart what an earlier mount has left, which was killed.

        What stays because the kernel refuses is in the way of its segments, and they say so.
        """
        self._parked.clear()
        self._device_of.clear()
        for device in self._index.all():
            if self.is_parking(device.name):
                try:
                    self._delete(device.name)
                except RegionError as e:
                    log.warning("%s", e)
                    self._index.look(device.name)

    def park(self, rows: Iterable[Segment]) -> list[SegmentNo]:
        """Take the memory of segments; returns the numbers of those whose memory it has.

        They are in the order in which nothing has to be parked again.
        The others are together with one of whose memory somebody else has a part. Or labels cannot
        be written here, without which no later mount could know the devices.
        """
        in_order = sorted(rows, key=lambda row: row.pieces[0].start)
        for at in range(0, len(in_order), MOST_SEGMENTS):
            group = in_order[at : at + MOST_SEGMENTS]
            try:
                self._park(group)
            except PkernfsError as e:  # one by one they say whose fault it is
                log.debug("segments %d and more: not parked: %s", group[0].number, e)
        return [row.number for row in reversed(in_order) if self.holds(row.number)]

    def _park(self, group: list[Segment]) -> None:
        where = f"segment {group[0].number}"
        pieces = _pieces_of(group)
        self._locks.take(pieces)
        name = ""
        try:
            name = dax_making.create(self._base.region, where, self._host)
            dax_node.set_label(name, self._label, self._host)
            if not self.is_parking(name):
                raise RegionError(f"/dev/{name}: it cannot be labelled")
            dax_making.set_align(name, BLOCK, where, self._host)
            self._add(name, pieces, where)
            self._check_size(name, spans.size_of(pieces))
        except BaseException:
            with contextlib.suppress(RegionError):
                self._delete(name)
            self._locks.let_go(pieces)
            raise
        self._remember(name, group)

    @contextlib.contextmanager
    def taken_out(self, row: Segment) -> Iterator[None]:
        """The memory of a segment is nobody's in the block, which gives it to its own device.

        So is that of the segments behind it in the parking device, which the kernel can cut only
        at its end. After the block those are parked again. Nothing happens if it was not parked.

        :raises RegionError: the kernel refuses; all stays as it was.
        """
        name = self._device_of.get(row.number)
        if name is None:
            yield
            return
        group = self._parked[name]
        at = [one.number for one in group].index(row.number)
        before, behind = group[:at], group[at + 1 :]
        dax_making.unbind(name, self._host)  # somebody may have bound it meanwhile
        size = sum(one.length for one in before)
        dax_making.set_size(name, size, f"/dev/{name}", self._host)
        self._remember(name, before)
        try:
            yield
        finally:
            self._park_again(name, before, behind)

    def _park_again(self, name: str, before: list[Segment], behind: list[Segment]) -> None:
        """What lay behind a segment that was taken out goes on being parked, if it can.

        If somebody has a part of it, each segment is parked alone, but for those that he has.
        """
        group = [*before, *behind]
        if behind:
            try:
                self._add(name, _pieces_of(behind), f"/dev/{name}")
                self._check_size(name, sum(one.length for one in group))
                self._remember(name, group)
                return
            except PkernfsError as e:
                log.warning("%s", e)
                self._cut(name, before)
        if not before:
            with contextlib.suppress(RegionError):  # a device without memory is in nobody's way
                self._delete(name)
        for row in behind:
            self.park([row])

    def _cut(self, name: str, group: list[Segment]) -> None:
        """Have a parking device hold only some segments; it stays if the kernel refuses."""
        with contextlib.suppress(RegionError):
            size = sum(one.length for one in group)
            dax_making.set_size(name, size, f"/dev/{name}", self._host)
        self._index.look(name)

    # ------------------------------------------------------------------ one device

    def _add(self, name: str, pieces: Pieces, where: str) -> None:
        for piece in pieces:
            dax_making.add_piece(name, piece, where, self._host)

    def _check_size(self, name: str, expected: int) -> None:
        """The size tells: the kernel gives a device just the ranges that it is told, or none."""
        size = dax_making.size_of(name, self._host)
        if size != expected:
            raise RegionError(f"/dev/{name}: the kernel gave it {size} bytes of {expected}")

    def _remember(self, name: str, group: list[Segment]) -> None:
        """Know what is parked in a device now, and let the index know it."""
        for row in self._parked.get(name, []):
            self._device_of.pop(row.number, None)
        self._parked[name] = group
        self._device_of.update((row.number, name) for row in group)
        pieces = _pieces_of(group)
        base = self._base
        size = spans.size_of(pieces)
        self._index.put(Device(name, size, BLOCK, pieces, base.node, None, base.region))

    def _delete(self, name: str) -> None:
        self._parked.pop(name, None)
        self._index.drop(name)
        if name:
            dax_making.unbind(name, self._host)
            dax_making.set_size(name, 0, f"/dev/{name}", self._host)
            dax_making.delete(name, self._base.region, self._host)


def _pieces_of(group: Iterable[Segment]) -> Pieces:
    """The memory of segments, one after the other; what touches is one piece."""
    return spans.merged(piece for row in group for piece in row.pieces)
