"""Live tables of a kernel: read from a made-up /proc/kcore, whatever is in there."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from pkernfs.errors import (
    NotFoundError,
    NotSupportedError,
    PermissionDeniedError,
    PkernfsError,
    TableDamageError,
)
from pkernfs.host.sysroot import Host
from pkernfs.iommu import READ, READ_WRITE, Memory, Mode
from pkernfs.layout import PAGE
from pkernfs.quantities import Iova, PhysAddr, RegionOff, RegionRun, SourceId
from pkernfs.units.kernel_tables import KernelTables, MachineMemory, read_second_stage
from pkernfs.units.mmio import MemoryWindow
from pkernfs.units.unit import Unit
from support.made_up_kernel import (
    AT,
    EDU,
    MIB,
    NIC,
    Kernel,
)

Make = Callable[..., Kernel]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    made: list[Kernel] = []

    def one(mode: Mode, levels: int = 4) -> Kernel:
        made.append(Kernel(tmp_path, mode, levels))
        return made[-1]

    yield one
    for kernel in made:
        kernel.close()


@pytest.fixture(params=[Mode.LEGACY, Mode.SCALABLE], ids=["legacy", "scalable"])
def kernel(request: pytest.FixtureRequest, make: Make) -> Kernel:
    return make(request.param)


@pytest.fixture
def legacy(make: Make) -> Kernel:
    return make(Mode.LEGACY)


@pytest.fixture
def scalable(make: Make) -> Kernel:
    return make(Mode.SCALABLE)


@pytest.mark.parametrize("levels", [3, 4, 5])
@pytest.mark.parametrize("mode", list(Mode))
def test_devices_and_what_they_map(make: Make, mode: Mode, levels: int) -> None:
    kernel = make(mode, levels)
    first, second, _ = kernel.domains
    first.map(Iova(0), PhysAddr(1 << 30), 5 * PAGE, READ_WRITE)
    first.map(Iova(2 * MIB), PhysAddr((1 << 30) + 2 * MIB), 8 * MIB, READ)
    second.map(Iova(1 << 30), PhysAddr(1 << 34), 1 << 30, READ_WRITE)
    kernel.root.attach(EDU, first.root, 5)
    kernel.root.attach(NIC, second.root, 6)
    live = kernel.live()
    assert (live.mode, live.root) == (mode, kernel.root.root)
    edu, nic = live.entry(EDU), live.entry(NIC)
    assert (edu.table, edu.levels, edu.domain_id) == (first.root, levels, 5)
    assert live.mappings(edu) == [
        (0, 1 << 30, 5 * PAGE, READ_WRITE),
        (2 * MIB, (1 << 30) + 2 * MIB, 8 * MIB, READ),
    ]
    assert live.mappings(nic) == [(1 << 30, 1 << 34, 1 << 30, READ_WRITE)]
    assert live.users_of_id(5, first.root) == []
    assert [e.source_id for e in live.users_of_id(6, first.root)] == [NIC]
    with pytest.raises(NotFoundError, match=r"0000:00:06.0: no live domain in dmar0: bind it"):
        live.entry(SourceId(0x30))


def test_a_domain_that_maps_nothing(kernel: Kernel) -> None:
    kernel.root.attach(EDU, kernel.domains[0].root, 5)
    live = kernel.live()
    assert live.mappings(live.entry(EDU)) == []


# ---------------------------------------------------------------------- other kinds


def test_pass_through(legacy: Kernel) -> None:
    legacy.root.attach(EDU, legacy.domains[0].root, 1)
    [entry] = legacy.root.devices()
    legacy.word(entry.where, entry.context_words[0] | 2 << 2)
    live = legacy.live()
    with pytest.raises(NotSupportedError, match=r"0000:00:05.0: its requests pass through"):
        live.entry(EDU)
    assert [e.source_id for e in live.users_of_id(1, PhysAddr(0x1000))] == [EDU]


@pytest.mark.parametrize(
    ("kind", "message"), [(1, "first-stage"), (3, "nested"), (4, "pass through")]
)
def test_other_kinds_in_scalable_mode(scalable: Kernel, kind: int, message: str) -> None:
    """They are refused, but who has which domain id is known of them as well."""
    scalable.root.attach(EDU, scalable.domains[0].root, 5)
    [entry] = scalable.root.devices()
    scalable.word(entry.where, entry.pasid_words[0] & ~(7 << 6) | kind << 6)
    scalable.word(PhysAddr(entry.where + 16), 0x123000)  # FSPTPTR
    live = scalable.live()
    with pytest.raises(NotSupportedError, match=message):
        live.entry(EDU)
    assert [e.source_id for e in live.users_of_id(5, scalable.domains[0].root)] == [EDU]


def test_another_pasid(scalable: Kernel) -> None:
    scalable.root.attach(EDU, scalable.domains[0].root, 5)
    [entry] = scalable.root.devices()
    for at, word in enumerate(entry.pasid_words):
        scalable.word(PhysAddr(entry.where + 3 * 64 + 8 * at), word)
    with pytest.raises(NotSupportedError, match=r"0000:00:05.0: PASID 3 is in use"):
        scalable.live().entry(EDU)


def test_units_that_are_not_to_be_read(legacy: Kernel) -> None:
    legacy.enable_translation(status=0)
    with pytest.raises(NotFoundError, match=r"dmar0: .* does not translate"):
        legacy.live()
    legacy.enable_translation(mode=3)
    with pytest.raises(NotSupportedError, match="dmar0: tables of another mode"):
        legacy.live()


# ---------------------------------------------------------------------- what cannot be read


def test_no_kcore(legacy: Kernel) -> None:
    legacy.save()
    (legacy.ram.root / "proc/kcore").unlink()
    memory = MachineMemory(legacy.ram.host)
    with pytest.raises(PermissionDeniedError, match="a kernel without CONFIG_PROC_KCORE"):
        KernelTables(Unit("dmar0", MemoryWindow(legacy.window)), memory)
    (legacy.ram.root / "proc/kcore").write_bytes(b"nothing")
    with pytest.raises(PermissionDeniedError, match="not what it should be"):
        KernelTables(Unit("dmar0", MemoryWindow(legacy.window)), memory)


def test_a_kernel_that_is_locked_down(legacy: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    legacy.ram.write("sys/kernel/security/lockdown", "none integrity [confidentiality]")

    def refuse(_host: Host) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("pkernfs.units.kernel_tables.Kcore", refuse)
    with pytest.raises(PermissionDeniedError, match=r"kernel lockdown .confidentiality.: boot"):
        legacy.live()


def test_a_root_table_that_is_nowhere(legacy: Kernel) -> None:
    legacy.window[0x20:0x28] = (1 << 45).to_bytes(8, "little")
    with pytest.raises(TableDamageError, match=r"dmar0: its live tables: root table .* outside"):
        legacy.live()


def test_tables_in_a_region_are_read_there(legacy: Kernel) -> None:
    """As a kdump kernel has them, which adopted them; no /proc/kcore has that memory."""
    legacy.domains[0].map(Iova(0), PhysAddr(1 << 30), PAGE, READ)
    region = Memory(legacy.region, [RegionRun(RegionOff(MIB), MIB)])
    with MachineMemory(Host("/nowhere"), region) as memory:
        found = read_second_stage(memory, legacy.domains[0].root, 4)
    assert found == [(0, 1 << 30, PAGE, READ)]


# ---------------------------------------------------------------------- damage


def test_cycles_and_tables_that_are_shared(legacy: Kernel) -> None:
    top = legacy.domains[0].root
    legacy.word(top, top | 3)
    with pytest.raises(TableDamageError, match=r"level 3 at .*: reached a second time"):
        read_second_stage(legacy.memory(), top, 4)
    legacy.word(top, top + PAGE | 3)
    legacy.word(PhysAddr(top + 8), top + PAGE | 3)
    with pytest.raises(TableDamageError, match="reached a second time"):
        read_second_stage(legacy.memory(), top, 4)


def test_tables_that_are_nowhere_and_reserved_bits(legacy: Kernel) -> None:
    top = legacy.domains[0].root
    legacy.word(top, 1 << 45 | 3)
    with pytest.raises(TableDamageError, match="0x200000000000: not in memory"):
        read_second_stage(legacy.memory(), top, 4)
    legacy.word(top, top + PAGE | 3)
    legacy.word(PhysAddr(top + PAGE), 1 << 62 | 1 << 30 | 0x83)
    with pytest.raises(TableDamageError, match="reserved bits set"):
        read_second_stage(legacy.memory(), top, 4)


def test_too_many_tables(legacy: Kernel) -> None:
    for at in range(20):
        legacy.domains[0].map(Iova(at << 30), PhysAddr(at << 21), PAGE, READ)
    assert len(read_second_stage(legacy.memory(), legacy.domains[0].root, 4)) == 20
    with pytest.raises(TableDamageError, match="more than 20 pages of tables"):
        read_second_stage(legacy.memory(pages=20), legacy.domains[0].root, 4)


@pytest.mark.slow("3 MiB of garbage, word by word")
@pytest.mark.parametrize("seed", range(12))
def test_garbage_is_refused_or_read_in_time(make: Make, seed: int) -> None:
    """All of RAM at random, with pointers into itself."""
    rng = random.Random(seed)
    kernel = make(rng.choice(list(Mode)))
    for page in range(0, 3 * MIB, PAGE):
        words = [rng.choice((0, rng.getrandbits(64), _pointer(rng))) for _ in range(512)]
        kernel.region.copy_in(RegionOff(page), b"".join(w.to_bytes(8, "little") for w in words))
    began = time.monotonic()
    with suppress(PkernfsError):
        live = kernel.live()
        for entry in live.entries:
            live.mappings(live.entry(entry.source_id))
    assert time.monotonic() - began < 30


def _pointer(rng: random.Random) -> int:
    return AT + rng.randrange(3 * MIB // PAGE) * PAGE | rng.choice((1, 3, 3, 3))
