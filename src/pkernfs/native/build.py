"""Builds ``pkernfs.native._native`` from the C files beside it, in cffi's API mode.

Each thing is declared once: structures and functions in native.h, of which cffi gets the part that
is marked for it; numbers that Python declares as well (the format of entries, registers, the
journal's record) in Python, from where they go to _declared.h.
"""

import os
import re
import sys
from pathlib import Path

from cffi import FFI

_HERE = Path(__file__).resolve().parent
_SOURCE = _HERE.parents[1]
# A checkout is built before it is installed, and another one may be installed already.
sys.path.insert(0, str(_SOURCE))
try:
    from pkernfs import layout
    from pkernfs.native import compiler
    from pkernfs.vtd import entries, registers
finally:
    sys.path.remove(str(_SOURCE))

#: What _declared.h is made from.
_DECLARATIONS = ("layout.py", "vtd/entries.py", "vtd/registers.py")

_LEAF = entries.SecondStageLeaf4K
_SMALL = {
    "PAGE": layout.PAGE,
    "BLOCK": layout.BLOCK,
    "RECORD_MAGIC": layout.MAGIC_RECORD,
    "RECORD_BYTES": layout.RECORD.size,
    "RUN_BYTES": layout.RUN.size,
    "PT_PAGE_SHIFT": entries.PAGE_SHIFT,
    "PT_LEVEL_BITS": entries.LEVEL_BITS,
    "PT_ENTRIES": entries.ENTRIES,
    "PT_MAX_LEVEL": max(entries.LEVELS),
    "PT_MAX_LEAF_LEVEL": entries.LARGEST_LEAF_LEVEL,
    "MMIO_GCMD": registers.Command.OFFSET,
    "MMIO_GSTS": registers.STATUS,
    "MMIO_KEPT": registers.KEPT,
    **{f"STEP_{kind.name}": kind.value for kind in registers.StepKind},
}
#: Parts of an entry; 64 bits wide, so that their complements are.
_MASKS = {
    "PT_READ_WRITE": entries.READ_WRITE,
    "PT_LARGE": entries.PS,
    "PT_ACCESSED_DIRTY": _LEAF.A.mask | _LEAF.D.mask,
    "PT_SNOOP": _LEAF.SNP.mask,
    "PT_ADDRESS": entries.ADDRESS_MASK,
}


def declared_header() -> str:
    """_declared.h: the numbers that Python declares, for C."""
    lines = [f"/* Made by build.py from {', '.join(_DECLARATIONS)}. */"]
    lines += [f"#define {name} {value:#x}u" for name, value in _SMALL.items()]
    lines += [f"#define {name} {value:#x}ull" for name, value in _MASKS.items()]
    return "\n".join(lines) + "\n"


def cdef_of(header: str) -> str:
    """The part of native.h that is for cffi: without values of #defines, with declared numbers."""
    part = header.split("/* cdef */", 1)[1].split("/* end of cdef */", 1)[0]
    part = re.sub(r"^#define (\w+) .*$", r"#define \1 ...", part, flags=re.MULTILINE)
    for name, value in _SMALL.items():
        part = re.sub(rf"\b{name}\b", str(value), part)
    return part


def _store_if_other(path: Path, text: str) -> None:
    """Write a file unless it is so already: what depends on it would be compiled again."""
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


_store_if_other(_HERE / "_declared.h", declared_header())

# setuptools wants them relative to setup.py; compile() changes the directory.
_from = _HERE if __name__ == "__main__" else Path(os.path.relpath(_HERE))

ffibuilder = FFI()
ffibuilder.cdef(cdef_of((_HERE / "native.h").read_text()))
ffibuilder.set_source(
    "pkernfs.native._native",
    '#include "native.h"',
    sources=[str(_from / path.name) for path in sorted(_HERE.glob("[!_]*.c"))],
    include_dirs=[str(_from)],
    depends=[str(_from / name) for name in ("native.h", "_declared.h")],
    # Calls from file to file are direct ones, and no other module's function takes their place.
    extra_compile_args=[*compiler.COMPILE, "-fvisibility=hidden"],
    extra_link_args=compiler.LINK,
)

if __name__ == "__main__":
    ffibuilder.compile(tmpdir=str(_SOURCE), verbose=True)
