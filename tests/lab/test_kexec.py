"""Files outlive their kernel: real kexecs, into the same kernel and others, one after the other."""

from __future__ import annotations

import pytest
import regions
import trees
from regions import MOUNT

from kexeclab.guest import Guest
from kexeclab.runner import Lab

pytestmark = pytest.mark.lab

RAM_BYTES = 256 << 20
_TREE = MOUNT / "tree"
_RAM = MOUNT / "guest-ram"


def fill(guest: Guest) -> None:
    """A tree of 1,000 files and a guest's memory; describe them, and go."""
    regions.mkfs(guest)
    _TREE.mkdir()
    with guest.step("make 1,000 files"):
        trees.make(_TREE, guest.parameters["seed"])
    with guest.step("fill guest memory"):
        guest.note("ram", trees.fill_ram(_RAM, RAM_BYTES, guest.parameters["seed"]))
    guest.note("extents", guest.run("pkernfs", "extents", str(_RAM), "--json"))
    guest.load()
    with guest.step("describe 1,000 files"):
        guest.note("tree", trees.describe(_TREE))
    guest.run("umount", str(MOUNT))
    guest.execute()


def compare(guest: Guest) -> None:
    """Everything is there, to the byte and the attribute."""
    with guest.step("mount"):
        regions.mount(guest)
    with guest.step("compare 1,000 files"):
        assert trees.difference(_TREE, guest.notes["tree"]) == ""
    assert guest.run("pkernfs", "extents", str(_RAM), "--json") == guest.notes["extents"]
    with guest.step("compare guest memory"):
        assert trees.ram_digest(_RAM) == guest.notes["ram"]
    with guest.step("unmount and fsck"):
        regions.unmount_and_check(guest)


@pytest.mark.parametrize("kind", regions.PARAMETERS)
def test_survives_a_kexec(lab: Lab, kind: str) -> None:
    """1,000 files of all kinds and 256 MiB of guest memory are the same, byte and attribute."""
    machine = lab.machine(memory=regions.MEMORY_MIB, cmdline=regions.PARAMETERS[kind])
    lab.run(fill, compare, machine=machine, parameters={"kind": kind, "seed": 7}, seconds=400)
