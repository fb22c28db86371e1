"""pkernfs segment: files of a real mount get memory of their own and lose it; bytes stay."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from pkernfs.fuse import segment_xattr
from support.command_lines import Command, refused
from support.mounted_pool import MountedPool
from support.mounting import MIB

DATA = os.urandom(5 * MIB + 99)


@pytest.fixture
def mounted() -> Iterator[MountedPool]:
    """A mount with a pool; fsck finds it clean in the end."""
    with MountedPool() as mounted:
        yield mounted


def switch(command: Command, file: Path, way: str) -> None:
    done = command("pkernfs", "segment", file, way)
    assert (done.status, done.out, done.err) == (0, "", "")


@pytest.mark.fuse
def test_there_and_back(mounted: MountedPool, command: Command) -> None:
    file = mounted.path / "f"
    file.write_bytes(DATA)
    for _ in range(2):
        switch(command, file, "on")
        info = segment_xattr.read(str(file))
        assert info is not None
        assert file.read_bytes() == DATA
        assert Path(info.path).read_bytes() == DATA + bytes(6 * MIB - len(DATA))
        switch(command, file, "off")
        assert segment_xattr.read(str(file)) is None
        assert file.read_bytes() == DATA
        assert file.stat().st_blocks * 512 == 6 * MIB


@pytest.mark.fuse
def test_the_choice_outlives_a_mount(mounted: MountedPool, command: Command) -> None:
    wants, wants_none = mounted.file("wants"), mounted.file("wants none")
    switch(command, wants, "on")
    switch(command, wants_none, "off")
    mounted.unmount()
    mounted.options = "segments=no"
    mounted.start()
    os.truncate(wants, 5000)
    assert segment_xattr.read(str(wants)) is not None
    assert segment_xattr.read(str(mounted.file("says nothing", 2 * MIB))) is None
    mounted.unmount()
    mounted.options = ""
    mounted.start()
    os.truncate(wants_none, 2 * MIB)
    assert segment_xattr.read(str(wants_none)) is None


@pytest.mark.fuse
def test_what_is_in_use_is_refused(mounted: MountedPool, command: Command) -> None:
    file = mounted.path / "f"
    file.write_bytes(DATA)
    with file.open("r+b") as opened:
        said = command("pkernfs", "segment", file, "on")
        refused(said, 1, "pkernfs", str(file), "it is open for writing")
        mapping = mmap.mmap(opened.fileno(), 0)
    refused(command("pkernfs", "segment", file, "on"), 1, "pkernfs", "it is open for writing")
    mapping.close()
    with file.open("rb"):
        switch(command, file, "on")
        refused(command("pkernfs", "segment", file, "off"), 1, "pkernfs", "it is open")
    info = segment_xattr.read(str(file))
    assert info is not None
    with open(info.path, "r+b") as held:
        said = command("pkernfs", "segment", file, "off")
        refused(said, 1, "pkernfs", f"process {os.getpid()} ")
        assert held.read(9) == DATA[:9]
    assert os.stat(info.path).st_mode & 0o777 == file.stat().st_mode & 0o777
    switch(command, file, "off")
    assert file.read_bytes() == DATA


@pytest.mark.fuse
def test_what_cannot_have_one_is_refused(mounted: MountedPool, command: Command) -> None:
    for file, why in (
        (mounted.path, "not a regular file"),
        (mounted.path / "no", "No such file"),
    ):
        refused(command("pkernfs", "segment", file, "on"), 1, "pkernfs", why)
    (mounted.path / "iommu/dom-0").write_bytes(b"")
    said = command("pkernfs", "segment", mounted.path / "iommu/dom-0", "on")
    refused(said, 1, "pkernfs", "a table file")
    big = mounted.file("big", 100 * MIB)
    refused(command("pkernfs", "segment", big, "off"), 1, "pkernfs", "no space")
    assert segment_xattr.read(str(big)) is not None
