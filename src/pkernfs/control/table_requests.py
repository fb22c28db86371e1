"""Requests about tables, and about a kexec with devices that depend on them.

Changes run to their end on the event loop, as the file system's own operations do. What takes long
(walking all names, a check, a long listing) gives way after each step.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Generator
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import trio

from pkernfs.control import protocol, table_protocol
from pkernfs.control.protocol import Nothing
from pkernfs.control.session import Session
from pkernfs.control.table_protocol import Attached, ByteCount, UnitNames
from pkernfs.dma import reports, snapshot
from pkernfs.dma.activation import Activation
from pkernfs.dma.crash_jump import CrashJump
from pkernfs.dma.mount import tables_of
from pkernfs.dma.output import Output, Pause, Record, Status, Text
from pkernfs.errors import TableDamageError
from pkernfs.fs.names import ROOT_PGTABLES
from pkernfs.host.bars import read_bar
from pkernfs.host.sysroot import HOST
from pkernfs.iommu.check import Report
from pkernfs.iommu.config import Config
from pkernfs.iommu.context_walk import Mode
from pkernfs.iommu.memory import overlaps
from pkernfs.layout import IOMMU_INO
from pkernfs.quantities import Ino, PhysRange
from pkernfs.vtd.entries import check_source_id

if TYPE_CHECKING:
    from pkernfs.control.server import Handlers
    from pkernfs.fs.filesystem import FileSystem

_STEP_SECONDS = 0.0005

T = TypeVar("T")


class TableRequests:
    """The handlers of one mount. What the requests mean is said with their classes."""

    def __init__(self, fs: FileSystem, session: Session) -> None:
        self._fs = fs
        self._session = session
        # Held by a change over the zeroing of what it maps, and by a check over its thread: both
        # need tables that stay as they are. Nothing that serves the file system ever takes it.
        self._lock = trio.Lock()
        self._jump = CrashJump(fs)

    def handlers(self) -> Handlers:
        """The handlers by request."""
        return {
            table_protocol.CreateTables: self.create,
            table_protocol.MapFile: self.map_file,
            table_protocol.MapBar: self.map_bar,
            table_protocol.Unmap: self.unmap,
            table_protocol.Attach: self.attach,
            table_protocol.Detach: self.detach,
            table_protocol.Persist: self.persist,
            table_protocol.Snapshot: self.snapshot,
            table_protocol.CheckKernelTables: self.check_kernel_tables,
            table_protocol.Switch: self.switch,
            table_protocol.Activate: self.activate,
            table_protocol.Deactivate: self.deactivate,
            table_protocol.ListDevices: self.devices,
            table_protocol.FindRoot: self.root,
            table_protocol.Read: self.read,
            protocol.FindKexecNeeds: self.kexec_needs,
            protocol.CrashJump: self.crash_jump,
            protocol.UndoCrashJump: self.undo_crash_jump,
        }

    # ------------------------------------------------------------------ changes

    async def create(self, request: table_protocol.CreateTables) -> Nothing:
        """Make root-pgtables."""
        config = Config(Mode[request.mode.upper()], request.levels)
        await self._change(lambda: tables_of(self._fs).create_root(config, request.size))
        return Nothing()

    async def map_file(self, request: table_protocol.MapFile) -> ByteCount:
        """Map a range of a file."""
        r, tables = request, tables_of(self._fs)
        count = await self._change(
            lambda: tables.map_file(r.domain, r.iova, r.ino, r.offset, r.length, r.access),
            r.domain,
        )
        await self._session.invalidate(r.ino)
        return ByteCount(count)

    async def map_bar(self, request: table_protocol.MapBar) -> ByteCount:
        """Map a range of a BAR."""
        r, tables = request, tables_of(self._fs)
        bar = read_bar(r.device, r.bar)
        count = await self._change(
            lambda: tables.map_bar(r.domain, r.iova, bar, r.offset, r.length, r.access), r.domain
        )
        return ByteCount(count)

    async def unmap(self, request: table_protocol.Unmap) -> ByteCount:
        """Unmap a range of addresses."""
        domain, iova, length = request.domain, request.iova, request.length
        count = await self._change(lambda: tables_of(self._fs).unmap(domain, iova, length), domain)
        return ByteCount(count)

    async def attach(self, request: table_protocol.Attach) -> Attached:
        """Attach a device."""
        domain, device = request.domain, request.device
        return Attached(await self._change(lambda: tables_of(self._fs).attach(domain, device)))

    async def detach(self, request: table_protocol.Detach) -> Nothing:
        """Detach a device."""
        await self._change(lambda: tables_of(self._fs).detach(request.device))
        return Nothing()

    async def persist(self, request: table_protocol.Persist) -> Nothing:
        """Set whether a handover keeps a device's entries."""
        await self._change(lambda: tables_of(self._fs).persist(request.device, request.on))
        return Nothing()

    async def snapshot(self, request: table_protocol.Snapshot) -> Attached:
        """Read the kernel's tables in a thread, plan in steps, then change ours at once."""
        number, source_id = request.domain, request.device
        check_source_id(source_id)
        tables = tables_of(self._fs)
        tables.domain(number)
        kept = {d.source_id for d in tables.devices()} - tables.non_persistent()
        async with self._lock:
            with Activation(self._fs).kernel_units() as kernel:
                # Only memory that does not change hands meanwhile is read there.
                reading = await trio.to_thread.run_sync(snapshot.read, kernel, source_id, kept)
            plan = await self._in_steps(snapshot.plan(self._fs, HOST, reading))
        return Attached(await self._change(lambda: snapshot.apply(self._fs, plan, number), number))

    async def check_kernel_tables(self, request: table_protocol.CheckKernelTables) -> Nothing:
        """See :meth:`Activation.check_kernel_tables`."""
        await self._looking(Activation(self._fs).check_kernel_tables)
        return Nothing()

    async def switch(self, request: table_protocol.Switch) -> UnitNames:
        """See :meth:`Activation.switch_units`; nothing but the jump may follow."""
        async with self._lock:
            return UnitNames(tuple(Activation(self._fs).switch_units()))

    async def activate(self, request: table_protocol.Activate) -> UnitNames:
        """Check the tables, and enable translation by them."""
        async with self._lock:
            report = await self._examine()
            if not report.clean:
                raise TableDamageError(
                    f"activate: the tables are not sound: {report.found} problems, the first: "
                    f"{report.findings[0].message}: see pkernfs iommu check"
                )
            names = Activation(self._fs).activate(list(request.units), block_others=request.cut_off)
            return UnitNames(tuple(names))

    async def deactivate(self, request: table_protocol.Deactivate) -> UnitNames:
        """Have units translate no more."""
        async with self._lock:
            names = Activation(self._fs).deactivate(list(request.units), forced=request.force)
            return UnitNames(tuple(names))

    async def kexec_needs(self, request: protocol.FindKexecNeeds) -> protocol.KexecNeeds:
        """See :meth:`CrashJump.needs`."""
        needs = await self._looking(self._jump.needs)
        return protocol.KexecNeeds(
            tuple(needs.devices), tuple(needs.cut), needs.scalable, tuple(needs.units)
        )

    async def crash_jump(self, request: protocol.CrashJump) -> Nothing:
        """Take the step before the next kernel; with ``panic`` there is no answer.

        The loop stands still meanwhile: nothing else is to happen between the last look and the
        jump, and the file system is frozen.
        """
        async with self._lock:
            self._jump.start(panic=request.panic)
        return Nothing()

    async def undo_crash_jump(self, request: protocol.UndoCrashJump) -> Nothing:
        """See :meth:`CrashJump.undo`."""
        async with self._lock:
            self._jump.undo()
        return Nothing()

    async def _looking(self, look: Callable[[], T]) -> T:
        """Look at the tables in a thread, while they do not change."""
        async with self._lock:
            with tables_of(self._fs).reading():
                return await trio.to_thread.run_sync(look)

    async def _change(self, operation: Callable[[], T], number: int | None = None) -> T:
        """Change root-pgtables, and dom-``number``."""
        had_root = self._root_ino()
        async with self._lock:
            done = await self._session.with_zeroing(operation)
        # What the kernel has of these files, or knows to be missing, is old.
        if not had_root and self._root_ino():
            await self._session.invalidate_name(IOMMU_INO, ROOT_PGTABLES)
        names = [ROOT_PGTABLES] if number is None else [ROOT_PGTABLES, b"dom-%d" % number]
        for name in names:
            if ino := self._fs.find(IOMMU_INO, name):
                await self._session.invalidate(ino, data=True)
        return done

    def _root_ino(self) -> Ino:
        return self._fs.find(IOMMU_INO, ROOT_PGTABLES)

    # ------------------------------------------------------------------ reading

    async def devices(self, request: table_protocol.ListDevices) -> table_protocol.Devices:
        """List the devices that are attached."""
        return table_protocol.Devices(tuple(d.source_id for d in tables_of(self._fs).devices()))

    async def root(self, request: table_protocol.FindRoot) -> table_protocol.RootTable:
        """Tell where the root table is."""
        root = tables_of(self._fs).root
        return table_protocol.RootTable(None if root is None else root.root)

    async def read(self, request: table_protocol.Read) -> AsyncIterator[Text | Record | Status]:
        """Answer a question; text of one step is one item."""
        question = request.question()
        if question.what == "check":
            output = await self._check(question.as_json)
        else:
            if question.what == "export":
                await self._bring_mapped()
            output = reports.answer(self._fs, question)
        began = time.monotonic()
        text: list[str] = []
        for item in output:
            if isinstance(item, Text):
                text.append(item.text)
            elif not isinstance(item, Pause):
                yield item
            if time.monotonic() - began > _STEP_SECONDS:
                if text:
                    yield Text("".join(text))
                    text = []
                await self._session.pause()
                began = time.monotonic()
        if text:
            yield Text("".join(text))

    async def _bring_mapped(self) -> None:
        """Restore the segments that domains map: a VMM opens them by what an export says."""
        segments = self._fs.segments
        rows = [row for n in segments.absent if (row := segments.table.rows.get(n)) is not None]
        held = self._fs.pins.held_memory([piece for row in rows for piece in row.pieces])
        ranges = [PhysRange(span.start, span.end) for span in held]
        for row in rows:
            if any(overlaps(ranges, PhysRange(p.start, p.end)) for p in row.pieces):
                await self._session.with_zeroing(partial(segments.bring, row.number))
            await self._session.pause()

    async def _check(self, as_json: bool) -> Output:
        async with self._lock:
            report = await self._examine()
        return reports.check_text(report, as_json=as_json)

    async def _examine(self) -> Report:
        """Check the tables in a thread, while they do not change."""
        with tables_of(self._fs).reading():
            given = await self._in_steps(reports.prepare_check(self._fs))
            return await trio.to_thread.run_sync(given.run)

    async def _in_steps(self, steps: Generator[Pause, None, T]) -> T:
        while True:
            began = time.monotonic()
            while time.monotonic() - began < _STEP_SECONDS:
                try:
                    next(steps)
                except StopIteration as end:
                    done: T = end.value
                    return done
            await self._session.pause()
