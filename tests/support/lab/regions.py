"""Regions of a lab machine: how the kernel is told of them, and mounts of them.

Runs on both sides.
"""

from __future__ import annotations

import os
from pathlib import Path

from kexeclab.guest import Guest

MOUNT = Path("/mnt/pkernfs")
REGION_MIB = 512
START_MIB = 1024
#: Memory of a machine with such a region (MiB): below it and above it there is room for Linux.
MEMORY_MIB = START_MIB + REGION_MIB + 512
SPEC = "512M!1G"
MEMMAP = "memmap=512M%1G"

#: Kernel parameters for each kind of region. Soft-reserved memory is what becomes a dax device;
#: asked for in this way it is one in a crash kernel as well.
PARAMETERS = {
    "devmem": [MEMMAP, f"pkernfs={SPEC}"],
    "dax": [f"{MEMMAP}+0xefffffff", "pkernfs=/dev/dax0.0"],
}


def mkfs(guest: Guest, *options: str) -> None:
    """Format the region that the kernel command line names, and mount it."""
    _find_devices(guest)
    guest.run("mkfs.pkernfs", *options, "none")
    mount(guest)


def mount(guest: Guest, *options: str, seconds: float = 120) -> str:
    """Mount that region by mount(8); what it said."""
    _find_devices(guest)
    words = [word for option in options for word in ("-o", option)]
    said = guest.run("mount", "-t", "fuse.pkernfs", "none", str(MOUNT), *words, seconds=seconds)
    for line in said.splitlines():
        guest.log(f"  {line}")
    return said


def make_file(path: Path, size: int) -> Path:
    """Make a file of zeros, of ``size`` bytes, or make one longer."""
    path.touch()
    os.truncate(path, size)
    return path


def make_domain(number: int) -> Path:
    """Make the file of a domain, with 2 MiB for its tables."""
    return make_file(domain(number), 2 << 20)


def domain(number: int) -> Path:
    """The file of a domain."""
    return MOUNT / f"iommu/dom-{number}"


def unmount_and_check(guest: Guest) -> None:
    """Unmount, and have fsck look for anything to complain of."""
    guest.run("umount", str(MOUNT))
    guest.run("fsck.pkernfs", "-n", "none")


def _find_devices(guest: Guest) -> None:
    """Load the drivers of a dax device, as udev does where it runs."""
    if guest.parameters.get("kind") == "dax":
        guest.run("modprobe", "-a", "dax_hmem", "device_dax")
