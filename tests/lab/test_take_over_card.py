"""A network card that receives all the time: through the jump, and its take-over by VFIO."""

from __future__ import annotations

from pathlib import Path

import pytest

from kexeclab.guest import Guest
from kexeclab.runner import Lab
from pkernfs.vmm.export import read_export
from pkernfs.vmm.plan import plan
from pkernfs.vmm.takeover import TakeOver, release
from support.lab import regions
from support.lab.commands import ask, pkernfs
from support.lab.dma import (
    AT,
    CARD,
    DOMAINS,
    FAULT,
    RATE,
    RING,
    WIRE,
    kexec_words,
    machine,
    pci_commands,
    put_to_work,
    tell_packets,
)
from support.lab.regions import MOUNT
from support.waiting import until

pytestmark = pytest.mark.lab


def start(guest: Guest) -> None:
    """The card receives; then the jump."""
    regions.mkfs(guest)
    put_to_work(guest)
    words = kexec_words(guest, guest.parameters["kernel"])
    guest.feed(WIRE, RATE, limit=RING.room)
    until("packets arrive", lambda: RING.received() > 10)
    guest.leaving("pkernfs kexec")
    status, said = ask(*words)
    raise AssertionError(f"pkernfs kexec: came back with {status}: {said}")


def take_over(guest: Guest) -> None:
    """Taken over while packets come in; no one is missing, and no request has failed."""
    regions.mount(guest)
    if "intremap=off" in guest.parameters["unit"]:
        guest.run("modprobe", "vfio_iommu_type1", "allow_unsafe_interrupts=1")
    resets = Path(f"/sys/bus/pci/devices/{CARD}/reset_method").read_text().split()
    assert resets, "it could not be reset anyway"
    export = read_export(str(MOUNT))
    [wanted] = plan(export, [CARD])
    with TakeOver(export) as taking:
        before = RING.received()
        taken = taking.take(wanted)
        guest.figure("hold of 64 MiB", taken.hold_ms[CARD], "ms")
        assert RING.received() >= before > 0
        release(str(MOUNT), CARD)
        domain = str(regions.domain(DOMAINS[CARD]))
        pkernfs("iommu", "unmap", domain, hex(AT[CARD]), "64M")
        after = RING.received()
        until("more packets", lambda: RING.received() > after + RATE)
        sent = guest.fed(WIRE, stop=True)
        assert sent < RING.room, "there was not room for all"
        until("the last packets are there", lambda: RING.received() >= sent)
        assert [packet.number for packet in RING.packets()] == list(range(sent))
        guest.log(f"all {sent} packets are there, in order; resets that were not made: {resets}")
        assert not FAULT.findall(guest.run("dmesg"))
    assert not pci_commands()[CARD] & 4
    regions.unmount_and_check(guest)


@pytest.mark.parametrize(
    ("kernel", "mode", "unit"),
    [
        ("6.12", "legacy", "intremap=off"),
        ("7", "scalable", "intremap=on,x-scalable-mode=on"),
    ],
)
def test_card(lab: Lab, kernel: str, mode: str, unit: str) -> None:
    """A network card at work is taken over by VFIO after the jump, and no packet is lost."""
    made = machine(lab, [kernel, kernel], "crashkernel=256M", unit=unit)
    told = {"kernel": kernel, "mode": mode, "unit": unit}
    result = lab.run(start, take_over, machine=made, parameters=told, seconds=300)
    tell_packets(result)
