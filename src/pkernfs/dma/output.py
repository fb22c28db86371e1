"""Questions about tables, and the kinds of items in their answers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from pkernfs.quantities import Iova, SourceId


class Question(NamedTuple):
    """A question of a command: ``what`` is translate, show, export or check.

    ``domain`` is N of dom-N, ``access`` READ, WRITE or both.
    """

    what: str
    domain: int | None = None
    device: SourceId | None = None
    iova: Iova | None = None
    pasid: int | None = None
    access: int = 0
    as_json: bool = False
    merge: bool = False


@dataclass
class Text:
    """Text to print as it is, with its ends of line."""

    text: str


@dataclass
class Record:
    """A record of a JSON document (:func:`pkernfs.iommu.export.assemble`)."""

    record: dict[str, Any]


@dataclass
class Status:
    """The exit status that the answer calls for."""

    status: int


@dataclass
class Pause:
    """A place where others may be served."""


PAUSE = Pause()

Output = Iterator[Text | Record | Status | Pause]
