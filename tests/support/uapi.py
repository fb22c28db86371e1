"""The kernel's headers by the C compiler, to be compared with pkernfs.vmm.uapi."""

from __future__ import annotations

import ctypes
import re
import subprocess
from pathlib import Path

from pkernfs.vmm import uapi

HEADERS = ("vfio", "iommufd")


def structures() -> dict[str, type[ctypes.Structure]]:
    """All of the module."""
    found = vars(uapi).items()
    return {n: v for n, v in found if isinstance(v, type) and ctypes.Structure in v.__mro__[1:]}


def constants() -> dict[str, int]:
    """All numbers of the module that are named as the kernel names them."""
    prefixes = ("VFIO_", "IOMMU_")
    found = vars(uapi).items()
    return {n: v for n, v in found if n.startswith(prefixes) and isinstance(v, int)}


def ours() -> dict[str, int]:
    """Every number, offset and size, by a C expression for it."""
    found = dict(constants())
    for name, structure in structures().items():
        for field in structure._fields_:
            at = getattr(structure, field[0])
            found[f"offsetof(struct {name}, {field[0]})"] = at.offset
            found[f"sizeof(((struct {name} *)0)->{field[0]})"] = at.size
    return found


def missing(name: str) -> bool:
    """Tell whether the headers that are installed here are too old for an expression."""
    text = "".join(header(h).read_text() for h in HEADERS if header(h).exists())
    word = name.removeprefix("offsetof(struct ").removeprefix("sizeof(((struct ")
    return re.findall(r"\w+", word)[0] not in re.findall(r"\w+", text)


def theirs(expressions: list[str], scratch: Path) -> dict[str, int]:
    """Ask the compiler for the expressions, with the headers that are installed here."""
    lines = [f"#include <linux/{h}.h>" for h in HEADERS if header(h).exists()]
    lines += ["#include <stddef.h>", "#include <stdio.h>", "int main(void) {"]
    lines += [f'printf("%llu\\n", (unsigned long long)({one}));' for one in expressions]
    source = scratch / "uapi.c"
    source.write_text("\n".join([*lines, "return 0; }"]))
    subprocess.run(["gcc", "-o", scratch / "uapi", source], check=True)
    said = subprocess.run([scratch / "uapi"], check=True, capture_output=True, text=True).stdout
    return dict(zip(expressions, map(int, said.split()), strict=True))


def header(name: str) -> Path:
    """Return the path of a kernel header."""
    return Path(f"/usr/include/linux/{name}.h")
