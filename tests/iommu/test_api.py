"""The Python of docs/iommu.md does what it says there."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from pkernfs.dma.mount import mount_filesystem, tables_of
from pkernfs.fs.mkfs import make_filesystem
from pkernfs.iommu import Translation
from pkernfs.layout import BLOCK, IOMMU_INO, ROOT_INO
from pkernfs.quantities import Iova, PhysAddr, SourceId
from pkernfs.region.region import Region

DOCS = Path(__file__).parents[2] / "docs"
MIB = 1 << 20


def blocks() -> list[str]:
    """The indented blocks below "From Python"."""
    section = (DOCS / "iommu.md").read_text().partition("## From Python\n")[2]
    indented = (p for p in section.strip("\n").split("\n\n") if p.startswith("    "))
    found: list[str] = []
    for part in indented:
        if part.startswith("    from "):
            found.append("")
        found[-1] += textwrap.dedent(part) + "\n"
    return found


def test_tables_in_any_region(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with Path("region").open("wb") as file:
        file.truncate(8 * MIB)
    known: dict[str, Any] = {}
    *first, last = blocks()[0].strip().splitlines()
    exec("\n".join(first), known)
    result = eval(last, known)
    assert isinstance(result, Translation)
    assert result.physical == 0x80001234
    known["region"].close()


def test_an_export_without_a_mount(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with Path("guests").open("wb") as file:
        file.truncate(32 * MIB)
    with Region.open("guests", write=True, phys_base=PhysAddr(1 << 32)) as region:
        make_filesystem(region)
        fs = mount_filesystem(region)
        ram = fs.create(ROOT_INO, b"ram", 0o100600, 0, 0).ino
        fs.setattr(ram, size=2 * BLOCK)
        fs.setattr(fs.create(IOMMU_INO, b"dom-0", 0o100400, 0, 0).ino, size=BLOCK)
        tables_of(fs).map_file(0, Iova(0), ram, 0, None, 3)
        tables_of(fs).attach(0, SourceId(0x28))
        fs.unmount()
    known: dict[str, Any] = {}
    exec(blocks()[1], known)
    document = known["document"]
    schema = json.loads((DOCS / "iommu-export.schema.json").read_text())
    jsonschema.Draft202012Validator(schema).validate(document)
    assert document["ioas"][0]["mappings"][0]["file"] == "/ram"
    assert document["devices"][0]["hwpt"] == "dom-0"
