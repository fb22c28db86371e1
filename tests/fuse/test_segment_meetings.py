"""Many requests at once for files with segments, whose pool works in a thread meanwhile."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import stat
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import pytest
import trio

from pkernfs.dma.mount import mount_filesystem
from pkernfs.errors import WorkNeeded, ZeroingNeeded
from pkernfs.fs.filesystem import FileSystem
from pkernfs.fs.mkfs import make_filesystem
from pkernfs.fuse import shim
from pkernfs.fuse.operations import Operations
from pkernfs.layout import INODE_FLAG_PENDING, ROOT_INO
from pkernfs.quantities import Ino
from pkernfs.region.region import Region
from support.fuse_handlers import AS_ROOT, make, set_fields
from support.memory_pool import POOL, MemoryPool
from support.pool_crash import check_pool

from pyfuse3 import FUSEError  # isort: skip  # after the shim

MIB = 1 << 20
FILES = 3
CLIENTS = 5
REQUESTS = 40  # of each client
SIZES = [0, 1000, MIB, 2 * MIB, 2 * MIB + 5, 4 * MIB]


class Session:
    """Waits as a session does: one turn at a time, and work in a thread."""

    def __init__(self, fs: FileSystem, nursery: trio.Nursery) -> None:
        self._fs = fs
        self._nursery = nursery
        self._zeroing = trio.Lock()
        self._pooling = trio.Lock()

    @contextlib.asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        async with self._zeroing:
            yield

    @contextlib.asynccontextmanager
    async def pool_turn(self) -> AsyncIterator[None]:
        async with self._pooling:
            yield

    async def work(self, need: WorkNeeded) -> None:
        await self.pause()
        await trio.to_thread.run_sync(need.work)
        await self.pause()

    async def zero(self, need: ZeroingNeeded) -> None:
        isolated = self._fs.isolate_for_zeroing(need.blocks)
        for offset, length in isolated.pieces():
            self._fs.region.zero(offset, length)
        self._fs.finish_zeroing(isolated)

    async def aside(self, work: Callable[[], Any]) -> Any:
        return await trio.to_thread.run_sync(work)

    async def pause(self) -> None:
        await trio.lowlevel.checkpoint()

    drain = settle = sync = pause

    def start(self, task: Callable[[], Awaitable[None]]) -> None:
        self._nursery.start_soon(task)

    async def destroy_dead(self) -> None:
        """As the session's task does."""
        async with self._pooling:
            work = self._fs.segments.reaping()
            if work is not None:
                self._fs.segments.reaped(await trio.to_thread.run_sync(work))


class Answer:
    """A request that may be answered later."""

    def __init__(self) -> None:
        self._done = trio.Event()
        self._result = 0

    def reply(self, result: int, *, counted: bool) -> None:
        self._result = result
        self._done.set()

    async def of(self, result: int) -> int:
        if result == shim.LATER:
            await self._done.wait()
            return self._result
        return result


class Client:
    """Sends random requests for all files; what it writes tells whose file it is."""

    def __init__(self, ops: Operations, inos: list[Ino], rng: random.Random) -> None:
        self._ops = ops
        self._inos = inos
        self._rng = rng

    async def run(self) -> None:
        for _ in range(REQUESTS):
            try:
                await self.request()
            except FUSEError as e:
                assert e.errno == errno.ENOSPC, os.strerror(e.errno)  # noqa: PT017
            await trio.lowlevel.checkpoint()

    async def request(self) -> None:
        rng, ops = self._rng, self._ops
        ino = rng.choice(self._inos)
        match rng.randrange(6):
            case 0 | 1 as kind:
                for size in [rng.choice(SIZES)] if kind else [0, 2 * MIB]:
                    await ops.setattr(ino, *set_fields(size=size), None, AS_ROOT)
            case 2:
                data = memoryview(bytes([ino]) * rng.choice([10, 5000]))
                await self.answered(ops.data.on_write, ino, data, rng.randrange(4 * MIB), False)
            case 3:
                mode, at = rng.choice([0, 1, 3, 16, 17]), rng.choice([0, rng.randrange(4 * MIB)])
                length = rng.choice([99, MIB, 4 * MIB])
                await self.answered(ops.data.on_fallocate, ino, mode, at, length)
            case 4:
                mode = stat.S_IFREG | rng.choice([0o600, 0o644])
                await ops.setattr(ino, *set_fields(mode=mode), None, AS_ROOT)
            case 5:
                found = bytes(await ops.read(ino, 0, 6 * MIB))
                assert not found.translate(None, bytes([0, ino])), "bytes of another file, or old"

    async def answered(self, request: Callable[..., int], *words: Any) -> None:
        answer = Answer()
        result = await answer.of(request(answer, *words))
        if result < 0:
            raise FUSEError(-result)


@pytest.fixture
def pool() -> Iterator[MemoryPool]:
    with MemoryPool(10 * MIB, dirty=True) as pool:
        yield pool


@pytest.mark.parametrize("seed", range(3))
def test_many_at_once(seed: int, pool: MemoryPool, monkeypatch: pytest.MonkeyPatch) -> None:
    """No bytes get to another file, and nothing is left half done, lost or leaked."""
    monkeypatch.setattr(shim, "reply_later", lambda answer, *a, **k: answer.reply(*a, **k))
    rng = random.Random(seed)
    with Region.anonymous(32 * MIB) as region:
        make_filesystem(region, pool=POOL)
        fs = mount_filesystem(region, open_pool=pool.opener())
        ops = Operations(fs)
        inos = [make(ops, b"f%d" % i) for i in range(FILES)]

        async def all_clients() -> None:
            async with trio.open_nursery() as tasks:
                session = ops.waiting = Session(fs, tasks)
                async with trio.open_nursery() as clients:
                    for _ in range(CLIENTS):
                        clients.start_soon(Client(ops, inos, rng).run)
                await session.destroy_dead()

        trio.run(all_clients)
        assert not any(fs.inode(ino).flags & INODE_FLAG_PENDING for ino in inos)
        check_pool(fs, pool)
        assert fs.segments.table.new_number() > FILES, "hardly any segments were made"
        for i in range(FILES):
            fs.unlink(ROOT_INO, b"f%d" % i)
        fs._life.forget_all()
        fs._life.reclaim_all()
        fs.unmount()
        assert not pool.memories
