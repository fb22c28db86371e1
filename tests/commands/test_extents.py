"""pkernfs extents: pages of the attribute put together, as a table and as JSON."""

from __future__ import annotations

import argparse
import errno
import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest

from pkernfs.commands import extents
from pkernfs.commands.extents import describe, read_extents
from pkernfs.control.mounts import FSTYPE, Mount
from pkernfs.errors import NotSupportedError
from pkernfs.fuse import segment_xattr
from pkernfs.fuse.extents_xattr import NAME, Extent
from pkernfs.quantities import PhysAddr, RegionOff
from support.command_lines import Command, refused

FOUND = [
    Extent(0, 0x200000, RegionOff(0x400000), PhysAddr(0x40400000)),
    Extent(0x200000, 4096, RegionOff(0x5000), None),
    Extent(0x400000, 4096, RegionOff(0x6000), PhysAddr(0)),
]


@pytest.fixture
def attribute(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The attribute of a file has two extents a page; the names that were asked for."""
    asked: list[str] = []

    def getxattr(file: str, name: str) -> bytes:
        asked.append(name)
        start = int(name.removeprefix(NAME).removeprefix(".") or 0)
        if start > len(FOUND):
            raise OSError(errno.ENODATA, "No data available")
        return b"".join(
            struct.pack("<QQQQ", *extent[:3], 2**64 - 1 if extent[3] is None else extent[3])
            for extent in FOUND[start : start + 2]
        )

    monkeypatch.setattr(os, "getxattr", getxattr)
    return asked


def test_all_pages_are_read(attribute: list[str]) -> None:
    assert list(read_extents("file")) == FOUND
    assert attribute == [NAME, f"{NAME}.2", f"{NAME}.3"]


def test_a_file_without_extents(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for number, found in ((errno.ENODATA, []), (errno.EOPNOTSUPP, None)):

        def getxattr(file: str, name: str, number: int = number) -> bytes:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "getxattr", getxattr)
        if found is not None:
            assert list(read_extents("file")) == found
        else:
            with pytest.raises(NotSupportedError, match="file: cannot read its extents: Operat"):
                list(read_extents("file"))


def test_json_has_names(attribute: list[str]) -> None:
    found: Any = describe("file", list(read_extents("file")), None)
    assert found["file"] == "file"
    first, second, _ = found["extents"]
    assert first == {
        "offset": 0, "length": 0x200000, "region_offset": 0x400000, "physical": 0x40400000,
        "segment": None,
    }  # fmt: skip
    assert second["physical"] is None
    assert [e["segment"] for e in describe("file", FOUND, 7)["extents"]] == [7, 7, 7]  # type: ignore[attr-defined]


def test_what_is_printed(
    attribute: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mount = Mount(7, "/mnt/a", FSTYPE, "/dev/shm/region", 0)
    monkeypatch.setattr(extents, "mount_of", lambda path: mount)
    monkeypatch.setattr(segment_xattr, "read", lambda file: None)
    assert extents.run(argparse.Namespace(file="file", json=False)) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["offset", "length", "region", "offset", "physical"]
    assert [int(word, 16) for word in lines[0].split()] == list(FOUND[0])
    assert [line.split()[3] for line in lines] == ["0x40400000", "-", "0x0"]
    assert extents.run(argparse.Namespace(file="file", json=True)) == 0
    assert json.loads(capsys.readouterr().out)["file"] == "file"
    segment = segment_xattr.SegmentInfo(7, "dax", "/dev/dax0.7", 2 << 20, 2 << 20)
    monkeypatch.setattr(segment_xattr, "read", lambda file: segment)
    assert extents.run(argparse.Namespace(file="file", json=False)) == 0
    assert capsys.readouterr().out.split("\n")[0].split()[2:] == ["in", "segment", "7", "physical"]


def test_extents_refuses(command: Command, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"x")
    refused(command("pkernfs", "extents", file), 1, "pkernfs", "not on a pkernfs mount")
    refused(command("pkernfs", "extents", tmp_path / "no"), 1, "pkernfs", "No such file")
