"""The requests about segments and their answers, as in :mod:`pkernfs.control.protocol`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pkernfs import quantities
from pkernfs.control.message import Message
from pkernfs.control.protocol import UNSIGNED, Ino, Nothing, Unsigned
from pkernfs.control.wire import Call, Request, Stream

SegmentNo = Annotated[quantities.SegmentNo, UNSIGNED]


class SetSegment(Call[Nothing], op="segment.set"):
    """Give a file a segment, or take its segment from it; it keeps its bytes."""

    ino: Ino
    on: bool


class SetNative(Call[Nothing], op="native.set"):
    """Have the names of a file lead to its segment, or to the file again."""

    ino: Ino
    on: bool


class SegmentRow(Message):
    """A row of the table of segments; ``length`` in bytes.

    ``path`` is a name of the file in the mount, with a ``/`` before it; ``native_path`` is where
    other programs open the segment. Either is "" if there is none. ``lost`` says why the segment
    cannot be used; "": it can. ``native`` tells if the names of the file lead to it.
    """

    number: SegmentNo
    ino: Ino
    path: str
    state: Literal["new", "in use", "dead"]
    length: Unsigned
    native_path: str
    lost: str
    native: bool


class ListSegments(Stream[SegmentRow], op="segment.list"):
    """Ask for all segments, by number."""


#: The requests of this module.
REQUESTS: tuple[type[Request[Any]], ...] = (SetSegment, SetNative, ListSegments)
