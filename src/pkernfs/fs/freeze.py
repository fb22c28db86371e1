"""The file system's side of a handover: freezing, the list, the record, and the mount after it.

The list is made and filled by the command; here it is kept in a file without a name, which only the
record in the state page refers to.
"""

from __future__ import annotations

import stat
from typing import NamedTuple

from pkernfs.errors import CorruptionError, InvalidError, NotFoundError, PkernfsError
from pkernfs.fs import comparison, state_page
from pkernfs.fs.file import Files
from pkernfs.fs.inode import InodeLife
from pkernfs.fs.segment_memory import SegmentMemory
from pkernfs.fs.super import Super
from pkernfs.layout import (
    ARRIVAL_FIRST_BOOT,
    ARRIVAL_LIVE_UPDATE,
    ARRIVAL_REMOUNT,
    MAGIC_STATE,
    NO_HANDOVER,
    NO_INO,
    NO_PHYSICAL,
    STATE_FROZEN,
    STATE_MOUNTED,
    STATE_PAGE,
    HandoverFields,
    HistoryFields,
    StateFields,
)
from pkernfs.quantities import Ino, PageNo, PhysAddr
from pkernfs.region import digest


class NewList(NamedTuple):
    """Room for a list: its inode, and the metadata pages that making it has changed."""

    ino: Ino
    pages: set[PageNo]


class Freezer:
    """The handover of one file system, before and after the kernel's change."""

    def __init__(
        self, state: Super, files: Files, life: InodeLife, segments: SegmentMemory
    ) -> None:
        self._super = state
        self._region = state.region
        self._store = state.store
        self._inodes = state.inodes
        self._files = files
        self._life = life
        self._segments = segments
        self._list_ino = NO_INO  # of the handover that is under way
        #: What the mount has found; None before it has looked.
        self.mount_report: comparison.MountReport | None = None

    # ------------------------------------------------------------------ before

    def thaw(self) -> None:
        """End the freeze, and the handover that it was for if there is one.

        After a failure meanwhile it stays read-only.

        :raises InvalidError: not frozen.
        """
        failure = self._super.thaw()
        page = self._store.read(STATE_PAGE, MAGIC_STATE)
        record = state_page.read_record(page)
        if state_page.load(page).state == STATE_FROZEN:
            self._super.set_state(state=STATE_MOUNTED, record=NO_HANDOVER)
        if failure:
            self._super.fail(failure)
            return
        for ino in {record.list_ino, self._list_ino} - {NO_INO}:
            self._drop_manifest(ino)
        self._list_ino = NO_INO
        self._life.reclaim_all()

    def _drop_manifest(self, ino: Ino) -> None:
        try:
            inode = self._inodes.get(ino)
            if inode.is_reg and not inode.nlink:
                self._life.evict(inode)
        except NotFoundError:
            pass

    def make_manifest(self, size: int) -> NewList:
        """Make room for a handover's list of ``size`` bytes, while frozen.

        :raises NoSpaceError: there is none; nothing was changed.
        :raises InvalidError: not frozen.
        """
        with self._super.handing_over():
            new = self._make_list(size)
        self._list_ino = new.ino
        return new

    def _make_list(self, size: int) -> NewList:
        touched: set[PageNo] = set()
        self._store.touched = touched
        ino = NO_INO
        try:
            with self._store:
                inode = self._life.new(stat.S_IFREG | 0o600, 0, 0)
                self._inodes.save(inode)
            ino = inode.ino
            self._super.run(lambda: self._files.grow(inode, size))
            with self._store:
                self._inodes.touch(inode)
                self._files.set_size(inode, size)
                self._inodes.save(inode)
        except BaseException:
            if ino:
                self._drop_manifest(ino)
            raise
        finally:
            self._store.touched = None
        return NewList(ino, touched)

    def write_manifest(self, ino: Ino, offset: int, data: bytes) -> None:
        """Fill a part of the list; no metadata changes.

        :raises InvalidError: not the list that :meth:`make_manifest` made, or beyond its end.
        """
        inode = self._inodes.get(ino)
        if not self._super.frozen or inode.nlink or offset < 0 or offset + len(data) > inode.size:
            raise InvalidError(f"the handover's list: cannot store {len(data)} bytes at {offset}")
        for low, length, at in self._files.pieces(ino, offset, len(data)):
            self._region.copy_in(at, data[low - offset : low - offset + length])

    def hand_over(self, list_ino: Ino, list_bytes: int, list_digest: int, flags: int) -> int:
        """Record that the frozen file system is handed over; the handover's number.

        :raises CorruptionError: the list is not what it should be.
        """
        if not self._super.frozen:
            raise InvalidError("not frozen")
        page = self._store.read(STATE_PAGE, MAGIC_STATE)
        record = HandoverFields(
            self.next_handover,
            self._super.clock(),
            self._super.boot_id(),
            list_ino,
            list_bytes,
            list_digest,
            flags,
            NO_PHYSICAL if self._region.phys_base is None else self._region.phys_base,
        )
        if state_page.load(page).state == STATE_FROZEN:
            raise InvalidError("handed over already")
        if list_ino and digest.crc64(self.read_list(record)) != list_digest:
            raise CorruptionError("the handover's list: its bytes did not arrive")
        self._super.set_state(state=STATE_FROZEN, record=record)
        self._region.sync()
        return record.number

    @property
    def next_handover(self) -> int:
        """The number of the next handover."""
        entries = state_page.read_history(self._store.read(STATE_PAGE, MAGIC_STATE))
        return 1 + max((entry.number for entry in entries), default=0)

    # ------------------------------------------------------------------ after

    def compare_handover(self, state: StateFields) -> comparison.MountReport:
        """See what kind of mount this is, and compare with the handover before it."""
        kind = ARRIVAL_REMOUNT if state.boot_id == self._super.boot_id() else ARRIVAL_LIVE_UPDATE
        if not state.mounts:
            kind = ARRIVAL_FIRST_BOOT
        mount_report = self.mount_report = comparison.MountReport(kind, self._super.clock())
        if state.state != STATE_FROZEN:
            return mount_report
        record = state_page.read_record(self._store.read(STATE_PAGE, MAGIC_STATE))
        mount_report.record = record
        if not record.list_ino:
            mount_report.trouble = "the handover has left no list to compare with"
            return mount_report
        try:
            data = self.read_list(record)
            comparison.load(self._super, self._files.extents, self._segments, data, mount_report)
        except PkernfsError as e:
            mount_report.trouble = str(e)
        base = NO_PHYSICAL if self._region.phys_base is None else self._region.phys_base
        if record.phys_base not in (base, NO_PHYSICAL):  # without one, nothing can depend on it
            mount_report.changes.add_structure(
                f"physical address: {_address(base)}, {_address(record.phys_base)} at the handover"
            )
        return mount_report

    def history_entry(self, before: StateFields) -> HistoryFields | None:
        """The history's entry for this mount; None if it is an ordinary one.

        :param before: the state that :meth:`compare_handover` was given.
        """
        mount_report = self.mount_report
        assert mount_report is not None
        record = mount_report.record
        if record is None and mount_report.kind != ARRIVAL_LIVE_UPDATE:
            return None
        return HistoryFields(
            record.number if record else 0,
            record.handed_over_at if record else 0,
            mount_report.mounted_at,
            record.boot_id if record else before.boot_id,
            self._super.boot_id(),
            mount_report.kind,
            mount_report.result,
            len(mount_report.changes),
        )

    def read_list(self, record: HandoverFields) -> bytes:
        """The bytes of the list of a record; its digest is not checked.

        :raises NotFoundError, CorruptionError: the record's inode is not a list's.
        """
        inode = self._inodes.get(record.list_ino)
        if not inode.is_reg or inode.nlink or inode.size != record.list_bytes:
            raise CorruptionError(f"the handover's list: inode {inode.ino} is something else")
        data = bytearray(inode.size)
        for offset, length, at in self._files.pieces(inode.ino, 0, inode.size):
            data[offset : offset + length] = self._region.view(at, length)
        return bytes(data)

    def end_verification(self) -> None:
        """The verifier has finished: note the result in the history."""
        self._inodes.watch = None
        mount_report = self.mount_report
        if mount_report is None or self._super.read_only:
            return
        with self._store:
            page = self._store.edit(STATE_PAGE, MAGIC_STATE)
            entries = state_page.read_history(page)
            if entries and entries[0].mounted_at == mount_report.mounted_at:
                state_page.set_newest(
                    page,
                    entries[0]._replace(
                        result=mount_report.result, changed=len(mount_report.changes)
                    ),
                )


def _address(physical: PhysAddr) -> str:
    return "none" if physical == NO_PHYSICAL else f"{physical:#x}"
