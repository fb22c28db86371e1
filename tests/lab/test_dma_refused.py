"""Hosts on which DMA would not go on: refused before anything starts, and the machine goes on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from kexeclab.guest import KERNELS, Guest
from kexeclab.runner import Lab
from support.lab import regions
from support.lab.commands import ask, pkernfs
from support.lab.dma import (
    EDU,
    WORDS,
    faults,
    kexec_words,
    machine,
    put_to_work,
    reads_and_writes,
    shown,
)
from support.lab.edu import Edu
from support.lab.regions import MOUNT

pytestmark = pytest.mark.lab

NEXT = "7"
CRASH_SIZE = Path("/sys/kernel/kexec_crash_size")
CRASH_LOADED = Path("/sys/kernel/kexec_crash_loaded")


def refusals(guest: Guest) -> None:
    """One after the other, in one machine."""
    regions.mkfs(guest)
    unable_unit(guest)
    edu, _other = put_to_work(guest)
    before = shown()
    for number, (words, reason) in enumerate(wrong_kernels(guest)):
        refused(guest, words, reason)
        still_works(edu, number)
    CRASH_SIZE.write_text("0")  # as without crashkernel=
    refused(guest, kexec_words(guest, NEXT), "boot with crashkernel=")
    still_works(edu, 100)
    assert shown() == before
    assert faults() == []
    regions.unmount_and_check(guest)


def unable_unit(guest: Guest) -> None:
    """Tables of a kind that the unit cannot walk are not put in force."""
    root = MOUNT / "iommu/root-pgtables"
    pkernfs("iommu", "create", str(MOUNT), "--levels", "5")
    domain = regions.make_domain(0)
    pkernfs("iommu", "attach", str(domain), EDU)
    status, said = ask("iommu", "activate", str(MOUNT), "--cut-off")
    assert status == 1
    assert "no tables of 5 levels (CAP.SAGAW)" in said, said
    guest.log(said.strip())
    pkernfs("iommu", "detach", EDU)
    domain.unlink()
    root.unlink()


def wrong_kernels(guest: Guest) -> Iterator[tuple[list[str], str]]:
    """Commands that would end DMA, and what is said of each."""
    for parameters, reason in (
        (["intel_iommu=on,sm_on"], "the tables are of legacy mode"),
        (["intel_iommu=off"], "it needs intel_iommu=on"),
        (["intel_iommu=on,sm_off", "iommu=off"], "has iommu=off"),
    ):
        yield kexec_words(guest, NEXT, *parameters), reason
    for option in ("INTEL_IOMMU", "CRASH_DUMP"):
        place = kernel_without(option)
        words = kexec_words(guest, NEXT)
        words[words.index("--kernel") + 1] = str(place / "vmlinuz")
        yield words, f"no CONFIG_{option}"


def kernel_without(option: str) -> Path:
    """A kernel that says of itself that it was built without an option."""
    original, place = KERNELS / NEXT, Path("/tmp/without") / option
    [modules] = (original / "lib/modules").iterdir()
    copy = place / "lib/modules" / modules.name
    copy.mkdir(parents=True)
    for name in ("modules.alias", "modules.builtin.modinfo"):
        (copy / name).symlink_to(modules / name)
    (place / "vmlinuz").symlink_to(original / "vmlinuz")
    lines = (modules / "config").read_text().splitlines()
    kept = [line for line in lines if not line.startswith(f"CONFIG_{option}=")]
    assert len(kept) == len(lines) - 1
    (copy / "config").write_text("\n".join(kept) + "\n")
    return place


def refused(guest: Guest, words: list[str], reason: str) -> None:
    """In one line, with its reason; nothing is loaded, and nothing handed over."""
    status, said = ask(*words)
    assert status == 1, said
    assert reason in said, said
    assert said.count("\n") == 1, said
    guest.log(said.strip())
    assert CRASH_LOADED.read_text().strip() == "0"


def still_works(edu: Edu, number: int) -> None:
    """The device reads and writes a file, which the file system lets be written."""
    reads_and_writes(edu, EDU, WORDS + 8 * number, 0x5000 + number)


def test_refused(lab: Lab) -> None:
    """kexec: another table mode, no IOMMU, kernels that do not adopt, no crashkernel=."""
    made = machine(lab, ["6.12", NEXT], "crashkernel=256M", unit="intremap=off,x-scalable-mode=on")
    lab.run(refusals, machine=made)
