"""A short cut through trio for pyfuse3's session loop, and the event of the loop being idle.

What a request costs beyond its handler is mostly the event loop, so :class:`FastTrio` enters it
only when no request is there. That reads of the device do not block is the shim's work.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Generator
from typing import Any

import trio

from pkernfs.fuse import shim

_REQUESTS_IN_A_ROW = 32  # before other tasks get their turn


class _Done:
    """An awaitable that does not wait, and does not enter the event loop."""

    __slots__ = ()
    _nothing: Any = iter(())

    def __await__(self) -> Generator[Any, None, None]:
        return self._nothing  # type: ignore[no-any-return]


_DONE = _Done()


class ReadLock:
    """trio.Lock for the one case that matters: nobody else wants it, so nobody has to wait."""

    def __init__(self) -> None:
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


class RecurringEvent:
    """Something that happens again and again, for which now and then a task waits."""

    def __init__(self) -> None:
        self._waiters = trio.lowlevel.ParkingLot()
        self.awaited = False

    async def wait(self) -> None:
        """Wait for the next time."""
        self.awaited = True
        await self._waiters.park()

    def notify_all(self) -> None:
        """It happens now: all who wait go on."""
        self.awaited = False
        self._waiters.unpark_all()


class FastTrio:
    """The ``trio`` that pyfuse3 sees, as pyfuse3.asyncio is one: the same, but for two things.

    Waiting for the device is skipped unless the last read found nothing, and the lock around it
    costs nothing. Every so often other tasks get their turn.
    """

    Lock = ReadLock

    def __init__(self, idle: RecurringEvent) -> None:
        self.lowlevel = _FastLowLevel(idle)

    def __getattr__(self, name: str) -> Any:
        return getattr(trio, name)


class _FastLowLevel:
    """``trio.lowlevel`` for :class:`FastTrio`; ``idle`` happens when no request is there."""

    def __init__(self, idle: RecurringEvent) -> None:
        self._lowlevel = trio.lowlevel
        self._idle = idle
        self.wait_readable: Callable[[int], Awaitable[None]] = trio.lowlevel.wait_readable
        if shim.attached():
            self.wait_readable = self._make_wait(shim.found_no_request)

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
                    idle.notify_all()
                return really_wait(fd)
            left -= 1
            if left:
                return _DONE
            left = _REQUESTS_IN_A_ROW
            return let_others_run()

        return wait_readable
