"""What is declared once: numbers of Python's for C, and C's declarations for cffi."""

from __future__ import annotations

import re
from pathlib import Path

from pkernfs.native._native import ffi, lib

from pkernfs.native import build

HERE = Path(build.__file__).parent

#: Typed out by hand from VT-d 9.8 and 11.4.4, docs/format.md, and vtd/registers.py.
NUMBERS = {
    "PAGE": 4096,
    "BLOCK": 2 << 20,
    "RECORD_MAGIC": 0x524A4B50,
    "RECORD_BYTES": 64,
    "RUN_BYTES": 16,
    "PT_PAGE_SHIFT": 12,
    "PT_LEVEL_BITS": 9,
    "PT_ENTRIES": 512,
    "PT_MAX_LEVEL": 5,
    "PT_MAX_LEAF_LEVEL": 3,
    "MMIO_GCMD": 0x18,
    "MMIO_GSTS": 0x1C,
    "MMIO_KEPT": 0x96FF_FFFF,
    "STEP_WRITE_32": 0,
    "STEP_WRITE_64": 1,
    "STEP_COMMAND": 2,
    "STEP_WAIT_32": 3,
    "STEP_WAIT_64": 4,
    "STEP_WAIT_SAME": 5,
    "STEP_WAIT_MEMORY": 6,
    "PT_READ_WRITE": 3,
    "PT_LARGE": 1 << 7,
    "PT_ACCESSED_DIRTY": 3 << 8,
    "PT_SNOOP": 1 << 11,
    "PT_ADDRESS": (1 << 52) - 4096,
}


def test_numbers_are_those_of_the_specification() -> None:
    text = build.declared_header()
    found = dict(re.findall(r"#define (\w+) (0x[0-9a-f]+)u(?:ll)?", text))
    assert {name: int(value, 16) for name, value in found.items()} == NUMBERS
    assert (HERE / "_declared.h").read_text() == text


def test_masks_of_an_entry_are_as_wide_as_it() -> None:
    for line in build.declared_header().splitlines():
        if re.match(r"#define PT_(READ_WRITE|LARGE|ACCESSED_DIRTY|SNOOP|ADDRESS) ", line):
            assert line.endswith("ull")


def test_no_number_of_python_is_written_in_c_again() -> None:
    """A literal that happens to be one of the masks would be a second declaration."""
    masks = {f"{NUMBERS[name]:x}" for name in ("PT_ADDRESS", "MMIO_KEPT", "RECORD_MAGIC")}
    for path in sorted(HERE.glob("[!_]*.[ch]")):
        words = re.findall(r"0x0*([0-9a-f]+)", path.read_text().lower())
        assert not masks & set(words), path.name


def test_cffi_gets_what_is_marked() -> None:
    header = "#define HIDDEN 1\n/* cdef */\n#define SHOWN (~0ull)\nint a[PT_MAX_LEVEL + 1];\n"
    header += "/* end of cdef */\nint hidden;\n"
    assert build.cdef_of(header).split("\n") == ["", "#define SHOWN ...", "int a[5 + 1];", ""]


def test_everything_that_is_declared_is_there() -> None:
    header = (HERE / "native.h").read_text()
    functions = set(re.findall(r"\b(pk_\w+)\(", build.cdef_of(header)))
    assert functions <= set(dir(lib))
    assert len(functions) > 30
    assert ffi.sizeof("struct pk_check") == 8 * (2 * 6 + 4 + 6)
    assert lib.PT_NONE == (1 << 64) - 1


def test_a_file_is_stored_only_if_it_changes(tmp_path: Path) -> None:
    path = tmp_path / "made.h"
    build._store_if_other(path, "one\n")
    before = path.stat().st_mtime_ns
    build._store_if_other(path, "one\n")
    assert path.stat().st_mtime_ns == before
    build._store_if_other(path, "other\n")
    assert path.read_text() == "other\n"
