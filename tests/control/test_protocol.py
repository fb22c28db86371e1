"""All that may be asked: each request and each answer goes over the wire and comes back."""

from __future__ import annotations

import dataclasses
from typing import Any, NewType, get_args, get_origin, get_type_hints

import pytest

from pkernfs.control import protocol, segment_protocol, table_protocol
from pkernfs.control.wire import (
    Done,
    Item,
    Request,
    Stream,
    done_line,
    item_line,
    parse_answer,
    parse_request,
    request_line,
)

MODULES = (protocol, segment_protocol, table_protocol)
REQUESTS = tuple(request for module in MODULES for request in module.REQUESTS)
BY_OP = {request.op: request for request in REQUESTS}
#: A value of each kind of field.
VALUES: dict[Any, Any] = {int: 3, bool: True, str: "ü\n", bytes: b"\0\xff", dict: {"a": [1, None]}}


def example(annotation: Any) -> Any:
    """Something that the annotation allows."""
    arguments = get_args(annotation)
    if dataclasses.is_dataclass(annotation):
        return made(annotation)
    if get_origin(annotation) is tuple:
        return (example(arguments[0]),) * 2
    if arguments and isinstance(arguments[0], str):
        return arguments[-1]  # of a Literal
    if type(None) in arguments:
        return example(arguments[0])
    if isinstance(annotation, NewType):
        return example(annotation.__supertype__)
    return VALUES[get_origin(annotation) or annotation]


def made(kind: Any) -> Any:
    """A message of the class."""
    hints = get_type_hints(kind)
    return kind(**{field.name: example(hints[field.name]) for field in dataclasses.fields(kind)})


def test_every_request_is_registered_once() -> None:
    found = {
        one
        for module in MODULES
        for one in vars(module).values()
        if isinstance(one, type) and issubclass(one, Request) and hasattr(one, "op")
    }
    assert found == set(REQUESTS)
    assert len(BY_OP) == len(REQUESTS) == len(set(REQUESTS))


@pytest.mark.parametrize("kind", REQUESTS)
def test_requests_and_answers_come_back(kind: type[Request[Any]]) -> None:
    request = made(kind)
    assert parse_request(request_line(request).rstrip(b"\n"), BY_OP) == request
    assert request_line(request).count(b"\n") == 1
    for answer in map(made, kind.answers):
        if issubclass(kind, Stream):
            assert parse_answer(item_line(answer), request) == Item(answer)
            assert parse_answer(done_line(None), request) == Done(None)
        else:
            assert parse_answer(done_line(answer), request) == Done(answer)
