"""What devices under VFIO reach by a kernel's own tables, in a made-up /proc/kcore."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pkernfs.dma.kernel_reach import KernelReach, under_vfio
from pkernfs.host.dmar import Dmar, UnitStructure
from pkernfs.host.iomem import Span
from pkernfs.host.sysroot import Host
from pkernfs.iommu.context_walk import Mode
from pkernfs.iommu.memory import Memory
from pkernfs.layout import PAGE
from pkernfs.quantities import Iova, PhysAddr, RegionOff, RegionRun
from pkernfs.region.region import Region
from pkernfs.units.discovery import FoundUnit
from pkernfs.units.mmio import MemoryWindow
from pkernfs.units.unit import Unit
from support.dmar_tables import add_device, config, drhd, table
from support.made_up_kernel import EDU, MIB, NIC, Kernel
from support.unit_rig import BUS_MASTER

AT = PhysAddr(1 << 41)
NAMES = {EDU: "0000:00:05.0", NIC: "0000:03:00.0"}


@pytest.fixture(params=[Mode.LEGACY, Mode.SCALABLE], ids=["legacy", "scalable"])
def kernel(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Kernel]:
    """Both devices are attached; that of edu maps 4 MiB at AT, that of the card what is behind."""
    made = Kernel(tmp_path, request.param)
    for number, device in enumerate((EDU, NIC)):
        made.domains[number].map(Iova(0), PhysAddr(AT + 4 * number * MIB), 4 * MIB, 3)
        made.root.attach(device, made.domains[number].root, 2 + number)
        add_device(tmp_path, NAMES[device], config(command=BUS_MASTER))
    acpi = tmp_path / "sys/firmware/acpi/tables"
    acpi.mkdir(parents=True)
    (acpi / "DMAR").write_bytes(table(drhd(0xFED9_0000, flags=1)))
    made.save()
    yield made
    made.close()


def bind(kernel: Kernel, driver: str, name: str) -> None:
    place = Path(kernel.ram.host.path(f"sys/bus/pci/drivers/{driver}"))
    place.mkdir(parents=True, exist_ok=True)
    (place / name).symlink_to("/nowhere")


def holder(kernel: Kernel, start: int, size: int, *, seen: bool = True) -> str | None:
    def find(host: Host, dmar: Dmar) -> list[FoundUnit]:
        unit = Unit("dmar0", MemoryWindow(kernel.window)) if seen else None
        structure = UnitStructure(0, 0, PhysAddr(0), PAGE, True, ())
        return [FoundUnit(structure, True, unit, "no /dev/mem")]

    with Region.anonymous(2 * MIB, phys_base=PhysAddr(1 << 42)) as region:
        memory = Memory(region, [RegionRun(RegionOff(0), 2 * MIB)])
        reach = KernelReach(memory, kernel.ram.host, find)
        return reach.holder([Span(PhysAddr(start), size)])


def test_a_device_under_vfio_is_named(kernel: Kernel) -> None:
    bind(kernel, "vfio-pci", NAMES[EDU])
    bind(kernel, "e1000e", NAMES[NIC])
    assert list(under_vfio(kernel.ram.host)) == [NAMES[EDU]]
    assert holder(kernel, AT + 2 * MIB, 2 * MIB) == f"device {NAMES[EDU]}"
    assert holder(kernel, AT - MIB, 2 * MIB) == f"device {NAMES[EDU]}"
    assert holder(kernel, AT - 2 * MIB, 2 * MIB) is None
    assert holder(kernel, AT + 4 * MIB, 2 * MIB) is None  # it is the kernel's own driver's
    bind(kernel, "mlx5-vfio-pci", NAMES[NIC])
    assert holder(kernel, AT + 4 * MIB, 2 * MIB) == f"device {NAMES[NIC]}"


def test_it_is_asked_anew(kernel: Kernel) -> None:
    bind(kernel, "vfio-pci", NAMES[EDU])
    assert holder(kernel, AT, 2 * MIB) is not None
    kernel.domains[0].unmap(Iova(0), 4 * MIB)
    kernel.save()
    assert holder(kernel, AT, 2 * MIB) is None


def test_one_device_of_which_it_cannot_be_seen(kernel: Kernel) -> None:
    for name in NAMES.values():
        bind(kernel, "vfio-pci", name)
    kernel.word(kernel.domains[0].root, (1 << 50) | 3)  # a table where no memory is
    kernel.save()
    assert holder(kernel, AT, 2 * MIB) is None
    assert holder(kernel, AT + 4 * MIB, 2 * MIB) == f"device {NAMES[NIC]}"


def test_what_cannot_be_seen_holds_nobody_up(kernel: Kernel) -> None:
    assert holder(kernel, AT, 2 * MIB) is None  # VFIO has no device
    bind(kernel, "vfio-pci", NAMES[EDU])
    assert holder(kernel, AT, 2 * MIB, seen=False) is None
    kernel.enable_translation(status=0)
    assert holder(kernel, AT, 2 * MIB) is None
    Path(kernel.ram.host.path("sys/firmware/acpi/tables/DMAR")).unlink()
    assert holder(kernel, AT, 2 * MIB) is None
