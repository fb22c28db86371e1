"""The free memory of a dax region: how much there is, what is promised, and where to take some."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

from pkernfs.errors import NoSpaceError, RegionError
from pkernfs.host.cmdline import format_number
from pkernfs.host.iomem import Span
from pkernfs.host.sysroot import Host
from pkernfs.layout import MAX_SEGMENT_PIECES
from pkernfs.pool import pieces as spans
from pkernfs.pool.dax_index import DaxIndex
from pkernfs.pool.pieces import Pieces
from pkernfs.pool.pool import Space
from pkernfs.quantities import PhysAddr, SegmentNo
from pkernfs.region import dax_making
from pkernfs.region.dax import Device


class DaxSpace:
    """The memory of the dax region of ``base`` that no device has.

    :param name: for what; messages begin with it
    """

    def __init__(self, base: Device, index: DaxIndex, name: str, host: Host) -> None:
        self._base = base
        self._index = index
        self._name = name
        self._host = host
        self._start: PhysAddr | None = None
        self._promised: dict[SegmentNo, Pieces] = {}

    def look(self) -> Space:
        """Return how much memory the dax region has, what no device or plan has, and in one piece.

        Another program's changes of the largest piece show at the next :meth:`choose`.
        """
        promised = [piece for more in list(self._promised.values()) for piece in more]
        free = max(0, self._index.available() - spans.size_of(promised))
        largest = max((gap.size for gap in self._gaps(promised)), default=0)
        return Space(self._index.total, free, min(free, largest))

    def choose(self, number: SegmentNo, has: Pieces, length: int, others: Iterable[Span]) -> Pieces:
        """Choose memory for a segment that has ``has``, and is to have ``length`` bytes.

        It is promised until :meth:`settle`. ``others`` is not to be had, whoever has it.

        :raises NoSpaceError: full, or too fragmented: the message says the largest piece.
        """
        self._index.refresh()
        self._find_start()
        missing = length - spans.size_of(has)
        free = self._gaps([*others, *has])
        most = MAX_SEGMENT_PIECES - len(has)
        more = spans.choose(free, missing, most, has[-1].end if has else None)
        if missing > 0 and not more:
            raise self._no_space(missing, most, free)
        self._promised[number] = more
        return more

    def settle(self, number: SegmentNo) -> None:
        """What was promised to a segment is its device's now, or nobody's."""
        self._promised.pop(number, None)

    def _no_space(self, missing: int, most: int, free: list[Span]) -> NoSpaceError:
        left = spans.size_of(free)
        where = "" if self._base.node is None else f" in NUMA node {self._base.node}"
        why = f"{format_number(left)} free{where}"
        if free:
            why += f", the largest piece {format_number(max(gap.size for gap in free))}"
        if left >= missing:
            why += f", and it may have {most} pieces"
        return NoSpaceError(f"{self._name}: no room for {format_number(missing)}: {why}")

    def _gaps(self, also_taken: Iterable[Span]) -> list[Span]:
        taken = [piece for device in self._index.all() for piece in device.pieces]
        return spans.gaps(self._whole(), [*taken, *also_taken])

    def _whole(self) -> Span:
        """The memory of the dax region, as far as it is known where that begins."""
        start = self._start
        if start is None:
            start = min(piece.start for device in self._index.all() for piece in device.pieces)
        return Span(start, self._index.total)

    def _find_start(self) -> None:
        """Learn where the memory of the dax region begins: a device without memory tells."""
        if self._start is not None:
            return
        empty = next((device.name for device in self._index.all() if not device.size), None)
        if empty is not None:
            self._start = dax_making.resource(empty, self._host)
            return
        with contextlib.suppress(RegionError):  # no memory is left to be found
            self._start = dax_making.first_address(self._base.region, self._name, self._host)
