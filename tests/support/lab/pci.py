"""PCI devices of a lab machine that no driver has, through sysfs."""

from __future__ import annotations

import mmap

from pkernfs.host.pci_config import COMMAND, COMMAND_MASTER, COMMAND_MEMORY
from pkernfs.vmm import sysfs


def enable(bdf: str) -> None:
    """Let the device answer at its BARs, and do DMA."""
    (sysfs.device_path(bdf) / "enable").write_text("1")
    set_master(bdf, True)


def is_master(bdf: str) -> bool:
    """Tell whether the device may do DMA."""
    return bool(sysfs.read_config(bdf, COMMAND) & COMMAND_MASTER)


def set_master(bdf: str, on: bool) -> None:
    """Let the device do DMA, or not; it answers at its BARs."""
    command = sysfs.read_config(bdf, COMMAND) & ~COMMAND_MASTER | COMMAND_MEMORY
    sysfs.write_config(bdf, COMMAND, command | (COMMAND_MASTER if on else 0))


def map_bar(bdf: str, size: int = 4096) -> mmap.mmap:
    """The registers of the device's first BAR, so many bytes of them."""
    with (sysfs.device_path(bdf) / "resource0").open("r+b") as file:
        return mmap.mmap(file.fileno(), size)
