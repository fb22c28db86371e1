"""scripts/take-over: devices that went on through the jump, taken over by VFIO in the next kernel.

The first kernel leaves the IOMMU alone, and the unit walks the region's tables. `pkernfs kexec`
starts the next one by a panic, which stops no device, and that one adopts the tables.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from kexeclab.guest import Guest, running_kernel
from kexeclab.runner import Lab
from pkernfs.errors import TakeOverError
from pkernfs.vmm import hold, sysfs, vfio
from pkernfs.vmm.export import read_export
from pkernfs.vmm.plan import plan
from pkernfs.vmm.takeover import TakeOver, release
from support import uapi
from support.lab import regions
from support.lab.commands import PROJECT, PYTHON, iommu, pkernfs
from support.lab.dma import ADOPTED
from support.lab.edu import BUFFER, FROM_MEMORY, TO_MEMORY, Transfers
from support.lab.faults import no_faults
from support.lab.pci import enable, is_master, map_bar
from support.lab.regions import MOUNT
from support.lab.words import read_word, write_word
from support.waiting import until

pytestmark = pytest.mark.lab

PAGE, MIB = 4096, 1 << 20
#: One for each way to take it over, and one with nothing to do.
QUIET, BUSY, ARMED, SPARE = (f"0000:00:{slot}.0" for slot in ("10", "11", "12", "13"))
#: Behind a port whose whole bus can be reset, which would set this register of it to 0.
CARD, REGISTER, VALUE = "0000:01:00.0", 0x2800, 0x1234_5670
EDUS = (QUIET, BUSY, ARMED)
DOMAINS = {QUIET: 0, BUSY: 1, ARMED: 2, CARD: 3}
AT = {bdf: (1 + 4 * number) << 30 for bdf, number in DOMAINS.items()}  # of guest-ram
RAM, FLAT = MOUNT / "guest-ram", MOUNT / "flat-ram"  # on device-dax, guest-ram is a segment
FILES = {QUIET: RAM, BUSY: RAM, ARMED: FLAT, CARD: FLAT}
BYTES = {QUIET: 256 * MIB, BUSY: 256 * MIB, ARMED: 2 * MIB, CARD: 2 * MIB}  # how much of it
WORD = {QUIET: 100 * MIB, BUSY: 200 * MIB, ARMED: MIB}  # of the file, for each device
TAKE_OVER = str(PROJECT / "scripts/take-over")
UNSAFE = Path("/sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts")
#: What a VMM does with what --exec leaves it: the device is at work, and more can be mapped.
VMM = """
import json, mmap, os, sys
from pkernfs.host.pci_config import COMMAND, COMMAND_MASTER
from pkernfs.vmm import vfio
told = json.loads(os.environ["TAKEN_OVER"])["dom-1"]
device = vfio.Device(sys.argv[1], told["devices"][sys.argv[1]])
assert device.read_config(COMMAND) & COMMAND_MASTER
registers = device.map_bar(0)
assert registers[0:4] == bytes.fromhex("ed000001"), registers[0:4]
assert set(told["fds"]) >= {"container"}
print("a VMM at work", flush=True)
sys.stdin.read()
"""


class Edu(Transfers):
    """An edu device, while the machine does much besides."""

    SECONDS = 60.0

    @classmethod
    def at(cls, bdf: str) -> Edu:
        """Through sysfs."""
        return cls(map_bar(bdf))


def register(bar: mmap.mmap) -> ctypes.c_uint32:
    """The register of the card that a reset clears."""
    return ctypes.c_uint32.from_buffer(bar, REGISTER)


def domain(bdf: str) -> str:
    """The file of the device's domain."""
    return str(regions.domain(DOMAINS[bdf]))


def works(edu: Edu, bdf: str) -> None:
    """The device copies a word of its file to the one behind it."""
    value = time.monotonic_ns()
    write_word(FILES[bdf], WORD[bdf], value)
    edu.copy(AT[bdf] + WORD[bdf], AT[bdf] + WORD[bdf] + 8)
    assert read_word(FILES[bdf], WORD[bdf] + 8) == value


# ---------------------------------------------------------------------------- the first kernel


def make_domains(guest: Guest) -> None:
    """The files, and a domain for each device that maps one at an address of its own."""
    pooled = guest.parameters.get("kind") == "dax"
    regions.mkfs(guest, *(("-s", "64M") if pooled else ()))
    regions.make_file(RAM, BYTES[QUIET])
    FLAT.touch()
    if pooled:
        pkernfs("segment", str(FLAT), "off")
        assert guest.run("pkernfs", "path", str(RAM)) == "/dev/dax0.1\n"
    regions.make_file(FLAT, BYTES[ARMED])
    for bdf, number in DOMAINS.items():
        regions.make_domain(number)
        iommu("map", domain(bdf), hex(AT[bdf]), str(FILES[bdf]), "--length", str(BYTES[bdf]))
        iommu("attach", domain(bdf), bdf)


def start(guest: Guest) -> None:
    """Tables in force, devices at work; then the switch."""
    make_domains(guest)
    said = guest.run(TAKE_OVER, str(MOUNT), status=1)
    assert said == f"take-over: {QUIET}: in no IOMMU group: boot with intel_iommu=on\n", said
    iommu("activate", str(MOUNT), "--cut-off")
    for bdf in DOMAINS:
        enable(bdf)
    for bdf in EDUS:
        works(Edu.at(bdf), bdf)
    register(map_bar(CARD, 4 * PAGE)).value = VALUE
    place = running_kernel()
    line = guest.command_line(remove=["intel_iommu"])
    guest.leaving("pkernfs kexec")
    pkernfs(
        "kexec", "--kernel", str(place / "vmlinuz"), "--initrd", str(place / "initrd"),
        "--append", " ".join(line),
    )  # fmt: skip
    raise AssertionError("pkernfs kexec: came back")


# ---------------------------------------------------------------------------- the next one


def take_over(guest: Guest) -> None:
    """Devices at work, taken over, at work through the kernel's new tables."""
    assert ADOPTED in guest.run("dmesg")
    regions.mount(guest)
    assert all(map(is_master, DOMAINS))
    for bdf in EDUS:
        works(Edu.at(bdf), bdf)
    left_alone()
    pinned(guest)
    reasons(guest)
    planned(guest)
    no_faults(guest)
    by_hand(guest)
    by_import(guest)
    not_reset(guest)
    by_exec(guest)
    iommu("check", str(MOUNT))
    regions.unmount_and_check(guest)


def reasons(guest: Guest) -> None:
    """What is refused, with no device changed."""
    export = read_export(str(MOUNT))
    assert [d.adopted_by for d in export.devices] == ["dmar0"] * 4
    # Not as pkernfs kexec has it told, on the kernel command line.
    guest.run("modprobe", "vfio_pci", "disable_idle_d3=0")
    with pytest.raises(TakeOverError, match="it would put devices to sleep: modprobe"):
        plan(export)
    guest.run("modprobe", "-r", "vfio_pci")
    with pytest.raises(TakeOverError, match=f"not remapped.*echo 1 >{UNSAFE}"):
        plan(export)
    UNSAFE.write_text("1")
    assert not any(map(sysfs.driver_of, DOMAINS))


def left_alone() -> None:
    """What this kernel's unit walks cannot be changed: nobody could tell the unit."""
    for words, what in (
        (("unmap", domain(BUSY), hex(AT[BUSY]), "4K"), "dom-1"),
        (("map", domain(BUSY), hex(AT[BUSY] * 2), str(RAM)), "dom-1"),
        (("detach", BUSY), f"device {BUSY}"),
    ):
        said = iommu(*words, status=1)
        assert f"{what}: dmar0 walks it for device {BUSY}" in said, said
        assert "take the device over first" in said, said


def pinned(guest: Guest) -> None:
    """What a domain maps stays, and it is told for which devices."""
    for file in (RAM, FLAT):
        assert "busy" in guest.run("truncate", "-s", "1M", str(file), status=1)
        assert "busy" in guest.run("rm", str(file), status=1)
        said = pkernfs("holders", str(file))
        for bdf in (bdf for bdf in DOMAINS if FILES[bdf] == file):
            assert f"{bdf} reaches it by dom-{DOMAINS[bdf]}" in said, said
    if guest.parameters["kind"] == "dax":
        assert "mapped for DMA" in pkernfs("segment", str(RAM), "off", status=1)


def planned(guest: Guest) -> None:
    """--dry-run says what would be done, and does nothing."""
    said = guest.run(TAKE_OVER, str(MOUNT), "--dry-run")
    for bdf, number in DOMAINS.items():
        assert f"dom-{number}: {BYTES[bdf]} bytes in 1 piece, at the same addresses" in said
        assert f"dom-{number}: {bdf} (group {sysfs.group_of(bdf)}): held" in said
        assert sysfs.driver_of(bdf) is None
    for bdf in EDUS:
        works(Edu.at(bdf), bdf)


def by_hand(guest: Guest) -> None:
    """The script in the foreground; then SIGTERM."""
    with taking("--device", QUIET) as running:
        said = read_until(running, "detached")
        guest.figure("hold of 256 MiB", held(said, QUIET), "ms")
        no_faults(guest)
        if guest.parameters["kind"] == "dax":
            assert f"process {running.pid} (" in pkernfs("holders", str(RAM))
        assert sysfs.driver_of(QUIET) == sysfs.DRIVER
        let_go(QUIET)
        works(Edu.at(QUIET), QUIET)
        no_faults(guest)
        running.send_signal(signal.SIGTERM)
        assert running.wait(60) == 0
    assert not is_master(QUIET)


def by_import(guest: Guest) -> None:
    """The classes, as a VMM would use them; a transfer is begun right before the hold."""
    export = read_export(str(MOUNT))
    [wanted] = plan(export, [ARMED])
    word, late = (AT[ARMED] + WORD[ARMED] + offset for offset in (32, 40))
    write_word(FLAT, WORD[ARMED] + 32, 0xABCD)
    edu = Edu.at(ARMED)
    edu.start(word, BUFFER, FROM_MEMORY)
    edu.wait()

    def hold_at_work(bdf: str, real: Callable[[str], None] = hold.hold) -> None:
        edu.start(BUFFER, late, TO_MEMORY)
        real(bdf)

    with mock.patch.object(hold, "hold", hold_at_work), TakeOver(export) as taking:
        taken = taking.take(wanted)
        edu = Edu(taken.devices[ARMED].map_bar(0))
        edu.wait()
        guest.figure("hold of 2 MiB", taken.hold_ms[ARMED], "ms")
        landed = read_word(FLAT, WORD[ARMED] + 40) == 0xABCD
        # QEMU drops what is due in the hold, 100 ms after it was begun; PCI Express has it kept.
        assert landed or taken.hold_ms[ARMED] > 100
        guest.log(
            f"the transfer that was under way: {'landed' if landed else 'fell into the hold'}"
        )
        release(str(MOUNT), ARMED)
        let_go(ARMED)
        works(edu, ARMED)
        no_faults(guest)
    assert not is_master(ARMED)


def not_reset(guest: Guest) -> None:
    """A device that is reset when it is opened as ever is not by its take-over."""
    reset = sysfs.device_path(CARD) / "reset_method"
    reset.write_text("bus\n")  # another one may leave registers as they are
    assert register(map_bar(CARD, 4 * PAGE)).value == VALUE
    export = read_export(str(MOUNT))
    with TakeOver(export) as taking:
        [wanted] = plan(export, [CARD])
        taken = taking.take(wanted)
        assert register(taken.devices[CARD].map_bar(0)).value == VALUE
        assert is_master(CARD)
        release(str(MOUNT), CARD)
    no_faults(guest)
    reset.write_text("bus\n")
    guest.run("setpci", "-s", CARD, "COMMAND=2:2")
    register(map_bar(CARD, 4 * PAGE)).value = VALUE
    assert register(map_bar(CARD, 4 * PAGE)).value == VALUE
    space = vfio.Container()
    device = space.open(CARD)
    assert register(device.map_bar(0)).value == 0
    device.close()
    space.close()


def let_go(bdf: str) -> None:
    """The region's tables map nothing for it any more; what it reaches is by the kernel's."""
    iommu("unmap", domain(bdf), hex(AT[bdf]), str(BYTES[bdf]))
    iommu("translate", str(MOUNT), bdf, hex(AT[bdf]), status=1)


def by_exec(guest: Guest) -> None:
    """The script with a spare device and --exec, for a device that never stops working."""
    words = ("--device", BUSY, "--spare", SPARE, "--exec", PYTHON, "-c", VMM, BUSY)
    with hammered(BUSY) as copies, taking(*words, stdin=subprocess.PIPE) as running:
        said = read_until(running, "a VMM at work")
        guest.figure("hold of 256 MiB with a spare device", held(said, BUSY), "ms")
        let_go(BUSY)
        after = len(copies)
        until("more copies", lambda: len(copies) > after + 5, every=0.005)
        assert all(copies[after:])
        no_faults(guest)
        guest.log(f"{len(copies)} copies, {copies.count(False)} of them fell into the hold")
        # QEMU drops what is due in the hold: no more than a transfer, which takes longer.
        assert copies.count(False) <= 1
        assert running.stdin is not None
        running.stdin.close()
        assert running.wait(60) == 0
    assert not is_master(BUSY)
    no_faults(guest)


@contextlib.contextmanager
def hammered(bdf: str) -> Iterator[list[bool]]:
    """The device copies word after word all the time; whether each was copied."""
    stop = threading.Event()
    copies: list[bool] = []

    def work() -> None:
        edu = Edu.at(bdf)
        while not stop.is_set():
            value = time.monotonic_ns()
            write_word(RAM, WORD[bdf] + 64, value)
            edu.copy(AT[bdf] + WORD[bdf] + 64, AT[bdf] + WORD[bdf] + 72)
            copies.append(read_word(RAM, WORD[bdf] + 72) == value)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        until("the device is at work", lambda: len(copies) > 2, every=0.005)
        yield copies
    finally:
        stop.set()
        thread.join(60)


@contextlib.contextmanager
def taking(*words: str, stdin: int = subprocess.DEVNULL) -> Iterator[subprocess.Popen[str]]:
    """scripts/take-over, running."""
    command = [PYTHON, TAKE_OVER, str(MOUNT), *words]
    with subprocess.Popen(
        command, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as running:
        try:
            yield running
        finally:
            running.kill()


def read_until(running: subprocess.Popen[str], word: str) -> str:
    """What the program says, up to the line with a word."""
    said = ""
    assert running.stdout is not None
    for line in running.stdout:
        said += line
        if word in line:
            return said
    raise AssertionError(f"it has ended without {word!r}:\n{said}")


def held(said: str, bdf: str) -> float:
    """For how many milliseconds, as the program says."""
    found = re.search(rf"{bdf}: taken over; held for ([0-9.]+) ms", said)
    assert found is not None, said
    return float(found[1])


# ---------------------------------------------------------------------------- other kernels


def not_adopted(guest: Guest) -> None:
    """A kernel that has tables of its own: each device is refused with its reason."""
    make_domains(guest)
    disk = next(p.name for p in Path("/sys/bus/pci/drivers/virtio-pci").iterdir() if ":" in p.name)
    guest.run("modprobe", "vfio_iommu_type1", "allow_unsafe_interrupts=1")
    said = guest.run(TAKE_OVER, str(MOUNT), status=1)
    reason = "no unit of this kernel is seen to walk the region's tables for it"
    assert said.startswith(f"take-over: {QUIET}: {reason}"), said
    iommu("attach", domain(QUIET), disk)
    said = guest.run(TAKE_OVER, str(MOUNT), "--device", disk, status=1)
    assert said.startswith(f"take-over: {disk}: virtio-pci has it"), said
    headers_agree()


def headers_agree() -> None:
    """The structures of pkernfs.vmm.uapi are those of this system's headers, iommufd's included."""
    ours = uapi.ours()
    assert not any(map(uapi.missing, ours))
    scratch = Path("/run/uapi")
    scratch.mkdir()
    assert uapi.theirs(list(ours), scratch) == ours


# ---------------------------------------------------------------------------- on the host


def machine(lab: Lab, cmdline: list[str], kernel: str, kind: str = "devmem") -> Any:
    """A machine with the devices."""
    devices = ["-device", "intel-iommu,aw-bits=48,intremap=off"]
    devices += ["-device", "pcie-root-port,id=below,chassis=1,addr=14.0"]
    devices += ["-device", "e1000e,bus=below"]
    for bdf in (*EDUS, SPARE):
        devices += ["-device", f"edu,addr={bdf[8:]},dma_mask=0xffffffffffffffff"]
    return lab.machine(
        kernel=kernel,
        cmdline=[*regions.PARAMETERS[kind], "iomem=relaxed", *cmdline],
        devices=devices,
        memory=regions.MEMORY_MIB,
    )


@pytest.mark.parametrize(("kernel", "kind"), [("6.12", "devmem"), ("7", "dax")])
def test_taken_over(lab: Lab, kernel: str, kind: str) -> None:
    """Devices that went on through the jump are taken over by VFIO at work, with no fault."""
    made = machine(lab, ["intel_iommu=off", "crashkernel=256M"], kernel, kind)
    lab.run(start, take_over, machine=made, parameters={"kind": kind}, seconds=420)


def test_refused(lab: Lab) -> None:
    """take-over: a kernel that has not adopted the tables, a device that has a driver."""
    lab.run(not_adopted, machine=machine(lab, ["intel_iommu=on"], "6.12"))
