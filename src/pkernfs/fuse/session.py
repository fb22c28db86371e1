"""The tasks of one mount: the session loop, zeroing ahead, signals, the control socket.

The session loop is pyfuse3's, single file: one task reads and handles requests, and a handler that
must wait lets another loop take over the reading. Everything here runs on one thread, but for what
takes long: zeroing, writing back, unmounting.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import itertools
import logging
import math
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import trio

from pkernfs.alloc.blocks import IsolatedBlocks
from pkernfs.control.native_requests import names_of
from pkernfs.errors import (
    Needed,
    NoSpaceError,
    PkernfsError,
    RegionError,
    WorkNeeded,
    ZeroingNeeded,
)
from pkernfs.fuse import mounting, shim  # noqa: F401 - the shim is found first by the linker
from pkernfs.fuse.event_loop import RecurringEvent
from pkernfs.fuse.native_mounts import NativeMounts
from pkernfs.fuse.waiting import until_worked, until_zeroed
from pkernfs.host.holders import Holding, Target, look
from pkernfs.host.mappings import Mapping, mappings_of
from pkernfs.layout import ARRIVAL_REMOUNT, BLOCK, SEGMENT_DEAD
from pkernfs.quantities import BlockNo, BlockRun, Ino, RegionRun, SegmentNo
from pkernfs.ratelimit import RateLimit

import pyfuse3  # isort: skip

if TYPE_CHECKING:
    from pkernfs.control.sockets import Listener
    from pkernfs.fs.filesystem import FileSystem
    from pkernfs.fuse.operations import Operations
    from pkernfs.pool.pool import Pool, Segment
    from pkernfs.region.region import Place, Region

log = logging.getLogger(__name__)

_MIB = 1 << 20
_ZERO_BATCH_BYTES = 64 * _MIB  # one thread call: what an unmount may wait for
_DRAIN_SECONDS = 0.05
_ZERO_DELAY_SECONDS = 0.05  # more will be freed in a moment
_LOOK_SECONDS = 1.0  # between two looks at who maps what is held

_ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

_Result = TypeVar("_Result")


class Session:
    """The tasks of one mount.

    It is the :class:`pkernfs.fuse.waiting.Waiting` of the handlers of FUSE requests, and the
    :class:`pkernfs.control.session.Session` of those of the control socket.
    """

    _nursery: trio.Nursery  # while it runs

    def __init__(
        self,
        fs: FileSystem,
        region: Region,
        mountpoint: str,
        operations: Operations,
        device: int | None,
    ) -> None:
        self._fs = fs
        self._operations = operations
        self._region = region
        self._mountpoint = os.path.abspath(mountpoint)
        self._device = device
        self._natives = None if device is None else NativeMounts(self._mountpoint, device)
        self._loops = 0
        self._ended = trio.Event()
        self._dirty = trio.Event()
        self._held = IsolatedBlocks([])
        self._look_seconds = 0.0  # what the last one took
        self._refusals = RateLimit(log)
        if region.place is not None:  # a daemon before this one may have held what is dirty
            before = fs.mount_report
            fs.blocks.watch_freed(dirty=before is not None and before.kind == ARRIVAL_REMOUNT)
        self._ready = trio.Event()
        self.idle = RecurringEvent()
        self._zeroing = trio.Lock()
        self._pooling = trio.Lock()
        self._segments_there = trio.Event()
        if not fs.segments.absent:
            self._segments_there.set()
        self.listener: Listener | None = None

    async def run(self, ready: Callable[[], Any]) -> None:
        """Handle requests until the session ends, and whatever belongs to it."""
        async with trio.open_nursery() as background, trio.open_nursery() as nursery:
            self._nursery = nursery
            background.start_soon(self._zero_ahead)
            if self._fs.segments.pool is not None:
                background.start_soon(self._destroy_dead_segments)
                background.start_soon(self._bring_segments)
            background.start_soon(self._handle_signals)
            background.start_soon(self._announce, ready)
            background.start_soon(self._serve_control_socket)
            background.start_soon(self._verify)
            self._start_loop()
            await self._ended.wait()
            self._region.serving(False)
            background.cancel_scope.cancel()

    async def _announce(self, ready: Callable[[], Any]) -> None:
        """Tune what root may tune, and call ``ready``, when FUSE_INIT has been answered."""
        while not self._operations.initialized:
            await trio.sleep(0.001)
        if self._device is not None:
            mounting.tune_backing_device(self._device)
        await self._cover_natives()
        ready()
        self._ready.set()

    async def _serve_control_socket(self) -> None:
        """Serve the control socket, when nobody waits for the mount any more.

        Its modules are loaded in a thread: that takes as long as hundreds of requests.
        """
        if self.listener is not None:
            await self._ready.wait()
            await trio.to_thread.run_sync(_load_handlers)
            from pkernfs.control.handlers import handlers
            from pkernfs.control.server import Server

            server = Server(handlers(self._fs, self), fail=self._fs.fail)
            await server.run(self.listener)

    async def _verify(self) -> None:
        """Compare the files with the digests of the handover, if it has some."""
        if self._fs.mount_report is not None and self._fs.mount_report.verifier is not None:
            from pkernfs.control.verification import verify

            await self._segments_there.wait()
            await verify(self._fs, lambda: self._pooling)

    def writers(self) -> dict[Ino, int]:
        """Count by inode how often each is open for writing."""
        return dict(self._operations.writers)

    # ------------------------------------------------------------------ native files

    async def _cover_natives(self) -> None:
        """Have the names of native files lead to their segments, as before this mount.

        Whatever is damaged, the mount goes on: it is there for all other files.
        """
        inos = [] if self._fs.read_only else self._fs.natives.all()
        try:
            names = await names_of(self._fs, inos, self.pause)
        except PkernfsError as e:
            log.error("%s: no file is native: %s", self._mountpoint, e)
            return
        for path, ino in names:
            try:
                await self.cover(path, ino)
            except PkernfsError as e:
                log.error("%s: inode %d: not native: %s", self._mountpoint, ino, e)

    async def cover(self, path: str, ino: Ino) -> None:
        """Have a path of the mount lead to the segment of its file.

        :raises RegionError: the kernel refuses, or the segment is lost.
        """
        segment = await self.with_zeroing(lambda: self._fs.natives.path(ino))
        if segment is None or self._natives is None:
            raise RegionError(f"inode {ino}: no memory of its own here")
        await trio.to_thread.run_sync(self._natives.cover, path, ino, segment)

    async def uncover(self, ino: Ino) -> None:
        """Have all paths lead to a file again that lead to its segment."""
        await self._uncover([ino])

    async def _uncover(self, inos: list[Ino]) -> None:
        paths = [path for ino in inos if (path := await self._path(ino)) is not None]
        if self._natives is not None and paths:
            await trio.to_thread.run_sync(self._natives.uncover, paths)

    async def _path(self, ino: Ino) -> str | None:
        """Where a file's segment is, once it is there; None: it has none, or it is lost."""
        try:
            return await self.with_zeroing(lambda: self._fs.natives.path(ino))
        except PkernfsError:
            return None

    async def users(self, ino: Ino, *, segment: bool) -> list[Holding]:
        """Ask the kernel which processes have a file, or else its segment, open or mapped."""
        if self._device is None:
            return []
        targets = [Target(self._device, ino)]
        path = await self._path(ino) if segment else None
        if path is not None:
            with contextlib.suppress(OSError):
                targets.append(Target.of(os.stat(path), os.path.basename(path)))
        seen = await trio.to_thread.run_sync(look, targets)
        return seen.found

    # ------------------------------------------------------------------ the session loop

    def _start_loop(self) -> None:
        self._loops += 1
        self._nursery.start_soon(self._loop)

    async def _loop(self) -> None:
        """Read requests, until another loop reads.

        pyfuse3 starts no worker below the (unreachable) limit of tasks, and ends a loop that comes
        back from a handler and finds another one reading.
        """
        try:
            await pyfuse3.main(min_tasks=0, max_tasks=-(2**31))
        finally:
            self._loops -= 1
            if not self._loops:
                self._ended.set()

    async def sync(self) -> None:
        """Write the region back to its disk, in a thread."""
        await self.aside(self._fs.sync)

    async def aside(self, work: Callable[[], _Result]) -> _Result:
        """Run ``work`` in a thread, while others are served."""
        self._start_loop()
        return await trio.to_thread.run_sync(work)

    @contextlib.asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Serve others meanwhile, but let nobody else zero: what is free can be allocated."""
        self._start_loop()
        async with self._zeroing:
            yield

    @contextlib.asynccontextmanager
    async def pool_turn(self) -> AsyncIterator[None]:
        """Serve others meanwhile, but let nobody else change the pool of segments."""
        self._start_loop()
        async with self._pooling:
            yield

    async def work(self, need: WorkNeeded) -> None:
        """Do the work that an operation needs, in a thread; inside :meth:`pool_turn`."""
        await trio.to_thread.run_sync(need.work)

    @contextlib.asynccontextmanager
    async def hold_zeroing(self) -> AsyncIterator[None]:
        """Keep everybody else from zeroing memory and from changing the pool of segments.

        So no request waits for either. What was freed has been looked at. All segments are there.
        """
        async with self._zeroing, self._pooling:
            for number in list(self._fs.segments.absent):
                await self._bring(number)
            await self._look_at_freed()
            yield

    async def drain(self) -> None:
        """Wait until the requests that are there already have been handled, or for a moment."""
        with trio.move_on_after(_DRAIN_SECONDS):
            await self.idle.wait()

    async def settle(self) -> None:
        """As :meth:`drain`, for a handler: another loop reads meanwhile."""
        self._start_loop()
        await self.drain()

    async def zero(self, need: ZeroingNeeded) -> None:
        """Zero what an operation needs, in a thread; inside :meth:`turn`.

        If it needs more than is free, see whether what was freed, or held, can be had.
        """
        if need.blocks:
            await self._zero_isolated(self._fs.isolate_for_zeroing(need.blocks))
        else:
            await self._look_at_freed()

    async def with_zeroing(self, operation: Callable[[], _Result]) -> _Result:
        """Run an operation that may need zeroed memory; for a task beside the session loop."""
        while True:
            try:
                return operation()
            except WorkNeeded as e:
                reason: Needed = e
            except ZeroingNeeded as e:
                reason = e
            except NoSpaceError:
                reason = ZeroingNeeded([])
            try:
                if isinstance(reason, WorkNeeded):
                    return await self._with_work(operation)
                return await self._with_zeroing(reason, operation)
            except Needed:  # of the other kind: no two turns are held at once
                continue

    async def _with_work(self, operation: Callable[[], _Result]) -> _Result:
        async with self._pooling:  # so that what is planned is what is made
            return await until_worked(self._fs, self, operation)

    async def _with_zeroing(self, need: Needed, operation: Callable[[], _Result]) -> _Result:
        assert isinstance(need, ZeroingNeeded)
        async with self._zeroing:  # nobody else zeroes, so what is free can be allocated
            return await until_zeroed(self, need, operation)

    async def invalidate(self, ino: Ino, *, data: bool = False) -> None:
        """Have the kernel ask for an inode's attributes, and ``data``, again.

        In a thread: the kernel may have to wait for one of our answers.
        """
        with contextlib.suppress(OSError):  # the kernel does not know it
            await trio.to_thread.run_sync(pyfuse3.invalidate_inode, ino, not data)

    async def invalidate_name(self, directory: Ino, name: bytes) -> None:
        """Have the kernel look a name up again, and read its directory again."""
        run = trio.to_thread.run_sync
        with contextlib.suppress(OSError):
            await run(pyfuse3.invalidate_entry, directory, name)
        with contextlib.suppress(OSError):
            await run(pyfuse3.invalidate_inode, directory, False)

    async def pause(self) -> None:
        """Let other requests be served before the caller goes on."""
        await trio.lowlevel.checkpoint()

    def start(self, task: Callable[[], Awaitable[None]]) -> None:
        """Run ``task`` beside the session loop."""
        self._nursery.start_soon(task)

    # ------------------------------------------------------------------ zeroing

    def freed(self) -> None:
        """Look soon for memory that has to be zeroed: some may have become free."""
        if not self._dirty.is_set():
            self._dirty.set()

    async def _zero_ahead(self) -> None:
        """Zero freed blocks before anyone asks for them, a batch at a time."""
        while not self._fs.read_only or self._fs.frozen:
            self._dirty = trio.Event()
            try:
                async with self._zeroing:
                    await self._look_at_freed()
                    isolated = self._fs.next_dirty(_ZERO_BATCH_BYTES)
                    if isolated is not None:
                        await self._zero_isolated(isolated)
                        continue
            except PkernfsError as e:
                self._fs.fail(f"zeroing: {e}")
                return
            with trio.move_on_after(_LOOK_SECONDS if self._held.runs else math.inf):
                await self._dirty.wait()
            # To look at every process takes its time: no more than a twentieth of all.
            await trio.sleep(max(_ZERO_DELAY_SECONDS, 20 * self._look_seconds))

    async def _destroy_dead_segments(self) -> None:
        """Give back the memory of segments that no file has, once nobody else has it either."""
        segments = self._fs.segments
        while True:
            changed = trio.Event()
            segments.died = changed.set
            await self._uncover_dead()
            async with self._pooling:
                if changed.is_set():
                    continue  # another one has died, which may still be covered
                work = segments.reaping()
                if work is not None:
                    try:
                        segments.reaped(await trio.to_thread.run_sync(work))
                    except PkernfsError as e:
                        self._fs.fail(f"segments: {e}")
                        return
            with trio.move_on_after(_LOOK_SECONDS if segments.reaping() is not None else math.inf):
                await changed.wait()

    async def _uncover_dead(self) -> None:
        """Have no name lead to a segment that is going to be destroyed.

        The kernel uncovers a name that it removes, but not before it has our answer; and the name
        of a device is soon another's. Not inside :attr:`_pooling`: the way to a name may be locked
        by somebody who waits for that.
        """
        natives, segments = self._natives, self._fs.segments
        pool, rows = segments.pool, segments.table.rows.values()
        dead = [row for row in rows if row.state == SEGMENT_DEAD]
        if natives is None or pool is None or not dead:
            return
        with contextlib.suppress(OSError):  # no table of mounts
            await trio.to_thread.run_sync(natives.uncover, _paths(pool, dead))

    async def _bring_segments(self) -> None:
        """Restore the segments that the mount did not wait for; others get turns in between."""
        await self._ready.wait()
        for number in list(self._fs.segments.absent):
            async with self._pooling:
                await self._bring(number)
        self._segments_there.set()

    async def _bring(self, number: SegmentNo) -> None:
        """Restore one; inside :attr:`_pooling`."""
        await until_worked(self._fs, self, functools.partial(self._fs.segments.bring, number))

    async def _look_at_freed(self) -> None:
        """Hold what others still map of the memory that was freed; inside :attr:`_zeroing`.

        A region is one file to the kernel: nobody can be kept from mapping what another file gets
        next. So what is still mapped for writing is neither zeroed nor given to anybody.
        """
        blocks = self._fs.blocks
        freed = blocks.take_freed()
        if not freed.runs and not self._held.runs:
            return
        began = time.monotonic()
        try:
            users = await trio.to_thread.run_sync(_writers, self._region.place, self._region.size)
        except BaseException:
            blocks.leave_freed(freed)
            raise
        self._look_seconds = time.monotonic() - began
        held, self._held = self._held, IsolatedBlocks([])
        for run, user in _parts(held.runs, users):
            if user is None:
                blocks.let_go(IsolatedBlocks([run]))
            else:
                self._held.runs.append(run)
        said: dict[str, int] = {}
        for run, user in _parts(freed.runs, users):
            if user is None:
                blocks.putback(IsolatedBlocks([run]))
                continue
            blocks.hold(IsolatedBlocks([run]))
            self._held.runs.append(run)
            said[user] = said.get(user, 0) + run.blocks * BLOCK
        for user, size in said.items():
            self._refusals.warning(
                f"{user} maps {size >> 20} MiB of the region whose file was removed or cut: "
                "nobody gets that memory before it is unmapped"
            )

    async def _zero_isolated(self, isolated: IsolatedBlocks) -> None:
        try:
            await trio.to_thread.run_sync(_zero, self._region, isolated.pieces())
        except BaseException:
            self._fs.abandon_zeroing(isolated)
            raise
        self._fs.finish_zeroing(isolated)

    # ------------------------------------------------------------------ the end

    async def _handle_signals(self) -> None:
        with trio.open_signal_receiver(*_ENDING) as signals:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _ENDING)  # the caller's mask comes with it
            async for _ in signals:
                await self._unmount()

    async def _unmount(self) -> None:
        """Write back and unmount, still serving; leave the users behind if there are any."""
        await self._uncover(self._fs.natives.all())
        busy = await trio.to_thread.run_sync(
            mounting.sync_and_unmount, self._mountpoint, self._device
        )
        if busy:
            log.warning(
                "%s: still in use: %s: detached, and what is open in it fails",
                self._mountpoint,
                busy,
            )
            pyfuse3.terminate()


def _paths(pool: Pool, rows: list[Segment]) -> Iterator[str]:
    """Where the segments are, of those that are there."""
    for row in rows:
        with contextlib.suppress(OSError, PkernfsError):
            yield pool.native_path(row)


def _writers(place: Place | None, size: int) -> list[Mapping]:
    """Who may store into a part of the region; offsets are the region's.

    Who maps all of it says nothing about a part.
    """
    if place is None:
        return []
    return [
        mapping._replace(start=mapping.start - place.offset, end=mapping.end - place.offset)
        for mapping in mappings_of(place.path)
        if mapping.writable and mapping.end - mapping.start < size
    ]


def _parts(runs: list[BlockRun], users: list[Mapping]) -> Iterator[tuple[BlockRun, str | None]]:
    """Yield the runs, cut where mappings begin or end, each with a process that maps some of it."""
    for first, count in runs:
        end = first + count
        cuts = {first, end}
        for m in users:
            cuts.update(at for at in (m.start // BLOCK, -(-m.end // BLOCK)) if first < at < end)
        for low, high in itertools.pairwise(sorted(cuts)):
            user = next((m for m in users if m.start < high * BLOCK and low * BLOCK < m.end), None)
            yield BlockRun(BlockNo(low), high - low), None if user is None else user.process


def _load_handlers() -> None:
    importlib.import_module("pkernfs.control.handlers")


def _zero(region: Region, pieces: Iterable[RegionRun]) -> None:
    for offset, length in pieces:  # without the interpreter lock, so they do not delay others
        region.zero(offset, length)
