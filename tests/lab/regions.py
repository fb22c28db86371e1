"""Regions of a lab machine: how the kernel is told of them, and what they are called.

Runs on both sides.
"""

from __future__ import annotations

from pathlib import Path

from kexeclab.guest import Guest

MOUNT = Path("/mnt/pkernfs")
REGION_MIB = 512
START_MIB = 1024
#: Memory of a machine with such a region (MiB): below it and above it there is room for Linux.
MEMORY_MIB = START_MIB + REGION_MIB + 512
SPEC = f"{REGION_MIB}M!{START_MIB}M"
MEMMAP = f"memmap={REGION_MIB}M%{START_MIB}M"

#: Kernel parameters for each kind of region.
PARAMETERS = {
    "devmem": [MEMMAP, f"pkernfs={SPEC}"],
}


def source(guest: Guest) -> str:
    """What to give to mount(8) and mkfs.pkernfs in this machine."""
    return {"devmem": "none"}[guest.parameters["kind"]]


def mkfs(guest: Guest) -> None:
    """Format the region and mount it."""
    guest.run("mkfs.pkernfs", source(guest))
    mount(guest)


def mount(guest: Guest, *options: str) -> str:
    """Mount the region, by mount(8); what it said."""
    words = [word for option in options for word in ("-o", option)]
    return guest.run("mount", "-t", "fuse.pkernfs", source(guest), str(MOUNT), *words)


def unmount_and_check(guest: Guest) -> None:
    """Unmount, and have fsck look for anything to complain of."""
    guest.run("umount", str(MOUNT))
    guest.run("fsck.pkernfs", "-n", source(guest))
