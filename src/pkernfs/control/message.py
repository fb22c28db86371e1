"""Frozen dataclasses without code of their own, made when they are first used.

:func:`dataclasses.dataclass` compiles up to seven functions for a class, which takes 0.3 ms. The
protocol has forty classes; a command and the daemon that it asks would wait for each that they use.
"""

from __future__ import annotations

from dataclasses import MISSING, FrozenInstanceError, dataclass, fields
from threading import RLock
from typing import Any, ClassVar, NoReturn, dataclass_transform

_lock = RLock()
_pending: set[type[Any]] = set()


def _complete(kind: type[Any]) -> None:
    """Find the fields of a message, unless they are known; threads may ask at once."""
    with _lock:
        if kind in _pending:
            dataclass(init=False, repr=False, eq=False)(kind)
            _pending.discard(kind)


class _Fields:
    """Stands for ``__dataclass_fields__`` in messages whose fields nobody has asked for."""

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
        """Take the values of the fields, in order or by name.

        :raises TypeError: too many, one twice, one that is no field, or one is missing.
        """
        known = fields(type(self))
        state = self.__dict__  # __setattr__ refuses
        for field, value in zip(known, values, strict=False):
            state[field.name] = value
        for field in known[len(values) :]:
            if field.name in named:
                state[field.name] = named.pop(field.name)
            elif field.default is not MISSING:
                state[field.name] = field.default
            else:
                raise TypeError(f"{type(self).__name__}: {field.name} is missing")
        if len(values) > len(known) or named:
            raise TypeError(f"{type(self).__name__}: {values[len(known) :]} {named}: no such field")

    def __setattr__(self, name: str, value: Any) -> NoReturn:
        raise FrozenInstanceError(f"cannot assign to field {name!r}")

    def __delattr__(self, name: str) -> NoReturn:
        raise FrozenInstanceError(f"cannot delete field {name!r}")

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return self.__dict__ == other.__dict__

    def __hash__(self) -> int:
        return hash((type(self), *self.__dict__.values()))

    def __repr__(self) -> str:
        values = ", ".join(f"{name}={value!r}" for name, value in self.__dict__.items())
        return f"{type(self).__qualname__}({values})"
