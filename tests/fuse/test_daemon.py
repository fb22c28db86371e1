"""The daemon's parts that need no mount: the way to the background, and the short cuts of trio."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import trio
import trio.testing

from pkernfs.fuse import daemon


@pytest.mark.parametrize("status", [0, 1, 32])
def test_a_failure_is_the_first_process_status(status: int) -> None:
    def fail(ready: Callable[[], None]) -> int:
        return status

    assert daemon._in_background(fail) == (status or 32), "ended without being ready"


def test_the_first_process_ends_when_the_daemon_is_ready(tmp_path: object) -> None:
    read_end, write_end = os.pipe()

    def serve(ready: Callable[[], None]) -> int:
        os.write(write_end, b"1")
        ready()
        os.write(write_end, b"2")
        return 5

    assert daemon._in_background(serve) == 0
    os.close(write_end)
    with open(read_end, "rb") as f:
        assert f.read() == b"12"
    os.wait()


def test_a_daemon_that_dies_is_said(capfd: pytest.CaptureFixture[str]) -> None:
    def die(ready: Callable[[], None]) -> int:
        os.kill(os.getpid(), 9)
        return 0

    assert daemon._in_background(die) == 32
    assert capfd.readouterr().err == "pkernfs: the daemon died: Killed\n"


def test_a_bug_in_the_daemon_is_said(capfd: pytest.CaptureFixture[str]) -> None:
    def fail(ready: Callable[[], None]) -> int:
        raise KeyError("oops")

    assert daemon._in_background(fail) == 32
    assert "the daemon failed: KeyError('oops')" in capfd.readouterr().err


def test_the_read_lock_is_a_lock() -> None:
    """Free, it does not enter the event loop; taken, it is handed over in order."""
    order: list[str] = []

    async def use(lock: daemon._ReadLock, name: str) -> None:
        async with lock:
            order.append(f"{name} has it")
            await trio.sleep(0)
            order.append(f"{name} leaves")

    async def main() -> None:
        lock = daemon._ReadLock()
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


def test_a_moment_wakes_all_who_wait() -> None:
    woken: list[int] = []

    async def wait(moment: daemon._Moment, number: int) -> None:
        await moment.wait()
        woken.append(number)

    async def main() -> None:
        moment = daemon._Moment()
        assert not moment.awaited
        async with trio.open_nursery() as nursery:
            for i in range(3):
                nursery.start_soon(wait, moment, i)
            await trio.testing.wait_all_tasks_blocked()
            assert moment.awaited
            moment.come()
        assert not moment.awaited

    trio.run(main)
    assert sorted(woken) == [0, 1, 2]
