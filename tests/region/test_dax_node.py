"""Nodes of devices: owner, mode and label; /dev/null stands for a dax device's."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from pkernfs.errors import RegionError
from pkernfs.host.holders import Target
from pkernfs.region import dax_node
from pkernfs.region.dax_node import (
    Access,
    closed,
    read_access,
    read_label,
    set_access,
    set_label,
    target,
)
from support.made_up_host import Machine, add_dax, make_machine

NAME = "dax0.1"


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A device whose node is a file that is taken for a device."""
    made = make_machine(tmp_path)
    add_dax(made, NAME, (1 << 30, 2 << 20))
    monkeypatch.setattr(dax_node, "_is_of", lambda found, number: True)
    os.chmod(made.path(f"dev/{NAME}"), 0o640)
    return made


def test_owner_and_mode(machine: Machine) -> None:
    before = read_access(NAME, machine)
    assert before == Access(os.geteuid(), os.getegid(), 0o640)
    set_access(NAME, before._replace(mode=0o606), machine)
    assert read_access(NAME, machine).mode == 0o606


def test_the_old_mode_is_not_for_the_new_owner(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it may be opened as is nothing while the owner changes."""
    seen = []
    path = machine.path(f"dev/{NAME}")

    def chown(where: str, uid: int, gid: int) -> None:
        seen.append((where, uid, gid, os.stat(path).st_mode & 0o777))

    monkeypatch.setattr(os, "chown", chown)
    set_access(NAME, Access(7, 8, 0o600), machine)
    assert seen == [(path, 7, 8, 0)]
    assert os.stat(path).st_mode & 0o777 == 0o600


def test_closed_for_a_while(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    owners = []
    monkeypatch.setattr(os, "chown", lambda path, uid, gid: owners.append((uid, gid)))
    with closed(NAME, machine):
        assert read_access(NAME, machine).mode == 0o600
    assert read_access(NAME, machine).mode == 0o640
    if os.geteuid() != 0:
        assert owners == [(0, 0)]


def test_another_file_in_its_place(tmp_path: Path) -> None:
    machine = make_machine(tmp_path)
    add_dax(machine, NAME, (1 << 30, 2 << 20))
    with pytest.raises(RegionError, match=r"dev/dax0.1: it is not the node of that device"):
        read_access(NAME, machine)
    os.unlink(machine.path(f"dev/{NAME}"))
    with pytest.raises(RegionError, match=r"No such file or directory: is /dev no devtmpfs\?"):
        read_access(NAME, machine)
    Path(machine.path(f"dev/{NAME}")).symlink_to("/dev/null")
    with pytest.raises(RegionError, match="not the node"):
        read_access(NAME, machine)


def test_what_to_look_for(machine: Machine) -> None:
    found = os.stat(machine.path(f"dev/{NAME}"))
    assert target(NAME, machine) == Target(found.st_dev, found.st_ino, NAME)
    with pytest.raises(RegionError, match=r"dev/dax0.9: No such file or directory"):
        target("dax0.9", machine)


def test_the_number_of_a_node() -> None:
    found = os.stat("/dev/null")
    assert dax_node._is_of(found, "1:3")
    assert not dax_node._is_of(found, "1:5")
    assert not dax_node._is_of(found, None)


def test_owner_that_cannot_be_set(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str, mode: int) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "chmod", refuse)
    with pytest.raises(RegionError, match="cannot set its owner: Read-only file system") as caught:
        set_access(NAME, read_access(NAME, machine), machine)
    assert caught.value.errno == errno.EROFS


def test_a_label(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where extended attributes are not to be had, there is none."""
    kept: dict[str, bytes] = {}
    monkeypatch.setattr(os, "setxattr", lambda path, name, value: kept.update({name: value}))
    monkeypatch.setattr(os, "getxattr", lambda path, name: kept[name])
    set_label(NAME, "0x40000000 7", machine)
    assert kept == {"trusted.pkernfs.segment": b"0x40000000 7"}
    assert read_label(NAME, machine) == "0x40000000 7"

    def refuse(*_: object) -> bytes:
        raise OSError(errno.EOPNOTSUPP, "")

    monkeypatch.setattr(os, "setxattr", refuse)
    monkeypatch.setattr(os, "getxattr", refuse)
    set_label(NAME, "0x40000000 8", machine)
    assert read_label(NAME, machine) is None
