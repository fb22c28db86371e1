"""Frozen dataclasses as JSON, and back, with every check that their annotations call for.

A field may be an int, with its range as ``Annotated[int, Between(...)]``; bool; str; bytes, which
are base64 in JSON; a Literal of strings; another such dataclass; a dict, which is JSON as it is; or
a NewType of one of these. It may be a tuple of one kind of these, and each may be None. A field
with a default may be missing.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import inspect
import types
from collections.abc import Callable, Iterator
from functools import partial
from typing import (
    Annotated,
    Any,
    Literal,
    NamedTuple,
    NewType,
    TypeVar,
    Union,
    cast,
    get_args,
    get_origin,
)

from pkernfs.errors import InvalidError

_SHOWN = 80  # characters of a value in a message

M = TypeVar("M")


class Between(NamedTuple):
    """The range of an int, both ends included."""

    first: int
    last: int


class _RefusedError(Exception):
    """``problem`` is of the field ``where``, a path as in ``bar.number``; "" is the whole."""

    def __init__(self, problem: str, where: str = "", reason: str = "") -> None:
        super().__init__(problem, where, reason)
        self.problem = problem
        self.where = where
        self.reason = reason


def _bad(got: object, expected: str) -> _RefusedError:
    return _RefusedError("bad", reason=f": got {_short(repr(got))}, expected {expected}")


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


class _Codec(NamedTuple):
    """The way of a value to JSON, and its way back with the checks."""

    encode: Callable[[Any], Any]
    decode: Callable[[object], object]


class _Field(NamedTuple):
    name: str
    codec: _Codec
    required: bool


def prepare(kind: type[Any]) -> None:
    """Read the annotations of a dataclass now, so that its first value need not wait for it."""
    _fields(kind)


def encode(message: object) -> dict[str, Any]:
    """Return the fields of a dataclass for :mod:`json`, unchecked."""
    return {f.name: f.codec.encode(getattr(message, f.name)) for f in _fields(type(message))}


def decode(kind: type[M], found: object, what: str) -> M:
    """Make the ``kind`` whose fields are ``found`` in JSON; messages name it ``what``.

    :raises InvalidError: a field is missing, is not known, or has a value that it cannot have.
    """
    try:
        return cast(M, _decode(kind, found))
    except _RefusedError as e:
        raise InvalidError(f"{what}: {e.problem} {e.where or 'fields'}{e.reason}") from None


def _decode(kind: type[Any], found: object) -> object:
    if not isinstance(found, dict):
        raise _bad(found, "an object")
    fields = _fields(kind)
    values = {}
    for field in fields:
        if field.name in found:
            values[field.name] = _inside(field.name, field.codec.decode, found[field.name])
        elif field.required:
            raise _RefusedError("missing field", field.name)
    if len(values) < len(found):
        unknown = min(found.keys() - {f.name for f in fields})
        raise _RefusedError("unknown field", _short(unknown))
    return kind(**values)


def _inside(name: str, read: Callable[[object], object], value: object) -> object:
    try:
        return read(value)
    except _RefusedError as e:
        e.where = f"{name}.{e.where}" if e.where else name
        raise


_known: dict[Any, tuple[_Field, ...]] = {}


def _fields(kind: type[Any]) -> tuple[_Field, ...]:
    fields = _known.get(kind)
    if fields is None:
        fields = _known[kind] = tuple(_read_annotations(kind))
    return fields


def _read_annotations(kind: type[Any]) -> Iterator[_Field]:
    hints = inspect.get_annotations(kind, eval_str=True)
    for f in dataclasses.fields(kind):
        optional = (f.default, f.default_factory) != (dataclasses.MISSING, dataclasses.MISSING)
        yield _Field(f.name, _codec(hints[f.name]), not optional)


def _codec(annotation: Any) -> _Codec:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _Codec(_as_it_is, partial(_decode_int, arguments[1]))
    if isinstance(annotation, NewType):
        return _codec(annotation.__supertype__)
    if origin is Literal:
        return _Codec(_as_it_is, partial(_decode_literal, arguments))
    if origin in (Union, types.UnionType):
        (inner,) = (a for a in arguments if a is not type(None))
        return _optional(_codec(inner))
    if origin is tuple:
        assert arguments[1:] == (...,), annotation
        return _sequence(_codec(arguments[0]))
    if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
        return _Codec(encode, partial(_decode, annotation))
    return _PLAIN[origin or annotation]


def _optional(inner: _Codec) -> _Codec:
    return _Codec(
        lambda value: None if value is None else inner.encode(value),
        lambda value: None if value is None else inner.decode(value),
    )


def _sequence(inner: _Codec) -> _Codec:
    def decode_all(value: object) -> tuple[object, ...]:
        if not isinstance(value, list):
            raise _bad(value, "a list")
        return tuple(_inside(str(at), inner.decode, item) for at, item in enumerate(value))

    return _Codec(lambda values: [inner.encode(v) for v in values], decode_all)


def _as_it_is(value: Any) -> Any:
    return value


def _decode_int(span: Between, value: object) -> int:
    if type(value) is not int or not span.first <= value <= span.last:  # a bool is no number
        raise _bad(value, f"a number from {span.first} to {span.last:#x}")
    return value


def _decode_literal(words: tuple[str, ...], value: object) -> str:
    if not isinstance(value, str) or value not in words:
        raise _bad(value, " or ".join(words))
    return value


def _decode_bytes(value: object) -> bytes:
    try:
        return base64.b64decode(_decode_str(value), validate=True)
    except (binascii.Error, ValueError):
        raise _bad(value, "base64") from None


def _decode_plain(kind: type[M], expected: str, value: object) -> M:
    if type(value) is not kind:
        raise _bad(value, expected)
    return value


_decode_str = cast(Callable[[object], str], partial(_decode_plain, str, "text"))

_PLAIN: dict[Any, _Codec] = {
    int: _Codec(_as_it_is, partial(_decode_plain, int, "a number")),
    bool: _Codec(_as_it_is, partial(_decode_plain, bool, "true or false")),
    str: _Codec(_as_it_is, _decode_str),
    dict: _Codec(_as_it_is, partial(_decode_plain, dict, "an object")),
    bytes: _Codec(lambda value: base64.b64encode(value).decode(), _decode_bytes),
}
