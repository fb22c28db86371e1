"""Dataclasses that are made when they are first used.

To make a dataclass takes 0.2 ms, the protocol has forty, and every command would wait for all of
them at its start, to use two or three.
"""

from __future__ import annotations

from dataclasses import dataclass
from threading import RLock
from typing import Any, ClassVar, dataclass_transform

_lock = RLock()
_pending: set[type[Any]] = set()


def _complete(kind: type[Any]) -> None:
    """Make the dataclass of a message, unless it is made; threads may ask at once."""
    with _lock:
        if kind in _pending:
            dataclass(frozen=True)(kind)
            _pending.discard(kind)


class _Fields:
    """Stands for ``__dataclass_fields__`` in messages that are not yet dataclasses."""

    def __get__(self, message: object, kind: type[Any]) -> Any:
        _complete(kind)
        found = kind.__dict__.get("__dataclass_fields__", self)
        if found is self:
            raise AttributeError("__dataclass_fields__")
        return found


@dataclass_transform(frozen_default=True)
class Message:
    """Its subclasses are frozen dataclasses, for all who ask; none needs a decorator.

    An ``abstract`` one has no fields, and only its subclasses are messages.
    """

    __dataclass_fields__: ClassVar[Any] = _Fields()

    def __init_subclass__(cls, *, abstract: bool = False) -> None:
        super().__init_subclass__()
        if not abstract:
            _pending.add(cls)

    def __init__(self, *values: Any, **named: Any) -> None:
        _complete(type(self))
        type(self).__init__(self, *values, **named)
