"""Imports point one way, the core needs no FUSE, and only the adapter is asynchronous."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import pkernfs

ROOT = Path(pkernfs.__file__).parent

#: A module may import from its own package and from anything below it.
LAYERS = (
    ("errors",),
    ("layout", "progress", "ratelimit"),
    ("options",),
    ("vtd",),
    ("host",),
    ("region",),
    ("journal",),
    ("alloc",),
    ("iommu",),
    ("units",),
    ("fs",),
    ("dma",),
    ("control",),
    ("kexec",),
    ("fuse",),
    ("vmm",),
    ("doctor",),
    ("commands",),
    ("cli",),
)
#: Not part of the running program: they build the extension modules.
BUILDERS = {"native.build", "fuse.shim_build"}
#: The extension modules, and who alone may use each.
EXTENSIONS = {
    "native._native": {
        "region.files",
        "region.region",
        "region.digest",
        "journal",
        "units.mmio",
        "iommu.page_pool",
    },
    "fuse._shim": {"fuse.shim"},
}
ASYNC_MODULES = {
    "control.handlers",
    "control.freezing",
    "control.server",
    "fuse.operations",
    "fuse.daemon",
}


def module_name(path: Path) -> str:
    """``fs.journal`` for src/pkernfs/fs/journal.py."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {
    name: ast.parse(path.read_text())
    for path in sorted(ROOT.rglob("*.py"))
    if (name := module_name(path)) and name not in BUILDERS
}


def imported(tree: ast.Module) -> set[str]:
    """Every module that is named in an import, wherever in the file it is."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            found.add(node.module or "")
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def ours(tree: ast.Module) -> set[str]:
    """The imports of the project's own modules, without the ``pkernfs.``."""
    names = {
        name.removeprefix("pkernfs.") for name in imported(tree) if name.startswith("pkernfs.")
    }
    return {name for name in names if name in MODULES or name in EXTENSIONS}


def layer(name: str) -> int:
    """Index into LAYERS of the module ``name``."""
    top = name.split(".")[0]
    return next(i for i, names in enumerate(LAYERS) if top in names)


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_down(name: str) -> None:
    for other in ours(MODULES[name]):
        if other in EXTENSIONS:
            assert name in EXTENSIONS[other], f"{name} uses the extension module {other}"
            continue
        same_package = name.split(".")[0] == other.split(".")[0]
        assert same_package or layer(other) < layer(name), f"{name} imports {other}"


@pytest.mark.parametrize("name", sorted(set(MODULES) - ASYNC_MODULES))
def test_only_the_adapter_is_asynchronous(name: str) -> None:
    tree = MODULES[name]
    asynchronous = (ast.AsyncFunctionDef, ast.Await, ast.AsyncWith, ast.AsyncFor)
    assert not any(isinstance(node, asynchronous) for node in ast.walk(tree))
    tops = {other.split(".")[0] for other in imported(tree)}
    assert not tops & {"pyfuse3", "trio"}


def test_the_checker_does_not_use_what_it_checks() -> None:
    for name, tree in MODULES.items():
        if name == "fs.fsck" or name.startswith("fs.fsck."):
            assert not ours(tree) & {"fs.filesystem", "alloc.blocks", "alloc.pages"}, name


def test_core_works_without_fuse() -> None:
    """Every module but the adapter is imported where pyfuse3 and trio are not to be had."""
    core = sorted(set(MODULES) - ASYNC_MODULES - {"fuse.shim"})
    program = "import sys\nsys.modules['pyfuse3'] = sys.modules['trio'] = None\n"
    program += "".join(f"import pkernfs.{name}\n" for name in core)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
