"""Regions in physical memory, on real kernels: /dev/mem, device-dax, `none`; what is refused."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from kexeclab.guest import Guest, running_kernel
from kexeclab.runner import Lab
from support.lab import regions
from support.lab.commands import pkernfs

pytestmark = pytest.mark.lab

M = 1 << 20
G = 1 << 30
MNT = str(regions.MOUNT)
RAM = Path(MNT, "guest-ram")
RAM_BYTES = 64 * M
PAT = Path("/sys/kernel/debug/x86/pat_memtype_list")
DAX = Path("/sys/bus/dax/devices")
#: The oldest and the newest; the rest runs on the one between.
KERNELS = ("6.1", "7")


# ---------------------------------------------------------------------- steps


def mount(guest: Guest, spec: str, *options: str) -> None:
    guest.run("mount", "-t", "fuse.pkernfs", spec, MNT, *options)


def info(guest: Guest, target: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(guest.run("pkernfs", "info", "--json", target))
    return found


def refused(guest: Guest, *command: str, says: str, status: int = 1) -> None:
    """The command fails with one line that has ``says`` in it."""
    answer = guest.run(*command, status=status)
    assert says in answer, f"{' '.join(command)}: {answer!r} has no {says!r}"
    assert answer.count("\n") == 1, answer


def fill(guest: Guest) -> None:
    """Write guest-ram through the mount, and note what is in it."""
    data = os.urandom(M) * (RAM_BYTES // M)
    RAM.write_bytes(data)
    guest.note("digest", hashlib.sha256(data).hexdigest())


def check_contents(guest: Guest) -> list[dict[str, int]]:
    """Compare what the mount reads with what was written; where it is."""
    assert hashlib.sha256(RAM.read_bytes()).hexdigest() == guest.notes["digest"]
    answer = json.loads(guest.run("pkernfs", "extents", "--json", str(RAM)))
    extents: list[dict[str, int]] = answer["extents"]
    assert sum(e["length"] for e in extents) == RAM_BYTES
    return extents


def digest_at(path: str, extents: list[dict[str, int]], key: str) -> str:
    """The digest of the extents in a device, whose offsets are the extents' ``key``."""
    digest = hashlib.sha256()
    fd = os.open(path, os.O_RDONLY)
    try:
        for e in extents:
            with mmap.mmap(fd, e["length"], prot=mmap.PROT_READ, offset=e[key]) as memory:
                digest.update(memory)
    finally:
        os.close(fd)
    return digest.hexdigest()


@contextmanager
def uncached_mapping(address: int) -> Iterator[None]:
    """Another process that has mapped a page of physical memory round the caches."""
    program = (
        "import mmap, os, sys\n"
        "fd = os.open('/dev/mem', os.O_RDWR | os.O_SYNC)\n"
        "held = mmap.mmap(fd, 4096, offset=int(sys.argv[1]))\n"
        "print('ready', flush=True)\n"
        "sys.stdin.read()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(address)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    assert process.stdout.readline() == "ready\n"
    try:
        yield
    finally:
        process.communicate(timeout=20)


# ---------------------------------------------------------------------- /dev/mem


def use_dev_mem(guest: Guest) -> None:
    """A file system in memory that memmap= has reserved; then the next kernel, still mounted."""
    show_memory_types(guest)
    guest.run("mkfs.pkernfs", "-f", "-L", "guests", "none")
    mount(guest, "none:guests")
    facts = info(guest, MNT)
    assert facts["region"] == "512M!1G"
    assert facts["ranges"][0]["physical"] == facts["ranges"][0]["physical_at_mkfs"] == G
    assert facts["ranges"][0]["node"] == 0
    fill(guest)
    extents = check_contents(guest)
    assert digest_at("/dev/mem", extents, "physical") == guest.notes["digest"]
    assert "[mem 0x0000000040000000-0x0000000060000000] write-back" in PAT.read_text()
    guest.kexec()


def show_memory_types(guest: Guest) -> None:
    """Mount debugfs, where the kernel lists how memory is mapped."""
    if not PAT.exists():
        guest.run("mount", "-t", "debugfs", "debugfs", "/sys/kernel/debug")


def find_it_again(guest: Guest) -> None:
    """The next kernel finds the file system where it was."""
    mount(guest, "none")
    check_contents(guest)
    guest.run("umount", MNT)
    guest.run("fsck.pkernfs", "none")


MACHINE: dict[str, Any] = {
    "memory": 2048,
    "cmdline": ["memmap=768M%1G", "pkernfs=guests:512M!1G"],
}


@pytest.mark.parametrize("kernel", KERNELS)
def test_dev_mem(lab: Lab, kernel: str) -> None:
    """A region in /dev/mem is used, and found again by the next kernel."""
    machine = lab.machine(kernel=kernel, **MACHINE)
    lab.run(use_dev_mem, find_it_again, machine=machine)


# ---------------------------------------------------------------------- refusals


def check_overlaps(guest: Guest) -> None:
    """Whatever has a byte in common with a mounted region is refused, by other processes too."""
    guest.run("mkfs.pkernfs", "-f", "none")
    mount(guest, "none")
    fill(guest)
    for spec in ("512M!1G", "0x20000000!0x40000000"):
        refused(guest, "fsck.pkernfs", spec, says="in use: it is mounted", status=8)
    for spec in ("256M!1G", "2M!1534M", "768M!1G"):
        refused(guest, "mkfs.pkernfs", "-f", spec, says="in use: it overlaps 512M!1G")
    guest.run("mkfs.pkernfs", "-f", "256M!1536M")  # next to it
    check_contents(guest)
    guest.run("umount", MNT)


def check_ranges(guest: Guest) -> None:
    """Ranges that are not free."""
    mkfs = ("mkfs.pkernfs", "-f")
    for spec, says in (
        ("512M!512M", "is System RAM at 0x20000000: boot with memmap=512M%512M"),
        ("832M!1G", "memmap=768M%1G ends at 0x70000000: boot with memmap=832M%1G"),
        ("1G!1G", "no memory at 0x7ff"),
        ("1G!100G", "the firmware reports nothing there"),
        ("512M!1025M", "bad start: got 0x40100000"),
        ("1G!4P", "beyond the last physical address"),
        ("1G!1G,1G!4G", "several ranges in one file system"),
        ("none:other", "no region of that name in pkernfs=: expected none:guests"),
        ("/dev/mem", "not a region"),
    ):
        refused(guest, *mkfs, spec, says=says)


def check_access(guest: Guest) -> None:
    """Access that the kernel does not give, or not through the caches."""
    show_memory_types(guest)
    with uncached_mapping(G + 300 * M):
        refused(guest, "mkfs.pkernfs", "-f", "512M!1G", says="uncached-minus, not write-back")
    ask = ("pkernfs", "info", "512M!1G")
    somebody = ("setpriv", "--reuid=1000", "--regid=1000", "--clear-groups")
    refused(guest, *somebody, *ask, says="/proc/iomem shows no addresses: root is needed")
    without = ("setpriv", "--bounding-set=-sys_rawio", "--inh-caps=-sys_rawio")
    refused(guest, *without, *ask, says="root is needed (CAP_SYS_RAWIO)")
    os.rename("/dev/mem", "/dev/mem.away")
    refused(guest, *ask, says="a kernel without CONFIG_DEVMEM")
    os.rename("/dev/mem.away", "/dev/mem")
    lockdown = Path("/sys/kernel/security/lockdown")
    if not lockdown.exists():
        guest.run("mount", "-t", "securityfs", "securityfs", "/sys/kernel/security")
    guest.run("fsck.pkernfs", "none")  # nothing of all this has stored anything
    lockdown.write_text("integrity")
    refused(
        guest, *ask, says="kernel lockdown (integrity, by Secure Boot or lockdown=): use device"
    )


def test_refusals(lab: Lab) -> None:
    """A region in /dev/mem is guarded: ranges, overlaps, access, and what the kernel maps."""
    lab.run(refusals, machine=lab.machine(**MACHINE))


def refusals(guest: Guest) -> None:
    """Everything that is refused on one machine."""
    check_overlaps(guest)
    check_ranges(guest)
    check_access(guest)


# ---------------------------------------------------------------------- device-dax


def write(name: str, text: str) -> None:
    """Write a sysfs attribute."""
    fd = os.open(name, os.O_WRONLY)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)


def load_dax(guest: Guest) -> None:
    for module in ("device_dax", "dax_hmem"):
        guest.run("modprobe", module)


def use_dax(guest: Guest) -> None:
    """Divide soft-reserved memory into two devices, one of two ranges, and use both."""
    mkfs = ("mkfs.pkernfs", "-f")
    refused(guest, *mkfs, "/dev/dax0.0", says="modprobe device_dax; modprobe dax_hmem")
    load_dax(guest)
    refused(guest, *mkfs, "/dev/dax0.1", says="no such device: there is /dev/dax0.0")
    refused(guest, *mkfs, "64M!1G", says="keeps 0x40000000 for device-dax: use /dev/daxX.Y")
    guest.run(*mkfs, "/dev/dax0.0")  # no driver had it
    refused(guest, "mount", "-t", "fuse.pkernfs", "/dev/dax0.0", MNT, "-o", "phys_base=0",
            says="phys_base= is for files", status=32)  # fmt: skip
    write("/sys/bus/dax/drivers/device_dax/unbind", "dax0.0")
    write(f"{DAX}/dax0.0/size", "0")
    refused(guest, *mkfs, "/dev/dax0.0", says="it has no memory")
    create = (DAX / "dax0.0").resolve().parent / "dax_region/create"
    for name, ranges in (
        ("dax0.1", ((G + 256 * M, 128 * M), (G, 64 * M))),
        ("dax0.2", ((G + 64 * M, 64 * M),)),
    ):
        write(str(create), "1")
        for start, size in ranges:
            write(f"{DAX}/{name}/mapping", f"{start:x}-{start + size - 1:x}")
        guest.run(*mkfs, "-L", name, f"/dev/{name}")
    mount(guest, "/dev/dax0.2")
    Path(MNT, "small").write_text("of dax0.2")
    guest.run("umount", MNT)
    mount(guest, "/dev/dax0.1")
    assert info(guest, MNT)["region_bytes"] == 192 * M
    fill(guest)
    extents = check_contents(guest)
    assert digest_at("/dev/dax0.1", extents, "region_offset") == guest.notes["digest"]
    refused(guest, "fsck.pkernfs", "/dev/dax0.1", says="in use", status=8)
    guest.note("extents", extents)
    guest.kexec()


def find_the_devices_again(guest: Guest) -> None:
    """The next kernel has forgotten the devices; a mount puts each back, ranges and all."""
    load_dax(guest)
    assert [path.name for path in DAX.iterdir()] == ["dax0.0"]
    holder = guest.run(
        "sh", "-c", "echo dax0.0 > /sys/bus/dax/drivers/device_dax/new_id 2>&1; true"
    )
    assert not holder
    with open("/dev/dax0.0", "rb"):
        refused(guest, "fsck.pkernfs", "/dev/dax0.1",
                says="/dev/dax0.0: in the way, and in use by", status=8)  # fmt: skip
    mount(guest, "/dev/dax0.1")
    assert check_contents(guest) == guest.notes["extents"]
    refused(guest, "pkernfs", "info", "/dev/dax0.3", says="there is /dev/dax0.0, /dev/dax0.1")
    guest.run("fsck.pkernfs", "/dev/dax0.2")
    guest.run("umount", MNT)
    assert info(guest, "/dev/dax0.2")["label"] == "dax0.2"
    mount(guest, "/dev/dax0.2", "-o", "ro")
    assert Path(MNT, "small").read_text() == "of dax0.2"
    guest.run("umount", MNT)
    guest.run("fsck.pkernfs", "/dev/dax0.1")


def lose_to_the_kernel(guest: Guest) -> None:
    """A device in system-ram mode is refused, and stays what it is."""
    find_the_devices_again(guest)
    guest.run("modprobe", "kmem")
    for driver, file in (("device_dax", "unbind"), ("device_dax", "remove_id"), ("kmem", "new_id")):
        write(f"/sys/bus/dax/drivers/{driver}/{file}", "dax0.1")
    refused(guest, "mkfs.pkernfs", "-f", "/dev/dax0.1", says="it is in system-ram mode")


SOFT = "memmap=512M%1G-1+0xefffffff"


def leave_by_another_line(guest: Guest) -> None:
    """Give the next kernel a command line without a word of the region."""
    load_dax(guest)
    guest.run("mkfs.pkernfs", "-f", "none")
    mount(guest, "none")
    fill(guest)
    place = running_kernel()
    ours = ("memmap=", "pkernfs=")
    line = " ".join(word for word in guest.command_line() if not word.startswith(ours))
    words = (
        "kexec", "--kernel", str(place / "vmlinuz"), "--initrd", str(place / "initrd"),
        "--append", line,
    )  # fmt: skip
    said = pkernfs(*words, "--dry-run")
    for word in (SOFT, "pkernfs=/dev/dax0.0", "modprobe.blacklist=kmem"):
        assert f"added to the command line: {word}\n" in said, said
    guest.run("kexec", "-s", "-l", str(place / "vmlinuz"), f"--initrd={place / 'initrd'}",
              f"--command-line={line}")  # fmt: skip
    refused(guest, "pkernfs", "handover", MNT, says=f"is not told {SOFT} pkernfs=/dev/dax0.0: ")
    guest.run("kexec", "-s", "-l", str(place / "vmlinuz"), f"--command-line={line} {SOFT} "
              "pkernfs=/dev/dax0.0")  # fmt: skip
    refused(guest, "pkernfs", "handover", MNT, says="has no initrd, and this one was started with")
    guest.leaving("pkernfs kexec")
    raise AssertionError(f"pkernfs kexec: came back: {pkernfs(*words)}")


def find_all_of_it(guest: Guest) -> None:
    """The device is there, and nothing has taken it for memory."""
    assert "modprobe.blacklist=kmem" in guest.command_line()
    load_dax(guest)
    mount(guest, "none")
    check_contents(guest)
    guest.run("umount", MNT)
    guest.run("fsck.pkernfs", "none")


def test_dax_by_another_command_line(lab: Lab) -> None:
    """What keeps the memory apart is asked for where the command line is replaced."""
    machine = lab.machine(kernel="7", memory=2048, cmdline=[SOFT, "pkernfs=/dev/dax0.0"])
    lab.run(leave_by_another_line, find_all_of_it, machine=machine)


@pytest.mark.parametrize("kernel", KERNELS)
def test_dax(lab: Lab, kernel: str) -> None:
    """Device-dax, a file system over two ranges: a mount makes again what a kexec forgot."""
    machine = lab.machine(
        kernel=kernel,
        memory=2048,
        cmdline=["memmap=512M%1G-1+0xefffffff", "modprobe.blacklist=kmem"],
    )
    lab.run(use_dax, lose_to_the_kernel, machine=machine)


# ---------------------------------------------------------------------- START, and kernels


def odd_starts(guest: Guest) -> None:
    """A START that the kernel rounds RAM up to; reserved memory that /proc/iomem shows."""
    refused(
        guest,
        "mkfs.pkernfs",
        "32M!1056M",
        says="Operation not permitted (STRICT_DEVMEM): choose a START that is a multiple of 64M",
    )
    guest.run("mkfs.pkernfs", "-f", "64M!1536M")
    assert "60000000-63ffffff : Reserved" in Path("/proc/iomem").read_text()
    check_nodes(guest)
    refused(guest, "mkfs.pkernfs", "64M!1G", says="boot with memmap=64M%1G")
    refused(guest, "mkfs.pkernfs", "none", says="no pkernfs= on the kernel command line")
    for driver in ("nd_e820", "nd_pmem"):
        guest.run("modprobe", driver)
    refused(guest, "mkfs.pkernfs", "64M!1728M", says="makes persistent memory of 0x6c000000")


def check_nodes(guest: Guest) -> None:
    """The NUMA node of a region is told, although the kernel knows nothing of its memory any more;
    of one that lies in two there is a warning."""
    assert Path("/sys/devices/system/node/node1").exists()
    assert info(guest, "64M!1536M")["ranges"][0]["node"] == 1
    guest.run("mkfs.pkernfs", "-f", "128M!1216M")
    assert "128M!1216M: lies in NUMA nodes 0 and 1" in guest.run("pkernfs", "info", "128M!1216M")


#: 1,280 MiB in one node and 768 MiB in another.
NODES = [
    word
    for node, size in enumerate(("1280M", "768M"))
    for word in (
        "-object", f"memory-backend-ram,id=node{node},size={size}",
        "-numa", f"node,nodeid={node},memdev=node{node}",
    )
]  # fmt: skip


def test_starts(lab: Lab) -> None:
    """memmap=SIZE$START is as good as %; memmap=SIZE!START and an odd START are refused; nodes."""
    cmdline = ["memmap=32M%1056M", "memmap=64M$1536M", "memmap=64M!1728M", "memmap=128M%1216M"]
    machine = lab.machine(memory=2048, cmdline=cmdline, devices=NODES)
    lab.run(odd_starts, machine=machine)


def load_badly(guest: Guest) -> None:
    """kexec -c chooses places from the firmware's map: a handover sees it. Go on all the same."""
    guest.run("mkfs.pkernfs", "-f", "none")
    mount(guest, "none")
    given = " ".join(guest.command_line())
    place = running_kernel()
    load = (f"--initrd={place / 'initrd'}", f"--command-line={given}", str(place / "vmlinuz"))
    guest.run("kexec", "-s", "-l", *load)
    guest.run("pkernfs", "handover", MNT)
    guest.run("pkernfs", "handover", "--abort", MNT)
    guest.run("kexec", "-c", "-l", *load)
    refused(guest, "pkernfs", "handover", MNT,
            says="kexec would put the next kernel into the region, at 0x")  # fmt: skip
    guest.execute()


def find_the_kernel_in_it(guest: Guest) -> None:
    """What is left of such a region is refused, not mounted and not formatted."""
    for command, status in (
        (("mount", "-t", "fuse.pkernfs", "none", MNT), 32),
        (("mkfs.pkernfs", "-f", "none"), 1),
    ):
        refused(guest, *command, says="the running kernel was put into it, at 0x", status=status)


def test_kernel_in_the_region(lab: Lab) -> None:
    """A kernel that kexec puts into a region: refused at the handover, and seen at the mount."""
    cmdline = ["memmap=510M%5632M", "pkernfs=510M!5632M"]  # the last of the memory
    machine = lab.machine(memory=4096, cmdline=cmdline)
    lab.run(load_badly, find_the_kernel_in_it, machine=machine)
