"""Signals that end the process while a kexec is under way: what was done is undone first."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

_ENDING = (signal.SIGTERM, signal.SIGHUP)
_ALL_ENDING = (*_ENDING, signal.SIGINT)


class EndedBySignal(BaseException):
    """A signal has asked the process to end; whoever catches it does that.

    :ivar number: of the signal
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"signal {number}")
        self.number = number


@contextmanager
def ended_by_exception() -> Iterator[None]:
    """Raise :class:`EndedBySignal` for a signal that would end the process at once.

    A terminal that goes away sends one.
    """

    def end(number: int, _frame: object) -> NoReturn:
        raise EndedBySignal(number)

    before = {n: signal.signal(n, end) for n in _ENDING if signal.getsignal(n) is signal.SIG_DFL}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def held() -> Iterator[None]:
    """Hold signals that end the process until the end of the context.

    By handlers, not by a mask: a signal to the process goes to any thread of it that takes it.

    :raises EndedBySignal: at the end, one has come.
    """
    came: list[int] = []
    kept = (None, signal.SIG_IGN)
    before = {
        n: signal.signal(n, lambda number, _frame: came.append(number))
        for n in _ALL_ENDING
        if signal.getsignal(n) not in kept
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if came:
            raise EndedBySignal(came[0])
