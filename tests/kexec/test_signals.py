"""Signals while a kexec is under way: an exception at once, or at the end."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from pkernfs.kexec.signals import EndedBySignal, ended_by_exception, held


@pytest.fixture(autouse=True)
def dispositions() -> Iterator[None]:
    """Those of before are in force afterwards."""
    numbers = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
    before = [signal.getsignal(n) for n in numbers]
    yield
    after = [signal.getsignal(n) for n in numbers]
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)
    assert after == before


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_that_ends_is_an_exception(number: int) -> None:
    with (
        pytest.raises(EndedBySignal, match=f"signal {int(number)}") as caught,
        ended_by_exception(),
    ):
        send(number)
    assert caught.value.number == number
    assert not isinstance(caught.value, Exception)  # nobody takes it for a failure


def test_what_somebody_handles_already_stays() -> None:
    came: list[int] = []
    before = signal.signal(signal.SIGHUP, lambda number, _: came.append(number))
    try:
        with ended_by_exception():
            send(signal.SIGHUP)
        with held():
            send(signal.SIGHUP)
    except EndedBySignal:
        pass
    else:
        pytest.fail("it was lost")
    finally:
        signal.signal(signal.SIGHUP, before)
    assert came == [signal.SIGHUP]


def test_what_is_ignored_stays_ignored() -> None:
    """As nohup has it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with ended_by_exception(), held():
            send(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_held_signal_comes_at_the_end(number: int) -> None:
    done = []

    def work() -> None:
        send(number)
        done.append("the work")
        send(signal.SIGTERM)

    with pytest.raises(EndedBySignal) as caught, held():
        work()
    assert done == ["the work"]
    assert caught.value.number == number  # the first one


def test_a_failure_is_not_lost_behind_a_held_signal() -> None:
    def work() -> None:
        send(signal.SIGTERM)
        raise ValueError("the work failed")

    with pytest.raises(EndedBySignal) as caught, held():
        work()
    assert isinstance(caught.value.__context__, ValueError)
    with pytest.raises(ValueError, match="the work failed"), held():
        raise ValueError("the work failed")
