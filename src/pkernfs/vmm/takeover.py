"""Take devices over from the tables that survived, in the kernel that has adopted them.

For a VMM that restores itself after the jump:

    export = read_export("/mnt/pkernfs")
    domains = plan(export)              # refuses what cannot work; nothing has been changed then
    with TakeOver(export) as taking:
        for domain in domains:
            taken = taking.take(domain)  # taken.devices["0000:00:05.0"] is at work
        ...                              # to close it all stops the devices

From when the kernel takes its copy of a device's context entry down until the new domain is filled,
the device's requests would fault. So its bus mastering is off for that time, the hold: a device
keeps what it wants to write until then, and its registers stay as they are. docs/dma.md, "After the
jump", has each step with its reason. Standard library and :mod:`vfio` only.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from pkernfs.vmm import vfio

_BLOCK = 2 << 20
_PATIENCE_SECONDS = 5.0
_MODULES = Path("/sys/module")
_INTERRUPTS = Path("/proc/interrupts")
#: Of the devices of a group that VFIO takes.
_DRIVERS = (None, vfio.DRIVER, "pcieport")
#: Of PCI's capabilities (linux/pci_regs.h).
_CAPABILITY_LIST, _CAPABILITY_EXPRESS = 0x34, 0x10
_EXPRESS_STATUS, _TRANSACTIONS_PENDING = 0x0A, 0x20
_GONE = 0xFFFF  # what is read where nothing answers


class TakeOverError(vfio.VfioError):
    """What failed and why, in one line. Unless it says so, nothing has been changed."""


@dataclass(frozen=True)
class Piece:
    """Addresses of a domain and the memory that they reach, consecutive in both. Bytes.

    ``offset`` is in the region, or in the BAR ``bar`` (device, number).
    """

    iova: int
    length: int
    perm: int
    offset: int
    bar: tuple[str, int] | None = None


@dataclass(frozen=True)
class Domain:
    """A domain of the export: what it maps, and the devices that are to be taken over with it."""

    name: str
    pieces: list[Piece]
    devices: list[str]

    def groups(self) -> list[list[str]]:
        """Its devices by IOMMU group: those of one group change together."""
        by_group: dict[int, list[str]] = {}
        for bdf in self.devices:
            by_group.setdefault(vfio.group_of(bdf), []).append(bdf)
        return list(by_group.values())

    @property
    def bytes(self) -> int:
        """How much it maps."""
        return sum(piece.length for piece in self.pieces)


@dataclass
class Taken:
    """A domain as it is now: keep it, for closing it stops its devices.

    :ivar hold_ms: for how long each device had its bus mastering off
    :ivar mapping_ms: the part of that in which memory was mapped
    """

    name: str
    space: vfio.AddressSpace
    devices: dict[str, vfio.Device] = field(default_factory=dict)
    hold_ms: dict[str, float] = field(default_factory=dict)
    mapping_ms: float = 0.0


# ------------------------------------------------------------------------------ the export


def read_export(mnt: str) -> dict[str, Any]:
    """What ``pkernfs iommu export`` says of a mount.

    :raises TakeOverError: it fails, or is of a version that is not known here.
    """
    export: dict[str, Any] = json.loads(_pkernfs("export", mnt, "--json"))
    if export["version"] != 1:
        raise TakeOverError(f"export: version {export['version']} is not known")
    return export


def _pkernfs(*words: str) -> str:
    try:
        done = subprocess.run(
            ["pkernfs", "iommu", *words], stdin=subprocess.DEVNULL, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
    except FileNotFoundError as error:
        raise TakeOverError("pkernfs: no such program") from error
    # An export that lacks damaged tables is one; what they are of is refused by the plan.
    if done.returncode != 0 and not done.stdout:
        raise TakeOverError((done.stderr.strip() or "pkernfs: it failed").splitlines()[-1])
    return done.stdout


def release(mnt: str, bdf: str) -> None:
    """Let go of the tables that the device no longer uses; its files can be unmapped then."""
    _pkernfs("detach", bdf, mnt)


def _pieces(mapping: dict[str, Any]) -> Iterator[Piece]:
    """The memory of a mapping, piece by piece."""
    perm = (vfio.READ if mapping["readable"] else 0) | (vfio.WRITE if mapping["writeable"] else 0)
    iova = mapping["iova"]
    if "bar" in mapping:
        bar = (mapping["bar"]["device"], mapping["bar"]["number"])
        yield Piece(iova, mapping["length"], perm, mapping["offset"], bar)
        return
    for piece in mapping["pieces"]:
        if "file" not in mapping or piece["region_offset"] is None:
            raise TakeOverError(f"{iova:#x}: maps nobody's memory: run pkernfs iommu check")
        yield Piece(iova, piece["length"], perm, piece["region_offset"])
        iova += piece["length"]


# ------------------------------------------------------------------------------ the plan


def plan(
    export: dict[str, Any], devices: Sequence[str] = (), spare: str | None = None
) -> list[Domain]:
    """The domains to take over, with all of their devices or those of ``devices``.

    Everything that can be known beforehand is checked: what fails later has stopped a device.

    :param spare: see :meth:`TakeOver.take`.

    :raises TakeOverError: it cannot work, and why.
    """
    if root := export.get("damaged", {}).get("root-pgtables"):
        raise TakeOverError(f"root-pgtables: damaged: {root}: run pkernfs iommu check")
    attached = {d["device"]: d for d in export["devices"]}
    for bdf in devices:
        if bdf not in attached:
            raise TakeOverError(f"{bdf}: not attached in this region")
    wanted = [bdf for bdf in attached if not devices or bdf in devices]
    if not wanted:
        raise TakeOverError("no device is attached in this region")
    for bdf in wanted:
        if attached[bdf]["hwpt"] is None:
            raise TakeOverError(f"{bdf}: attached to what is no domain: run pkernfs iommu check")
    mappings = {ioas["id"]: ioas["mappings"] for ioas in export["ioas"]}
    domains = []
    for name, of_domain in mappings.items():
        mine = [bdf for bdf in wanted if attached[bdf]["hwpt"] == name]
        if mine:
            domains.append(Domain(name, [p for m in of_domain for p in _pieces(m)], mine))
    for bdf in wanted:
        _check_device(bdf, attached[bdf]["adopted_by"])
    _check_host()
    for domain in domains:
        _check_domain(domain, set(attached))
    if spare is not None:
        _check_spare(spare, set(attached))
    return domains


def _check_host() -> None:
    """Whether VFIO is there, leaves devices awake, and takes these interrupts."""
    # Awake: binding a device would put it into D3 else, and end its work.
    _load("vfio_pci", "disable_idle_d3=1")
    if not vfio.IOMMUFD.exists():
        _load("vfio_iommu_type1")
    if not _switched_on("vfio_pci", "disable_idle_d3"):
        raise TakeOverError(
            "vfio-pci: it would put devices to sleep: "
            "modprobe -r vfio_pci; modprobe vfio_pci disable_idle_d3=1"
        )
    remapped = "IR-" in _INTERRUPTS.read_text()
    if not remapped and not _unsafe_interrupts_allowed():
        raise TakeOverError(
            "VFIO: interrupts are not remapped, so a device could forge them: if you trust it, "
            "echo 1 >/sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts"
        )


def _load(module: str, *parameters: str) -> None:
    if (_MODULES / module).exists():
        return
    try:
        done = subprocess.run(["modprobe", module, *parameters], capture_output=True, check=False)
    except FileNotFoundError as error:
        raise TakeOverError("modprobe: no such program") from error
    if done.returncode:
        raise TakeOverError(f"{module}: this kernel has no such module")


def _unsafe_interrupts_allowed() -> bool:
    return any(
        _switched_on(module, "allow_unsafe_interrupts")
        for module in ("vfio_iommu_type1", "iommufd")
    )


def _switched_on(module: str, parameter: str) -> bool:
    path = _MODULES / module / "parameters" / parameter
    return path.exists() and path.read_text().strip() == "Y"


def _check_domain(domain: Domain, attached: set[str]) -> None:
    limit = _MODULES / "vfio_iommu_type1/parameters/dma_entry_limit"
    most = int(limit.read_text()) if limit.exists() else 65535
    if len(domain.pieces) > most:
        raise TakeOverError(f"{domain.name}: its memory is in {len(domain.pieces)} pieces: VFIO "
                            f"takes {most}: see dma_entry_limit of vfio_iommu_type1")  # fmt: skip
    for bdf in domain.devices:
        _check_group(bdf, domain, attached)
        _check_addresses(bdf, domain)


def _check_spare(spare: str, attached: set[str]) -> None:
    for member in vfio.group_members(vfio.group_of(spare)):
        if member in attached:
            raise TakeOverError(f"{spare}: not spare: {member} of its group is attached")
        if (driver := vfio.driver_of(member)) not in _DRIVERS:
            raise TakeOverError(f"{spare}: not spare: {driver} has {member}")


def _check_device(bdf: str, unit: str | None) -> None:
    driver = vfio.driver_of(bdf)
    if driver not in (None, vfio.DRIVER):
        raise TakeOverError(f"{bdf}: {driver} has it, and has set it up anew: too late")
    vfio.group_of(bdf)
    if unit is None:
        raise TakeOverError(
            f"{bdf}: no unit of this kernel is seen to walk the region's tables for it: it has not "
            "adopted them (dmesg), has taken the device over already, or lacks iomem=relaxed"
        )


def _check_group(bdf: str, domain: Domain, attached: set[str]) -> None:
    group = vfio.group_of(bdf)
    for member in vfio.group_members(group):
        if member in domain.devices:
            continue
        if member in attached:
            raise TakeOverError(
                f"{bdf}: in group {group} with {member}, which would lose its tables: a group is "
                "taken over as one, by one domain"
            )
        if (driver := vfio.driver_of(member)) not in _DRIVERS:
            raise TakeOverError(f"{bdf}: in group {group} with {member}, which {driver} has")


def _check_addresses(bdf: str, domain: Domain) -> None:
    """VFIO maps nothing where the kernel says that addresses are taken."""
    for line in vfio.reserved_regions(vfio.group_of(bdf)).splitlines():
        first, last, kind = int(line.split()[0], 16), int(line.split()[1], 16), line.split()[2]
        if kind == "direct":
            raise TakeOverError(f"{bdf}: the firmware has it use {first:#x}-{last:#x} (RMRR)")
        if kind == "direct-relaxable":
            continue
        for piece in domain.pieces:
            if piece.iova <= last and first < piece.iova + piece.length:
                raise TakeOverError(
                    f"{bdf}: {domain.name} maps {piece.iova:#x}, {piece.length:#x} bytes: VFIO "
                    f"takes no addresses from {first:#x} to {last:#x} ({kind})"
                )


# ------------------------------------------------------------------------------ memory


class Memory:
    """The region's memory, and BARs, mapped into this process where they are asked for.

    The region itself: VFIO cannot pin pages of a FUSE mount.
    """

    def __init__(self, export: dict[str, Any]) -> None:
        place = export["region"]["mmap"]
        if place is None:
            raise TakeOverError(f"{export['region']['name']}: nothing that a program could map")
        self._path = Path(place["path"])
        self._start, self._length = int(place["offset"]), int(place["length"])
        self._region: list[tuple[int, int, mmap.mmap]] = []
        self._bars: dict[tuple[str, int], mmap.mmap] = {}

    @property
    def is_physical(self) -> bool:
        """Whether it is mapped through /dev/mem."""
        return self._path == Path("/dev/mem")

    def map(self, pieces: Sequence[Piece]) -> None:
        """Map what pieces need, in as few mappings as possible."""
        for bar in {piece.bar for piece in pieces if piece.bar is not None} - set(self._bars):
            self._bars[bar] = self._map_bar(*bar)
        align = _alignment(self._path)
        with self._path.open("r+b", buffering=0) as file:
            for start, end in _ranges(pieces, align):
                end = min(end, self._length)
                self._region.append((start, end, self._map_region(file.fileno(), start, end)))

    def _map_region(self, fd: int, start: int, end: int) -> mmap.mmap:
        flags = mmap.MAP_SHARED | mmap.MAP_POPULATE  # not in the hold: faults take their time
        try:
            return mmap.mmap(fd, end - start, flags, offset=self._start + start)
        except OSError as error:
            raise TakeOverError(f"{self._path}: cannot map it: {error.strerror}") from error

    def _map_bar(self, bdf: str, number: int) -> mmap.mmap:
        path = vfio.device_path(bdf) / f"resource{number}"
        with path.open("r+b", buffering=0) as file:
            return mmap.mmap(file.fileno(), os.fstat(file.fileno()).st_size)

    def address(self, piece: Piece) -> int:
        """Where a piece is in this process."""
        if piece.bar is not None:
            return _address(self._bars[piece.bar]) + piece.offset
        for start, end, mapping in self._region:
            if start <= piece.offset < end:
                return _address(mapping) + piece.offset - start
        raise TakeOverError(f"{piece.iova:#x}: not mapped")


def _alignment(path: Path) -> int:
    """What a mapping of the region has to begin and end at a multiple of."""
    info = path.stat()
    device = f"{os.major(info.st_rdev)}:{os.minor(info.st_rdev)}"
    align = Path(f"/sys/dev/char/{device}/align")  # device-dax's
    return int(align.read_text()) if align.exists() else max(_BLOCK, info.st_blksize)


def _ranges(pieces: Sequence[Piece], align: int) -> list[tuple[int, int]]:
    """Aligned ranges of the region that have all pieces in them; neighbours are one."""
    found: list[tuple[int, int]] = []
    for piece in sorted((p for p in pieces if p.bar is None), key=lambda p: p.offset):
        start = piece.offset - piece.offset % align
        end = -(-(piece.offset + piece.length) // align) * align
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((start, end))
    return found


def _address(mapping: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(mapping))


# ------------------------------------------------------------------------------ taking over


class TakeOver:
    """Takes domains over, and keeps what has been taken over until it is closed."""

    def __init__(self, export: dict[str, Any]) -> None:
        self._export = export
        self.taken: list[Taken] = []
        self._memory = Memory(export)

    def __enter__(self) -> TakeOver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self.close()

    def close(self) -> None:
        """Stop the devices, as VFIO does when they are closed, and end their address spaces."""
        while self.taken:
            taken = self.taken.pop()
            for device in taken.devices.values():
                device.close()
            taken.space.close()

    def take(self, domain: Domain, spare: str | None = None) -> Taken:
        """Take one domain over, with a hold of its devices.

        :param spare: a device that does nothing, in a group of its own. In the address space first,
            it has the memory pinned and mapped before the hold, which then does not depend on how
            much there is.
        :raises TakeOverError, VfioError: if that is within the hold, the message says so: the
            device then has its bus mastering off.
        """
        for bdf in domain.devices:
            prepare(bdf)
        if spare is not None:
            vfio.bind(spare)
        space = self._address_space(domain)
        taken = Taken(domain.name, space)
        self.taken.append(taken)
        self._memory.map(domain.pieces)
        for bdf in domain.devices:
            space.prepare(bdf)
        if spare is not None:
            space.add(spare)
            taken.devices[spare] = space.open(spare)
        mapped = space.ready
        if mapped:
            self._map(taken, domain)
        for group in domain.groups():
            self._switch(taken, domain, group, mapped=mapped)
            mapped = True
        return taken

    def _address_space(self, domain: Domain) -> vfio.AddressSpace:
        # iommufd pins pages, and neither a BAR nor memory that the kernel never had has any.
        pages = not self._memory.is_physical and all(piece.bar is None for piece in domain.pieces)
        return vfio.Ioas() if pages and vfio.has_iommufd(domain.devices[0]) else vfio.Container()

    def _switch(self, taken: Taken, domain: Domain, group: list[str], *, mapped: bool) -> None:
        """The hold: all devices of a group change from the old tables to the new ones."""
        masters = {bdf: vfio.read_config(bdf, vfio.PCI_COMMAND) for bdf in group}
        began = time.perf_counter()
        _hold_all(masters)
        try:
            for bdf in group:
                taken.space.add(bdf)
            if not mapped:
                self._map(taken, domain)
            for bdf in group:
                taken.devices[bdf] = taken.space.open(bdf)
            for bdf in group:
                if masters[bdf] & vfio.PCI_COMMAND_MASTER:
                    taken.devices[bdf].set_master(True)
        except (OSError, vfio.VfioError) as error:
            raise TakeOverError(
                f"{', '.join(group)}: stopped, bus mastering is off: {error}"
            ) from error
        held = (time.perf_counter() - began) * 1e3
        taken.hold_ms.update(dict.fromkeys(group, held))

    def _map(self, taken: Taken, domain: Domain) -> None:
        began = time.perf_counter()
        for piece in domain.pieces:
            taken.space.map(piece.iova, self._memory.address(piece), piece.length, piece.perm)
        taken.mapping_ms = (time.perf_counter() - began) * 1e3


def prepare(bdf: str) -> None:
    """Bind the device to vfio-pci in a way that leaves it as it is, also when it is opened."""
    reset = vfio.device_path(bdf) / "reset_method"
    if reset.exists():  # not there if the device cannot be reset, or before Linux 5.15
        reset.write_text("\n")
        if reset.read_text().strip():
            raise TakeOverError(f"{bdf}: opening it would reset it: see reset_method")
    vfio.bind(bdf)
    status = vfio.device_path(bdf) / "power/runtime_status"
    if status.exists() and status.read_text().strip() == "suspended":
        raise TakeOverError(f"{bdf}: vfio-pci has put it to sleep: load it with disable_idle_d3=1")


def _hold_all(commands: dict[str, int]) -> None:
    """Hold devices, which have these command registers. If one cannot be, all of them go on.

    :raises TakeOverError: their tables are the old ones, and they are at work.
    """
    try:
        for bdf in commands:
            hold(bdf)
    except (OSError, vfio.VfioError) as error:
        for bdf, command in commands.items():
            if command != _GONE:
                vfio.write_config(bdf, vfio.PCI_COMMAND, command)
        raise TakeOverError(f"{error}: its tables are the old ones") from error


def hold(bdf: str) -> None:
    """Have the device make no requests, and wait until those under way are done.

    :raises TakeOverError: it does not end them.
    """
    command = vfio.read_config(bdf, vfio.PCI_COMMAND)
    if command == _GONE:
        raise TakeOverError(f"{bdf}: it does not answer")
    express = _express_capability(bdf)
    vfio.write_config(bdf, vfio.PCI_COMMAND, command & ~vfio.PCI_COMMAND_MASTER)
    # The answer to this read comes behind the writes that the device has made before.
    vfio.read_config(bdf, vfio.PCI_COMMAND)
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while express and vfio.read_config(bdf, express + _EXPRESS_STATUS) & _TRANSACTIONS_PENDING:
        if time.monotonic() > deadline:
            raise TakeOverError(f"{bdf}: requests are under way for {_PATIENCE_SECONDS:g} s")


def _express_capability(bdf: str) -> int:
    """Where PCI Express's capability is in the configuration space; 0 if there is none."""
    at = vfio.read_config(bdf, _CAPABILITY_LIST) & 0xFC
    for _ in range(48):  # as many as there is room for: a broken list may be a circle
        if at < 0x40:
            return 0
        word = vfio.read_config(bdf, at)
        if word & 0xFF == _CAPABILITY_EXPRESS:
            return at
        at = word >> 8 & 0xFC
    return 0
