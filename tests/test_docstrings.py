"""What a docstring or a comment refers to by a role (:class:`X`, :meth:`y`) is there."""

from __future__ import annotations

import ast
import builtins
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import pkernfs

ROOT = Path(pkernfs.__file__).parent
SUPPORT = Path(__file__).parent / "support"
ROLE = re.compile(r":(?:attr|class|data|exc|func|meth|mod):`~?([\w.]+)(?:\(\))?`")


def names_in(tree: ast.Module) -> Iterator[str]:
    """Each name that a module defines, imports, or uses as an attribute."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield from (alias.asname or alias.name for alias in node.names)


def is_there(dotted: str) -> bool:
    """Tell if ``pkernfs.package.module.Class.method`` can be found, however short it is."""
    parts = dotted.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for name in parts[end:]:
            if name in getattr(found, "__annotations__", {}):
                return True
            if not hasattr(found, name):
                return False
            found = getattr(found, name)
        return True
    return False


def missing(path: Path) -> list[str]:
    text = path.read_text()
    own = {*names_in(ast.parse(text)), *dir(builtins)}
    return [
        name for name in ROLE.findall(text) if name.split(".")[0] not in own and not is_there(name)
    ]


def test_a_name_that_is_gone_is_seen(tmp_path: Path) -> None:
    module = tmp_path / "module.py"
    module.write_text(
        '"""See :func:`here`, :func:`gone` and :class:`~pkernfs.layout.Gone`."""\ndef here(): ...\n'
    )
    assert missing(module) == ["gone", "pkernfs.layout.Gone"]


@pytest.mark.parametrize(
    "path", [*sorted(ROOT.rglob("*.py")), *sorted(SUPPORT.rglob("*.py"))], ids=lambda p: p.stem
)
def test_what_is_referred_to_is_there(path: Path) -> None:
    assert missing(path) == []
