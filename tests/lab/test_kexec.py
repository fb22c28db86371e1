"""Files outlive their kernel: real kexecs, into the same kernel and others, one after the other."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import NoReturn

import pytest

from kexeclab.guest import Guest
from kexeclab.runner import Lab
from support.lab import regions, trees, writers
from support.lab.commands import extents
from support.lab.regions import MOUNT

pytestmark = pytest.mark.lab

_TREE = MOUNT / "tree"
_RAM = MOUNT / "guest-ram"


# ---------------------------------------------------------------------------- with a handover


def fill(guest: Guest) -> None:
    """Make a tree and a guest's memory; describe them, hand over, and go."""
    seed = guest.parameters["seed"]
    regions.mkfs(guest)
    with guest.step("make the tree"):
        trees.make(_TREE, seed, guest.parameters["files"])
    with guest.step("fill guest memory"):
        guest.note("ram", trees.fill_ram(_RAM, guest.parameters["ram"] << 20, seed))
    guest.note("extents", guest.run("pkernfs", "extents", str(_RAM), "--json"))
    with guest.step("describe the tree"):
        guest.note("tree", trees.describe(_TREE))
    guest.load(guest.parameters.get("kernel"))
    with guest.step("handover"):
        guest.run("pkernfs", "handover", "--digest", str(MOUNT))
    guest.execute()


def compare(guest: Guest) -> None:
    """Everything is there, to the byte and the attribute."""
    with guest.step("mount"):
        said = regions.mount(guest)
    assert "after handover 1" in said
    with guest.step("compare the tree"):
        assert trees.difference(_TREE, guest.notes["tree"]) == ""
    assert guest.run("pkernfs", "extents", str(_RAM), "--json") == guest.notes["extents"]
    with guest.step("compare guest memory"):
        assert trees.ram_digest(_RAM) == guest.notes["ram"]
    with guest.step("unmount and fsck"):
        regions.unmount_and_check(guest)


@pytest.mark.parametrize("kind", regions.PARAMETERS)
def test_everything_survives_a_kexec(lab: Lab, kind: str) -> None:
    """1,000 files of all kinds and 256 MiB of guest memory are the same, byte and attribute."""
    machine = lab.machine(memory=regions.MEMORY_MIB, cmdline=regions.PARAMETERS[kind])
    what = {"kind": kind, "seed": 7, "files": trees.FILES, "ram": 256}
    lab.run(fill, compare, machine=machine, parameters=what, seconds=400)


@pytest.mark.parametrize(
    ("first", "second", "kind"), [("6.1", "7", "devmem"), ("7", "6.12", "dax")]
)
def test_another_kernel_version(lab: Lab, first: str, second: str, kind: str) -> None:
    """A kexec into a newer and into an older kernel: the files and the memory are the same."""
    machine = lab.machine(
        kernel=first,
        kernels=[second],
        memory=regions.MEMORY_MIB,
        cmdline=regions.PARAMETERS[kind],
    )
    what = {"kind": kind, "seed": 8, "files": 60, "ram": 32, "kernel": second}
    lab.run(fill, compare, machine=machine, parameters=what)


# ---------------------------------------------------------------------------- three in a row


def go_on(guest: Guest) -> None:
    """Add a tree to those of the kernels before; leave it mounted, its data just written."""
    if guest.stage == 1:
        regions.mkfs(guest)
    else:
        said = regions.mount(guest)
        assert (f"after handover {guest.stage - 1}" in said) == guest.parameters["handover"], said
    so_far = guest.notes.get("trees", {})
    for name, described in so_far.items():
        assert trees.difference(MOUNT / name, described) == ""
    name = f"stage-{guest.stage}"
    trees.make(MOUNT / name, guest.stage, files=40)
    # All of them anew: comparing was an access, and changed times.
    guest.note("trees", {one: trees.describe(MOUNT / one) for one in [*so_far, name]})
    if guest.stage < 4:
        leave(guest)
    check_history(guest)
    regions.unmount_and_check(guest)


def leave(guest: Guest) -> NoReturn:
    """Hand over, if that is to be done, and start the next kernel."""
    hand_over = ("pkernfs", "handover", str(MOUNT))
    if guest.parameters["handover"] and guest.stage == 1:
        guest.load(remove=["pkernfs"])
        assert "is not told pkernfs=" in guest.run(*hand_over, status=1)
    guest.load()
    if guest.parameters["handover"]:
        guest.run(*hand_over)
    guest.execute()


def check_history(guest: Guest) -> None:
    """Each kernel's first mount is in it, the newest first."""
    history = json.loads(guest.run("pkernfs", "info", "--json", str(MOUNT)))["history"]
    assert [entry["arrival"] for entry in history] == ["live update"] * 3
    numbers = [3, 2, 1] if guest.parameters["handover"] else [None] * 3
    assert [entry["handover"] for entry in history] == numbers
    result = "metadata unchanged" if guest.parameters["handover"] else "unknown"
    assert [entry["result"] for entry in history] == [result] * 3
    for newer, older in itertools.pairwise(history):
        assert newer["boot_id_before"] == older["boot_id_after"] != newer["boot_id_after"]


@pytest.mark.parametrize(("kind", "handover", "cpus"), [("devmem", False, 2), ("dax", True, 1)])
def test_three_kexecs(lab: Lab, kind: str, handover: bool, cpus: int) -> None:
    """Three kexecs in a row, with handovers and with none (mounted, on two processors)."""
    cmdline = regions.PARAMETERS[kind]
    machine = lab.machine(cpus=cpus, memory=regions.MEMORY_MIB, cmdline=cmdline)
    what = {"kind": kind, "handover": handover}
    lab.run(go_on, go_on, go_on, go_on, machine=machine, parameters=what)


# ---------------------------------------------------------------------------- damage


def scribble(guest: Guest) -> None:
    """After the handover somebody writes to one file's memory, behind everybody's back."""
    regions.mkfs(guest)
    for name in ("good", "victim", "last"):
        (MOUNT / name).write_bytes(name.encode() * 600_000)
    address = extents(MOUNT / "victim")[0]["physical"] + 2345
    guest.load()
    guest.run("pkernfs", "handover", "--digest", str(MOUNT))
    guest.run("umount", str(MOUNT))
    with open("/dev/mem", "r+b", buffering=0) as memory:
        memory.seek(address)
        memory.write(b"\xff")
    guest.execute()


def find_it(guest: Guest) -> None:
    """The mount names that file, and it alone; all can be read."""
    said = regions.mount(guest, "verify")
    assert "/victim" in said
    assert "/good" not in said
    assert "/last" not in said
    assert (MOUNT / "good").read_bytes() == b"good" * 600_000
    victim = (MOUNT / "victim").read_bytes()
    assert len(victim) == 6 * 600_000
    assert victim.count(0xFF) == 1
    regions.unmount_and_check(guest)


def test_changed_bytes_are_found(lab: Lab) -> None:
    """A byte of a file is changed between handover and mount: the mount names the file."""
    machine = lab.machine(memory=regions.MEMORY_MIB, cmdline=regions.PARAMETERS["devmem"])
    lab.run(scribble, find_it, machine=machine)


def shorten(guest: Guest) -> None:
    """Start a kernel that takes a half of the region for ordinary RAM."""
    regions.mkfs(guest)
    (MOUNT / "file").write_bytes(b"kept" * 1000)
    guest.run("umount", str(MOUNT))
    guest.kexec(remove=["memmap"], add=["memmap=256M%1G"])


def refuse_it(guest: Guest) -> None:
    """The region reaches past what is reserved: refused with the parameter that is missing."""
    mount = ("mount", "-t", "fuse.pkernfs")
    refusal = guest.run(*mount, "none", str(MOUNT), status=32)
    assert f"boot with {regions.MEMMAP}" in refusal, refusal
    refuse_overlaps(guest)


def refuse_overlaps(guest: Guest) -> None:
    """What is left of the reservation may be a region, but no part of it twice."""
    mount = ("mount", "-t", "fuse.pkernfs")
    guest.run("mkfs.pkernfs", "-f", "128M!1G")
    guest.run(*mount, "128M!1G", str(MOUNT))
    Path("/mnt/other").mkdir()
    for spec in ("64M!1088M", "192M!1G"):
        refusal = guest.run(*mount, spec, "/mnt/other", status=32)
        assert "in use: it overlaps 128M!1G" in refusal, refusal
    guest.run("umount", str(MOUNT))


def test_reservations_that_do_not_fit(lab: Lab) -> None:
    """A memmap= shorter than the region is refused at mount, and a region over a mounted one."""
    machine = lab.machine(memory=regions.MEMORY_MIB, cmdline=regions.PARAMETERS["devmem"])
    lab.run(shorten, refuse_it, machine=machine)


# ---------------------------------------------------------------------------- a panic


def write_until_it_panics(guest: Guest) -> None:
    """Four writers at work, and a panic at a random moment."""
    regions.mkfs(guest)
    guest.load(panic=True, add=["nr_cpus=1"], remove=["crashkernel"])
    rng = random.Random(guest.parameters["seed"])
    writers.work_until_panic(guest, MOUNT, rng.uniform(2.0, 10.0))


def look_at_promises(guest: Guest) -> None:
    """In the crash kernel: all that was fsynced is there, and fsck is content."""
    regions.mount(guest)
    promised = guest.notes["promised"]
    guest.log(f"fsynced before the panic: {promised}")
    assert writers.broken_promises(MOUNT, promised) == []
    (MOUNT / "new").write_bytes(b"goes on")
    regions.unmount_and_check(guest)


@pytest.mark.parametrize("kind", regions.PARAMETERS)
def test_panic_under_load(lab: Lab, kind: str) -> None:
    """A panic at a random moment under write load: what was fsynced is there, fsck is clean."""
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    machine = lab.machine(
        memory=regions.MEMORY_MIB, cmdline=[*regions.PARAMETERS[kind], "crashkernel=256M"]
    )
    lab.run(
        write_until_it_panics,
        look_at_promises,
        machine=machine,
        parameters={"kind": kind, "seed": seed},
    )
