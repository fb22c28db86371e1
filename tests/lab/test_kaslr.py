"""KASLR and a region: the three classes of pkernfs.host.memmap, by real kexecs.

One machine goes through all of them, because a kernel takes long to start. Each kexec is done by
``pkernfs kexec`` with another command line.
"""

from __future__ import annotations

import hashlib
import os
from typing import NamedTuple

import pytest

from kexeclab.guest import Guest, running_kernel
from kexeclab.runner import Lab
from pkernfs.host.iomem import Resource, Span, overlap, read_iomem
from pkernfs.host.sysroot import HOST
from pkernfs.quantities import PhysAddr
from support.lab import regions
from support.lab.commands import pkernfs
from support.lab.regions import MOUNT

pytestmark = pytest.mark.lab

MEMORY_MIB = 2048
SPAN = Span(PhysAddr(512 << 20), 1 << 30)
REGION = "memmap=1G$512M"
#: As many ranges as the decompressor avoids, above the region, where nothing needs them.
FOUR = "1M$1600M,1M$1610M,1M$1620M,1M$1630M"
LIMIT = "memmap=1G%512M"


class Class(NamedTuple):
    """A class of command lines: what is given, and what ``pkernfs kexec`` then adds.

    It also adds the words of the kernel before, behind what is given.
    """

    name: str
    append: list[str]
    nokaslr: bool


#: By which each kernel but the first is started; the first has REGION alone.
CLASSES = (
    Class("avoided", [REGION], nokaslr=False),
    Class("not avoided, by number", [f"memmap={FOUR}", REGION], nokaslr=True),
    Class("not avoided, by limit", [LIMIT], nokaslr=True),
    Class("off", [f"{REGION},{FOUR}"], nokaslr=False),
)
_RAM = MOUNT / "guest-ram"
_OURS = ("memmap=", "nokaslr")


def kernel_code() -> Resource:
    """Where the running kernel is."""
    return next(r for r in read_iomem("test", HOST) if r.name == "Kernel code")


def arrive(guest: Guest) -> None:
    """The kernel is beside the region; the file is made first, and is the same in each kernel."""
    code = kernel_code()
    guest.log(f"the kernel is at {code.start:#x}: {' '.join(guest.command_line())}")
    assert not overlap(SPAN, code), f"the kernel is in the region, at {code.start:#x}"
    if guest.stage == 1:
        regions.mkfs(guest)
        data = os.urandom(1 << 20) * 16
        _RAM.write_bytes(data)
        guest.note("digest", hashlib.sha256(data).hexdigest())
        return
    assert ("nokaslr" in guest.command_line()) == CLASSES[guest.stage - 2].nokaslr
    regions.mount(guest)
    assert hashlib.sha256(_RAM.read_bytes()).hexdigest() == guest.notes["digest"]


def go_on(guest: Guest) -> None:
    """Arrive, and leave by ``pkernfs kexec`` with the command line of the next class."""
    arrive(guest)
    if guest.stage > len(CLASSES):
        regions.unmount_and_check(guest)
        return
    following = CLASSES[guest.stage - 1]
    place = running_kernel()
    others = [word for word in guest.command_line() if not word.startswith(_OURS)]
    words = [
        "kexec", "--kernel", str(place / "vmlinuz"), "--initrd", str(place / "initrd"),
        "--append", " ".join([*following.append, *others]),
    ]  # fmt: skip
    said = pkernfs(*words, "--dry-run")
    is_told = "added to the command line: nokaslr" in said
    assert is_told == following.nokaslr, (following.name, said)
    guest.leaving(f"pkernfs kexec, {following.name}")
    raise AssertionError(f"pkernfs kexec: came back: {pkernfs(*words)}")


def test_the_next_kernel_stays_out_of_the_region(lab: Lab) -> None:
    """By itself where KASLR avoids it or is off, and with nokaslr where it does not avoid it."""
    # The first kernel is not placed by pkernfs.
    machine = lab.machine(memory=MEMORY_MIB, cmdline=[REGION, "pkernfs=1G!512M", "nokaslr"])
    lab.run(*[go_on] * (len(CLASSES) + 1), machine=machine, seconds=400)


#: Three quarters of the places where a kernel may be put.
LARGE = Span(PhysAddr(384 << 20), 1536 << 20)
_THROWS = 5


def throw(guest: Guest) -> None:
    """Note if the kernel is in the region, and start the next one by hand, without nokaslr."""
    code = kernel_code()
    guest.log(f"the kernel is at {code.start:#x}")
    inside = guest.notes.get("inside", 0) + overlap(LARGE, code)
    guest.note("inside", inside)
    if guest.stage <= _THROWS:
        guest.kexec(remove=["nokaslr"])
    guest.log(f"in the region {inside} times of {_THROWS}")
    assert inside, "no kernel was put into the region: the test above shows nothing"


def test_without_nokaslr_a_kernel_is_put_into_the_region(lab: Lab) -> None:
    """What pkernfs prevents does happen without it (a false alarm is one in a thousand)."""
    line = [f"memmap={FOUR}", "memmap=1536M$384M", "nokaslr"]
    machine = lab.machine(kernel="6.1", memory=MEMORY_MIB, cmdline=line)
    lab.run(*[throw] * (_THROWS + 1), machine=machine)
