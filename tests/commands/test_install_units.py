"""``pkernfs install-units``: what is installed, and what systemd thinks of it.

That the units do what they say is shown in tests/lab, with systemd as process 1.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from pkernfs import cli
from pkernfs.kexec import systemd

BASE = "/usr/lib/systemd/system"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The root of a system that has a pkernfs."""
    command = tmp_path / "usr" / "local" / "bin" / "pkernfs"
    command.parent.mkdir(parents=True)
    command.symlink_to("/opt/pkernfs/.venv/bin/pkernfs")  # nothing of the kind is out here
    return tmp_path


def installed(root: Path) -> dict[str, str]:
    """The units in ``root``."""
    directory = root / systemd.DIRECTORY
    return {path.name: path.read_text() for path in directory.iterdir()}


def test_installs(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        assert cli.main(["install-units", "--root", str(root)]) == 0
        units = installed(root)
        assert set(units) == set(systemd.UNITS)
        assert all("@PKERNFS@" not in text for text in units.values())
        assert "ExecStart=/usr/local/bin/pkernfs mount " in units["pkernfs@.service"]
        lines = capsys.readouterr().out.splitlines()
        assert [Path(line).name for line in lines] == list(systemd.UNITS)
    assert cli.main(["install-units", "--remove", "--root", str(root)]) == 0
    assert installed(root) == {}
    assert cli.main(["install-units", "--remove", "--root", str(root)]) == 0


def test_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["install-units", "--root", str(tmp_path / "no")]) == 1
    assert "no such directory" in capsys.readouterr().err
    assert cli.main(["install-units", "--root", str(tmp_path)]) == 1
    assert "no pkernfs in its" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_every_unit_is_installed() -> None:
    units = Path(systemd.__file__).parent.parent / "systemd"
    assert {path.name for path in units.iterdir()} == set(systemd.UNITS)


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="no systemd-analyze")
@pytest.mark.skipif(not os.path.isdir(BASE), reason="no units of systemd's own")
def test_systemd_finds_nothing_wrong(root: Path, tmp_path: Path) -> None:
    """Unknown settings, cycles, commands that are not there: verify tells of them all."""
    assert cli.main(["install-units", "--root", str(root)]) == 0
    directory = tmp_path / "verify"
    directory.mkdir()
    for name, text in installed(root).items():
        (directory / name).write_text(text.replace("/usr/local/bin/pkernfs", "/bin/true"))
    names = ["pkernfs@mnt-pkernfs.service", "pkernfs-handover@mnt-pkernfs.service"]
    names += ["pkernfs.target", "pkernfs-kexec-refused.service"]
    paths = [str(directory / name) for name in names]
    command = ["systemd-analyze", "verify", "--man=no", *paths]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "SYSTEMD_LOG_LEVEL": "warning"}
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    (directory / "pkernfs.target").write_text("[Unit]\nBefore=basic.target\nNonsense=1\n")
    done = subprocess.run(command, capture_output=True, text=True)
    assert re.search("Unknown key.*Nonsense", done.stderr), "verify sees nothing at all"
