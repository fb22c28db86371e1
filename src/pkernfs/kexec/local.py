"""A file system of this process, as a handover needs it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from pkernfs.dma.mount import tables_of
from pkernfs.fs import comparison
from pkernfs.fs.filesystem import FileSystem
from pkernfs.kexec.mounted import Frozen, ManifestFile
from pkernfs.pool.pool import Pool, Segment
from pkernfs.quantities import Ino, SegmentNo
from pkernfs.region.region import Region


class LocalFileSystem:
    """Acts on a file system directly; a :class:`pkernfs.kexec.mounted.MountedFileSystem`."""

    def __init__(self, fs: FileSystem) -> None:
        self._fs = fs
        self._manifest_bytes = 0
        self._committed = False

    @property
    def name(self) -> str:
        """The region's name."""
        return self._fs.region.name

    @contextmanager
    def frozen(self) -> Iterator[Frozen]:
        """Freeze; thaw if the context ends before :meth:`commit`."""
        fs = self._fs
        fs.freeze()
        self._committed = False
        try:
            yield Frozen(fs.next_handover, fs.superblock.uuid)
        finally:
            if not self._committed:
                fs.thaw()

    def open_region(self) -> AbstractContextManager[Region]:
        """Lend the file system's own region."""
        return nullcontext(self._fs.region)

    def other_mappers(self) -> Iterator[str]:
        """Nobody else has the region: its lock is held."""
        return iter(())

    def open_pool(self, region: Region) -> AbstractContextManager[Pool]:
        """Lend the file system's own pool."""
        return nullcontext(self._fs.segments.need_pool())

    def segment_mappers(self, pool: Pool, rows: Iterable[Segment]) -> Iterator[str]:
        """Nobody is looked for: the file system is this process's own."""
        return iter(())

    def segment_paths(self) -> dict[SegmentNo, str]:
        """Find the path of the file that has each segment."""
        rows = self._fs.segments.table.rows.values()
        paths = comparison.paths_of({row.ino for row in rows}, self._fs.readdir)
        return {
            row.number: paths[row.ino].decode("utf-8", "backslashreplace")
            for row in rows
            if row.ino in paths
        }

    def make_manifest(self, size: int) -> ManifestFile:
        """Make room for a manifest of so many bytes.

        :raises NoSpaceError: there is none; nothing was changed.
        """
        ino, pages = self._fs.make_manifest(size)
        self._manifest_bytes = size
        return ManifestFile(ino, pages)

    def write_manifest(self, ino: Ino, data: bytes) -> None:
        """Fill the manifest."""
        self._fs.write_manifest(ino, 0, data)

    def commit(self, ino: Ino, digest: int, flags: int) -> int:
        """Record the handover; return its number."""
        tables_of(self._fs).clear_non_persistent()
        number = self._fs.hand_over(ino, self._manifest_bytes if ino else 0, digest, flags)
        self._committed = True
        return number

    def abort(self) -> None:
        """Undo a handover.

        :raises InvalidError: there is none.
        """
        self._fs.thaw()
