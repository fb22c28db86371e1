"""The short cuts of trio: the lock around reads of the device, and the event of the idle loop."""

from __future__ import annotations

import trio
import trio.testing

from pkernfs.fuse import event_loop


def test_the_read_lock_is_a_lock() -> None:
    """Free, it does not enter the event loop; taken, it is handed over in order."""
    order: list[str] = []

    async def use(lock: event_loop.ReadLock, name: str) -> None:
        async with lock:
            order.append(f"{name} has it")
            await trio.sleep(0)
            order.append(f"{name} leaves")

    async def main() -> None:
        lock = event_loop.ReadLock()
        async with lock:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(use, lock, "a")
                await trio.testing.wait_all_tasks_blocked()
                nursery.start_soon(use, lock, "b")
                await trio.testing.wait_all_tasks_blocked()
                order.append("main leaves")
                await lock.__aexit__()
                await trio.testing.wait_all_tasks_blocked()
            await lock.__aenter__()

    trio.run(main)
    assert order == ["main leaves", "a has it", "a leaves", "b has it", "b leaves"]


def test_a_recurring_event_wakes_all_who_wait() -> None:
    woken: list[int] = []

    async def wait(event: event_loop.RecurringEvent, number: int) -> None:
        await event.wait()
        woken.append(number)

    async def main() -> None:
        event = event_loop.RecurringEvent()
        assert not event.awaited
        async with trio.open_nursery() as nursery:
            for i in range(3):
                nursery.start_soon(wait, event, i)
            await trio.testing.wait_all_tasks_blocked()
            assert event.awaited
            event.notify_all()
        assert not event.awaited

    trio.run(main)
    assert sorted(woken) == [0, 1, 2]
