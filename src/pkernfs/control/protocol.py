"""The requests to the daemon of a mount, and the answers: a dataclass for each.

A request's bases say what answers it: ``Call[Reply]`` or ``Stream[Item]``. The annotations of its
fields say which values they may have; both ends check them where a line arrives. How lines look is
in :mod:`pkernfs.control.wire`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pkernfs import quantities
from pkernfs.control.codec import Between
from pkernfs.control.message import Message
from pkernfs.control.wire import Call, Request, Stream
from pkernfs.dma.output import Question, Record, Status, Text

_UNSIGNED = Between(0, 2**64 - 1)
Unsigned = Annotated[int, _UNSIGNED]
Ino = Annotated[quantities.Ino, _UNSIGNED]
PageNo = Annotated[quantities.PageNo, _UNSIGNED]
PhysAddr = Annotated[quantities.PhysAddr, _UNSIGNED]
Iova = Annotated[quantities.Iova, _UNSIGNED]
SourceId = Annotated[quantities.SourceId, Between(0, 0xFFFF)]
DomainNumber = Annotated[int, Between(0, 0xFFFF)]  #: N of dom-N
Access = Annotated[int, Between(0, 3)]  #: READ, WRITE or both


class Nothing(Message):
    """The reply to a request that only does something."""


# ---------------------------------------------------------------------- the daemon


class Pong(Message):
    """The daemon of the mount. ``region`` is the region's spec, as in mountinfo."""

    pid: int
    region: str
    read_only: bool


class Ping(Call[Pong], op="ping"):
    """Ask who serves the mount."""


# ---------------------------------------------------------------------- handover


class OpenForWriting(Message):
    """The file system was not frozen: these inodes are open for writing."""

    inodes: tuple[Ino, ...]


class Frozen(Message):
    """The file system is frozen; ``number`` will be that of the handover."""

    number: Unsigned
    uuid: bytes


class Freeze(Stream[OpenForWriting | Frozen], op="handover.freeze"):
    """Freeze as long as the client listens, or until it commits."""


class ManifestFile(Message):
    """Room for a manifest: its inode, and the pages of metadata that making it has changed."""

    ino: Ino
    pages: tuple[PageNo, ...]


class MakeManifest(Call[ManifestFile], op="handover.make_manifest"):
    """Make room for a manifest of ``size`` bytes; the file system is frozen."""

    size: Unsigned


class WriteManifest(Call[Nothing], op="handover.write_manifest"):
    """Store ``data`` at ``offset`` of the manifest ``ino``."""

    ino: Ino
    offset: Unsigned
    data: bytes


class Committed(Message):
    """The handover has this number."""

    number: Unsigned


class Commit(Call[Committed], op="handover.commit"):
    """Record the handover, with the manifest ``ino`` of this digest (CRC-64) unless that is 0.

    ``flags`` are HANDOVER_FLAG_* of the record.
    """

    ino: Ino
    digest: Unsigned
    flags: Unsigned


class Abort(Call[Nothing], op="handover.abort"):
    """Undo a handover."""


class ChangedFile(Message):
    """A file that has changed since the handover; the path "" is the file system itself."""

    path: str
    what: str


class Verification(Message):
    """The outcome of the handover before this mount."""

    state: Literal["none", "running", "done"]
    trouble: str
    done_bytes: Unsigned
    total_bytes: Unsigned
    not_verified: Unsigned
    changes: tuple[ChangedFile, ...]


class HandoverStatus(Call[Verification], op="handover.status"):
    """Ask what has become of the handover before this mount."""


# ---------------------------------------------------------------------- tables


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


# ---------------------------------------------------------------------- kexec


class KexecNeeds(Message):
    """The needs of a mount's devices in a kexec.

    ``devices`` must go on, ``cleared`` are those that a handover detaches, by names as ``lspci -D``
    has them. ``units`` are above the former. ``scalable`` is the mode of the tables.
    """

    devices: tuple[str, ...]
    cleared: tuple[str, ...]
    scalable: bool
    units: tuple[str, ...]


class FindKexecNeeds(Call[KexecNeeds], op="kexec.needs"):
    """Ask what the devices of the mount need of a kexec."""


class CrashJump(Call[Nothing], op="kexec.jump"):
    """Take the step before the next kernel; with ``panic`` that kernel is the answer."""

    panic: bool


class UndoCrashJump(Call[Nothing], op="kexec.undo"):
    """Have the units walk the kernel's tables again."""


REQUESTS: tuple[type[Request[Any]], ...] = (
    Ping,
    Freeze,
    MakeManifest,
    WriteManifest,
    Commit,
    Abort,
    HandoverStatus,
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
    FindKexecNeeds,
    CrashJump,
    UndoCrashJump,
)
#: Every request by the name of its operation.
BY_OP = {request.op: request for request in REQUESTS}
