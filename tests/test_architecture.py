"""docs/architecture.md against the code: each name in it exists, and each module is in it."""

from __future__ import annotations

import ast
import re
from difflib import get_close_matches
from pathlib import Path

import pkernfs

PACKAGE = Path(pkernfs.__file__).parent
ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs" / "architecture.md"
LAWS = ROOT / "tests" / "test_imports.py"

_NAME = re.compile(r"[a-z_]\w*(\.[A-Za-z_]\w*)*")
_C_NAME = re.compile(r"pk_\w+")
_ROW = re.compile(r" {4} *(\d+)? +([a-z]+)  +\S.*")


def modules() -> dict[str, ast.Module]:
    """Every module by its name without ``pkernfs.``; a package stands for its __init__."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name:
            found[name] = ast.parse(path.read_text())
    return found


def members(body: list[ast.stmt], prefix: str) -> set[str]:
    """Names that statements define, also those of classes in them."""
    found = set()
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(f"{prefix}.{node.name}")
            if isinstance(node, ast.ClassDef):
                found |= members(node.body, f"{prefix}.{node.name}")
        elif isinstance(node, ast.Assign):
            names = [t for t in node.targets if isinstance(t, ast.Name)]
            found.update(f"{prefix}.{t.id}" for t in names)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.add(f"{prefix}.{node.target.id}")
    return found


MODULES = modules()
NAMES = set(MODULES).union(*(members(tree.body, name) for name, tree in MODULES.items()))
TEXT = DOCUMENT.read_text()
QUOTED = re.findall(r"`([^`\n]+)`", TEXT)


def named_in_python() -> list[str]:
    """Backticked names whose first part is a module or package of ours."""
    tops = {name.split(".")[0] for name in MODULES}
    return [q for q in QUOTED if _NAME.fullmatch(q) and q.split(".")[0] in tops]


def hint(name: str) -> str:
    """What the document may have meant."""
    last = name.rpartition(".")[2]
    moved = sorted(n for n in NAMES if n.rpartition(".")[2] == last)
    guesses = moved or get_close_matches(name, NAMES)
    return f"{name}: there is {', '.join(guesses) or 'nothing like it'}"


def test_every_python_name_exists() -> None:
    wrong = sorted({name for name in named_in_python() if name not in NAMES})
    assert not wrong, "\n" + "\n".join(hint(name) for name in wrong)


def test_every_c_name_exists() -> None:
    source = "\n".join(path.read_text() for path in sorted(PACKAGE.rglob("*.c")))
    named = {q for q in QUOTED if _C_NAME.fullmatch(q)}
    wrong = sorted(n for n in named if not re.search(rf"\b{n}\(", source))
    assert named
    assert not wrong


def test_every_path_exists() -> None:
    paths = set(re.findall(r"\b(?:docs|scripts|src|tests)/[\w./-]*\w", TEXT))
    paths |= {f"docs/{p}" for p in re.findall(r"\]\(([\w.-]+)\)", TEXT)}
    wrong = sorted(p for p in paths if not (ROOT / p).exists())
    assert not wrong


def test_every_module_has_its_row() -> None:
    rows = [
        line.split("|")[1] for line in TEXT.splitlines() if line.startswith("| `")
    ] + re.findall(r"(?<=### Builders\n\n).*", TEXT)
    listed = [q for row in rows for q in re.findall(r"`([\w.]+)`", row)]
    packages = {name for name, _ in (n.rsplit(".", 1) for n in MODULES if "." in n)}
    expected = set(MODULES) - (packages - {"fs.fsck"})
    wrong = {
        "without a row": sorted(expected - set(listed)),
        "no such module": sorted(set(listed) - expected),
        "twice": sorted({name for name in listed if listed.count(name) > 1}),
    }
    assert not any(wrong.values()), wrong


def test_the_map_is_that_of_the_laws() -> None:
    laws = ast.parse(LAWS.read_text())
    (layers,) = (
        ast.literal_eval(node.value)
        for node in laws.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "LAYERS"
    )
    expected = [(at + 1, name) for at, names in enumerate(layers) for name in names]
    rows = [m for line in TEXT.splitlines() if (m := _ROW.fullmatch(line))]
    drawn = [(int(m[1]), m[2]) for m in rows if m[1]]
    assert sorted(drawn) == sorted(expected)
    assert [number for number, _ in drawn] == sorted((n for n, _ in drawn), reverse=True)
    assert [m[2] for m in rows if not m[1]] == ["native"]
