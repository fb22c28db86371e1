"""DMA that goes on from one kernel into the next, and the next: edu devices and a network card.

The tables and all memory that the devices use are in the region. `pkernfs kexec` starts the next
kernel by a panic, which stops no device, and that kernel adopts the tables.
"""

from __future__ import annotations

import pytest

from kexeclab.guest import Guest
from kexeclab.runner import Lab, Result
from pkernfs.quantities import Iova
from support.lab import regions
from support.lab.commands import ask, pkernfs
from support.lab.dma import (
    ADOPTED,
    AT,
    CARD,
    EDU,
    FAULT,
    OTHER,
    RAM,
    RATE,
    RING,
    SCRATCHES,
    WIRE,
    WORDS,
    all_packets,
    faults,
    kexec_words,
    machine,
    pci_commands,
    put_to_work,
    reads_and_writes,
    shown,
    tell_packets,
)
from support.lab.edu import BUFFER, FROM_MEMORY, Edu
from support.lab.kernel_tables import entries
from support.lab.regions import MOUNT
from support.lab.streams import BYTES, Stream, asked_for, expected, landed
from support.waiting import until

pytestmark = pytest.mark.lab

STREAMS = {EDU: WORDS + BYTES, OTHER: WORDS + 2 * BYTES}


def start(guest: Guest) -> None:
    """Tables in force, devices at work; then the first switch."""
    regions.mkfs(guest)
    edu, other = put_to_work(guest)
    guest.note("shown", shown())
    assert faults() == []
    switch(guest, {EDU: edu, OTHER: other})


def switch(guest: Guest, edus: dict[str, Edu]) -> None:
    """Go to the next kernel while packets arrive, and while edu's transfers are under way."""
    words = kexec_words(guest, guest.parameters["kernels"][guest.stage], "earlyprintk=ttyS0")
    arrived = RING.received()
    guest.feed(WIRE, RATE, limit=RING.room)
    until("packets arrive", lambda: RING.received() > arrived + 10)
    for bdf, edu in edus.items():
        Stream(edu, RAM, STREAMS[bdf], Iova(AT[bdf] + STREAMS[bdf])).start()
    guest.note("commands", pci_commands())
    guest.leaving("pkernfs kexec")
    status, said = ask(*words)
    raise AssertionError(f"pkernfs kexec: came back with {status}: {said}")


def adopted(guest: Guest) -> None:
    """All of it went on, and goes on, with no set-up of any device."""
    sent = guest.fed(WIRE, stop=True)
    assert sent < RING.room, "there was not room for the whole switch"
    assert ADOPTED in guest.run("dmesg")
    commands = pci_commands()
    assert commands == guest.notes["commands"]
    assert all(command & 4 for command in commands.values())
    regions.mount(guest)
    assert ADOPTED in pkernfs("info", str(MOUNT))
    same_tables(guest)
    with guest.step("read all packets"):
        all_packets(guest, sent)
    edu, other = (Edu(bdf, SCRATCHES[bdf], set_up=False) for bdf in (EDU, OTHER))
    transfers_landed(guest, edu)
    reads_and_writes(edu, EDU, WORDS, 0x9ABC)
    cut_off(guest, other)
    assert pci_commands() == commands
    if guest.stage < len(guest.parameters["kernels"]):
        switch(guest, {EDU: edu})
    with guest.step("unmount and fsck"):
        regions.unmount_and_check(guest)


def same_tables(guest: Guest) -> None:
    """``show`` prints what it did at first, and the unit walks the same entries."""
    before, after = guest.notes["shown"], shown()
    assert set(after) == {EDU, CARD}
    for bdf, device in after.items():
        assert device == before[bdf]
        found = entries(bdf)
        assert found is not None, bdf
        assert found.context == device["context_entry"], (bdf, found)
        if found.pasid is not None:
            assert found.pasid == device["pasid_table_entry"], (bdf, found)
    assert not reaches_memory(OTHER)


def reaches_memory(bdf: str) -> bool:
    """Whether entries lead to page tables. In scalable mode the kernel has made a context entry."""
    found = entries(bdf)
    return found is not None and (found.pasid is None or bool(found.pasid[0] & 1))


def transfers_landed(guest: Guest, edu: Edu) -> None:
    """Each transfer that was asked for; the last one when the kernel ended that asked for it."""
    asked = asked_for(edu, Iova(AT[EDU] + STREAMS[EDU]))
    assert landed(RAM, STREAMS[EDU]) == expected(asked)
    guest.log(f"all {asked} transfers have landed")


def cut_off(guest: Guest, other: Edu) -> None:
    """The third device has reached nothing since the handover; the kernel names it, and only it."""
    if guest.stage == 2:
        asked = asked_for(other, Iova(AT[OTHER] + STREAMS[OTHER]))
        assert len(landed(RAM, STREAMS[OTHER])) < asked
    before = len(FAULT.findall(guest.run("dmesg")))
    other.transfer(AT[OTHER] + WORDS, BUFFER, FROM_MEMORY)
    until("the fault", lambda: len(FAULT.findall(guest.run("dmesg"))) > before)
    assert set(FAULT.findall(guest.run("dmesg"))) == {OTHER[5:]}


def only_the_third_faults(result: Result) -> None:
    """What the kernels and QEMU say of all the time; QEMU names a device only once."""
    assert set(FAULT.findall("\n".join(result.console))) == {OTHER[5:]}
    said = [line for line in result.console if "vtd_" in line and "dev=" in line]
    other = f"dev=00:{OTHER[8:10]}:00"
    assert all(other in line for line in said), said


@pytest.mark.parametrize(
    ("kernels", "mode", "unit"),
    [
        (["6.12", "7", "7"], "legacy", "intremap=off"),
        (["7", "6.12"], "scalable", "intremap=on,x-scalable-mode=on"),
    ],
)
def test_goes_on(lab: Lab, kernels: list[str], mode: str, unit: str) -> None:
    """DMA of edu and of a network card goes on from kernel to kernel, and no packet is lost."""
    made = machine(lab, kernels, "crashkernel=256M", unit=unit)
    stages = [start, *[adopted] * (len(kernels) - 1)]
    told = {"kernels": kernels, "mode": mode}
    result = lab.run(*stages, machine=made, parameters=told)
    tell_packets(result)
    only_the_third_faults(result)
