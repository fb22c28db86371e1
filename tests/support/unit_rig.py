"""A file system in QEMU's machine, with its unit and its devices."""

from __future__ import annotations

import os
from pathlib import Path

from pkernfs.dma.activation import Activation
from pkernfs.dma.mount import mount_filesystem, tables_of
from pkernfs.fs.mkfs import make_filesystem
from pkernfs.host.dmar import BRIDGE, Dmar
from pkernfs.host.sysroot import Host
from pkernfs.iommu.config import Config
from pkernfs.iommu.context_walk import Mode
from pkernfs.layout import IOMMU_INO, PAGE, ROOT_INO
from pkernfs.quantities import Ino, Iova, PhysAddr, SourceId
from pkernfs.region.region import Region
from pkernfs.units.discovery import FoundUnit
from pkernfs.units.unit import Unit
from support.dmar_tables import add_device, config, drhd, scope, table
from support.qtest_machine import DEVICES, MIB, RAM, Machine
from support.qtest_window import UNIT, QtestWindow
from support.unit_drivers import BUFFER

FIRST, SECOND = DEVICES
SCRATCH = Iova(1 << 38)
AT = Iova(1 << 30)
BUS_MASTER = 4


class Rig:
    """A mounted file system in QEMU's memory, with two domains, and a host to activate it on."""

    def __init__(self, path: Path, mode: Mode, options: str = "") -> None:
        self.mode = mode
        memory = path / "memory"
        Region.create(str(memory), RAM)
        with self._region(memory) as region:
            make_filesystem(region)
        self.memory = memory
        self.machine = Machine(memory, scalable=mode is Mode.SCALABLE, options=options)
        self.window = QtestWindow(self.machine)
        self.host = Host(str(path / "host"))
        self.write_table(drhd(UNIT, flags=1), drhd(UNIT + PAGE, scope(BRIDGE, 0, (0x1C, 0))))
        for name in ("0000:00:05.0", "0000:00:06.0"):
            add_device(path / "host", name, config(command=BUS_MASTER))
        self.region = self._region(memory)
        self.fs = mount_filesystem(self.region)
        tables_of(self.fs).create_root(Config(mode, 4))
        for number, device in enumerate((FIRST, SECOND)):
            self.file(f"dom-{number}", 2 * MIB, IOMMU_INO)
            scratch = self.file(f"scratch-{number}", PAGE)
            tables_of(self.fs).map_file(number, SCRATCH, scratch, 0, None, 3)
            tables_of(self.fs).attach(number, device)

    @staticmethod
    def _region(memory: Path) -> Region:
        region = Region.open(str(memory), write=True, phys_base=PhysAddr(0))
        region._backing.real_addresses = True  # they are: QEMU's
        return region

    def close(self) -> None:
        self.machine.close()
        self.region.close()

    def remount(self) -> None:
        """As after a SIGKILL: nothing was told to anybody."""
        self.region.close()
        self.region = self._region(self.memory)
        self.fs = mount_filesystem(self.region)

    def write_table(self, *structures: bytes, width: int = 47) -> None:
        there = Path(self.host.path("sys/firmware/acpi/tables"))
        there.mkdir(parents=True, exist_ok=True)
        (there / "DMAR").write_bytes(table(*structures, width=width))

    def activation(self, window: QtestWindow | None = None) -> Activation:
        def find(host: Host, dmar: Dmar) -> list[FoundUnit]:
            driven = os.path.exists(host.path("sys/class/iommu/dmar0"))
            unit = Unit("dmar0", window or self.window, UNIT)
            here = FoundUnit(dmar.units[0], driven, unit, "")
            return [here, *(FoundUnit(u, False, None, "not here") for u in dmar.units[1:])]

        return Activation(self.fs, self.host, find)

    def activate(self) -> None:
        assert self.activation().activate([], block_others=False) == ["dmar0"]

    def unit(self) -> Unit:
        return Unit("dmar0", self.window, UNIT)

    # ------------------------------------------------------------------ files and devices

    def file(self, name: str, size: int, directory: Ino = ROOT_INO) -> Ino:
        ino = self.fs.create(directory, name.encode(), 0o100600, 0, 0).ino
        self.fs.setattr(ino, size=size)
        return ino

    def put(self, ino: Ino, offset: int, word: int) -> None:
        self.fs.write(ino, offset, word.to_bytes(8, "little"))

    def load(self, device: SourceId, iova: Iova) -> int | None:
        """The word that a device reads; None: a fault."""
        self.machine.start(device, iova, BUFFER, 1)
        self.machine.finish(device)
        faults = self.unit().faults()
        self.unit().clear_faults()
        if faults:
            assert [(f.source_id, f.iova) for f in faults] == [(device, iova & -PAGE)]
            return None
        self.machine.start(device, BUFFER, SCRATCH, 3)
        self.machine.finish(device)
        assert self.unit().faults() == []
        scratch = self.fs.find(ROOT_INO, b"scratch-%d" % (device == SECOND))
        return int.from_bytes(self.fs.read(scratch, 0, 8), "little")
