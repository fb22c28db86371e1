"""The tables that a unit walks for the running kernel, in the kernel's own memory; only read.

Nothing that is read is trusted: a kernel changes its tables whenever it likes, and a page may be
read between two of its stores. Time and memory are bounded, whatever is in there.
"""

from __future__ import annotations

from itertools import islice
from struct import Struct
from typing import NamedTuple

from pkernfs.errors import (
    InvalidError,
    NotFoundError,
    NotSupportedError,
    PermissionDeniedError,
    TableDamageError,
)
from pkernfs.host.kcore import Kcore, KcoreError
from pkernfs.host.sysroot import Host
from pkernfs.iommu.context_walk import KNOWN_PGTT, ContextReader, Device, Mode
from pkernfs.iommu.memory import Memory, Piece, Words
from pkernfs.iommu.page_pool import Mapping, TablePool
from pkernfs.iommu.page_walk import Code, Finding, check_tree, leaves, scan_tree
from pkernfs.layout import PAGE
from pkernfs.quantities import Iova, PhysAddr, RegionOff, SourceId
from pkernfs.region.region import Region
from pkernfs.units.unit import Unit
from pkernfs.vtd.entries import (
    ENTRIES,
    PGTT_FIRST_STAGE,
    PGTT_NESTED,
    PGTT_PASS_THROUGH,
    bdf_text,
    width_bits,
)
from pkernfs.vtd.registers import RootTableAddress

#: Pages of tables that are read at most: enough for 256 GiB that is mapped in 4 KiB pages.
MAX_PAGES = 1 << 17
#: Runs of consecutive memory that a domain may map.
MAX_RUNS = 1 << 19

_PAGE_OF_WORDS = Struct(f"<{ENTRIES}Q")
_MODES = {0: Mode.LEGACY, 1: Mode.SCALABLE}
_PASS_THROUGH = "its requests pass through untranslated (an identity domain)"
_REFUSED = {
    PGTT_FIRST_STAGE: "its requests are translated by first-stage tables, which pkernfs has not",
    PGTT_NESTED: "its requests are translated by nested tables, which pkernfs has not",
    PGTT_PASS_THROUGH: f"{_PASS_THROUGH}: it reaches memory that does not survive",
}


class MachineMemory:
    """All of this machine's memory: a region's own, and the kernel's through /proc/kcore.

    :param region: memory that is a region's, and not in /proc/kcore.
    :param pages: how many pages may be read after each :meth:`begin`.
    """

    def __init__(self, host: Host, region: Memory | None = None, pages: int = MAX_PAGES) -> None:
        self._host = host
        self._region = region
        self._kcore: Kcore | None = None
        self._pages = pages
        self._left = pages * PAGE

    def begin(self) -> None:
        """Count anew from here on."""
        self._left = self._pages * PAGE

    def __enter__(self) -> MachineMemory:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._kcore is not None:
            self._kcore.close()

    def words(self, physical: PhysAddr, count: int) -> tuple[int, ...] | None:
        """``count`` 8-byte words at a physical address; None if no memory is there.

        :raises PermissionDeniedError: /proc/kcore cannot be read.
        :raises TableDamageError: more than ``pages`` pages were read.
        """
        self._left -= 8 * count
        if self._left < 0:
            raise TableDamageError(f"more than {self._pages} pages of tables")
        if self._region is not None:
            found = self._region.words(physical, count)
            if found is not None:
                return found
        try:
            data = self._open().find_physical(physical, 8 * count)
        except OSError as e:
            raise PermissionDeniedError(f"/proc/kcore: {e.strerror}: {self._why(e)}") from None
        except KcoreError as e:
            raise PermissionDeniedError(f"the kernel's memory cannot be read: {e}") from None
        return None if data is None else tuple(memoryview(data).cast("Q"))

    def _open(self) -> Kcore:
        if self._kcore is None:
            self._kcore = Kcore(self._host)
        return self._kcore

    def _why(self, error: OSError) -> str:
        if isinstance(error, FileNotFoundError):
            return "a kernel without CONFIG_PROC_KCORE: the live tables cannot be read"
        lockdown = self._host.lockdown()
        if lockdown is not None:
            return f"kernel lockdown ({lockdown}): boot without Secure Boot and lockdown="
        return "root is needed (CAP_SYS_RAWIO)"


class KernelTables:
    """The tables that one unit walks now.

    :raises NotFoundError: it does not translate.
    :raises NotSupportedError: its tables are of a mode that nobody here knows.
    :raises TableDamageError: not all of root, context and PASID tables can be read.
    :raises PermissionDeniedError: see :class:`MachineMemory`.
    """

    def __init__(self, unit: Unit, memory: Words) -> None:
        self.unit = unit
        self.name = unit.name
        self._memory = memory
        state = unit.state()
        if not state.translating:
            raise NotFoundError(
                f"{unit.name}: the kernel's driver has it, and it does not translate"
            )
        mode = _MODES.get(RootTableAddress.TTM.get(state.root_register))
        if mode is None:
            raise NotSupportedError(
                f"{unit.name}: tables of another mode than legacy and scalable: "
                f"got RTADDR {state.root_register:#x}"
            )
        self.root = state.root
        self.mode = mode
        self.entries = self._entries()

    def _entries(self) -> list[Device]:
        """Every present entry, by source id and PASID."""
        wrong: list[Finding] = []
        reader = ContextReader(
            self._memory, self.root, self.mode, wrong.append, kinds=KNOWN_PGTT, place="memory"
        )
        try:
            found = list(reader.devices())
        except TableDamageError as e:
            raise TableDamageError(f"{self.name}: its live tables: {e}") from None
        for finding in wrong:
            # Reserved bits are the unit's to refuse; what else is wrong may hide entries.
            if finding.code is not Code.RESERVED_BITS:
                raise TableDamageError(f"{self.name}: its live tables: {finding.message}")
        return found

    def entry(self, source_id: SourceId) -> Device:
        """The entry that a device's requests are translated by, with second-stage tables.

        :raises NotFoundError: there is none.
        :raises NotSupportedError: it is of another kind, or there are several: the reason.
        """
        name = bdf_text(source_id)
        mine = [e for e in self.entries if e.source_id == source_id]
        if not mine:
            raise NotFoundError(
                f"device {name}: no live domain in {self.name}: bind it to vfio-pci and have a "
                "VMM map its memory first"
            )
        others = [e.pasid for e in mine if e.pasid]
        if others:
            raise NotSupportedError(f"device {name}: PASID {others[0]} is in use: stop its user")
        [entry] = mine
        if entry.kind in _REFUSED:
            raise NotSupportedError(f"device {name}: {_REFUSED[entry.kind]}: {_remedy(entry)}")
        return entry

    def users_of_id(self, domain_id: int, table: PhysAddr) -> list[Device]:
        """Entries that have a domain id, but not the page tables at ``table``."""
        return [e for e in self.entries if e.domain_id == domain_id and e.table != table]

    def mappings(self, entry: Device) -> list[Mapping]:
        """List what a second-stage entry's tables map, in order, neighbours joined.

        :raises TableDamageError: they are damaged, or too many.
        """
        try:
            return read_second_stage(self._memory, entry.table, entry.levels)
        except TableDamageError as e:
            raise TableDamageError(
                f"device {bdf_text(entry.source_id)}: its live tables: {e}"
            ) from None


class Shape(NamedTuple):
    """Mode and levels of tables: a region's can stand for a kernel's of the same shape only."""

    mode: Mode
    levels: int

    def __str__(self) -> str:
        return f"{self.mode.name.lower()} mode with {self.levels} levels"


def check_shape(source_id: SourceId, kernel: Shape, ours: Shape) -> None:
    """:raises InvalidError: a region's tables are of another shape than a device's kernel ones."""
    if kernel != ours:
        mode = kernel.mode.name.lower()
        raise InvalidError(
            f"device {bdf_text(source_id)}: its live tables are of {kernel}, "
            f"the region's of {ours}: detach all devices, and pkernfs iommu create "
            f"--mode {mode} --levels {kernel.levels}"
        )


def _remedy(entry: Device) -> str:
    if entry.kind == PGTT_PASS_THROUGH:
        return "bind it to vfio-pci, and boot without iommu=pt if it has no domain then"
    return "boot with intel_iommu=on,sm_off"


# ---------------------------------------------------------------------- second stage


def read_second_stage(memory: Words, table: PhysAddr, levels: int) -> list[Mapping]:
    """List what second-stage tables map, in order, neighbours joined, reading them page by page.

    :raises TableDamageError: a cycle, a table that is nowhere, reserved bits, too much of it.
    """
    with Region.anonymous(MAX_PAGES * PAGE) as region:  # it costs what is stored to it
        copy = _Copy(region, memory)
        for _run in leaves(copy.read, table, levels):
            pass
        pool = TablePool(region, copy.pieces())
        report = check_tree(pool, table, levels, name="live")
        if report.findings:
            raise TableDamageError(report.findings[0].message)
        end = Iova(1 << width_bits(levels))
        found = list(islice(scan_tree(pool, table, levels, Iova(0), end), MAX_RUNS + 1))
    if len(found) > MAX_RUNS:
        raise TableDamageError(f"it maps more than {MAX_RUNS} pieces of memory")
    return found


class _Copy:
    """A copy of tables, each once, in the order in which they are read."""

    def __init__(self, region: Region, memory: Words) -> None:
        self._region = region
        self._memory = memory
        self._offsets: dict[PhysAddr, RegionOff] = {}

    def read(self, physical: PhysAddr, level: int) -> tuple[int, ...]:
        """The words of a table, which are copied."""
        known = physical in self._offsets
        full = len(self._offsets) == MAX_PAGES
        words = None if known or full or physical % PAGE else self._memory.words(physical, ENTRIES)
        if words is None:
            why = "reached a second time" if known else "not in memory, or too many"
            raise TableDamageError(f"page table of level {level} at {physical:#x}: {why}")
        offset = self._offsets[physical] = RegionOff(len(self._offsets) * PAGE)
        self._region.copy_in(offset, _PAGE_OF_WORDS.pack(*words))
        return words

    def pieces(self) -> list[Piece]:
        """List what was copied, as :class:`TablePool` wants it."""
        return [Piece(at, offset, PAGE) for at, offset in sorted(self._offsets.items())]
