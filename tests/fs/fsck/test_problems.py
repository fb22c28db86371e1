"""The report; and the law that every problem code has a case."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from pkernfs.fs.fsck import Code, check
from pkernfs.layout import STATE_MOUNTED
from support.damage import Damage

#: Codes whose damage or outcome is unlike that of the others, and where they are tested.
TESTED_APART = {
    Code.SEGMENT_REMADE: "test_segments.py",
    Code.NO_ROOM: "test_connect.py",
    Code.TABLES_BAD: "test_tables.py",
    Code.TABLES_UNCHECKED: "test_tables.py",
}


def codes_of_cases(path: Path) -> Iterator[Code]:
    """The codes that the ``@case(Code.…)`` of a test module name."""
    for node in ast.walk(ast.parse(path.read_text())):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id == "case"
        ):
            for argument in node.args:
                assert isinstance(argument, ast.Attribute), ast.unparse(node)
                yield Code[argument.attr]


def test_every_code_has_a_case() -> None:
    modules = sorted(Path(__file__).parent.glob("test_*.py"))
    found = {code for path in modules for code in codes_of_cases(path)}
    assert found | set(TESTED_APART) == set(Code)
    assert not found & set(TESTED_APART)
    for code, module in TESTED_APART.items():
        assert f"Code.{code.name}" in (Path(__file__).parent / module).read_text()


@pytest.mark.parametrize(
    ("some", "test"),
    [
        (r"^case = Cases\(\)$", r"^@case\.each$"),
        (r"^@case\(.*lossless=True\)$", r"^@case\.each_lossless$"),
    ],
)
def test_every_case_runs(some: str, test: str) -> None:
    """A module that has cases has the test that runs them."""
    for path in Path(__file__).parent.glob("test_*.py"):
        text = path.read_text()
        is_there = [bool(re.search(pattern, text, re.MULTILINE)) for pattern in (some, test)]
        assert is_there[0] == is_there[1], path.name


def test_report_as_json(damage: Damage) -> None:
    damage.set_inode(damage.inos["small"], nlink=7)
    damage.set_state(state=STATE_MOUNTED)
    found = json.loads(check(damage.region, repair=False).to_json())
    assert found["clean"] is False
    assert found["left"] == 1
    (problem,) = found["problems"]
    assert problem["code"] == "INODE_LINKS"
    assert problem["message"].endswith(": bad nlink: got 7, expected 2")
    assert problem["message"].startswith(problem["where"])
    assert problem["fixed"] is False
    assert [note["code"] for note in found["notes"]] == ["NOT_UNMOUNTED"]
    assert found["summary"]["inodes"] > 150
    assert check(damage.region, repair=True).left == 0


def test_many_problems_are_counted_not_listed(
    damage: Damage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pkernfs.fs.fsck.problems.MAX_PER_CODE", 3)
    for i in range(8):
        damage.set_inode(damage.inos[f"many/a-name-that-takes-some-room-{i:04}"], nlink=9)
    report = check(damage.region, repair=True)
    assert len(report.problems) == 3
    assert report.suppressed == 5
    assert check(damage.region, repair=False).clean
