"""The daemon of a mount: all that a handover and a kexec ask of it, through its control socket."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from functools import cached_property
from typing import TYPE_CHECKING

from pkernfs.control import client, protocol
from pkernfs.control.mounts import Mount
from pkernfs.errors import BusyError
from pkernfs.kexec.mounted import Frozen, ManifestFile
from pkernfs.quantities import Ino, SegmentNo
from pkernfs.region.region import Region

if TYPE_CHECKING:
    from pkernfs.kexec.needs import Needs
    from pkernfs.pool.pool import Pool, Segment

_PIECE_BYTES = 512 << 10  # of the manifest, in one request
_SHOWN = 8


class Daemon:
    """The mount that ``path`` is in: a :class:`pkernfs.kexec.mounted.MountedFileSystem`.

    Every method raises what the daemon failed with, or the reason why it cannot be asked.
    """

    def __init__(self, path: str) -> None:
        self._path = path

    @property
    def name(self) -> str:
        """The path, as it was given."""
        return self._path

    @cached_property
    def mount(self) -> Mount:
        """The mount.

        :raises InvalidError: the path is in none.
        """
        return client.find_mount(self._path)

    # ------------------------------------------------------------------ the handover

    @staticmethod
    def prepare_handover() -> None:
        """Have ready what is needed between :meth:`frozen` and :meth:`commit`."""
        client.prepare(
            protocol.Freeze, protocol.MakeManifest, protocol.WriteManifest, protocol.Commit
        )

    @contextmanager
    def frozen(self) -> Iterator[Frozen]:
        """Freeze, as long as this process lives; thaw if the context ends before :meth:`commit`.

        :raises BusyError: files are open for writing, or it was handed over already.
        """
        lease = client.stream(self._path, protocol.Freeze(), self.mount)
        try:
            told = next(lease)
            if isinstance(told, protocol.OpenForWriting):
                raise self._busy(set(told.inodes))
            yield Frozen(told.number, told.uuid)
            for _ in lease:  # its end: the daemon has let go
                pass
        finally:
            lease.close()

    def open_region(self) -> AbstractContextManager[Region]:
        """Map the region once more: a fault in this mapping does not hurt the daemon."""
        return Region.open(self.mount.source, write=False, lock=False)

    def other_mappers(self) -> Iterator[str]:
        """Yield the processes beside the daemon that map the region itself for writing."""
        from pkernfs.kexec import users

        served_by = None
        for user in users.mappers_of(self.mount.source):
            if served_by is None:
                served_by = client.call(self._path, protocol.Ping()).pid
            if user.pid != served_by:
                yield str(user)

    def open_pool(self, region: Region) -> AbstractContextManager[Pool]:
        """Open the pool once more, beside the daemon's, for reading.

        :raises RegionError: it is not there, or not as it was.
        """
        from pkernfs.fs import superblock
        from pkernfs.pool.opening import open_pool

        kind, granule = superblock.load(region).pool
        return closing(open_pool(kind, granule, region.place, write=False, lock=False))

    def segment_mappers(self, pool: Pool, rows: Iterable[Segment]) -> Iterator[str]:
        """Yield who maps segments beside the daemon, and of which file: one line for each."""
        from pkernfs.kexec import users

        served_by = client.call(self._path, protocol.Ping()).pid
        paths: dict[SegmentNo, str] | None = None
        for user, row in users.mappers_of_segments(pool, rows):
            if user.pid != served_by:
                if paths is None:
                    paths = self.segment_paths()
                yield f"{user} maps the memory of {paths.get(row.number, f'inode {row.ino}')}"

    def segment_paths(self) -> dict[SegmentNo, str]:
        """Ask for the path of the file that has each segment."""
        from pkernfs.control.segment_protocol import ListSegments

        rows = client.stream(self._path, ListSegments(), self.mount)
        return {row.number: row.path for row in rows if row.path}

    def make_manifest(self, size: int) -> ManifestFile:
        """Make room for a manifest of so many bytes.

        :raises NoSpaceError: there is none; nothing was changed.
        """
        made = client.call(self._path, protocol.MakeManifest(size), self.mount)
        return ManifestFile(made.ino, set(made.pages))

    def write_manifest(self, ino: Ino, data: bytes) -> None:
        """Fill the manifest."""
        for at in range(0, len(data), _PIECE_BYTES):
            piece = data[at : at + _PIECE_BYTES]
            client.call(self._path, protocol.WriteManifest(ino, at, piece), self.mount)

    def commit(self, ino: Ino, digest: int, flags: int) -> int:
        """Record the handover; return its number."""
        return client.call(self._path, protocol.Commit(ino, digest, flags), self.mount).number

    def abort(self) -> None:
        """Undo a handover.

        :raises InvalidError: there is none.
        """
        client.call(self._path, protocol.Abort())

    def _busy(self, inos: set[Ino]) -> BusyError:
        from pkernfs.kexec import users  # what is in the way is looked for only if something is

        who = list(users.users_of(self.mount, inos))
        if not who:
            where = ", ".join(f"inode {ino}" for ino in sorted(inos)[:_SHOWN])
            who = [f"{where} by a process that cannot be seen from here"]
        more = f" and {len(who) - _SHOWN} more" if len(who) > _SHOWN else ""
        return BusyError(f"{self._path}: open for writing: {'; '.join(who[:_SHOWN])}{more}")

    # ------------------------------------------------------------------ the kexec

    def needs(self) -> Needs:
        """Ask for the needs of the devices that depend on the mount's tables."""
        from pkernfs.kexec.needs import Needs

        told = client.call(self._path, protocol.FindKexecNeeds())
        return Needs(list(told.devices), list(told.cleared), told.scalable, list(told.units))

    def crash_jump(self, *, panic: bool) -> None:
        """Have the daemon give units the region's root table; ``panic``: and end this kernel."""
        client.call(self._path, protocol.CrashJump(panic))

    def undo_crash_jump(self) -> None:
        """Have the daemon give units the kernel's root table again."""
        client.call(self._path, protocol.UndoCrashJump())
