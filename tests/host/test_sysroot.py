"""The files of a machine, under a root of our own."""

from __future__ import annotations

from pathlib import Path

import pytest

from pkernfs.host.sysroot import HOST, Host
from support.made_up_host import Machine


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(str(tmp_path))


def test_names_are_below_the_root(machine: Machine, tmp_path: Path) -> None:
    assert machine.path("proc/iomem") == str(tmp_path / "proc/iomem")
    assert HOST.path("proc/iomem") == "/proc/iomem"
    assert Host() == HOST


def test_a_text_is_without_white_space_at_its_end(machine: Machine) -> None:
    machine.write("proc/x", b"  one\ntwo\xff \n\n")
    assert machine.read("proc/x") == "  one\ntwo\udcff"
    assert machine.find("proc/x") == machine.read("proc/x")


def test_what_is_not_there(machine: Machine) -> None:
    with pytest.raises(FileNotFoundError):
        machine.read("proc/none")
    assert machine.find("proc/none") is None
    assert machine.list("proc/none") == []
    assert machine.command_line() == ""
    assert not machine.has_systemd()


def test_a_directory_is_sorted(machine: Machine) -> None:
    for name in ("b", "a", "c"):
        machine.write(f"sys/class/{name}", "")
    assert machine.list("sys/class") == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("[none] integrity confidentiality", None),
        ("none [integrity] confidentiality", "integrity"),
        ("none integrity [confidentiality]", "confidentiality"),
        ("", None),
    ],
)
def test_lockdown(machine: Machine, text: str, found: str | None) -> None:
    assert machine.lockdown() is None
    machine.write("sys/kernel/security/lockdown", text)
    assert machine.lockdown() == found


def test_systemd_has_a_directory_while_it_is_process_1(machine: Machine) -> None:
    machine.write("run/systemd/system/x", "")
    assert machine.has_systemd()
