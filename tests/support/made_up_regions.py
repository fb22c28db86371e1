"""Made-up machines with memory for regions: through /dev/mem, and through device-dax."""

from __future__ import annotations

from pathlib import Path

import pytest

from pkernfs.errors import RegionError
from pkernfs.host.sysroot import Host
from pkernfs.region.region import Region
from support.made_up_host import Machine, make_machine

M = 1 << 20
G = 1 << 30
#: The kernel's list of memory types, and a list of one line: start, end, type.
PAT = "sys/kernel/debug/x86/pat_memtype_list"
PAT_LIST = "PAT memtype list:\nPAT: [mem 0x{:016x}-0x{:016x}] {}\n"
SOFT_RESERVED = "memmap=512M%1G-1+0xefffffff"


def dev_mem_machine(root: Path) -> Machine:
    """Make a machine with 512 MiB at 1 GiB for a region, and a file in the place of /dev/mem."""
    made = make_machine(root)
    with made.write("dev/mem", b"").open("r+b") as memory:
        memory.truncate(2 * G)
    made.write(PAT, PAT_LIST.format(G, G + 512 * M, "write-back"))
    return made


def dax_machine(root: Path) -> Machine:
    """Make a machine with 512 MiB of soft-reserved memory at 1 GiB, and no device yet."""
    return make_machine(root, command_line=f"{SOFT_RESERVED} pkernfs=guests:/dev/dax0.0")


def open_region(spec: str, host: Host, *, write: bool = True, lock: bool = True) -> Region:
    return Region.open(spec, write=write, lock=lock, host=host)


def refusal(machine: Machine, name: str = "dax0.0") -> str:
    """The message, on the machine, of a dax device that cannot be opened."""
    with pytest.raises(RegionError) as caught:
        Region.open(machine.path(f"dev/{name}"), write=True, host=machine)
    assert caught.value.errno
    return str(caught.value).replace(machine.path(""), "/")
