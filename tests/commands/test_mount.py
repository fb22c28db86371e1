"""pkernfs mount: its exit status and lines, and mount points that are taken or left behind."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from pkernfs.commands import mount
from pkernfs.commands.mount import check_mount_point, exit_status
from pkernfs.control.mounts import FSTYPE, Mount
from pkernfs.errors import BusyError, NotDirError, NotFoundError, PkernfsError, RegionError
from pkernfs.fuse.background import DaemonError
from support.command_lines import (
    FOREIGN,
    MIB,
    SIZE,
    Command,
    mounting,
    no_superblocks,
    refused,
    unchanged,
)


def failing(error: Exception) -> Callable[[], None]:
    """A mount that fails."""

    def run() -> None:
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (RegionError("no such device"), "REGION: no such device"),
        (RegionError("REGION: no such device"), "REGION: no such device"),
        (RegionError("/mnt/a: cannot mount: denied"), "/mnt/a: cannot mount: denied"),
        (DaemonError("the daemon died: Killed"), "the daemon died: Killed"),
        (BusyError("a\nb"), "REGION: a\\nb"),
    ],
)
def test_a_failure_is_one_line_and_32(
    error: Exception, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_status(failing(error), "REGION", "/mnt/a") == 32
    assert capsys.readouterr().err == f"pkernfs: {line}\n"


def test_success_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status(lambda: None, "REGION", "/mnt/a") == 0
    assert capsys.readouterr() == ("", "")


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(KeyError):
        exit_status(failing(KeyError("oops")), "REGION", "/mnt/a")


class Mounted:
    """Something is mounted at a path, until it is unmounted."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
        self.mounts = [Mount(62, str(path), FSTYPE, "/dev/shm/region", 0)]
        self.status = 0
        self.alive = False
        monkeypatch.setattr(mount, "mount_at", lambda path: next(reversed(self.mounts), None))
        monkeypatch.setattr(mount, "_answers", lambda path: self.alive)
        monkeypatch.setattr(subprocess, "run", self._run)

    def _run(self, words: list[str], **_: object) -> subprocess.CompletedProcess[bytes]:
        assert words[-1] == self.mounts[-1].mount_point
        if not self.status:
            self.mounts.pop()
        return subprocess.CompletedProcess(words, self.status)


@pytest.fixture
def mounted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Mounted:
    return Mounted(monkeypatch, tmp_path)


def test_one_that_is_alive_is_in_the_way(mounted: Mounted, tmp_path: Path) -> None:
    mounted.alive = True
    with pytest.raises(BusyError, match="/dev/shm/region is mounted on it"):
        check_mount_point(str(tmp_path))


def test_dead_ones_are_taken_away(
    mounted: Mounted, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mounted.mounts *= 2
    check_mount_point(str(tmp_path))
    assert mounted.mounts == []
    line = f"pkernfs: {tmp_path}: removed the mount that a killed daemon left behind\n"
    assert capsys.readouterr().err == line * 2


def test_a_dead_one_that_stays_is_said(mounted: Mounted, tmp_path: Path) -> None:
    mounted.status = 1
    with pytest.raises(PkernfsError, match="cannot unmount what a killed daemon left behind"):
        check_mount_point(str(tmp_path))


def test_another_file_system_may_be_below(mounted: Mounted, tmp_path: Path) -> None:
    mounted.mounts = [mounted.mounts[0]._replace(fstype="tmpfs")]
    check_mount_point(str(tmp_path))


def test_it_is_a_directory(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NotDirError):
        check_mount_point(str(tmp_path / "file"))
    with pytest.raises(NotFoundError):
        check_mount_point(str(tmp_path / "missing"))


# ------------------------------------------------------------------------------- bad input


def test_mount_usage(region: Path, command: Command, tmp_path: Path) -> None:
    with unchanged(region):
        for option in ("bogus", "ro=1", "phys_base", "phys_base=1Q", "phys_base=12", "cache=warm"):
            refused(mounting(command, region, tmp_path, option), 1, "pkernfs", option.split("=")[0])
            # ... and in the form that mount(8) uses, before anything goes to the background
            outcome = command("pkernfs", region, tmp_path, "-o", f"rw,dev,{option}")
            refused(outcome, 1, "pkernfs")


def test_mount_point(region: Path, command: Command, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with unchanged(region):
        refused(mounting(command, region, tmp_path / "no"), 32, "pkernfs", "does not exist")
        refused(mounting(command, region, file), 32, "pkernfs", "not a directory")


def test_mount_bad_regions(command: Command, tmp_path: Path) -> None:
    refused(mounting(command, tmp_path / "no", tmp_path), 32, "pkernfs", "No such file")
    refused(mounting(command, tmp_path, tmp_path), 32, "pkernfs", "irectory")
    refused(mounting(command, "/dev/null", tmp_path), 32, "pkernfs", "/dev/null")
    for size in (0, 4096, MIB):
        small = tmp_path / f"small-{size}"
        small.write_bytes(bytes(size))
        with unchanged(small):
            refused(mounting(command, small, tmp_path), 32, "pkernfs")
            refused(mounting(command, small, tmp_path, "mkfs"), 32, "pkernfs", str(small))


@pytest.mark.parametrize("fill", FOREIGN)
@pytest.mark.parametrize("options", ["rw", "mkfs"])
def test_mount_other_data(
    fill: Callable[[Path], None], options: str, command: Command, tmp_path: Path
) -> None:
    path = tmp_path / "region"
    path.write_bytes(b"")
    os.truncate(path, SIZE)
    fill(path)
    with unchanged(path):
        refused(mounting(command, path, tmp_path, options), 32, "pkernfs")


@pytest.mark.parametrize("options", ["rw", "ro", "mkfs"])
def test_mount_never_formats_a_damaged_pkernfs(
    options: str, region: Path, command: Command, tmp_path: Path
) -> None:
    no_superblocks(region)
    with unchanged(region):
        refused(mounting(command, region, tmp_path, options), 32, "pkernfs")


def test_remount_is_refused(command: Command, tmp_path: Path) -> None:
    outcome = mounting(command, tmp_path / "region", tmp_path, "remount,ro")
    refused(outcome, 32, "pkernfs", "cannot remount")
