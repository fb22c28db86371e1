"""A kernel's own tables in a made-up /proc/kcore."""

from __future__ import annotations

from pathlib import Path

from pkernfs.iommu import Config, Memory, Mode, PageTable, RootTables, configure
from pkernfs.iommu.memory import store_words
from pkernfs.layout import PAGE
from pkernfs.quantities import PhysAddr, RegionOff, RegionRun, SourceId
from pkernfs.region.region import Region
from pkernfs.units.kernel_tables import MAX_PAGES, KernelTables, MachineMemory
from pkernfs.units.mmio import MemoryWindow
from pkernfs.units.unit import Unit
from pkernfs.vtd.registers import STATUS, Command, RootTableAddress
from support.kernel_memory import Memory as Ram

MIB = 1 << 20
AT = PhysAddr(MIB)  # where the tables are in the machine's 4 MiB of RAM
EDU, NIC = SourceId(0x28), SourceId(0x300)


class Kernel:
    """A kernel's tables in its RAM, and a unit that walks them."""

    def __init__(self, path: Path, mode: Mode = Mode.LEGACY, levels: int = 4) -> None:
        self.mode = mode
        self.ram = Ram(path)
        self.region = Region.anonymous(3 * MIB, phys_base=AT)
        root = Memory(self.region, [RegionRun(RegionOff(0), 128 * PAGE)])
        configure(root, store_words(self.region), Config(mode, levels))
        self.root = RootTables(root, store_words(self.region))
        self.domains = [self.domain(RegionOff(MIB + i * 64 * PAGE), levels) for i in range(3)]
        self.window = bytearray(PAGE)
        self.opened: list[MachineMemory] = []
        self.enable_translation()

    def domain(self, offset: RegionOff, levels: int) -> PageTable:
        memory = Memory(self.region, [RegionRun(offset, 64 * PAGE)])
        return PageTable(memory, store_words(self.region), levels=levels)

    def enable_translation(self, *, status: int = Command.TE.mask, mode: int | None = None) -> None:
        ttm = self.mode if mode is None else mode
        register = self.root.root | RootTableAddress.TTM.put("TTM", ttm)
        self.window[STATUS : STATUS + 4] = status.to_bytes(4, "little")
        self.window[0x20:0x28] = register.to_bytes(8, "little")

    def save(self) -> None:
        """What is in the region is in /proc/kcore from now on."""
        self.ram.bytes[AT : AT + 3 * MIB] = self.region.read(RegionOff(0), 3 * MIB)
        self.ram.save()

    def memory(self, pages: int = MAX_PAGES) -> MachineMemory:
        self.save()
        self.opened.append(MachineMemory(self.ram.host, pages=pages))
        return self.opened[-1]

    def live(self) -> KernelTables:
        return KernelTables(Unit("dmar0", MemoryWindow(self.window)), self.memory())

    def close(self) -> None:
        for memory in self.opened:
            memory.__exit__()
        self.region.close()

    def word(self, physical: PhysAddr, value: int) -> None:
        self.region.store_u64(RegionOff(physical - AT), value)
