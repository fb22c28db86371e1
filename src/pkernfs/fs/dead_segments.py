"""Dead segments, which no file has: which of them may be destroyed, and that they are."""

from __future__ import annotations

from typing import NamedTuple

from pkernfs.errors import PkernfsError
from pkernfs.fs.pins import PinGuard
from pkernfs.pool.pool import Pool, Segment
from pkernfs.quantities import SegmentNo


class Reaped(NamedTuple):
    """The dead segments whose memory is gone, and why that of others is not."""

    gone: list[SegmentNo]
    reasons: dict[SegmentNo, str]


class Unreached(NamedTuple):
    """The dead segments that no device can reach, and why others have to wait."""

    rows: list[Segment]
    reasons: dict[SegmentNo, str]


def unreached(dead: list[Segment], pins: PinGuard) -> Unreached:
    """Find those that no device can reach.

    A file that is mapped for devices keeps its segment, so only damage leaves others.
    """
    if pins.holder_of_memory([piece for row in dead for piece in row.pieces]) is None:
        return Unreached(dead, {})
    found = Unreached([], {})
    for row in dead:
        holder = pins.holder_of_memory(row.pieces)
        if holder is None:
            found.rows.append(row)
        else:
            found.reasons[row.number] = f"segment {row.number}: busy: {holder}"
    return found


def destroy(pool: Pool, dead: Unreached) -> Reaped:
    """Destroy segments, as far as nobody has them; any thread may do it."""
    done = Reaped([], dict(dead.reasons))
    for row in dead.rows:
        try:
            pool.destroy(row)
            done.gone.append(row.number)
        except PkernfsError as e:
            done.reasons[row.number] = str(e)
    return done
