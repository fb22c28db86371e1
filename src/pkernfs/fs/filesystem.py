"""A mounted file system, put together from its parts: every operation, synchronous, without FUSE.

The parts share one :class:`~pkernfs.fs.super.Super`. Each operation runs to its end without giving
way to another one; what it changes in the metadata is one transaction (or several of which each
leaves a state that is before or after). All expected failures are :class:`PkernfsError`. While it
is mounted nobody else writes to the region.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from pkernfs.errors import BusyError, CorruptionError, PkernfsError, RegionError
from pkernfs.fs import comparison, superblock
from pkernfs.fs.conversion import Conversions
from pkernfs.fs.extents import ExtentMap
from pkernfs.fs.file import Files
from pkernfs.fs.freeze import Freezer
from pkernfs.fs.inode import InodeLife
from pkernfs.fs.namei import Namei
from pkernfs.fs.native_files import NativeFiles
from pkernfs.fs.pins import PinGuard, Pins
from pkernfs.fs.segment_table import SegmentTable
from pkernfs.fs.segments import Segments
from pkernfs.fs.super import Super
from pkernfs.fs.xattrs import Overflow
from pkernfs.layout import IOMMU_INO, ROOT_INO, STATE_CLEAN, STATE_FLAG_ERROR
from pkernfs.pool.pool import Pool
from pkernfs.quantities import Ino
from pkernfs.region.region import Region

log = logging.getLogger(__name__)


def _no_pool(_sb: superblock.Superblock) -> Pool | None:
    return None


class FileSystem:
    """A mounted file system; :func:`pkernfs.dma.mount.mount_filesystem` makes one.

    The operations are those of the parts, bound here: a call costs no frame more than the part's.
    """

    def __init__(
        self, state: Super, pins: Callable[[FileSystem], Pins], pool: Pool | None, *, wanted: bool
    ) -> None:
        self.super = state
        self.region = state.region
        self.superblock = state.superblock
        self.store = state.store
        extents = ExtentMap(state.store, state.blocks, state.pages)
        overflow = Overflow(state.store, state.pages)
        table = SegmentTable(state.store, state.pages)
        guard = PinGuard(state.inodes, extents, table)
        segments = self.segments = Segments(state, extents, table, pool, guard, wanted=wanted)
        files = self._files = Files(state, extents, segments, guard)
        life = self._life = InodeLife(state, extents, overflow, files, segments, guard)
        namei = self._namei = Namei(state, overflow, life, guard)
        self.conversions = Conversions(state, extents, files, life, segments, guard)
        self.natives = NativeFiles(state, segments)
        freezer = self._freezer = Freezer(state, files, life, segments)

        self.fail = state.fail
        self.sync = state.sync
        self.statfs = segments.statfs
        self.isolate_for_zeroing = state.isolate_for_zeroing
        self.next_dirty = state.next_dirty
        self.blocks = state.blocks
        self.finish_zeroing = state.finish_zeroing
        self.abandon_zeroing = state.abandon_zeroing
        self.run = segments.run

        self.lookup = namei.lookup
        self.find = namei.find
        self.opendir = namei.opendir
        self.readdir = namei.readdir
        self.create = namei.create
        self.tmpfile = namei.tmpfile
        self.mkdir = namei.mkdir
        self.symlink = namei.symlink
        self.readlink = namei.readlink
        self.link = namei.link
        self.unlink = namei.unlink
        self.rmdir = namei.rmdir
        self.rename = namei.rename

        self.read = files.read
        self.write = files.write
        self.fallocate = files.fallocate
        self.fallocate_steps = files.fallocate_steps
        self.seek = files.seek
        self.pieces = files.pieces
        self.extents = files.extents
        self.memory = files.memory
        self.holder = guard.holder

        self.inode = state.inodes.get
        self.stat = state.inodes.stat
        self.numbers = life.numbers
        self.has_orphans = life.has_orphans
        self.remember = life.remember
        self.forget = life.forget
        self.open = life.open
        self.is_open = life.is_open
        self.release = life.release
        self.setattr = life.setattr
        self.getxattr = life.getxattr
        self.listxattr = life.listxattr
        self.setxattr = life.setxattr
        self.removexattr = life.removexattr

        self.freeze = state.freeze
        self.thaw = freezer.thaw
        self.make_manifest = freezer.make_manifest
        self.write_manifest = freezer.write_manifest
        self.hand_over = freezer.hand_over
        self.end_verification = freezer.end_verification

        self.pins = guard.pins = pins(self)

    @property
    def read_only(self) -> bool:
        """Nobody may change anything now."""
        return self.super.read_only

    @property
    def frozen(self) -> bool:
        """Frozen for a handover."""
        return self.super.frozen

    @property
    def attribute_cache(self) -> dict[Ino, Any]:
        """For the caller to keep what it made of an inode's attributes, by number.

        An entry goes when the inode changes; all go when there are too many.
        """
        return self.super.inodes.attribute_cache

    @property
    def mount_report(self) -> comparison.MountReport | None:
        """The handover before this mount, and what has changed since."""
        return self._freezer.mount_report

    @property
    def next_handover(self) -> int:
        """The number of the next handover."""
        return self._freezer.next_handover

    # ------------------------------------------------------------------ mounting

    @classmethod
    def mount(
        cls,
        region: Region,
        *,
        pins: Callable[[FileSystem], Pins],
        open_pool: Callable[[superblock.Superblock], Pool | None] = _no_pool,
        segments: bool = True,
        park: bool = False,
        read_only: bool = False,
        clock: Callable[[], int] = time.time_ns,
    ) -> FileSystem:
        """Open the file system in a region; recovers what an interrupted writer left.

        :param pins: makes the pins of the file system, before anything in it is freed.
        :param open_pool: opens what segments come from, if the superblock says that there is it.
        :param segments: files get segments by themselves.
        :param park: some segments are restored later: the caller sees to those that are absent.
        :param clock: the time now, ns since 1970.
        :raises FormatError: no pkernfs, or one that this version must not touch.
        :raises CorruptionError: too damaged to be mounted.
        """
        sb = superblock.load(region)
        may_write = superblock.check_features(sb)
        if not may_write and region.writable and not read_only:
            log.warning("unknown ro_compat features %#x: read-only", sb.fields.feature_ro_compat)
        may_write = may_write and not read_only and region.writable
        pool = open_pool(sb) if sb.pool.pool else None
        fs = cls(Super(region, sb, clock, may_write), pins, pool, wanted=segments)
        fs._start(park=park)
        return fs

    def _start(self, *, park: bool) -> None:
        inodes, name = self.super.inodes, self.region.name
        state = self.super.state()
        if state.flags & STATE_FLAG_ERROR:
            log.warning("%s: errors were found earlier: run fsck.pkernfs", name)
        if state.state == STATE_CLEAN:
            inodes.used = state.inodes_used
            unfinished: list[Ino] = []
        else:
            unfinished = inodes.count_used()
        for reason in inodes.damaged:  # what is in there is lost, and nothing else
            log.error("%s: %s: run fsck.pkernfs", name, reason)
        if not inodes.get(ROOT_INO).is_dir:
            raise CorruptionError("root inode: not a directory")
        mount_report = self._freezer.compare_handover(state)
        if self.read_only:
            self.segments.restore()
            return
        history = self._freezer.history_entry(state)
        self.super.mark_mounted(state, mount_report.kind, mount_report.mounted_at, history)
        try:
            if inodes.get(IOMMU_INO).size:
                self.pins.load()  # from here on, what is held is known
        except PkernfsError as e:
            self.fail(f"iommu: what is mapped for DMA cannot be told: {e}")
            return
        unfinished += self.segments.restore(park=park)
        self._finish(unfinished)  # what cannot be completed is told, and tried at the next mount
        if mount_report.verifier is not None:
            inodes.watch = mount_report.verifier.changed_meanwhile

    def _finish(self, inos: list[Ino]) -> bool:
        """Complete what was interrupted, and destroy the segments that nobody has.

        False: a segment is lost or busy, so that something remains to be completed.
        """
        whole = True
        for ino in inos:
            try:
                self.run(lambda ino=ino: self._life.finish(self.super.inodes.get(ino)))  # type: ignore[misc]
            except (RegionError, BusyError) as e:
                log.error("%s: inode %d: left as it is: %s", self.region.name, ino, e)
                whole = False
        self.segments.reap()
        return whole

    def unmount(self) -> None:
        """Reclaim what was unlinked but open, and mark the region clean.

        One that was handed over stays as it is.
        """
        if self.frozen:
            self.region.sync()
        if self.read_only:
            self.segments.close()
            return
        inodes = self.super.inodes
        self._life.forget_all()
        self.segments.settle()
        self.segments.bring_all()
        whole = self._finish(inodes.count_used())
        self.segments.close()
        if inodes.damaged:
            self.fail(inodes.damaged[0])
            return
        if whole:
            self.super.mark_clean()
