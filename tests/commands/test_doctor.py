"""pkernfs doctor: what is printed of the checks, and the exit status."""

from __future__ import annotations

import json

import pytest

from pkernfs import cli, doctor
from pkernfs.doctor import MISSING, OK, UNKNOWN, WARNING, Result
from support.mounting import run_pkernfs


@pytest.mark.parametrize("mount", [OK, MISSING])
def test_the_status_is_that_of_mounting(
    mount: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results = [
        Result("mount", "kernel", mount, "7.3", "" if mount == OK else "another one"),
        Result("region", "device-dax", WARNING, "no device", "modprobe dax_hmem"),
        Result("dma", "dmar0", UNKNOWN, "not for us", "as root"),
        Result("units", "systemd", MISSING, "not running here", "boot with systemd"),
    ]
    monkeypatch.setattr(doctor, "examine", lambda: iter(results))
    status = 0 if mount == OK else 1
    assert cli.main(["doctor"]) == status
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"mount a file system: {'yes' if mount == OK else 'no'}"
    assert "  !       device-dax: no device" in lines
    assert "          remedy: modprobe dax_hmem" in lines
    assert "  ?       dmar0: not for us" in lines
    assert "leave devices running meanwhile: not known" in lines
    assert lines[-3] == "do it with systemd: no"
    assert cli.main(["doctor", "--json"]) == status
    found = json.loads(capsys.readouterr().out)
    assert found["checks"] == [r._asdict() for r in results]
    assert found["able"] == {
        "mount": mount == OK, "region": True, "guest": True, "segments": True, "kexec": True,
        "dma": False, "units": False,
    }  # fmt: skip


@pytest.mark.slow("runs the command twice, as a program of its own")
def test_the_command_on_this_machine() -> None:
    done = run_pkernfs("doctor", "--json")
    found = json.loads(done.stdout)
    assert done.returncode == (0 if found["able"]["mount"] else 1)
    assert {c["name"] for c in found["checks"]} >= {"kernel", "/dev/fuse", "libfuse", "DMAR"}
    assert all(c["remedy"] for c in found["checks"] if c["status"] == "missing")
    plain = run_pkernfs("doctor")
    assert plain.stdout.startswith("mount a file system: ")
    assert not plain.stderr
