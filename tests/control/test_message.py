"""Messages are dataclasses for all who ask, and none before."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from pkernfs.control.message import Message


def fresh() -> type[Any]:
    """A message that nobody has used."""

    class Point(Message):
        """Where."""

        x: int
        y: int = 5

    return Point


def test_is_a_frozen_dataclass() -> None:
    point = fresh()
    one = point(1)
    assert (one.x, one.y) == (1, 5)
    assert one == point(x=1, y=5) != point(2)
    assert len({one, point(1)}) == 1
    assert repr(one).endswith("Point(x=1, y=5)")
    assert dataclasses.asdict(one) == {"x": 1, "y": 5}
    assert dataclasses.replace(one, y=6) == point(1, 6)
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.x = 2


@pytest.mark.parametrize("values", [(), (1, 2, 3)])
def test_wrong_values_are_refused(values: tuple[int, ...]) -> None:
    point = fresh()
    for _ in range(2):
        with pytest.raises(TypeError):
            point(*values)
    with pytest.raises(TypeError):
        point(1, z=2)


def test_the_class_can_be_asked_first() -> None:
    point = fresh()
    assert dataclasses.is_dataclass(point)
    assert [f.name for f in dataclasses.fields(point)] == ["x", "y"]


def test_what_is_abstract_is_no_dataclass() -> None:
    class Request(Message, abstract=True):
        pass

    class Ask(Request):
        what: str

    assert not dataclasses.is_dataclass(Request)
    assert not dataclasses.is_dataclass(Message)
    assert Ask("x").what == "x"
    assert not dataclasses.is_dataclass(Request)


def test_threads_that_ask_at_once() -> None:
    with ThreadPoolExecutor(8) as pool:
        for _ in range(50):
            point = fresh()
            made = list(pool.map(lambda n, kind=point: kind(n), range(8)))
            assert [m.x for m in made] == list(range(8))


def test_no_dataclass_is_made_at_import() -> None:
    """All of them would take a command 8 ms."""
    code = (
        "import pkernfs.control.protocol as p\n"
        "assert '__dataclass_fields__' not in p.Freeze.__dict__\n"
        "p.Freeze()\n"
        "assert '__dataclass_fields__' in p.Freeze.__dict__\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
