"""The law of units: a number that crosses a public function says its unit, a tuple has fields."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import pkernfs
from pkernfs import quantities

ROOT = Path(pkernfs.__file__).parent
#: What a parameter or a field of this name is, wherever it stands.
UNITS = {
    "ino": "Ino",
    "ino_in": "Ino",
    "ino_out": "Ino",
    "list_ino": "Ino",
    "parent": "Ino",
    "new_parent": "Ino",
    "map_page": "PageNo",
    "journal_page": "PageNo",
    "block": "BlockNo",
    "first_block": "BlockNo",
    "region_offset": "RegionOff",
    "physical": "PhysAddr",
    "phys_base": "PhysAddr",
    "iova": "Iova",
    "source_id": "SourceId",
}
#: Module and function whose number of that name stays bare, and why.
BARE_NUMBERS: dict[str, str] = {}
#: Module and function or class across which a tuple of fixed parts goes without fields, and why.
BARE_TUPLES: dict[str, str] = {
    "errors.ZeroingNeeded.__init__(blocks)": "errors imports nothing of ours",
    "fs.super.Super.isolate_for_zeroing(blocks)": "takes what ZeroingNeeded carries",
    "alloc.blocks.BlockAllocator.isolate(runs)": "takes what ZeroingNeeded carries",
    "fuse.operations.Operations.forget(inodes)": "pyfuse3 gives pairs",
}


class Annotated(NamedTuple):
    """An annotation in a public signature: ``fs.namei.Namei.lookup``, ``parent``, ``Ino``."""

    where: str
    name: str
    text: str


def is_public(name: str) -> bool:
    return not name.startswith("_") or name == "__init__"


def annotated(module: str, body: list[ast.stmt]) -> Iterator[Annotated]:
    """Each annotation of public functions, of what they return, and of fields of public classes."""
    for node in body:
        if isinstance(node, ast.ClassDef) and is_public(node.name):
            yield from annotated(f"{module}.{node.name}", node.body)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            if is_public(node.target.id):
                yield Annotated(module, node.target.id, ast.unparse(node.annotation))
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and is_public(node.name):
            where = f"{module}.{node.name}"
            arguments = node.args
            for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs):
                if a.annotation is not None:
                    yield Annotated(where, a.arg, ast.unparse(a.annotation))
            if node.returns is not None:
                yield Annotated(where, "return", ast.unparse(node.returns))


def of_source() -> Iterator[Annotated]:
    for path in sorted(ROOT.rglob("*.py")):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        yield from annotated(module, ast.parse(path.read_text()).body)


ALL = list(of_source())
NUMBER = re.compile(r"\bint\b")
#: A tuple of two or more parts, but not one of any length.
TUPLE = re.compile(r"\btuple\[[^\[\]]*(?:\[[^\[\]]*\][^\[\]]*)*,(?! \.\.\.\])")


def bare_numbers() -> dict[str, str]:
    return {
        f"{a.where}({a.name})": f"{a.text}, not {UNITS[a.name]}"
        for a in ALL
        if a.name in UNITS and NUMBER.search(a.text)
    }


def bare_tuples() -> dict[str, str]:
    return {f"{a.where}({a.name})": a.text for a in ALL if TUPLE.search(a.text)}


def test_the_source_is_found() -> None:
    assert len(ALL) > 1000
    assert {a.text for a in ALL} >= set(UNITS.values())


@pytest.mark.parametrize("unit", sorted(set(UNITS.values())))
def test_unit_is_a_new_type(unit: str) -> None:
    assert getattr(quantities, unit).__supertype__ is int


@pytest.mark.parametrize(
    ("text", "bare"),
    [
        ("int", True),
        ("int | None", True),
        ("set[int]", True),
        ("Ino", False),
        ("Callable[[Ino], str | None]", False),
    ],
)
def test_number_is_seen(text: str, bare: bool) -> None:
    assert bool(NUMBER.search(text)) == bare


@pytest.mark.parametrize(
    ("text", "fixed"),
    [
        ("tuple[int, int]", True),
        ("list[tuple[bytes, tuple[int, ...]]]", True),
        ("tuple[int, ...]", False),
        ("tuple[dict[int, int], ...]", False),
        ("dict[str, tuple[Ino, ...]]", False),
    ],
)
def test_tuple_is_seen(text: str, fixed: bool) -> None:
    assert bool(TUPLE.search(text)) == fixed


def test_numbers_say_their_unit() -> None:
    assert {k: v for k, v in bare_numbers().items() if k not in BARE_NUMBERS} == {}


def test_tuples_have_fields() -> None:
    assert {k: v for k, v in bare_tuples().items() if k not in BARE_TUPLES} == {}


def test_exemptions_are_needed() -> None:
    assert set(BARE_NUMBERS) <= set(bare_numbers())
    assert set(BARE_TUPLES) <= set(bare_tuples())
