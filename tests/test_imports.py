"""The laws of the house: imports point one way, each trade keeps to its own, and nothing is large.

A package is one trade. LAYERS orders them; nothing is exempt: neither imports for the type checker
nor imports inside functions.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import pkernfs

ROOT = Path(pkernfs.__file__).parent

#: Lowest first. A module imports from its own package and from packages in lower layers.
LAYERS = (
    ("errors",),
    ("quantities", "ratelimit"),
    ("layout",),
    ("options",),
    ("vtd",),
    ("host",),
    ("region",),
    ("pool",),
    ("journal",),
    ("alloc",),
    ("iommu",),
    ("units",),
    ("fs",),
    ("dma",),
    ("control",),
    ("kexec",),
    ("fuse",),
    ("plain",),
    ("vmm",),
    ("doctor",),
    ("commands",),
    ("cli",),
)
#: Not part of the running program: they build the extension modules.
BUILDERS = {"native.build", "native.compiler", "fuse.shim_build"}
#: The extension modules, and who alone may use each.
EXTENSIONS = {
    "native._native": {
        "region.bus_error",
        "region.checksum",
        "region.digest",
        "region.files",
        "region.region",
        "region.trace",
        "journal",
        "plain.caller",
        "plain.lookup",
        "plain.seccomp",
        "units.mmio",
        "iommu.page_pool",
    },
    "fuse._shim": {"fuse.shim"},
}
#: The only modules that know of pyfuse3 and trio, and that are asynchronous.
ASYNCHRONOUS = {
    "control.handlers",
    "control.freezing",
    "control.server",
    "control.native_requests",
    "control.segment_requests",
    "control.session",
    "control.table_requests",
    "control.verification",
    "fuse.operations",
    "fuse.data",
    "fuse.waiting",
    "fuse.xattr_handlers",
    "fuse.session",
    "fuse.event_loop",
    "fuse.daemon",
}
#: Who may print and choose exit statuses beside the commands, and why.
MAY_PRINT: dict[str, str] = {
    "plain.launch": "the children of its forks have no caller to end them",
    "fuse.background": "the child of the fork has no caller to end it, and what the first process "
    "has not yet written would be written twice",
}
#: Modules of more than MOST_LINES lines, and why each is one.
MOST_LINES = 600
LONG_MODULES = {
    "host.memmap": "two readers of one command line: one model, held against their code",
}
#: Classes with more than MOST_METHODS methods, and why each is one.
MOST_METHODS = 40
LARGE_CLASSES: dict[str, str] = {}


def module_name(path: Path) -> str:
    """``fs.journal`` for src/pkernfs/fs/journal.py."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {
    name: path.read_text()
    for path in sorted(ROOT.rglob("*.py"))
    if (name := module_name(path)) and name not in BUILDERS
}
MODULES = {name: ast.parse(text) for name, text in SOURCES.items()}


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
    """The imports of the project's own modules, without the ``pkernfs.``.

    A package counts only for itself: ``from pkernfs.fs import names`` is an import of fs.names.
    """
    names = {
        name.removeprefix("pkernfs.") for name in imported(tree) if name.startswith("pkernfs.")
    }
    known = {name for name in names if name in MODULES or name in EXTENSIONS}
    return {n for n in known if not any(other.startswith(f"{n}.") for other in known)}


def package(name: str) -> str:
    """The trade that a module belongs to."""
    return name.split(".")[0]


def layer(name: str) -> int:
    """Index into LAYERS of the module ``name``."""
    return next(i for i, names in enumerate(LAYERS) if package(name) in names)


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_down(name: str) -> None:
    for other in ours(MODULES[name]):
        if other in EXTENSIONS:
            assert name in EXTENSIONS[other], f"{name} uses the extension module {other}"
        elif package(other) != package(name):
            assert layer(other) < layer(name), f"{name} imports {other}"


def test_no_module_imports_itself_by_way_of_others() -> None:
    graph = {name: ours(tree) - set(EXTENSIONS) for name, tree in MODULES.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"a cycle: {' imports '.join(reversed(error.args[1]))}")


def test_every_package_is_in_a_layer() -> None:
    layered = [name for names in LAYERS for name in names]
    assert len(layered) == len(set(layered))
    assert {package(name) for name in MODULES} - {"native"} == set(layered)


@pytest.mark.parametrize("name", sorted(set(MODULES) - ASYNCHRONOUS))
def test_only_the_adapter_is_asynchronous(name: str) -> None:
    tree = MODULES[name]
    asynchronous = (ast.AsyncFunctionDef, ast.Await, ast.AsyncWith, ast.AsyncFor)
    assert not any(isinstance(node, asynchronous) for node in ast.walk(tree))
    tops = {other.split(".")[0] for other in imported(tree)}
    assert not tops & {"pyfuse3", "trio"}


def test_the_checker_does_not_use_what_it_checks() -> None:
    writers = {"fs.super", "fs.namei", "fs.file", "fs.inode", "alloc.blocks", "alloc.pages"}
    for name, tree in MODULES.items():
        if name == "fs.fsck" or name.startswith("fs.fsck."):
            assert not ours(tree) & writers, name


def test_the_file_system_knows_no_iommu() -> None:
    """Whoever mounts it gives it pins; only fsck looks into tables."""
    for name, tree in MODULES.items():
        if package(name) == "fs" and not name.startswith("fs.fsck"):
            assert not {package(other) for other in ours(tree)} & {"vtd", "iommu", "units"}, name


def test_core_works_without_fuse() -> None:
    """Every module but the adapter is imported where pyfuse3 and trio are not to be had."""
    core = sorted(set(MODULES) - ASYNCHRONOUS - {"fuse.shim"})
    program = "import sys\nsys.modules['pyfuse3'] = sys.modules['trio'] = None\n"
    program += "".join(f"import pkernfs.{name}\n" for name in core)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def spoken(tree: ast.Module) -> set[str]:
    """Names by which a module prints or ends its process."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id in {"print", "SystemExit"}:
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            name = f"{node.value.id}.{node.attr}"
            if name in {"sys.stdout", "sys.stderr", "sys.exit", "os._exit"}:
                found.add(name)
    return found


@pytest.mark.parametrize("name", MODULES)
def test_only_commands_print_or_choose_an_exit_status(name: str) -> None:
    if package(name) not in {"commands", "cli"} and name not in MAY_PRINT:
        assert not spoken(MODULES[name])


@pytest.mark.parametrize("name", SOURCES)
def test_a_long_module_has_a_reason(name: str) -> None:
    is_long = len(SOURCES[name].splitlines()) > MOST_LINES
    assert is_long == (name in LONG_MODULES), f"{name}: {len(SOURCES[name].splitlines())} lines"


def test_a_large_class_has_a_reason() -> None:
    large = {
        f"{name}.{node.name}"
        for name, tree in MODULES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        and sum(isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef) for part in node.body)
        > MOST_METHODS
    }
    assert large == set(LARGE_CLASSES)
