"""Guests of two tenants on segments of device-dax, by plain path, over a live update of the host.

docs/operations.md, "Guests of several owners", has what their operator types. It is typed here as
it stands there. A device of one guest goes on storing into its memory, whatever kernel runs.
"""

from __future__ import annotations

import json
import os
import select
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest

from guestlab import counter
from kexeclab.guest import Guest
from kexeclab.runner import Lab
from pagecache import cached_pages
from pkernfs.commands import path
from pkernfs.quantities import Iova
from pkernfs.vmm.live_update import run_directory
from support.lab import regions
from support.lab.commands import ask, extents, iommu, pkernfs
from support.lab.dma import ADOPTED, kexec_words
from support.lab.edu import SCRATCH, Edu
from support.lab.mapped import Mapped
from support.lab.pci import is_master
from support.lab.regions import MOUNT
from support.lab.streams import Stream, asked_for, expected, landed
from support.mounting import run_as
from support.sessions import ROOT, Block, blocks, compare
from support.waiting import until

pytestmark = pytest.mark.lab

MIB = 1 << 20
RAM_BYTES = 64 * MIB
EDU = "0000:00:10.0"  # as docs/operations.md has it
#: Where the device's stream is in its guest's memory, which the guest leaves alone.
STREAM = 32 * MIB
SECONDS = 200.0  # on a machine that is busy; two guests without KVM below one without
SCRATCH_FILE = MOUNT / "scratch"
HERE = "shown=tests/lab/test_tenants.py"


class Tenant(NamedTuple):
    """A user with a guest."""

    name: str
    uid: int

    @property
    def directory(self) -> Path:
        """What the user has in the mount."""
        return MOUNT / self.name

    @property
    def ram(self) -> Path:
        """The guest's memory, by its plain path."""
        return self.directory / "ram"

    @property
    def native(self) -> Path:
        """The node of the guest's memory that pkernfs keeps."""
        return Path(path.find(str(self.ram)).path)

    def numbers(self) -> list[int]:
        """All that the guest has counted; it was never reset."""
        return counter.numbers((self.directory / "serial.log").read_text())

    def wait_for(self, count: int) -> None:
        """Wait until the guest has written so many numbers."""
        what = f"{count} numbers of {self.name}"
        until(what, lambda: len(self.numbers()) >= count, SECONDS, every=0.1)

    def memory(self) -> Mapped:
        """The guest's memory as a program has it that maps the plain path."""
        return Mapped(self.ram, RAM_BYTES)

    def raw(self) -> Mapped:
        """The physical memory, which no file system lies between."""
        [piece] = extents(self.ram)
        assert piece["length"] == RAM_BYTES
        return Mapped(Path("/dev/mem"), RAM_BYTES, piece["physical"])

    def qemu(self) -> int:
        """The process that runs the guest; it is the user's."""
        [file] = run_directory(self.uid).glob("live-update-*.pid")
        return int(file.read_text())


TENANTS = Tenant("a", 2001), Tenant("b", 2002)
A, B = TENANTS


def type_block(guest: Guest, title: str) -> None:
    """Type a block of the document: the one whose first command begins with ``title``."""
    block = find_block(title)
    commands = block.commands()
    with guest.step(title):
        said = [guest.run("sh", "-c", f"cd {ROOT}; {command.typed}") for command in commands]
    compare(commands, said)


def find_block(title: str) -> Block:
    """The one block of the document that begins so."""
    found = [b for b in blocks(ROOT / "docs/operations.md") if HERE in b.words]
    [block] = [b for b in found if b.lines[0].startswith(f"# {title}")]
    return block


# ------------------------------------------------------------------------------ stage 1


def set_out(guest: Guest) -> None:
    """Two guests count, each in its own memory; a device writes; all of it is left at work."""
    guest.run("modprobe", "-a", "dax_hmem", "device_dax")
    type_block(guest, "useradd")
    type_block(guest, "mkfs.pkernfs")
    type_block(guest, "truncate -s 2M")
    give_scratch()
    edu = Edu(EDU, SCRATCH_FILE)
    type_block(guest, "scripts/live-update start")
    for tenant in TENANTS:
        tenant.wait_for(30)
        runs_as_its_user(tenant)
        memory_is_one(guest, tenant)
    keeps_the_other_out(A, B)
    keeps_the_other_out(B, A)
    guest_sees_the_device(edu, 0x1234)
    with A.memory() as memory:
        Stream(edu, memory, STREAM, Iova(STREAM)).start()
        leave(guest)


def give_scratch() -> None:
    """What the test's driver of the device needs beside the guest's memory."""
    regions.make_file(SCRATCH_FILE, 4096)
    iommu("map", str(regions.domain(1)), hex(SCRATCH), str(SCRATCH_FILE))


def runs_as_its_user(tenant: Tenant) -> None:
    """QEMU is its user's, and has the memory by its plain path, all of it and nothing else."""
    process = Path(f"/proc/{tenant.qemu()}")
    numbers = next(s for s in (process / "status").read_text().splitlines() if s.startswith("Uid"))
    assert numbers.split()[1:] == [str(tenant.uid)] * 4
    options = memory_options(tenant)
    assert (options["mem-path"], options.get("offset")) == (str(tenant.ram), None)


def memory_options(tenant: Tenant) -> dict[str, str]:
    """What QEMU was told of the guest's memory."""
    words = Path(f"/proc/{tenant.qemu()}/cmdline").read_text().split("\0")
    [memory] = [word for word in words if word.startswith("memory-backend-file")]
    return dict(option.partition("=")[::2] for option in memory.split(","))


def memory_is_one(guest: Guest, tenant: Tenant) -> None:
    """What the guest stores is in physical memory at once, and in no page cache."""
    with tenant.raw() as raw, tenant.memory() as memory:
        counts = [one.word(counter.COUNT_ADDRESS) for one in (raw, memory, raw, memory)]
        assert counts == sorted(counts)
        assert counts[0] > 0
        until(
            "the raw memory changes",
            lambda: raw.word(counter.COUNT_ADDRESS) > counts[-1],
            SECONDS,
            every=0.05,
        )
    fd = os.open(tenant.ram, os.O_RDONLY)
    try:
        pages = cached_pages(fd)
    finally:
        os.close(fd)
    guest.figure(f"page cache of {tenant.ram}", pages, "pages")
    assert pages == 0


def keeps_the_other_out(tenant: Tenant, other: Tenant) -> None:
    """Nobody opens another's memory: not by its plain path, not by its device, not by its QEMU."""
    assert other.native.stat().st_uid == other.uid
    os.chmod(other.directory, 0o711)  # so that the file itself has to keep others out
    process, monitors = f"/proc/{other.qemu()}", run_directory(other.uid)
    both = [
        (file, flags) for file in (other.ram, other.native) for flags in (os.O_RDWR, os.O_RDONLY)
    ]
    tries: list[Callable[[], object]] = [
        *(partial(os.open, file, flags) for file, flags in both),
        partial(os.open, f"{process}/mem", os.O_RDWR),
        partial(os.listdir, f"{process}/map_files"),
        partial(os.listdir, monitors),
    ]

    def fail() -> None:
        for number, attempt in enumerate(tries):
            try:
                attempt()
            except PermissionError:
                continue
            raise AssertionError(f"try {number} succeeds")
        os.close(os.open(tenant.ram, os.O_RDWR))

    run_as(tenant.uid, fail)
    os.chmod(other.directory, 0o700)


def guest_sees_the_device(edu: Edu, word: int) -> None:
    """The guest's processor reads what the device has written; the other guest has none of it."""
    edu.store(Iova(counter.MAILBOX_ADDRESS), word)
    with A.raw() as raw:
        until(
            "the guest has seen it",
            lambda: raw.word(counter.SEEN_ADDRESS) == word,
            SECONDS,
            every=0.05,
        )
    with B.raw() as raw:
        assert raw.word(counter.MAILBOX_ADDRESS) == raw.word(counter.SEEN_ADDRESS) == 0


def leave(guest: Guest) -> None:
    """Save both guests; the next kernel, by a panic, which stops no device."""
    type_block(guest, "scripts/live-update save")
    for tenant in TENANTS:
        guest.note(tenant.name, len(tenant.numbers()))
        with tenant.raw() as raw:
            guest.note(f"count of {tenant.name}", raw.word(counter.COUNT_ADDRESS))
    [typed] = [command.typed for command in find_block("pkernfs kexec").commands()]
    words = kexec_words(guest, guest.parameters["kernels"][guest.stage])
    assert typed == f"pkernfs {words[0]}"  # and what says where this machine has its kernels
    guest.leaving("pkernfs kexec")
    status, said = ask(*words)
    raise AssertionError(f"pkernfs kexec: came back with {status}: {said}")


# ------------------------------------------------------------------------------ stage 2


def go_on(guest: Guest) -> None:
    """Both go on at their very numbers; the device has gone on, and does, with no set-up at all."""
    assert ADOPTED in guest.run("dmesg")
    assert is_master(EDU)
    guest.run("modprobe", "-a", "dax_hmem", "device_dax")
    type_block(guest, "useradd")
    type_block(guest, "mount")
    info = json.loads(pkernfs("info", "--json", str(MOUNT)))
    assert info["history"][0]["result"] == "metadata unchanged"
    edu = Edu(EDU, SCRATCH_FILE, set_up=False)
    for tenant in TENANTS:
        with tenant.raw() as raw:
            assert raw.word(counter.COUNT_ADDRESS) == guest.notes[f"count of {tenant.name}"]
    transfers_landed(guest, edu)
    type_block(guest, "scripts/live-update restore")
    for tenant in TENANTS:
        tenant.wait_for(guest.notes[tenant.name] + 30)
        runs_as_its_user(tenant)
        memory_is_one(guest, tenant)
    keeps_the_other_out(B, A)
    guest_sees_the_device(edu, 0x5678)
    for tenant in TENANTS:
        end(tenant)
        found = tenant.numbers()
        assert found == list(range(1, len(found) + 1))
        before = guest.notes[tenant.name]
        guest.log(f"{tenant.name}: {before} numbers before, {len(found)} in the end, none missing")
    guest.run("umount", "-R", str(MOUNT))
    guest.run("fsck.pkernfs", "-n", "none")


def end(tenant: Tenant) -> None:
    """End a guest, wherever it is: what it has counted is in its file."""
    process = os.pidfd_open(tenant.qemu())
    try:
        signal.pidfd_send_signal(process, signal.SIGKILL)
        assert select.select([process], [], [], 30)[0]
    finally:
        os.close(process)


def transfers_landed(guest: Guest, edu: Edu) -> None:
    """Each transfer that was asked for, also the one that was under way when the kernel ended."""
    edu.wait()
    asked = asked_for(edu, Iova(STREAM))
    with A.raw() as raw:
        assert landed(raw, STREAM) == expected(asked)
    guest.log(f"all {asked} transfers have landed")


@pytest.mark.parametrize("kernels", [["6.12", "7"], ["7", "6.12"]], ids="-".join)
def test_tenants(lab: Lab, kernels: list[str]) -> None:
    """Guests of two owners, by plain path on dax segments, go on in the next kernel, with DMA."""
    machine = lab.machine(
        kernel=kernels[0],
        kernels=kernels[1:],
        cmdline=[
            *regions.PARAMETERS["dax"], "intel_iommu=off", "iomem=relaxed", "crashkernel=256M",
        ],
        devices=[
            "-device", "intel-iommu,aw-bits=48,intremap=off",
            "-device", f"edu,addr={EDU[8:]},dma_mask=0xffffffffffffffff",
        ],
        memory=regions.MEMORY_MIB,
    )  # fmt: skip
    result = lab.run(set_out, go_on, machine=machine, parameters={"kernels": kernels}, seconds=400)
    assert [v for name, (v, _) in result.figures.items() if name.startswith("page cache")] == [0, 0]
