"""KASLR and a region: the three classes of pkernfs.host.memmap, by real kexecs.

The region is half of the machine's memory, so a kernel that places itself at random and does not
avoid the region is in it about every second time.
"""

from __future__ import annotations

import hashlib
import os

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
#: Kernel parameters by what KASLR does then, and if pkernfs must add nokaslr.
CLASSES = {
    "avoided": ([REGION], False),
    "not avoided, by number": ([f"memmap={FOUR}", REGION], True),
    "not avoided, by limit": (["memmap=1G%512M"], True),
    "off": ([f"{REGION},{FOUR}"], False),
}
_KEXECS = 4
_RAM = MOUNT / "guest-ram"


def kernel_code() -> Resource:
    """Where the running kernel is."""
    return next(r for r in read_iomem("test", HOST) if r.name == "Kernel code")


def arrive(guest: Guest) -> None:
    """The kernel is beside the region; the file is made first, and is the same in each kernel."""
    code = kernel_code()
    guest.log(f"the kernel is at {code.start:#x}")
    assert not overlap(SPAN, code), f"the kernel is in the region, at {code.start:#x}"
    if guest.stage == 1:
        regions.mkfs(guest)
        data = os.urandom(1 << 20) * 64
        _RAM.write_bytes(data)
        guest.note("digest", hashlib.sha256(data).hexdigest())
        return
    is_told = "nokaslr" in guest.command_line()
    assert is_told == guest.parameters["added"]
    guest.note("places", [*guest.notes.get("places", []), code.start])
    regions.mount(guest)
    assert hashlib.sha256(_RAM.read_bytes()).hexdigest() == guest.notes["digest"]


def go_on(guest: Guest) -> None:
    """Arrive, and leave by ``pkernfs kexec`` with a command line that knows no nokaslr."""
    arrive(guest)
    if guest.stage > _KEXECS:
        regions.unmount_and_check(guest)
        places = set(guest.notes["places"])
        assert (len(places) > 1) == guest.parameters["random"], places
        return
    place = running_kernel()
    words = [
        "kexec", "--kernel", str(place / "vmlinuz"), "--initrd", str(place / "initrd"),
        "--append", " ".join(guest.command_line(remove=["nokaslr"])),
    ]  # fmt: skip
    said = pkernfs(*words, "--dry-run")
    assert ("added to the command line: nokaslr" in said) == guest.parameters["added"], said
    guest.leaving("pkernfs kexec")
    raise AssertionError(f"pkernfs kexec: came back: {pkernfs(*words)}")


@pytest.mark.parametrize("kernel", ["6.1", "7"])
@pytest.mark.parametrize("name", CLASSES)
def test_the_next_kernel_stays_out_of_the_region(lab: Lab, name: str, kernel: str) -> None:
    """By itself where KASLR avoids it or is off, and with nokaslr where it does not avoid it."""
    words, added = CLASSES[name]
    # The first kernel is not placed by pkernfs.
    line = [*words, "pkernfs=1G!512M", "nokaslr"]
    machine = lab.machine(kernel=kernel, memory=MEMORY_MIB, cmdline=line)
    what = {"added": added, "random": name == "avoided"}
    lab.run(*[go_on] * (_KEXECS + 1), machine=machine, parameters=what, seconds=400)


_THROWS = 10


def throw(guest: Guest) -> None:
    """Note if the kernel is in the region, and start the next one by hand, without nokaslr."""
    inside = guest.notes.get("inside", 0) + overlap(SPAN, kernel_code())
    guest.note("inside", inside)
    if guest.stage <= _THROWS:
        guest.kexec(remove=["nokaslr"])
    guest.log(f"in the region {inside} times of {_THROWS}")
    assert inside, "no kernel was put into the region: the test above shows nothing"


@pytest.mark.parametrize("name", [name for name, (_, added) in CLASSES.items() if added])
def test_without_nokaslr_a_kernel_is_put_into_the_region(lab: Lab, name: str) -> None:
    """What pkernfs prevents does happen without it (a false alarm is one in a thousand)."""
    machine = lab.machine(memory=MEMORY_MIB, cmdline=[*CLASSES[name][0], "nokaslr"])
    lab.run(*[throw] * (_THROWS + 1), machine=machine)
