"""A unit's registers through /dev/mem: the real :class:`~pkernfs.units.window.Window`."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Sequence
from typing import Any

from pkernfs.errors import PermissionDeniedError, UnitError
from pkernfs.host.sysroot import Host
from pkernfs.layout import PAGE
from pkernfs.native._native import ffi, lib
from pkernfs.quantities import PhysAddr
from pkernfs.region.region import Region
from pkernfs.vtd.entries import MAX_PHYSICAL_BITS
from pkernfs.vtd.registers import Capabilities, Capability, ExtendedCapability, Step, Version


class MemoryWindow:
    """Registers that are mapped; ``mapped`` is a mapping, or a bytearray in tests."""

    def __init__(self, mapped: Any) -> None:
        self._mapped = mapped
        self._registers = ffi.from_buffer("uint8_t[]", mapped)

    def read32(self, offset: int) -> int:
        """Load a register of 32 bits."""
        self._check(offset, 4)
        return int(lib.pk_mmio_read32(self._registers, offset))

    def read64(self, offset: int) -> int:
        """Load a register of 64 bits."""
        self._check(offset, 8)
        return int(lib.pk_mmio_read64(self._registers, offset))

    def run(
        self,
        steps: Sequence[Step],
        last: Sequence[Step] = (),
        *,
        memory: Region | None = None,
        seconds: float = 1.0,
    ) -> bool:
        """Do ``steps``, then ``last``: see :class:`~pkernfs.units.window.Window`."""
        reach = ffi.new(
            "struct pk_reach *",
            {
                "registers": self._registers,
                "n_registers": len(self._registers),
                "memory": ffi.NULL if memory is None else memory.base,
                "n_memory": 0 if memory is None else memory.size,
            },
        )
        done = lib.pk_mmio_run(
            reach,
            ffi.new("struct pk_step[]", [tuple(s) for s in steps]),
            len(steps),
            ffi.new("struct pk_step[]", [tuple(s) for s in last]),
            len(last),
            int(seconds * 1e9),
        )
        if done == lib.RUN_OUTSIDE:
            raise UnitError("a step reaches beyond the unit's registers or the memory")
        return bool(done == lib.RUN_DONE)

    def _check(self, offset: int, length: int) -> None:
        if offset % length or not 0 <= offset <= len(self._mapped) - length:
            raise UnitError(f"registers at {offset:#x}: beyond the unit's: got {length} bytes")


def open_window(base: PhysAddr, host: Host, *, write: bool) -> MemoryWindow:
    """Map the registers at a physical address, as many as the unit says it has.

    :raises PermissionDeniedError: the kernel does not let one.
    :raises UnitError: there is no unit.
    """
    if base % PAGE or base >> MAX_PHYSICAL_BITS:  # the firmware's word; Linux does not check it
        raise UnitError(f"registers at {base:#x}: no address of a page")
    path = host.path("dev/mem")
    try:
        # O_SYNC: not through the processor's caches.
        fd = os.open(path, (os.O_RDWR if write else os.O_RDONLY) | os.O_SYNC | os.O_CLOEXEC)
    except OSError as e:
        raise _refused(base, path, e, host) from None
    try:
        first = MemoryWindow(_map(fd, base, PAGE, write))
        unit = Capabilities(
            first.read32(Version.OFFSET),
            first.read64(Capability.OFFSET),
            first.read64(ExtendedCapability.OFFSET),
        )
        if unit.cap in (0, (1 << 64) - 1):
            raise UnitError(f"registers at {base:#x}: no unit answers: got {unit.cap:#x} as CAP")
        if unit.register_bytes <= PAGE:
            return first
        return MemoryWindow(_map(fd, base, unit.register_bytes, write))
    except OSError as e:
        raise _refused(base, path, e, host) from None
    finally:
        os.close(fd)


def _map(fd: int, base: PhysAddr, length: int, write: bool) -> mmap.mmap:
    access = mmap.PROT_READ | (mmap.PROT_WRITE if write else 0)
    return mmap.mmap(fd, length, mmap.MAP_SHARED, access, offset=base)


def _refused(base: PhysAddr, path: str, error: OSError, host: Host) -> PermissionDeniedError:
    message = f"registers at {base:#x}: {path}: {error.strerror}"
    lockdown = host.lockdown()
    if error.errno in (errno.ENOENT, errno.ENXIO, errno.ENODEV):
        why = "a kernel without CONFIG_DEVMEM, or a container"
    elif os.geteuid():
        why = "root is needed"
    elif lockdown is not None:
        why = f"kernel lockdown ({lockdown}): boot without Secure Boot and lockdown="
    elif "iomem=relaxed" not in host.command_line().split():
        why = "boot with iomem=relaxed"
    else:
        why = "the kernel keeps /dev/mem from registers (STRICT_DEVMEM)"
    return PermissionDeniedError(f"{message}: {why}")
