"""Dataclasses as JSON: what comes back, and what is refused with which line."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NewType

import pytest

from pkernfs.control.codec import Between, decode, encode
from pkernfs.errors import InvalidError

Page = NewType("Page", int)


@dataclass(frozen=True)
class Inner:
    """A field that has fields."""

    number: Annotated[int, Between(0, 5)]


@dataclass(frozen=True)
class All:
    """A field of each kind."""

    ranged: Annotated[int, Between(0, 0xFFFF)]
    plain: int
    flag: bool
    text: str
    data: bytes
    word: Literal["a", "b"]
    inner: Inner
    many: tuple[Inner, ...]
    numbers: tuple[Annotated[int, Between(0, 9)], ...]
    json: dict[str, Any]
    maybe: Annotated[int, Between(0, 9)] | None
    given: str = "default"


ONE = All(
    1, -5, True, "ü\n", b"\0\xff", "b", Inner(5), (Inner(0), Inner(1)), (1, 2), {"a": [None]}, None
)


def as_json(message: object) -> Any:
    """The fields that arrive at the other end."""
    return json.loads(json.dumps(encode(message)))


def test_what_is_sent_arrives() -> None:
    assert decode(All, as_json(ONE), "test") == ONE
    assert as_json(ONE)["data"] == "AP8="


@dataclass(frozen=True)
class Pages:
    """Numbers that have a type of their own."""

    first: Page
    ranged: Annotated[Page, Between(0, 9)]
    many: tuple[Page, ...]
    maybe: Page | None


def test_a_new_type_is_what_it_is_made_of() -> None:
    pages = Pages(Page(1), Page(9), (Page(2), Page(3)), None)
    fields = as_json(pages)
    assert fields == {"first": 1, "ranged": 9, "many": [2, 3], "maybe": None}
    assert decode(Pages, fields, "test") == pages
    with pytest.raises(InvalidError, match=r"^test: bad first: got True, expected a number$"):
        decode(Pages, {**fields, "first": True}, "test")
    with pytest.raises(InvalidError, match=r"^test: bad ranged: got 10, expected a number from 0"):
        decode(Pages, {**fields, "ranged": 10}, "test")


def test_a_default_may_be_missing() -> None:
    fields = as_json(ONE)
    del fields["given"]
    assert decode(All, fields, "test") == ONE


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("ranged", -1, "bad ranged: got -1, expected a number from 0 to 0xffff"),
        ("ranged", 1 << 16, "bad ranged: got 65536, expected a number from 0 to 0xffff"),
        ("ranged", True, "bad ranged: got True, expected a number"),
        ("ranged", 1.0, "bad ranged: got 1.0, expected a number"),
        ("ranged", None, "bad ranged: got None, expected a number"),
        ("plain", True, "bad plain: got True, expected a number"),
        ("plain", "1", "bad plain: got '1', expected a number"),
        ("flag", 1, "bad flag: got 1, expected true or false"),
        ("text", None, "bad text: got None, expected text"),
        ("data", "!!", "bad data: got '!!', expected base64"),
        ("data", "AP8", "bad data: got 'AP8', expected base64"),
        ("data", "ü", "bad data: got 'ü', expected base64"),
        ("data", 5, "bad data: got 5, expected text"),
        ("word", "c", "bad word: got 'c', expected a or b"),
        ("word", ["a"], "bad word: got ['a'], expected a or b"),
        ("inner", {"number": 6}, "bad inner.number: got 6, expected a number from 0 to 0x5"),
        ("inner", {}, "missing field inner.number"),
        ("inner", {"number": 5, "x": 0}, "unknown field inner.x"),
        ("inner", [5], "bad inner: got [5], expected an object"),
        ("many", {"number": 5}, "bad many: got {'number': 5}, expected a list"),
        ("many", [{"number": 1}, {"number": 7}], "bad many.1.number: got 7"),
        ("numbers", [1, 2, 10], "bad numbers.2: got 10, expected a number"),
        ("json", [], "bad json: got [], expected an object"),
        ("maybe", 10, "bad maybe: got 10, expected a number from 0 to 0x9"),
        ("unheard", 0, "unknown field unheard"),
        ("text", ["x" * 1000], "bad text: got ['xxx"),
    ],
)
def test_a_bad_value_is_one_line(name: str, value: object, says: str) -> None:
    with pytest.raises(InvalidError) as caught:
        decode(All, {**as_json(ONE), name: value}, "test")
    assert str(caught.value).startswith(f"test: {says}")
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("name", [name for name in as_json(ONE) if name != "given"])
def test_a_field_that_is_missing(name: str) -> None:
    fields = as_json(ONE)
    del fields[name]
    with pytest.raises(InvalidError, match=f"^test: missing field {name}$"):
        decode(All, fields, "test")


@pytest.mark.parametrize("value", [None, 5, "x", [], True])
def test_fields_that_are_none(value: object) -> None:
    with pytest.raises(InvalidError, match=r"^test: bad fields: got .*, expected an object$"):
        decode(All, value, "test")
