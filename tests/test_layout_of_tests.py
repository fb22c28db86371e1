"""The laws of the tests' house: one file for each module, helpers in support, nothing borrowed.

tests/P/test_M.py has the tests of src/pkernfs/P/M.py; only a module that declares and does nothing
needs none. What is otherwise is listed here with its reason. tests/lab and tests/scripts are apart:
they follow machines and scripts, not modules.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import pkernfs

TESTS = Path(__file__).parent
SOURCES = Path(pkernfs.__file__).parent
APART = ("lab", "scripts", "support")

#: Modules without a test file of their own, as they only declare: the file in which what they
#: declare is used, and how.
TESTED_ELSEWHERE = {
    "control.segment_protocol": "control/test_protocol.py: all go over the wire and come back",
    "control.session": "control/test_table_requests.py: a protocol; its handlers have one made up",
    "dma.output": "control/test_protocol.py: questions and items go over the wire and come back",
    "kexec.mounted": "kexec/test_local.py: a protocol, by what has it",
    "units.window": "units/test_mmio.py: a protocol, and that is the window that is real",
}
#: Test files that are named after no module, and why.
NAMED_OTHERWISE = {
    "dma/test_crash_points.py": "stores of several modules, cut at each",
    "dma/test_damage.py": "tables and files damaged together, whatever module reads them",
    "dma/test_persist.py": "one property of devices, from the command to the entry",
    "dma/test_stateful.py": "a model of all operations on tables",
    "fs/test_crash_points.py": "stores of several modules, cut at each",
    "fs/test_segment_crash_points.py": "stores of several modules and of the pool, cut at each",
    "fs/test_segment_stateful.py": "a model of files with segments, and of a small pool",
    "fs/test_stateful.py": "a model of the whole file system",
    "fuse/test_databases.py": "PostgreSQL as a client of real mounts",
    "fuse/test_guests.py": "QEMU as a client of real mounts",
    "fuse/test_isolation.py": "real mounts: what one user can do to another",
    "fuse/test_libvirt.py": "libvirt as a client of real mounts",
    "fuse/test_mount.py": "real mounts: a file system as its users see it",
    "fuse/test_overlay.py": "real mounts as the upper layer of overlayfs",
    "fuse/test_process.py": "a daemon as a process: its descriptors, its mount namespace, its end",
    "fuse/test_segment_damage.py": "real mounts: segments changed behind the daemon's back",
    "fuse/test_segment_meetings.py": "many requests at once, whatever modules they meet in",
    "fuse/test_segments.py": "real mounts: files with segments as programs meet them",
    "fuse/test_sigkill.py": "daemons killed at any moment",
    "fuse/test_stateful.py": "a model of a mounted file system",
    "host/test_memmap_oracle.py": "the kernel's own code says whether host.memmap is right",
    "iommu/test_api.py": "names that the package exports",
    "iommu/test_crash_points.py": "stores of several modules, cut at each",
    "iommu/test_oracle.py": "QEMU's unit says whether tables are right",
    "test_architecture.py": "docs/architecture.md names what is there",
    "test_budgets.py": "of support/budgets.py",
    "test_docstrings.py": "what docstrings of every module refer to",
    "test_imports.py": "laws of the sources",
    "test_layout_of_tests.py": "laws of the tests",
    "vmm/test_package.py": "what the package needs, as a whole",
}
MODULES = {
    ".".join(path.relative_to(SOURCES).with_suffix("").parts): path
    for path in sorted(SOURCES.rglob("*.py"))
    if path.name != "__init__.py"
}
PACKAGES = {path.parent.relative_to(SOURCES) for path in SOURCES.rglob("__init__.py")}
PYTHON = sorted(TESTS.rglob("*.py"))
TEST_FILES = {
    str(path.relative_to(TESTS)): path
    for path in PYTHON
    if path.name.startswith("test_") and path.relative_to(TESTS).parts[0] not in APART
}


def file_of(module: str) -> str:
    """Name the file, below tests, that has the tests of a module."""
    *packages, name = module.split(".")
    return "/".join([*packages, f"test_{name}.py"])


def names_something(file: str) -> bool:
    """Tell if a test file is named after a module, or after a package that is a module too."""
    directory, _, name = file.rpartition("/")
    name = name.removeprefix("test_").removesuffix(".py")
    is_module = ".".join(filter(None, [*directory.split("/"), name])) in MODULES
    return is_module or (Path(directory) in PACKAGES and Path(directory).name == name)


def test_a_module_has_a_test_file_or_a_reason() -> None:
    without = {module for module in MODULES if file_of(module) not in TEST_FILES}
    assert sorted(without) == sorted(TESTED_ELSEWHERE)


def test_a_test_file_has_a_module_or_a_reason() -> None:
    without = {file for file in TEST_FILES if not names_something(file)}
    assert sorted(without) == sorted(NAMED_OTHERWISE)


@pytest.mark.parametrize("module", TESTED_ELSEWHERE)
def test_a_module_without_a_test_file_only_declares(module: str) -> None:
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert ast.get_docstring(node), node.name
            assert len(node.body) == 1, f"{node.name} does something: test it"


def test_tests_that_reasons_name_are_there() -> None:
    for why in TESTED_ELSEWHERE.values():
        assert why.split(":")[0] in TEST_FILES, why


@pytest.mark.parametrize("path", PYTHON, ids=lambda path: str(path.relative_to(TESTS)))
def test_helpers_are_in_support_and_nothing_is_imported_from_a_test(path: Path) -> None:
    where = path.relative_to(TESTS).parts[0]
    if where == "support":
        assert not path.name.startswith("test_")
    else:
        assert path.name == "conftest.py" or path.name.startswith("test_")
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        parts = {part for name in names for part in name.split(".")}
        assert not {p for p in parts if p == "conftest" or p.startswith("test_")}, ast.unparse(node)
