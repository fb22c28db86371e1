"""The lines on the control socket, one JSON object each, and the version of their form.

A client sends one request, ``{"protocol": 2, "request": OP, "arguments": {...}}``. The answer is a
line ``{"protocol": 2, "item": KIND, "value": {...}}`` for each item of a stream, and at the end
``{"protocol": 2, "done": {...}}``, with the reply or None, or
``{"protocol": 2, "error": MESSAGE, "errno": NUMBER}``.

In every version a request and each line of an answer have ``protocol``, and a refusal has ``error``
and ``errno``; so any two versions understand that they do not understand each other. Version 1 had
no number; its requests were ``{"op": OP, ...}``, and its daemons refuse those of later versions,
which have no ``op``.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Mapping
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar, get_args

from pkernfs.control.codec import decode, encode
from pkernfs.control.message import Message
from pkernfs.errors import InvalidError, PkernfsError, one_line

VERSION = 2
_UNNUMBERED = 1  # the version that has no number

A = TypeVar("A")


class VersionError(PkernfsError):
    """The program and the daemon that it asks are of different versions."""

    errno = errno.EPROTONOSUPPORT

    def __init__(self, *, daemon: int, program: int) -> None:
        super().__init__(
            f"the daemon of this mount speaks protocol {daemon}, this program {program}: "
            "unmount and mount again"
        )

    def at(self, path: str) -> VersionError:
        """Put the path, by which the mount was named, before the message."""
        self.args = (f"{path}: {self}",)
        return self


class Request(Message, Generic[A], abstract=True):
    """A request of a client; ``A`` is the class of the answer, or a union of such classes.

    A subclass names the operation as ``op`` among its bases.
    """

    op: ClassVar[str]
    answers: ClassVar[tuple[type[Any], ...]]

    def __init_subclass__(cls, op: str | None = None) -> None:
        super().__init_subclass__(abstract=op is None)
        if op is not None:
            (answer,) = get_args(cls.__orig_bases__[0])  # type: ignore[attr-defined]
            cls.op = op
            cls.answers = get_args(answer) or (answer,)


class Call(Request[A]):
    """A request with one reply."""


class Stream(Request[A]):
    """A request that is answered by items, as long as the client listens."""


class Item(NamedTuple):
    """A line of the answer to a :class:`Stream`."""

    value: Any


class Done(NamedTuple):
    """The last line of an answer; ``reply`` is None for a :class:`Stream`."""

    reply: Any


def request_line(request: Request[Any]) -> bytes:
    """Return the line of a request."""
    return _line({"request": request.op, "arguments": encode(request)})


def item_line(item: object) -> bytes:
    """Return the line of an item."""
    return _line({"item": type(item).__name__, "value": encode(item)})


def done_line(reply: object | None) -> bytes:
    """Return the last line: the reply, or None after a stream."""
    return _line({"done": None if reply is None else encode(reply)})


def error_line(error: PkernfsError) -> bytes:
    """Return the last line for a request that has failed, or is refused."""
    return _line({"error": one_line(str(error)), "errno": error.errno})


def _line(content: dict[str, Any]) -> bytes:
    return json.dumps({"protocol": VERSION, **content}).encode() + b"\n"


def parse_request(line: bytes, known: Mapping[str, type[Request[Any]]]) -> Request[Any]:
    """Return the request in a line; ``known`` are the classes by operation.

    :raises VersionError: it is of another version.
    :raises InvalidError: anything else about it is wrong.
    """
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        raise InvalidError("control: the request is not JSON") from None
    match found:
        case {"protocol": int(version)} if version != VERSION:
            raise VersionError(daemon=VERSION, program=version)
        case {"protocol": int(), "request": str(op), "arguments": arguments, **more} if not more:
            kind = known.get(op)
            if kind is None:
                raise InvalidError(f"control: the daemon does not know {op!r}")
            return decode(kind, arguments, op)
        case {"op": str()} if "protocol" not in found:
            raise VersionError(daemon=VERSION, program=_UNNUMBERED)
    raise InvalidError(
        f'control: the request is not {{"protocol": {VERSION}, "request": OP, "arguments": ...}}'
    )


def parse_answer(line: bytes, request: Request[Any]) -> Item | Done | PkernfsError:
    """Return the content of a line of the answer; an error has only message and errno.

    :raises VersionError: the daemon is of another version.
    :raises InvalidError, ValueError: it is not an answer to that.
    """
    found = json.loads(line)
    if not isinstance(found, dict):
        raise InvalidError(f"{request.op}: the answer is not an object")
    version = found.pop("protocol", _UNNUMBERED)
    if isinstance(version, int) and version != VERSION:
        raise VersionError(daemon=version, program=VERSION)
    match found:
        case {"error": str(message), "errno": int(number), **more} if not more:
            error = PkernfsError(message)
            error.errno = number
            return error
        case {"item": str(name), "value": value, **more} if isinstance(request, Stream):
            kind = next((a for a in request.answers if a.__name__ == name), None)
            if kind is not None and not more:
                return Item(decode(kind, value, f"{request.op}: {name}"))
        case {"done": None, **more} if isinstance(request, Stream) and not more:
            return Done(None)
        case {"done": reply, **more} if isinstance(request, Call) and not more:
            return Done(decode(request.answers[0], reply, request.op))
    raise InvalidError(f"{request.op}: the answer makes no sense")
