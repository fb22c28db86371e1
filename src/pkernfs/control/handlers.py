"""What may be asked of the daemon about tables, through its control socket.

Changes run to their end on the event loop, as the file system's own operations do. What takes long
(walking all names, a check, a long listing) gives way after each step.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Generator
from typing import TYPE_CHECKING, Any, TypeVar

import trio

from pkernfs.control.session import Session
from pkernfs.dma import reports, snapshot
from pkernfs.dma.activation import Activation
from pkernfs.dma.crash_jump import Jump
from pkernfs.dma.reports import Output, Question
from pkernfs.dma.table_files import ROOT_NAME
from pkernfs.errors import InvalidError, TableDamageError
from pkernfs.host.bars import read_bar
from pkernfs.host.sysroot import HOST
from pkernfs.iommu.check import Report
from pkernfs.iommu.config import Config
from pkernfs.iommu.context_walk import Mode
from pkernfs.layout import IOMMU_INO
from pkernfs.vtd.entries import check_source_id

if TYPE_CHECKING:
    from pkernfs.control.server import Handler
    from pkernfs.fs.filesystem import FileSystem

_STEP_SECONDS = 0.0005

T = TypeVar("T")
Args = dict[str, Any]


class TableRequests:
    """The handlers of one mount."""

    def __init__(self, fs: FileSystem, session: Session) -> None:
        self._fs = fs
        self._session = session
        # Held by a change over the zeroing of what it maps, and by a check over its thread: both
        # need tables that stay as they are. Nothing that serves the file system ever takes it.
        self._lock = trio.Lock()
        self._jump = Jump(fs)

    def handlers(self) -> dict[str, Handler]:
        """The operations by name."""
        return {
            "iommu.create": self.create,
            "iommu.map": self.map,
            "iommu.unmap": self.unmap,
            "iommu.attach": self.attach,
            "iommu.detach": self.detach,
            "iommu.persist": self.persist,
            "iommu.snapshot": self.snapshot,
            "iommu.check_live": self.check_live,
            "iommu.switch": self.switch,
            "iommu.activate": self.activate,
            "iommu.deactivate": self.deactivate,
            "iommu.devices": self.devices,
            "iommu.root": self.root,
            "iommu.read": self.read,
            "kexec_needs": self.needs,
            "kexec_jump": self.jump,
            "kexec_undo": self.undo_jump,
        }

    # ------------------------------------------------------------------ changes

    async def create(self, args: Args) -> None:
        """Make root-pgtables, or set mode and levels of one that is not in use."""
        config = Config(_mode(args), _number(args, "levels"))
        size = _number(args, "size")
        await self._change(lambda: self._fs.tables.create_root(config, size))

    async def map(self, args: Args) -> int:
        """Map a range of a file (``ino``) or of a BAR (``bar``); the bytes."""
        number, iova = _number(args, "domain"), _number(args, "iova")
        offset, perm = _number(args, "offset"), _number(args, "perm")
        length = None if args.get("length") is None else _number(args, "length")
        if args.get("bar") is not None:
            source_id, index = _pair(args, "bar")
            bar = read_bar(source_id, index)
            return await self._change(
                lambda: self._fs.tables.map_bar(number, iova, bar, offset, length, perm), number
            )
        ino = _number(args, "ino")
        done = await self._change(
            lambda: self._fs.tables.map_file(number, iova, ino, offset, length, perm), number
        )
        await self._session.invalidate(ino)
        return done

    async def unmap(self, args: Args) -> int:
        """Unmap a range of addresses; the bytes that were mapped."""
        number, iova = _number(args, "domain"), _number(args, "iova")
        length = _number(args, "length")
        return await self._change(lambda: self._fs.tables.unmap(number, iova, length), number)

    async def attach(self, args: Args) -> int:
        """Attach a device; its domain id."""
        number, source_id = _number(args, "domain"), _number(args, "device")
        return await self._change(lambda: self._fs.tables.attach(number, source_id))

    async def detach(self, args: Args) -> None:
        """Detach a device."""
        source_id = _number(args, "device")
        await self._change(lambda: self._fs.tables.detach(source_id))

    async def persist(self, args: Args) -> None:
        """Whether a handover keeps a device's entries."""
        source_id, on = _number(args, "device"), bool(args.get("on"))
        await self._change(lambda: self._fs.tables.persist(source_id, on))

    async def snapshot(self, args: Args) -> int:
        """Have dom-``domain`` be the live domain of ``device``, which is attached; its id."""
        number, source_id = _number(args, "domain"), _number(args, "device")
        check_source_id(source_id)
        tables = self._fs.tables
        tables.domain(number)
        kept = {d.source_id for d in tables.devices()} - tables.transient()
        async with self._lock:
            with Activation(self._fs).live() as live:
                # Only memory that does not change hands meanwhile is read there.
                reading = await trio.to_thread.run_sync(snapshot.read, live, source_id, kept)
            plan = await self._in_steps(snapshot.plan(self._fs, HOST, reading))
        return await self._change(lambda: snapshot.apply(self._fs, plan, number), number)

    async def check_live(self, args: Args) -> None:
        """See :meth:`Activation.check_live`."""
        await self._looking(Activation(self._fs).check_live)

    async def switch(self, args: Args) -> list[str]:
        """See :meth:`Activation.switch_units`; nothing but the jump may follow."""
        async with self._lock:
            return Activation(self._fs).switch_units()

    async def activate(self, args: Args) -> list[str]:
        """Put the tables in force in ``units``; the names of the units that walk them then."""
        names, cutting_off = _names(args), bool(args.get("cut_off"))
        async with self._lock:
            report = await self._examine()
            if not report.clean:
                raise TableDamageError(
                    f"activate: the tables are not sound: {report.found} problems, the first: "
                    f"{report.findings[0].message}: see pkernfs iommu check"
                )
            return Activation(self._fs).activate(names, cutting_off=cutting_off)

    async def deactivate(self, args: Args) -> list[str]:
        """Have ``units`` translate no more; their names."""
        names, forced = _names(args), bool(args.get("force"))
        async with self._lock:
            return Activation(self._fs).deactivate(names, forced=forced)

    async def needs(self, args: Args) -> dict[str, Any]:
        """See :meth:`Jump.needs`."""
        return await self._looking(self._jump.needs)

    async def jump(self, args: Args) -> None:
        """The step before the next kernel; with ``panic`` there is no answer, but that kernel.

        The loop stands still meanwhile: nothing else is to happen between the last look and the
        jump, and the file system is frozen.
        """
        async with self._lock:
            self._jump.go(panic=bool(args.get("panic")))

    async def undo_jump(self, args: Args) -> None:
        """See :meth:`Jump.undo`."""
        async with self._lock:
            self._jump.undo()

    async def _looking(self, look: Callable[[], T]) -> T:
        """Look at the tables in a thread, while they do not change."""
        tables = self._fs.tables
        async with self._lock:
            tables.readers += 1
            try:
                return await trio.to_thread.run_sync(look)
            finally:
                tables.readers -= 1

    async def _change(self, operation: Callable[[], T], number: int | None = None) -> T:
        """Change root-pgtables, and dom-``number``."""
        had_root = self._root_ino()
        async with self._lock:
            done = await self._session.with_zeroing(operation)
        # What the kernel has of these files, or knows to be missing, is old.
        if not had_root and self._root_ino():
            await self._session.invalidate_name(IOMMU_INO, ROOT_NAME)
        names = [ROOT_NAME] if number is None else [ROOT_NAME, b"dom-%d" % number]
        for name in names:
            if ino := self._fs.find(IOMMU_INO, name):
                await self._session.invalidate(ino, data=True)
        return done

    def _root_ino(self) -> int:
        return self._fs.find(IOMMU_INO, ROOT_NAME)

    # ------------------------------------------------------------------ reading

    async def devices(self, args: Args) -> list[int]:
        """Source ids of the devices that are attached."""
        return [d.source_id for d in self._fs.tables.devices()]

    async def root(self, args: Args) -> int | None:
        """Physical address of the root table; None: there is none."""
        root = self._fs.tables.root
        return None if root is None else root.root

    async def read(self, args: Args) -> AsyncIterator[Any]:
        """``what`` is translate, show, export or check: text, records, an exit status."""
        question = _question(args)
        if question.what == "check":
            output = await self._check(question.as_json)
        else:
            output = reports.answer(self._fs, question)
        began = time.monotonic()
        text: list[str] = []
        for item in output:
            if isinstance(item, str):
                text.append(item)
            elif item is not None:
                yield {"status" if isinstance(item, int) else "record": item}
            if time.monotonic() - began > _STEP_SECONDS:
                if text:
                    yield {"text": "".join(text)}
                    text = []
                await self._session.pause()
                began = time.monotonic()
        if text:
            yield {"text": "".join(text)}

    async def _check(self, as_json: bool) -> Output:
        async with self._lock:
            report = await self._examine()
        return reports.check_text(report, as_json=as_json)

    async def _examine(self) -> Report:
        """Check the tables in a thread, while they do not change."""
        tables = self._fs.tables
        tables.readers += 1
        try:
            given = await self._in_steps(reports.prepare_check(self._fs))
            return await trio.to_thread.run_sync(given.run)
        finally:
            tables.readers -= 1

    async def _in_steps(self, steps: Generator[None, None, T]) -> T:
        while True:
            began = time.monotonic()
            while time.monotonic() - began < _STEP_SECONDS:
                try:
                    next(steps)
                except StopIteration as end:
                    done: T = end.value
                    return done
            await self._session.pause()


def _question(args: Args) -> Question:
    optional = {
        name: None if args.get(name) is None else _number(args, name)
        for name in ("domain", "device", "iova", "pasid")
    }
    access = 0 if args.get("access") is None else _number(args, "access")
    what = str(args.get("what"))
    as_json, merge = bool(args.get("json")), bool(args.get("merge"))
    return Question(
        what,
        optional["domain"],
        optional["device"],
        optional["iova"],
        optional["pasid"],
        access,
        as_json,
        merge,
    )


def _number(args: Args, name: str) -> int:
    value = args.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not -(2**63) <= value < 2**65:
        raise InvalidError(f"iommu: bad {name}: got {value!r}, expected a number")
    return value


def _names(args: Args) -> list[str]:
    names = args.get("units") or []
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
        raise InvalidError(f"iommu: bad units: got {names!r}")
    return names


def _pair(args: Args, name: str) -> tuple[int, int]:
    match args.get(name):
        case [int(source_id), int(number)] if 0 <= source_id <= 0xFFFF and 0 <= number <= 5:
            return source_id, number
    raise InvalidError(f"iommu: bad {name}: got {args.get(name)!r}")


def _mode(args: Args) -> Mode:
    try:
        return Mode[str(args.get("mode")).upper()]
    except KeyError:
        raise InvalidError(f"iommu: bad mode: got {args.get('mode')!r}") from None
