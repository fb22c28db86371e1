"""The daemon: mounts, serves requests on trio, cleans up, goes to the background.

trio and pyfuse3 are imported in this package and in :mod:`pkernfs.control` only, and not before a
mount is asked for. The session loop is pyfuse3's, single file: one task reads and handles requests,
and a handler that must wait lets another loop take over the reading (:class:`_Session`). What a
request costs beyond its handler is mostly the event loop, so it is entered only when no request is
there (:class:`_FastTrio`).
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import logging
import logging.handlers
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterable
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from pkernfs.control.mounts import FSTYPE, Mount, mount_at
from pkernfs.errors import FormatError, PkernfsError, RegionError, ZeroingNeeded, one_line

if TYPE_CHECKING:
    from pkernfs.alloc.blocks import Claim
    from pkernfs.control.server import Handler, Listener
    from pkernfs.fs.filesystem import FileSystem
    from pkernfs.region.region import Region

log = logging.getLogger(__name__)

EXIT_FAILED = 32

_MIB = 1 << 20
_ZERO_BATCH_BYTES = 64 * _MIB  # one thread call: what an unmount may wait for
_SETTLE_SECONDS = 0.05
_ZERO_DELAY_SECONDS = 0.05  # more will be freed in a moment
_REQUESTS_IN_A_ROW = 32  # before other tasks get their turn
_SPIN_MICROSECONDS = 100.0  # about as much as falling asleep and waking up would cost

#: Mount options for libfuse or the kernel. What else there is of the kind (relatime and others)
#: has no meaning here: FUSE leaves access times to the daemon.
_FUSE_OPTIONS = frozenset(
    "rw ro dev nodev suid nosuid exec noexec sync async dirsync noatime nosymfollow "
    "allow_other context fscontext defcontext rootcontext".split()
)

Options = dict[str, Any]
_Result = TypeVar("_Result")


# ---------------------------------------------------------------------- the mount command


def run_mount(region_spec: str, mountpoint: str, options: Options, foreground: bool) -> int:
    """Mount a region and serve it; the exit status, as mount(8) has it.

    ``options`` is what :func:`pkernfs.options.parse_mount_options` made of ``-o``; ``mountpoint``
    is a directory that no pkernfs is mounted on. In the background (not ``foreground``) this
    returns in the first process once the mount answers, or has failed: 0, or 32 after one line on
    stderr. The daemon itself never returns.
    """
    if foreground:
        _log_to_stderr()
        return _mount_and_serve(region_spec, mountpoint, options, lambda: None)
    return _in_background(lambda ready: _mount_and_serve(region_spec, mountpoint, options, ready))


def _say(error: object) -> None:
    print(f"pkernfs: {one_line(str(error))}", file=sys.stderr, flush=True)


def _mount_and_serve(
    spec: str, mountpoint: str, options: Options, ready: Callable[[], None]
) -> int:
    """Open, mount, serve until unmounted, clean up; the exit status."""
    try:
        with _open_region(spec, options) as region:
            fs = _open_filesystem(region, options)
            try:
                _tell_arrival(fs, options)
                serve(fs, region, mountpoint, options, ready)
            finally:
                region.serving(False)
                fs.unmount()
    except PkernfsError as e:
        _say(e if str(e).startswith((spec, mountpoint)) else f"{spec}: {e}")
        log.debug("mount failed", exc_info=True)
        return EXIT_FAILED
    return 0


def _open_region(spec: str, options: Options) -> Region:
    from pkernfs.fs.placement import open_region

    return open_region(spec, write="ro" not in options, phys_base=options.get("phys_base"))


def _open_filesystem(region: Region, options: Options) -> FileSystem:
    from pkernfs.fs import placement
    from pkernfs.fs.filesystem import FileSystem

    if "mkfs" in options:
        from pkernfs.fs import mkfs

        found = mkfs.probe(region)
        if found.content is mkfs.Content.EMPTY:
            mkfs.make_filesystem(region)
        elif found.content is not mkfs.Content.PKERNFS:
            raise FormatError(f"{region.name}: not formatted: it holds {found.what}")
    fs = FileSystem.mount(region, read_only="ro" in options)
    placement.record(fs)
    _adopt_units(fs)
    return fs


def _adopt_units(fs: FileSystem) -> None:
    """Units may be walking the tables: before anything changes, they are told to forget."""
    from pkernfs.dma.table_files import ROOT_NAME
    from pkernfs.layout import IOMMU_INO

    if os.geteuid() or not fs.find(IOMMU_INO, ROOT_NAME):
        return
    from pkernfs.dma.activation import Activation

    try:
        Activation(fs).adopt()
    except PkernfsError as e:
        fs.fail(f"units walk the tables: {e}")


def _tell_arrival(fs: FileSystem, options: Options) -> None:
    """After a handover: how long ago it was, and what has changed since."""
    arrival = fs.arrival
    if arrival is None or arrival.record is None:
        return
    from pkernfs.control import freezing

    if "verify" in options:
        freezing.verify_now(fs)
    for line in freezing.lines(fs):
        _say(line)


# ---------------------------------------------------------------------- going to the background


def _in_background(serve_it: Callable[[Callable[[], None]], int]) -> int:
    """Run ``serve_it`` in a child; return when it calls its argument, or has ended.

    The fork comes first, so that locks and memory belong to the daemon from the start.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    read_end, write_end = os.pipe()
    child = os.fork()
    if child:
        os.close(write_end)
        with open(read_end, "rb") as answer:
            word = answer.read(1)
        if word:
            return 0
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):
            return os.WEXITSTATUS(status) or EXIT_FAILED
        _say(f"the daemon died: {signal.strsignal(os.WTERMSIG(status))}")
        return EXIT_FAILED
    _be_the_daemon(serve_it, read_end, write_end)


def _be_the_daemon(
    serve_it: Callable[[Callable[[], None]], int], read_end: int, write_end: int
) -> NoReturn:
    status = EXIT_FAILED
    try:
        os.close(read_end)
        os.setsid()
        _log_to_journal()

        def ready() -> None:
            os.chdir("/")
            _leave_the_terminal()
            with contextlib.suppress(BrokenPipeError):
                os.write(write_end, b"r")
            os.close(write_end)

        status = serve_it(ready)
    except BaseException as e:
        log.critical("the daemon failed", exc_info=e)
        with contextlib.suppress(Exception):
            _say(f"the daemon failed: {e!r}")
    finally:
        os._exit(status)


def _leave_the_terminal() -> None:
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.close(null)


def _log_to_stderr() -> None:
    logging.basicConfig(format="pkernfs: %(message)s", level=_log_level())


def _log_to_journal() -> None:
    """The system log for a daemon without a terminal; until it is ready, stderr says failures."""
    if os.path.exists("/dev/log"):
        with contextlib.suppress(OSError):
            to_log = logging.handlers.SysLogHandler(
                "/dev/log", logging.handlers.SysLogHandler.LOG_DAEMON
            )
            to_log.setFormatter(logging.Formatter(f"pkernfs[{os.getpid()}]: %(message)s"))
            logging.basicConfig(handlers=[to_log], level=_log_level())
            return
    logging.basicConfig(handlers=[logging.NullHandler()])


def _log_level() -> int:
    return logging.DEBUG if os.environ.get("PKERNFS_DEBUG") else logging.WARNING


# ---------------------------------------------------------------------- serving


def serve(
    fs: FileSystem, region: Region, mountpoint: str, options: Options, ready: Callable[[], Any]
) -> None:
    """Mount ``fs`` at ``mountpoint`` and handle requests until it is unmounted.

    ``ready`` is called once when the mount answers. The file system itself is left for the caller
    to unmount; nothing is mounted any more after the return, whatever the reason.

    :raises RegionError: the mount was refused.
    """
    import trio

    from pkernfs.fuse import operations, shim

    import pyfuse3  # isort: skip

    module: Any = pyfuse3
    cache = options.get("cache", "auto")
    server = operations.Operations(fs, cache=cache)
    shim.prepare(
        server,
        fsname=os.fsencode(region.name),
        direct=cache != "page",
        spin_us=options.get("spin", _SPIN_MICROSECONDS),
    )
    try:
        pyfuse3.init(server, mountpoint, _fuse_options(options))
    except RuntimeError as e:
        reason = shim.last_message() or str(e)
        raise RegionError(f"{mountpoint}: cannot mount: {reason}") from e
    listener = None
    try:
        shim.attach()
        mount = _own_mount(mountpoint, region.name)
        session = _Session(fs, region, mountpoint, server, mount.device if mount else None)
        listener = session.listener = _listen(mountpoint, mount)
        server.waiting = session
        server.freed = session.freed
        module.trio = _FastTrio(session.idle)
        region.serving(True)
        _calm_collector()
        trio.run(session.run, server, ready)
    finally:
        region.serving(False)
        if listener is not None:
            listener.close()
        module.trio = trio
        pyfuse3.close(unmount=False)
        _detach_what_is_left(mountpoint, region.name)


def _own_mount(mountpoint: str, source: str) -> Mount | None:
    from pkernfs.control import server

    return server.own_mount(os.path.abspath(mountpoint), source)


def _listen(mountpoint: str, mount: Mount | None) -> Listener | None:
    """Open the control socket; without one the mount works all the same."""
    from pkernfs.control import server

    try:
        if mount is None:
            raise OSError("the mount is not in /proc/self/mountinfo")
        return server.Listener(mount.device)
    except OSError as e:
        log.warning("%s: no control socket, so no commands but reading: %s", mountpoint, e)
        return None


def _load_handlers() -> None:
    for name in ("freezing", "handlers"):
        importlib.import_module(f"pkernfs.control.{name}")


def _handlers(fs: FileSystem, session: _Session) -> dict[str, Handler]:
    """What may be asked through the control socket."""
    from pkernfs.control import freezing
    from pkernfs.control.handlers import TableRequests

    async def ping(args: dict[str, Any]) -> dict[str, Any]:
        return {"pid": os.getpid(), "region": session.region.name, "read_only": fs.read_only}

    return {
        "ping": ping,
        **freezing.handlers(fs, session),
        **TableRequests(fs, session).handlers(),
    }


def _calm_collector() -> None:
    """What is here stays, and a handler makes no cycles: look for them rarely, it takes long."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 100)


def _fuse_options(options: Options) -> set[str]:
    """What libfuse is told: defaults, and what it knows of the user's options."""
    words = {"default_permissions", "subtype=pkernfs"}
    for name, value in options.items():
        if name in _FUSE_OPTIONS:
            words.add(name if value is True else f"{name}={value}")
    return words


class _Session:
    """The tasks of one mount; also the :class:`pkernfs.fuse.operations.Waiting` of its handlers."""

    def __init__(
        self, fs: FileSystem, region: Region, mountpoint: str, server: Any, device: int | None
    ) -> None:
        import trio

        self._trio = trio
        self._fs = fs
        self._server = server
        self.region = region
        self._mountpoint = os.path.abspath(mountpoint)
        self._device = device
        self._loops = 0
        self._ended = trio.Event()
        self._dirty = trio.Event()
        self._ready = trio.Event()
        self.idle = _Moment()
        self._zeroing = trio.Lock()
        self._nursery: Any = None
        self.listener: Listener | None = None

    async def run(self, server: Any, ready: Callable[[], Any]) -> None:
        """Handle requests until the session ends, and whatever belongs to it."""
        trio = self._trio
        async with trio.open_nursery() as background, trio.open_nursery() as nursery:
            self._nursery = nursery
            background.start_soon(self._zero_ahead)
            background.start_soon(self._handle_signals)
            background.start_soon(self._announce, server, ready)
            background.start_soon(self._take_orders)
            background.start_soon(self._verify)
            self._start_loop()
            await self._ended.wait()
            self.region.serving(False)
            background.cancel_scope.cancel()

    async def _announce(self, server: Any, ready: Callable[[], Any]) -> None:
        """Tune what root may tune, and call ``ready``, when FUSE_INIT has been answered."""
        while not server.initialized:
            await self._trio.sleep(0.001)
        if self._device is not None:
            _tune_backing_device(self._device)
        ready()
        self._ready.set()

    async def _take_orders(self) -> None:
        """Serve the control socket, when nobody waits for the mount any more.

        Its modules are loaded in a thread: that takes as long as hundreds of requests.
        """
        if self.listener is not None:
            await self._ready.wait()
            await self._trio.to_thread.run_sync(_load_handlers)
            from pkernfs.control import server

            await server.Server(self._fs, _handlers(self._fs, self)).run(self.listener)

    async def _verify(self) -> None:
        """After a handover with digests: compare the files with them."""
        if self._fs.arrival is not None and self._fs.arrival.verifier is not None:
            from pkernfs.control import freezing

            await freezing.verify(self._fs)

    def writers(self) -> dict[int, int]:
        """How often each inode is open for writing."""
        return dict(self._server.writers)

    # ------------------------------------------------------------------ the session loop

    def _start_loop(self) -> None:
        self._loops += 1
        self._nursery.start_soon(self._loop)

    async def _loop(self) -> None:
        """One reader. pyfuse3 starts no worker below the (unreachable) limit of tasks, and ends a
        loop that comes back from a handler and finds another one reading.
        """
        import pyfuse3

        try:
            await pyfuse3.main(min_tasks=0, max_tasks=-(2**31))
        finally:
            self._loops -= 1
            if not self._loops:
                self._ended.set()

    async def sync(self) -> None:
        """Write the region back to its disk, in a thread."""
        self._start_loop()
        await self._trio.to_thread.run_sync(self._fs.sync)

    @contextlib.asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Others are served meanwhile, but nobody else zeroes: what is free can be allocated."""
        self._start_loop()
        async with self._zeroing:
            yield

    @contextlib.asynccontextmanager
    async def quiet(self) -> AsyncIterator[None]:
        """No operation waits for memory to be zeroed."""
        async with self._zeroing:
            yield

    async def settle(self) -> None:
        """Wait until the requests that are there already have been handled, or for a moment."""
        with self._trio.move_on_after(_SETTLE_SECONDS):
            await self.idle.wait()

    async def zero(self, need: ZeroingNeeded) -> None:
        """Zero what an operation needs, in a thread; inside :meth:`turn`."""
        await self._zero_claim(self._fs.claim_zeroing(need.blocks))

    async def with_zeroing(self, operation: Callable[[], _Result]) -> _Result:
        """Run an operation that may need zeroed memory; for a task beside the session loop."""
        try:
            return operation()
        except ZeroingNeeded:
            pass
        async with self._zeroing:  # nobody else zeroes, so what is free can be allocated
            while True:
                try:
                    return operation()
                except ZeroingNeeded as need:
                    await self.zero(need)

    async def invalidate(self, ino: int, *, data: bool = False) -> None:
        """Have the kernel ask for an inode's attributes, and ``data``, again.

        In a thread: the kernel may have to wait for one of our answers.
        """
        import pyfuse3

        with contextlib.suppress(OSError):  # the kernel does not know it
            await self._trio.to_thread.run_sync(pyfuse3.invalidate_inode, ino, not data)

    async def invalidate_name(self, directory: int, name: bytes) -> None:
        """Have the kernel look a name up again, and read its directory again."""
        import pyfuse3

        run = self._trio.to_thread.run_sync
        with contextlib.suppress(OSError):
            await run(pyfuse3.invalidate_entry, directory, name)
        with contextlib.suppress(OSError):
            await run(pyfuse3.invalidate_inode, directory, False)

    async def pause(self) -> None:
        """Let other requests be served before the caller goes on."""
        await self._trio.lowlevel.checkpoint()

    def start(self, task: Callable[[], Awaitable[None]]) -> None:
        """Run ``task`` beside the session loop."""
        self._nursery.start_soon(task)

    # ------------------------------------------------------------------ zeroing

    def freed(self) -> None:
        """Memory may have become free: see in a moment whether it has to be zeroed."""
        if not self._dirty.is_set():
            self._dirty.set()

    async def _zero_ahead(self) -> None:
        """Zero freed blocks before anyone asks for them, a batch at a time."""
        trio = self._trio
        while not self._fs.read_only or self._fs.frozen:
            try:
                async with self._zeroing:
                    claim = self._fs.next_dirty(_ZERO_BATCH_BYTES)
                    if claim is not None:
                        await self._zero_claim(claim)
                        continue
            except PkernfsError as e:
                self._fs.fail(f"zeroing: {e}")
                return
            self._dirty = trio.Event()
            await self._dirty.wait()
            await trio.sleep(_ZERO_DELAY_SECONDS)

    async def _zero_claim(self, claim: Claim) -> None:
        try:
            await self._trio.to_thread.run_sync(_zero, self.region, claim.pieces())
        except BaseException:
            self._fs.abandon_zeroing(claim)
            raise
        self._fs.finish_zeroing(claim)

    # ------------------------------------------------------------------ the end

    async def _handle_signals(self) -> None:
        trio = self._trio
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
            async for _ in signals:
                await self._unmount()

    async def _unmount(self) -> None:
        """Write back and unmount, still serving; leave the users behind if there are any."""
        import pyfuse3

        busy = await self._trio.to_thread.run_sync(_sync_and_unmount, self._mountpoint)
        if busy:
            log.warning("%s: still in use: %s; detached", self._mountpoint, busy)
            pyfuse3.terminate()


def _zero(region: Region, pieces: Iterable[tuple[int, int]]) -> None:
    for offset, length in pieces:  # without the interpreter lock, so they do not delay others
        region.zero(offset, length)


def _tune_backing_device(device: int) -> None:
    """Larger read-ahead, and no strict limit on what shared mappings may have dirty (root).

    ``device`` is the mount's ``st_dev``, from mountinfo: a stat of the mount would hold it for a
    moment, in which umount(8) finds it busy.
    """
    bdi = f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/"
    for name, value in (("read_ahead_kb", 1024), ("strict_limit", 0), ("max_ratio", 100)):
        with contextlib.suppress(OSError), open(bdi + name, "w") as f:
            f.write(str(value))


def _sync_and_unmount(mountpoint: str) -> str | None:
    """Unmount in a thread while requests are served; why it had to be detached, if it had to."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    path = os.fsencode(mountpoint)
    if os.geteuid():
        tool = ["fusermount3", "-u", "--", mountpoint]
        if subprocess.run(tool, capture_output=True).returncode == 0:
            return None
        subprocess.run(["fusermount3", "-u", "-z", "--", mountpoint], capture_output=True)
        return "cannot unmount"
    with contextlib.suppress(OSError):
        fd = os.open(mountpoint, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        libc.syncfs(fd)
        os.close(fd)
    if libc.umount2(path, 0) == 0:
        return None
    reason = os.strerror(ctypes.get_errno())
    libc.umount2(path, 2)  # MNT_DETACH
    return reason


def _detach_what_is_left(mountpoint: str, source: str) -> None:
    """Take away a mount that lost its daemon otherwise: a severed connection, a bug."""
    left = mount_at(mountpoint)
    if left is not None and (left.fstype, left.source) == (FSTYPE, source):
        tool = ["umount", "-l"] if not os.geteuid() else ["fusermount3", "-u", "-z"]
        subprocess.run([*tool, "--", mountpoint], capture_output=True, check=False)


# ---------------------------------------------------------------------- less of the event loop


class _Done:
    """An awaitable that does not wait, and does not enter the event loop."""

    __slots__ = ()
    _nothing: Any = iter(())

    def __await__(self) -> Generator[Any, None, None]:
        return self._nothing  # type: ignore[no-any-return]


_DONE = _Done()


class _ReadLock:
    """trio.Lock for the one case that matters: nobody else wants it, so nobody has to wait."""

    def __init__(self) -> None:
        import trio

        self._held = False
        self._waiters = trio.lowlevel.ParkingLot()

    def __aenter__(self) -> Awaitable[None]:
        if self._held:
            return self._waiters.park()  # the one who leaves hands it over
        self._held = True
        return _DONE

    def __aexit__(self, *exc: object) -> Awaitable[None]:
        if self._waiters:
            self._waiters.unpark()
        else:
            self._held = False
        return _DONE


class _Moment:
    """Something that happens again and again, for which now and then a task waits."""

    def __init__(self) -> None:
        import trio

        self._waiters = trio.lowlevel.ParkingLot()
        self.awaited = False

    async def wait(self) -> None:
        """Wait for the next time."""
        self.awaited = True
        await self._waiters.park()

    def come(self) -> None:
        """It is now: all who wait may go on."""
        self.awaited = False
        self._waiters.unpark_all()


class _FastTrio:
    """What pyfuse3 sees as its ``trio`` (as pyfuse3.asyncio does): the same, but for two things.

    Waiting for the device is skipped unless the last read found nothing, and the lock around it
    costs nothing. Every so often other tasks get their turn.
    """

    Lock = _ReadLock

    def __init__(self, idle: _Moment) -> None:
        import trio

        self._trio = trio
        self.lowlevel = _FastLowLevel(idle)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._trio, name)


class _FastLowLevel:
    """``trio.lowlevel`` for :class:`_FastTrio`; ``idle`` comes when no request is there."""

    def __init__(self, idle: _Moment) -> None:
        import trio

        from pkernfs.fuse import shim

        self._lowlevel = trio.lowlevel
        self._idle = idle
        self.wait_readable: Callable[[int], Awaitable[None]] = trio.lowlevel.wait_readable
        if shim.attached():
            self.wait_readable = self._make_wait(shim.took_a_break)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._lowlevel, name)

    def _make_wait(self, found_nothing: Callable[[], bool]) -> Callable[[int], Awaitable[None]]:
        really_wait = self._lowlevel.wait_readable
        let_others_run = self._lowlevel.checkpoint
        idle = self._idle
        left = _REQUESTS_IN_A_ROW

        def wait_readable(fd: int) -> Awaitable[None]:
            nonlocal left
            if found_nothing():
                left = _REQUESTS_IN_A_ROW
                if idle.awaited:
                    idle.come()
                return really_wait(fd)
            left -= 1
            if left:
                return _DONE
            left = _REQUESTS_IN_A_ROW
            return let_others_run()

        return wait_readable
