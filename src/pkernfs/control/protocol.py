"""The requests to the daemon of a mount, and the answers: a dataclass for each.

Those about tables are in :mod:`pkernfs.control.table_protocol`: a handover need not wait for them.

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

UNSIGNED = Between(0, 2**64 - 1)
Unsigned = Annotated[int, UNSIGNED]
Ino = Annotated[quantities.Ino, UNSIGNED]
PageNo = Annotated[quantities.PageNo, UNSIGNED]


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


class LostFile(Message):
    """A file whose segment is lost, or cannot be read, and why."""

    path: str
    why: str


class Verification(Message):
    """The outcome of the handover before this mount."""

    state: Literal["none", "running", "done"]
    trouble: str
    done_bytes: Unsigned
    total_bytes: Unsigned
    not_verified: Unsigned
    changes: tuple[ChangedFile, ...]
    lost: tuple[LostFile, ...] = ()


class HandoverStatus(Call[Verification], op="handover.status"):
    """Ask what has become of the handover before this mount."""


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


#: The requests of this module.
REQUESTS: tuple[type[Request[Any]], ...] = (
    Ping,
    Freeze,
    MakeManifest,
    WriteManifest,
    Commit,
    Abort,
    HandoverStatus,
    FindKexecNeeds,
    CrashJump,
    UndoCrashJump,
)
