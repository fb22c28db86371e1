"""The requests about IOMMU tables and their answers, as in :mod:`pkernfs.control.protocol`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pkernfs import quantities
from pkernfs.control.codec import Between
from pkernfs.control.message import Message
from pkernfs.control.protocol import UNSIGNED, Ino, Nothing, Unsigned
from pkernfs.control.wire import Call, Request, Stream
from pkernfs.dma.output import Question, Record, Status, Text

PhysAddr = Annotated[quantities.PhysAddr, UNSIGNED]
Iova = Annotated[quantities.Iova, UNSIGNED]
SourceId = Annotated[quantities.SourceId, Between(0, 0xFFFF)]
DomainNumber = Annotated[int, Between(0, 0xFFFF)]  #: N of dom-N
Access = Annotated[int, Between(0, 3)]  #: READ, WRITE or both


class CreateTables(Call[Nothing], op="iommu.create"):
    """Make root-pgtables of ``size`` bytes, or set mode and levels of one that is not in use."""

    mode: Literal["legacy", "scalable"]
    levels: Unsigned
    size: Unsigned


class ByteCount(Message):
    """The number of bytes that were mapped, or are not mapped any more."""

    count: Unsigned


class MapFile(Call[ByteCount], op="iommu.map_file"):
    """Map a range of a file; to its end if ``length`` is None."""

    domain: DomainNumber
    iova: Iova
    ino: Ino
    offset: Unsigned
    length: Unsigned | None
    access: Access


class MapBar(Call[ByteCount], op="iommu.map_bar"):
    """Map a range of memory BAR ``bar`` of a device; to its end if ``length`` is None."""

    domain: DomainNumber
    iova: Iova
    device: SourceId
    bar: Annotated[int, Between(0, 5)]
    offset: Unsigned
    length: Unsigned | None
    access: Access


class Unmap(Call[ByteCount], op="iommu.unmap"):
    """Unmap a range of addresses."""

    domain: DomainNumber
    iova: Iova
    length: Unsigned


class Attached(Message):
    """The device is attached by this domain id."""

    domain_id: Unsigned


class Attach(Call[Attached], op="iommu.attach"):
    """Have a device's requests translated by a domain."""

    domain: DomainNumber
    device: SourceId


class Detach(Call[Nothing], op="iommu.detach"):
    """Have a device's requests translated no more."""

    device: SourceId


class Persist(Call[Nothing], op="iommu.persist"):
    """Have a handover keep a device's entries, or clear them."""

    device: SourceId
    on: bool


class Snapshot(Call[Attached], op="iommu.snapshot"):
    """Have a domain be what the kernel's tables hold for a device, which is attached to it."""

    domain: DomainNumber
    device: SourceId


class CheckKernelTables(Call[Nothing], op="iommu.check_kernel_tables"):
    """Compare what the kernel's tables hold for the devices with the region's."""


class UnitNames(Message):
    """Units, as the kernel names them."""

    names: tuple[str, ...]


class Switch(Call[UnitNames], op="iommu.switch"):
    """Have the units that the kernel drives walk these tables; only a jump may follow."""


class Activate(Call[UnitNames], op="iommu.activate"):
    """Have units walk these tables; the reply names all that do then."""

    units: tuple[str, ...]
    cut_off: bool


class Deactivate(Call[UnitNames], op="iommu.deactivate"):
    """Have units translate no more; the reply names them."""

    units: tuple[str, ...]
    force: bool


class Devices(Message):
    """The devices that are attached."""

    source_ids: tuple[SourceId, ...]


class ListDevices(Call[Devices], op="iommu.devices"):
    """Ask for the devices that are attached."""


class RootTable(Message):
    """The physical address of the root table; None: there is none."""

    address: PhysAddr | None


class FindRoot(Call[RootTable], op="iommu.root"):
    """Ask for the root table."""


class Read(Stream[Text | Record | Status], op="iommu.read"):
    """Ask what the tables say; see :class:`pkernfs.dma.output.Question`."""

    what: Literal["translate", "show", "check", "export"]
    domain: DomainNumber | None = None
    device: SourceId | None = None
    iova: Iova | None = None
    pasid: Unsigned | None = None
    access: Access = 0
    as_json: bool = False
    merge: bool = False

    def question(self) -> Question:
        """The same, for who answers it."""
        return Question(
            self.what,
            self.domain,
            self.device,
            self.iova,
            self.pasid,
            self.access,
            self.as_json,
            self.merge,
        )


#: The requests of this module.
REQUESTS: tuple[type[Request[Any]], ...] = (
    CreateTables,
    MapFile,
    MapBar,
    Unmap,
    Attach,
    Detach,
    Persist,
    Snapshot,
    CheckKernelTables,
    Switch,
    Activate,
    Deactivate,
    ListDevices,
    FindRoot,
    Read,
)
