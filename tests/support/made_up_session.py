"""A session without a mount, for handlers of the control socket over a file system in memory."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import trio

from pkernfs.control.server import Handlers
from pkernfs.control.wire import Call, Stream
from pkernfs.errors import PkernfsError
from pkernfs.fs.filesystem import FileSystem
from pkernfs.host.holders import Holding
from pkernfs.quantities import Ino

T = TypeVar("T")
A = TypeVar("A")


class MadeUpSession:
    """Is a :class:`pkernfs.control.session.Session`; notes what it is asked for."""

    def __init__(self, fs: FileSystem) -> None:
        self._fs = fs
        self.asked: list[str] = []
        self.open_for_writing: dict[Ino, int] = {}
        self.processes: list[Holding] = []
        self.no_cover: PkernfsError | None = None

    @asynccontextmanager
    async def hold_zeroing(self) -> AsyncIterator[None]:
        self.asked.append("hold zeroing")
        yield

    async def drain(self) -> None:
        self.asked.append("drain")
        await trio.lowlevel.checkpoint()

    async def pause(self) -> None:
        await trio.lowlevel.checkpoint()

    async def with_zeroing(self, operation: Callable[[], T]) -> T:
        return self._fs.run(operation)

    async def invalidate(self, ino: Ino, *, data: bool = False) -> None:
        self.asked.append(f"invalidate {'data' if data else 'attributes'} of {ino}")

    async def invalidate_name(self, directory: Ino, name: bytes) -> None:
        self.asked.append(f"invalidate {name.decode()} in {directory}")

    def writers(self) -> dict[Ino, int]:
        return dict(self.open_for_writing)

    async def users(self, ino: Ino, *, segment: bool) -> list[Holding]:
        await trio.lowlevel.checkpoint()
        return list(self.processes)

    async def cover(self, path: str, ino: Ino) -> None:
        self.asked.append(f"cover {path} of {ino}")
        if self.no_cover is not None:
            raise self.no_cover

    async def uncover(self, ino: Ino) -> None:
        self.asked.append(f"uncover {ino}")

    def freed(self) -> None:
        self.asked.append("freed")


async def reply_of(handlers: Handlers, request: Call[A]) -> A:
    """The reply that the handler of a request returns."""
    answer: Any = handlers[type(request)](request)
    reply: A = await answer
    return reply


async def items_of(handlers: Handlers, request: Stream[A]) -> list[A]:
    """All the items that the handler of a request yields."""
    items: Any = handlers[type(request)](request)
    return [item async for item in items]
