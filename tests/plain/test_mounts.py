"""Which mounts are asked, and whose word counts."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from pkernfs.control.mounts import FSTYPE, Mount, read_mounts
from pkernfs.plain import mounts
from pkernfs.plain.mounts import Mounts


@pytest.fixture
def opened() -> Iterator[list[Mounts]]:
    """Tables that are closed at the end."""
    tables: list[Mounts] = []
    yield tables
    for one in tables:
        one.close()


def test_mounts_of_root_and_of_the_user_are_trusted(
    monkeypatch: pytest.MonkeyPatch, opened: list[Mounts]
) -> None:
    table = [
        Mount(10, "/mnt/a", FSTYPE, "/dev/dax0.0", 0),
        Mount(11, "/mnt/b", FSTYPE, "/tmp/region", 1000),
        Mount(12, "/mnt/c", FSTYPE, "/tmp/other", None),
        Mount(13, "/mnt/d", "tmpfs", "tmpfs"),
    ]
    monkeypatch.setattr(mounts, "read_mounts", lambda: table)
    found = Mounts()
    opened.append(found)
    assert found.are_there()
    assert [found.has(device) for device in (10, 11, 12, 13, 14)] == [True] * 3 + [False] * 2
    assert [found.is_trusted(device, 1000) for device in (10, 11, 12, 13)] == [1, 1, 0, 0]
    assert [found.is_trusted(device, 0) for device in (10, 11, 12, 13)] == [1, 0, 0, 0]


@pytest.mark.fuse
def test_a_mount_is_seen_at_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, opened: list[Mounts]
) -> None:
    """The table is read again only when it has changed."""
    monkeypatch.setattr(mounts, "FSTYPE", "ramfs")
    before = read_mounts()
    assert not [m for m in before if m.fstype == "ramfs"]
    found = Mounts()
    opened.append(found)
    assert not found.are_there()
    subprocess.run(["mount", "-t", "ramfs", "none", tmp_path], check=True)
    try:
        assert found.are_there()
        device = os.stat(tmp_path).st_dev
        assert found.has(device)
        assert not found.is_trusted(device, 0), "a mount without an owner"
        monkeypatch.setattr(mounts, "read_mounts", lambda: pytest.fail("read again"))
        assert found.are_there()
        monkeypatch.undo()
        monkeypatch.setattr(mounts, "FSTYPE", "ramfs")
    finally:
        subprocess.run(["umount", tmp_path], check=True)
    assert not found.are_there()
