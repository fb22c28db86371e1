"""pkernfs holders: who maps or holds what, asked of the kernel while they do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pkernfs.commands import holders
from pkernfs.commands.holders import Answer, HeldFile, Holder
from pkernfs.fuse import segment_xattr
from pkernfs.quantities import Ino
from support.command_lines import Command, refused
from support.mounted_pool import MountedPool
from support.mounting import MIB, Mapper, run_pkernfs
from support.passthrough import needs_passthrough

_HOLD = """
import mmap, sys, time
file = open(sys.argv[1], "r+b")
if sys.argv[2] == "map":
    held = mmap.mmap(file.fileno(), int(sys.argv[3]), offset=int(sys.argv[4]))
    file.close()
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def mounted() -> Iterator[MountedPool]:
    """A mount with a pool; fsck finds it clean in the end."""
    with MountedPool(options="phys_base=0x100000000") as mounted:
        yield mounted


@contextmanager
def holding(path: Path | str, how: str, length: int = 0, offset: int = 0) -> Iterator[int]:
    """Another process that has a file open or mapped; yields its number."""
    words = [str(path), how, str(length), str(offset)]
    process = subprocess.Popen(
        [sys.executable, "-c", _HOLD, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdin is not None
    with process:
        assert process.stdout.readline() == b"held\n"
        yield process.pid
        process.stdin.close()


def asked(command: Command, target: Path) -> list[dict[str, Any]]:
    done = command("pkernfs", "holders", "--json", target)
    assert (done.status, done.err) == (0, "")
    found = json.loads(done.out)
    assert found["target"] == str(target)
    assert found["not_seen"][0].startswith("descriptors on their way")
    files: list[dict[str, Any]] = found["files"]
    return files


def native(file: Path) -> str:
    info = segment_xattr.read(str(file))
    assert info is not None
    return info.path


@pytest.mark.fuse
def test_who_has_the_segment_itself(mounted: MountedPool, command: Command) -> None:
    file = mounted.file("guest", 4 * MIB)
    path = native(file)
    with holding(path, "map", 4 * MIB) as maps, holding(path, "open") as opened:
        (found,) = asked(command, file)
        assert (found["path"], found["native_path"]) == (str(file), path)
        assert {(h["kind"], h["pid"], h["how"], h["through"]) for h in found["holders"]} == {
            ("process", maps, "maps it", "segment"),
            ("process", opened, "has it open", "segment"),
        }
        lines = command("pkernfs", "holders", file).out.splitlines()
    number = os.path.basename(path).removeprefix("segment-")
    assert lines[0] == f"{file} (segment {number}, {path}):"
    assert any(f"process {maps} (" in line and "maps it" in line for line in lines)
    assert lines[-1].startswith("not seen: descriptors")
    (found,) = asked(command, file)
    assert found["holders"] == []


@pytest.mark.fuse
def test_who_comes_through_the_mount(mounted: MountedPool, command: Command) -> None:
    file = mounted.file("through", 2 * MIB)
    with holding(file, "map", MIB) as pid:
        (found,) = asked(command, file)
        (holder,) = found["holders"]
        assert (holder["pid"], holder["through"]) == (pid, "mount")
        assert holder["how"] == "maps it through the mount"
    with holding(file, "open") as pid:
        (holder,) = asked(command, file)[0]["holders"]
        assert holder["how"] == "has it open through the mount"


@pytest.mark.fuse
def test_who_came_through_a_mount_that_is_gone(command: Command) -> None:
    with MountedPool() as mounted:
        file = mounted.file("guest", 2 * MIB)
        with holding(file, "map", MIB) as pid:
            mounted.kill()
            mounted.start()
            holders = {h["pid"]: h for h in asked(command, file)[0]["holders"]}
            assert holders[pid]["how"] == "maps it through a mount that is gone"
            assert holders[pid]["through"] == "mount"


@pytest.mark.fuse
@pytest.mark.skipif(os.geteuid() != 0, reason="only root sees physical pages")
def test_of_two_mounts_that_are_gone_each_has_its_own(command: Command) -> None:
    """Their files have one inode number; their pages tell them apart."""
    needs_passthrough()
    with MountedPool() as one, MountedPool() as other:
        files = [mounted.file("guest", 2 * MIB) for mounted in (one, other)]
        assert len({file.stat().st_ino for file in files}) == 1
        with Mapper(files[0], 2 * MIB) as first, Mapper(files[1], 2 * MIB) as second:
            for client, mounted in ((first, one), (second, other)):
                client.store(0, b"stored")
                mounted.kill()
            for client, mounted, file in ((first, one, files[0]), (second, other, files[1])):
                mounted.start()
                assert [h["pid"] for h in asked(command, file)[0]["holders"]] == [client.pid]


@pytest.mark.fuse
def test_all_segments_of_a_mount(mounted: MountedPool, command: Command) -> None:
    held, other = mounted.file("held", 2 * MIB), mounted.file("other", 2 * MIB)
    with holding(native(held), "map", MIB) as pid:
        files = {f["path"]: f for f in asked(command, mounted.path)}
        assert [h["pid"] for h in files[str(held)]["holders"]] == [pid]
        assert files[str(other)]["holders"] == []
        text = command("pkernfs", "holders", mounted.path).out
        assert f"{other} (segment " in text
        assert f"{native(other)}): nobody" in text


@pytest.mark.fuse
def test_a_file_in_the_region(mounted: MountedPool, command: Command) -> None:
    file = mounted.path / "flat"
    file.write_bytes(b"x" * 2 * MIB)
    (extent,) = json.loads(run_pkernfs("extents", "--json", str(file)).stdout)["extents"]
    at = extent["region_offset"]
    with (
        holding(mounted.region, "map", 2 * MIB, at) as pid,
        holding(mounted.region, "map", 2 * MIB, at - 2 * MIB),
    ):
        (found,) = asked(command, file)
        assert (found["segment"], found["native_path"]) == (None, None)
        (holder,) = found["holders"]
        assert (holder["pid"], holder["through"]) == (pid, "region")
        assert f"{file} (in the region):" in command("pkernfs", "holders", file).out


@pytest.mark.fuse
def test_what_is_mapped_for_devices(mounted: MountedPool, command: Command) -> None:
    file, domain = mounted.path / "dma", mounted.path / "iommu/dom-0"
    file.write_bytes(b"x" * 2 * MIB)
    for words in (["create", str(mounted.path)], ["map", str(domain), "0x40000000", str(file)]):
        if words[0] == "map":
            with domain.open("wb") as made:
                made.truncate(2 * MIB)
        done = run_pkernfs("iommu", *words)
        assert done.returncode == 0, done.stderr
    try:
        (holder,) = asked(command, file)[0]["holders"]
        assert holder == {
            "kind": "domain", "pid": None, "name": "dom-0", "through": "tables",
            "how": "maps it for devices, at 0x40000000",
        }  # fmt: skip
        assert "  dom-0 maps it for devices" in command("pkernfs", "holders", file).out
        assert run_pkernfs("iommu", "attach", str(domain), "0000:00:05.0").returncode == 0
        domain_again, device = asked(command, file)[0]["holders"]
        assert domain_again == holder
        assert device == {
            "kind": "device", "pid": None, "name": "0000:00:05.0", "through": "tables",
            "how": "reaches it by dom-0",
        }  # fmt: skip
        assert "  0000:00:05.0 reaches it by dom-0" in command("pkernfs", "holders", file).out
    finally:
        run_pkernfs("iommu", "detach", str(mounted.path), "0000:00:05.0")
        assert run_pkernfs("iommu", "unmap", str(domain), "0x40000000", "2M").returncode == 0


def test_bad_targets(tmp_path: Path, command: Command) -> None:
    refused(command("pkernfs", "holders", tmp_path), 1, "pkernfs", "not on a pkernfs mount")
    refused(command("pkernfs", "holders", tmp_path / "no"), 1, "pkernfs", "No such file")


@pytest.mark.fuse
def test_what_has_no_memory(mounted: MountedPool, command: Command) -> None:
    os.mkfifo(mounted.path / "pipe")
    said = command("pkernfs", "holders", mounted.path / "pipe")
    refused(said, 1, "pkernfs", "not a regular file")


def test_names_are_one_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    holder = Holder("process", 7, "a\nb", "maps it", "segment")
    files = [
        HeldFile("/m/x\ny", Ino(3), 1, "/p/segment-1", [holder]),
        HeldFile(None, Ino(9), 2, "/p/segment-2"),
        HeldFile("/m/z", Ino(4)),
    ]
    holders._print(Answer(files, ["this", "that"]))
    assert capsys.readouterr().out.splitlines() == [
        "/m/x\\ny (segment 1, /p/segment-1):",
        "  process 7 (a\\nb) maps it",
        "a removed file (segment 2, /p/segment-2): nobody",
        "/m/z (in the region): nobody",
        "not seen: this; that",
    ]
