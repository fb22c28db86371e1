"""A made-up kernel that obeys what is written to the sysfs of a dax region (drivers/dax/bus.c).

Of 7.3, where device_dax takes soft-reserved memory only if told its name, or of 6.1, where it takes
all. The bytes of the memory stay when devices go; a file stands for each device's node.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pkernfs.errors import RegionError
from pkernfs.host.iomem import Span
from pkernfs.host.mappings import maps_device
from pkernfs.host.sysroot import Host
from pkernfs.layout import BLOCK
from pkernfs.quantities import PhysAddr
from pkernfs.region import dax, dax_devices, dax_making, dax_node
from pkernfs.region.dax import device_names, read_device
from pkernfs.region.dax_devices import region_devices
from support.made_up_host import Machine, add_dax

G = PhysAddr(1 << 30)
M = 1 << 20
REGION = "sys/devices/platform/hmem.0"


class MadeUpDax:
    """Devices of one dax region of ``size`` bytes at 1 GiB; at first one has all of it."""

    def __init__(self, machine: Machine, size: int = 512 * M, *, takes_all: bool = False) -> None:
        self.machine = machine
        self.size = size
        self.takes_all = takes_all
        #: Attributes (the end of the path) that the kernel refuses to have written.
        self.refuses = ""
        #: Called before each write, with the attribute's name: another program gets in between.
        self.between: Callable[[str], object] = lambda attribute: None
        self.ids: set[str] = set()
        self.labels: dict[str, str] = {}
        self.access: dict[str, dax_node.Access] = {}
        self.memory: dict[int, bytes] = {}  # of blocks that are not zero
        self.boot()

    # ------------------------------------------------------------------ the machine

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Have the modules write to this kernel, and find nodes that it made."""
        for module in (dax, dax_devices, dax_making):
            monkeypatch.setattr(module, "write_attribute", self.write)
        monkeypatch.setattr(dax_node, "read_access", self._read_access)
        monkeypatch.setattr(dax_node, "set_access", self._set_access)
        monkeypatch.setattr(dax_node, "set_label", self._set_label)
        monkeypatch.setattr(dax_node, "read_label", lambda name, host: self.labels.get(name))

    def boot(self) -> None:
        """After a kexec: one device has everything, and no driver. The memory keeps its bytes."""
        for name in device_names(self.machine):
            self._save(name)
            self._forget(name)
        self.ids.clear()
        add_dax(self.machine, "dax0.0", (G, self.size), driver=None)
        self.machine.write(f"{REGION}/dax_region/create", "")
        self.machine.write(f"{REGION}/dax_region/size", f"{self.size}\n")
        self.access["dax0.0"] = dax_node.FOR_ROOT
        self._tell_free()

    def foreign(self, *pieces: Span) -> str:
        """Make a device as another program does; its name."""
        name = self._create()
        for piece in pieces:
            self._add(self._home(name), piece)
        self._tell_free()
        return name

    def hold(self, pid: int, name: str) -> None:
        """Have a process map a device."""
        found = os.stat(self.machine.path(f"dev/{name}"))
        line = f"7f00-7f01 rw-s 0000 {maps_device(found.st_dev)} {found.st_ino} /dev/{name}\n"
        self.machine.write(f"proc/{pid}/maps", line)
        self.machine.write(f"proc/{pid}/comm", "qemu\n")
        Path(self.machine.path(f"proc/{pid}/fd")).mkdir()

    def end(self, pid: int) -> None:
        """End that process."""
        shutil.rmtree(self.machine.path(f"proc/{pid}"))

    # ------------------------------------------------------------------ what is written

    def write(self, name: str, text: str, where: str, host: Host) -> None:
        """Obey a store into an attribute."""
        self.between(os.path.basename(name))
        try:
            if self.refuses and name.endswith(self.refuses):
                raise OSError(errno.EINVAL, "")
            self._store(name, text)
        except OSError as e:
            why = os.strerror(e.errno or 0)
            raise RegionError(
                f"{where}: cannot write {text!r} to /{name}: {why}", e.errno or 0
            ) from e
        finally:
            self._tell_free()

    def _store(self, name: str, text: str) -> None:
        device = Path(self.machine.path(os.path.dirname(name)))
        match os.path.basename(name):
            case "bind":
                _require(self.takes_all or text in self.ids, errno.ENODEV)
                self._bind(text)
            case "new_id":
                self.ids.add(text)
                for each in device_names(self.machine):
                    if (self.takes_all or each in self.ids) and not self._is_bound(each):
                        self._bind(each)
            case "remove_id":
                self.ids.discard(text)
            case "unbind":
                _require(self._is_bound(text), errno.ENODEV)
                self._save(text)
                (self._home(text) / "driver").unlink()
            case "align":
                _require(not self._is_bound(device.name), errno.EBUSY)
                _require(int(text) in (4096, BLOCK, G), errno.EINVAL)
                pieces = read_device(device.name, self.machine).pieces
                _require(all(piece.size % int(text) == 0 for piece in pieces), errno.EINVAL)
                (device / "align").write_text(text)
            case "size":
                _require(not self._is_bound(device.name), errno.EBUSY)
                self._resize(device, int(text))
            case "mapping":
                start, end = (int(word, 16) for word in text.split("-"))
                if (end + 1 - start) % int((device / "align").read_text()) == 0:  # else: silence
                    self._add(device, Span(PhysAddr(start), end + 1 - start))
            case "create":
                _require(self._free() > 0, errno.ENOSPC)
                Path(self.machine.path(name)).write_text(self._create())
            case "delete":
                _require(text in device_names(self.machine), errno.ENXIO)
                has = read_device(text, self.machine)
                _require(not has.size and not has.driver and text != "dax0.0", errno.EBUSY)
                self._forget(text)

    def _home(self, name: str) -> Path:
        return Path(self.machine.path(f"{REGION}/{name}"))

    def _is_bound(self, name: str) -> bool:
        return (self._home(name) / "driver").is_symlink()

    def _create(self) -> str:
        number = 0
        while f"dax0.{number}" in device_names(self.machine):
            number += 1
        name = f"dax0.{number}"
        add_dax(self.machine, name, driver=None)
        (self._home(name) / "resource").write_text(f"{G:#x}")
        self.access[name] = dax_node.FOR_ROOT
        return name

    def _forget(self, name: str) -> None:
        shutil.rmtree(self._home(name))
        os.unlink(self.machine.path(f"{dax.DEVICES}/{name}"))
        os.unlink(self.machine.path(f"dev/{name}"))
        self.labels.pop(name, None)
        self.access.pop(name, None)

    def _bind(self, name: str) -> None:
        size = int((self._home(name) / "size").read_text())
        _require(size > 0, errno.ENXIO)
        (self._home(name) / "driver").symlink_to(self.machine.path(dax.DRIVER))
        node = Path(self.machine.path(f"dev/{name}"))
        with node.open("r+b") as file:
            file.truncate(0)
            file.truncate(size)
            for offset, address in self._blocks(name):
                if address in self.memory:
                    os.pwrite(file.fileno(), self.memory[address], offset)

    def _save(self, name: str) -> None:
        """Keep in memory what was stored through a node."""
        if not self._is_bound(name):
            return
        addresses = dict(self._blocks(name))
        for address in addresses.values():
            self.memory.pop(address, None)
        with open(self.machine.path(f"dev/{name}"), "rb") as file:
            at = 0
            with contextlib.suppress(OSError):  # no more data
                while True:
                    at = os.lseek(file.fileno(), at, os.SEEK_DATA) // BLOCK * BLOCK
                    self.memory[addresses[at]] = os.pread(file.fileno(), BLOCK, at)
                    at += BLOCK

    def _blocks(self, name: str) -> list[tuple[int, int]]:
        """Offset and address of each block of a device."""
        found: list[tuple[int, int]] = []
        for piece in read_device(name, self.machine).pieces:
            for address in range(piece.start, piece.end, BLOCK):
                found.append((len(found) * BLOCK, address))
        return found

    # ------------------------------------------------------------------ ranges

    def _resize(self, device: Path, size: int) -> None:
        pieces = list(read_device(device.name, self.machine).pieces)
        excess = sum(piece.size for piece in pieces) - size
        missing = -excess
        while excess > 0:
            last = pieces.pop()
            if last.size > excess:
                pieces.append(Span(last.start, last.size - excess))
            excess -= last.size
        for mapping in device.glob("mapping*"):
            shutil.rmtree(mapping)
        (device / "size").write_text("0")
        for piece in pieces:
            self._add(device, piece)
        while missing > 0:
            gap = self._first_gap(missing)
            self._add(device, gap)
            missing -= gap.size

    def _first_gap(self, most: int) -> Span:
        at: int = G
        for piece in sorted(p for d in self._devices() for p in d.pieces):
            if piece.start > at:
                break
            at = piece.end
        later = [p.start for d in self._devices() for p in d.pieces if p.start > at]
        _require(at < G + self.size, errno.ENOSPC)
        return Span(PhysAddr(at), min([most, G + self.size - at, *(a - at for a in later)]))

    def _add(self, device: Path, span: Span) -> None:
        inside = span.start >= G and span.end <= G + self.size
        taken = [p for d in self._devices() for p in d.pieces]
        clash = any(p.start < span.end and span.start < p.end for p in taken)
        _require(inside and not clash, errno.ENOMEM)
        before = int((device / "size").read_text())
        mapping = device / f"mapping{len(list(device.glob('mapping*')))}"
        mapping.mkdir()
        (mapping / "start").write_text(f"{span.start:#x}")
        (mapping / "end").write_text(f"{span.end - 1:#x}")
        (mapping / "page_offset").write_text(f"{before // 4096:#x}")
        (device / "size").write_text(f"{before + span.size}")

    def _devices(self) -> list[dax.Device]:
        return region_devices(REGION, self.machine)

    def _free(self) -> int:
        return self.size - sum(device.size for device in self._devices())

    def _tell_free(self) -> None:
        self.machine.write(f"{REGION}/dax_region/available_size", f"{self._free()}\n")

    # ------------------------------------------------------------------ nodes

    def _read_access(self, name: str, host: Host) -> dax_node.Access:
        return self.access[name]

    def _set_access(self, name: str, wanted: dax_node.Access, host: Host) -> None:
        self.access[name] = wanted

    def _set_label(self, name: str, text: str, host: Host) -> None:
        self.labels[name] = text


def _require(condition: bool, number: int) -> None:
    if not condition:
        raise OSError(number, os.strerror(number))
