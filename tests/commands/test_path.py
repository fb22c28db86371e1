"""pkernfs path: the path of a file's own memory, or why there is none and what gives it some."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from pkernfs.commands.path import may_have_pool
from support.command_lines import Command, refused
from support.mounted_pool import MountedPool
from support.mounting import MIB, Mounted, run_as


@pytest.fixture(scope="module")
def mounted() -> Iterator[MountedPool]:
    """A mount with a pool; fsck finds it clean in the end."""
    with MountedPool(options="allow_other") as mounted:
        yield mounted


def test_not_on_a_mount(tmp_path: Path, command: Command) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"x")
    refused(command("pkernfs", "path", file), 1, "pkernfs", "not on a pkernfs mount")
    refused(command("pkernfs", "path", tmp_path / "no"), 1, "pkernfs", "No such file")
    refused(command("pkernfs", "path"), 1, "pkernfs", "required: FILE")


@pytest.mark.parametrize(
    ("source", "may"),
    [("/dev/hugepages/pk/base", True), ("/dev/dax0.0", True), ("1G!1G", False), ("/x/a", False)],
)
def test_sources_with_a_pool(source: str, may: bool) -> None:
    assert may_have_pool(source) is may


@pytest.mark.fuse
def test_the_path_leads_to_the_files_own_memory(mounted: MountedPool, command: Command) -> None:
    file = mounted.file("guest", 4 * MIB)
    with file.open("r+b") as writing:
        writing.write(b"guest")
    done = command("pkernfs", "path", file)
    assert (done.status, done.err) == (0, "")
    path = Path(done.out.rstrip("\n"))
    assert path.parent == mounted.pool
    assert path.read_bytes()[:5] == b"guest"
    found = json.loads(command("pkernfs", "path", "--json", file).out)
    assert found == {
        "file": str(file), "segment": int(path.name.removeprefix("segment-")), "kind": "directory",
        "path": str(path), "length": 4 * MIB, "granule": 2 * MIB, "native": False,
    }  # fmt: skip


@pytest.mark.fuse
def test_its_owner_opens_it_and_nobody_else(mounted: MountedPool, command: Command) -> None:
    file = mounted.file("tenant", 2 * MIB)
    file.chmod(0o600)
    os.chown(file, 1234, 1234)
    path = command("pkernfs", "path", file).out.rstrip("\n")

    def denied() -> None:
        with pytest.raises(PermissionError):
            Path(path).read_bytes()

    run_as(1234, lambda: os.close(os.open(path, os.O_RDWR)))
    run_as(4321, denied)


@pytest.mark.fuse
def test_what_gives_it_one_is_said(mounted: MountedPool, command: Command) -> None:
    empty = mounted.file("an empty one")
    said = command("pkernfs", "path", empty)
    refused(said, 1, "pkernfs", f"it is empty: truncate -s SIZE {shlex.quote(str(empty))}")
    flat = mounted.path / "flat"
    flat.write_bytes(b"x" * 100)
    said = command("pkernfs", "path", flat)
    refused(said, 1, "pkernfs", f"no memory of its own: pkernfs segment {flat} on")
    refused(command("pkernfs", "path", mounted.path), 1, "pkernfs", "not a regular file")


@pytest.mark.fuse
def test_a_lost_one_is_said(command: Command) -> None:
    with MountedPool() as mounted:
        file = mounted.file("guest", 2 * MIB)
        path = Path(command("pkernfs", "path", file).out.rstrip("\n"))
        path.rename(path.with_name("elsewhere"))
        refused(command("pkernfs", "path", file), 1, "pkernfs", "lost, or elsewhere", str(path))
        path.with_name("elsewhere").rename(path)


@pytest.mark.fuse
def test_a_region_without_a_pool(command: Command) -> None:
    with Mounted(16 * MIB) as mounted:
        file = mounted.path / "f"
        subprocess.run(["truncate", "-s", "2M", str(file)], check=True)
        said = command("pkernfs", "path", file)
        refused(said, 1, "pkernfs", "no pool of segments", f"pkernfs qemu-args {file}", "mkfs")
