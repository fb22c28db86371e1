"""pkernfs info: lines from facts, and what a mount's daemon adds to them, if it does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pkernfs.commands import info
from pkernfs.control import client
from pkernfs.control.protocol import ChangedFile, LostFile, Verification
from pkernfs.control.wire import VersionError
from pkernfs.errors import PermissionDeniedError
from pkernfs.fs.mkfs import make_filesystem
from pkernfs.layout import BLOCK, POOL_DIRECTORY, PoolFields
from pkernfs.region.region import Region
from support.command_lines import FOREIGN, SIZE, Command, no_superblock, refused, unchanged

FACTS: dict[str, Any] = {
    "region": "/dev/shm/region",
    "label": "",
    "size_bytes": 3 << 20,
    "created_ns": 0,
    "errors": False,
    "mount_points": [],
    "features": {"compat": 1, "incompat": 0},
    "ranges": [
        {"offset": 0, "length": 1 << 21, "physical": 1 << 30},
        {"offset": 1 << 21, "length": 1 << 20, "physical": None},
    ],
    "handover": {"number": 3, "handed_over_ns": 10**9, "digests": True},
    "history": [
        {"arrival": "first boot", "mounted_ns": 0, "handover": None},
        {"arrival": "live update", "mounted_ns": 0, "handover": 3, "gap_ns": 1_500_000_000,
         "result": "as it was", "changed": "/f"},
    ],
    "kexec": {
        "path": "panic",
        "units": [{"unit": "dmar0", "adopted": False, "log": "Failed to copy\n"}],
    },
    "verification": {
        "state": "running", "trouble": "", "done_bytes": 25, "total_bytes": 100,
        "not_verified": 2, "changes": ({"path": "", "what": "metadata"},),
        "lost": ({"path": "/ram", "why": "it was\ncut"},),
    },
}  # fmt: skip


def test_each_fact_has_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    info._print_facts(FACTS)
    lines = capsys.readouterr().out.splitlines()
    for line in (
        "region: /dev/shm/region",
        "label: -",
        "size: 3145728 bytes (3 MiB)",
        "created: never",
        "errors: no",
        "mount points: -",
        "features: compat 0x1, incompat 0x0",
        "range 0: 2 MiB at 0x0, physical 0x40000000",
        "range 1: 1 MiB at 0x200000",
        "history: first boot, mounted never, without a handover",
        "history: live update, mounted never, 1.500 s after handover 3: as it was (/f)",
        "verification: running, 25%, 2 files not, for they were changed meanwhile",
        "changed: file system: metadata",
        "lost: /ram: it was\\ncut",
    ):
        assert line in lines, lines
    assert any(line.startswith("handover: number 3, 1970-") for line in lines)
    assert any("dmar0: not adopted" in line and "\\n" in line for line in lines)


def answering(monkeypatch: pytest.MonkeyPatch, answer: object) -> None:
    """Have every daemon answer so."""

    def call(path: str, request: object) -> object:
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(client, "call", call)


def test_the_daemon_tells_of_the_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    lost = (LostFile("/ram", "cut"),)
    answering(monkeypatch, Verification("done", "", 7, 7, 0, (ChangedFile("/f", "gone"),), lost))
    assert info._verification("/mnt/a") == {
        "state": "done", "trouble": "", "done_bytes": 7, "total_bytes": 7, "not_verified": 0,
        "changes": ({"path": "/f", "what": "gone"},), "lost": ({"path": "/ram", "why": "cut"},),
    }  # fmt: skip
    answering(monkeypatch, Verification("none", "", 0, 0, 0, ()))
    assert info._verification("/mnt/a") == {
        "state": "none", "trouble": "", "changes": (), "lost": (),
    }  # fmt: skip


def test_a_daemon_that_does_not_tell(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answering(monkeypatch, PermissionDeniedError("not for you"))
    assert info._verification("/mnt/a") is None
    assert capsys.readouterr().err == ""
    answering(monkeypatch, VersionError(daemon=1, program=2).at("/mnt/a"))
    assert info._verification("/mnt/a") is None
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("pkernfs: /mnt/a: the daemon of this mount speaks protocol 1")


# ------------------------------------------------------------------------------- region files


def test_info(region: Path, command: Command) -> None:
    with unchanged(region):
        text = command("pkernfs", "info", region)
        facts = json.loads(command("pkernfs", "info", "--json", region).out)
    assert (text.status, text.err) == (0, "")
    assert "here" in text.out
    assert facts["region"] == str(region)
    assert facts["mount_points"] == []


def test_info_backup_superblock(region: Path, command: Command) -> None:
    no_superblock(region)
    with unchanged(region):
        outcome = command("pkernfs", "info", "--json", region)
    assert outcome.status == 0
    assert json.loads(outcome.out)["label"] == "here"
    assert "backup" in outcome.err


def test_info_refuses(command: Command, tmp_path: Path) -> None:
    refused(command("pkernfs", "info", tmp_path), 1, "pkernfs", "directory")
    refused(command("pkernfs", "info", tmp_path / "no"), 1, "pkernfs", "No such file")
    for fill in FOREIGN:
        path = tmp_path / fill.__name__
        path.write_bytes(bytes(SIZE))
        fill(path)
        refused(command("pkernfs", "info", path), 1, "pkernfs", str(path))


# ------------------------------------------------------------------------------- segments


def test_a_pool_is_told(tmp_path: Path, command: Command) -> None:
    path = tmp_path / "base"
    Region.create(str(path), SIZE)
    with Region.open(str(path), write=True) as region:
        make_filesystem(region, pool=PoolFields(POOL_DIRECTORY, BLOCK))
    with unchanged(path):
        found = json.loads(command("pkernfs", "info", "--json", path).out)["pool"]
        lines = command("pkernfs", "info", path).out.splitlines()
    ways = found.pop("plain_paths")
    assert found == {"kind": "directory", "granule": BLOCK, "segments": 0, "segment_bytes": 0}
    assert [way["name"] for way in ways] == [
        "FUSE passthrough", "pkernfs native", "pkernfs exec", "pkernfs path",
    ]  # fmt: skip
    assert "pool: directory, in units of 2 MiB" in lines
    assert "segments: 0, 0 bytes" in lines
    assert "plain path, pkernfs path: yes: a file" in lines


def test_no_pool_is_told(region: Path, command: Command) -> None:
    assert json.loads(command("pkernfs", "info", "--json", region).out)["pool"] is None
    assert "pool: -" in command("pkernfs", "info", region).out.splitlines()


def test_a_table_that_cannot_be_read(capsys: pytest.CaptureFixture[str]) -> None:
    pool = {"kind": "dax", "granule": BLOCK, "segments": None, "segment_bytes": None,
            "plain_paths": [{"name": "a way", "offered": None, "why": "who knows"}]}  # fmt: skip
    info._print_pool(pool)
    assert capsys.readouterr().out.splitlines() == [
        "pool: dax, in units of 2 MiB",
        "plain path, a way: not known: who knows",
    ]
