"""systemd's units: their text, their place, and what systemd is asked about them."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from pkernfs.errors import NotFoundError, PkernfsError
from pkernfs.kexec import systemd
from support.made_up_host import Machine


def test_every_unit_runs_this_program() -> None:
    for name in systemd.UNITS:
        text = systemd.unit_text(name, "/opt/x/pkernfs")
        assert "@PKERNFS@" not in text
        assert ("/opt/x/pkernfs" in text) == name.startswith(("pkernfs@", "pkernfs-handover@"))


def test_installed_and_removed(tmp_path: Path) -> None:
    paths = systemd.install(tmp_path, "/usr/bin/pkernfs")
    assert [path.name for path in paths] == list(systemd.UNITS)
    assert {path.parent for path in paths} == {tmp_path / systemd.DIRECTORY}
    assert all(path.stat().st_mode & 0o777 == 0o644 for path in paths)
    (paths[0].parent / "other.service").touch()
    for _ in range(2):
        systemd.remove(tmp_path)
        assert [path.name for path in paths[0].parent.iterdir()] == ["other.service"]


def test_the_program_of_a_root(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"no pkernfs in its /usr/local/bin or /usr/bin"):
        systemd.find_program(tmp_path, "/here/is/pkernfs")
    for directory in ("usr/bin", "usr/local/bin"):
        (tmp_path / directory).mkdir(parents=True)
        (tmp_path / directory / "pkernfs").symlink_to("/nothing/of/the/kind")
        assert systemd.find_program(tmp_path) == f"/{directory}/pkernfs"


def test_the_program_of_the_running_system(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os.path, "lexists", lambda path: str(path).startswith("/here"))
    monkeypatch.setattr(shutil, "which", lambda name: name if "/" in name else None)
    assert systemd.find_program(Path("/"), "/here/pkernfs") == "/here/pkernfs"
    for invoked in ("/here/pytest", None):
        with pytest.raises(NotFoundError):
            systemd.find_program(Path("/"), invoked)


def test_units_are_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    done = subprocess.CompletedProcess([], 0, "", "")
    monkeypatch.setattr(subprocess, "run", lambda words, **_: done)
    systemd.reload()
    done.returncode, done.stderr = 1, "Access denied\n"
    with pytest.raises(PkernfsError, match=r"^systemctl daemon-reload: Access denied$"):
        systemd.reload()

    def run(words: list[str], **_: Any) -> None:
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(PkernfsError, match=r"^systemctl daemon-reload: No such file"):
        systemd.reload()


def test_which_mounts_it_hands_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def run(words: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        asked.append(words)
        active = words[-1] == "pkernfs-handover@mnt-a.service"
        text = words[-1].strip("/").replace("/", "-") + "\n"
        return subprocess.CompletedProcess(words, 0 if active else 3, text, "")

    monkeypatch.setattr(subprocess, "run", run)
    machine = Machine(str(tmp_path))
    assert not systemd.hands_over("/mnt/a", machine)
    assert asked == []  # it does not run here
    machine.write("run/systemd/system/x", "")
    assert systemd.hands_over("/mnt/a", machine)
    assert not systemd.hands_over("/mnt/b", machine)
    assert systemd.options_file("/mnt/a") == "/etc/pkernfs/mnt-a"
    for text, is_told in (
        ("REGION=none", False),
        ("HANDOVER=--digest", False),
        ("HANDOVER=--digest --force\nREGION=none", True),
        ('HANDOVER="--force"', True),
        ("HANDOVER=--cmdline=memmap=1G%1G", True),
        ("#HANDOVER=--force", False),
        ("HANDOVER=--force\nHANDOVER=", False),
    ):
        machine.write("etc/pkernfs/mnt-a", text + "\n")
        assert systemd.is_told_of_kernel("/mnt/a", machine) is is_told, text
        assert not systemd.is_told_of_kernel("/mnt/b", machine)
