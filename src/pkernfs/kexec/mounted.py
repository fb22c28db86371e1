"""A mounted file system, as a handover needs it: see :class:`MountedFileSystem`.

:mod:`pkernfs.kexec.daemon` reaches that of a mount, through its daemon; :mod:`pkernfs.kexec.local`
one of this process.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Set
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol

from pkernfs.pool.pool import Pool, Segment
from pkernfs.quantities import Ino, PageNo, SegmentNo
from pkernfs.region.region import Region


class Frozen(NamedTuple):
    """A file system that is frozen: the number of its next handover, and its UUID (16 bytes)."""

    number: int
    uuid: bytes


class ManifestFile(NamedTuple):
    """Room for a manifest: its inode, and the metadata pages that making it has changed."""

    ino: Ino
    pages: Set[PageNo]


class MountedFileSystem(Protocol):
    """Freezes, keeps a manifest, and records its handover."""

    @property
    def name(self) -> str:
        """Its name in messages."""

    def frozen(self) -> AbstractContextManager[Frozen]:
        """Freeze until the end of the context, or until the next mount after :meth:`commit`.

        :raises BusyError: files are open for writing, or it was handed over already.
        :raises ReadOnlyError: nothing can have changed.
        """

    def open_region(self) -> AbstractContextManager[Region]:
        """Open the region for reading."""

    def other_mappers(self) -> Iterator[str]:
        """Yield the processes that map the region for writing, but for the one that serves it."""

    def open_pool(self, region: Region) -> AbstractContextManager[Pool]:
        """Open the pool of the file system's segments, for reading.

        :raises RegionError: it is not there, or not as it was.
        """

    def segment_mappers(self, pool: Pool, rows: Iterable[Segment]) -> Iterator[str]:
        """Yield who maps segments, but for the process that serves them; and of which file."""

    def segment_paths(self) -> dict[SegmentNo, str]:
        """Return the path of the file that has each segment, from the mount point on."""

    def make_manifest(self, size: int) -> ManifestFile:
        """Make room for a manifest of so many bytes; the file system is frozen.

        :raises NoSpaceError: there is none; nothing was changed.
        """

    def write_manifest(self, ino: Ino, data: bytes) -> None:
        """Fill the manifest."""

    def commit(self, ino: Ino, digest: int, flags: int) -> int:
        """Record the handover; return its number.

        :param ino: of the manifest, whose CRC-64 is ``digest``; NO_INO: there is none.
        :param flags: HANDOVER_FLAG_* of the record.
        """

    def abort(self) -> None:
        """Undo a handover that was recorded.

        :raises InvalidError: there is none.
        """
