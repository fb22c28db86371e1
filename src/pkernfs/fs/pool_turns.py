"""Turns at the pool of segments: work that takes long, and the operation that waits for it.

An operation that needs such work raises :class:`~pkernfs.errors.WorkNeeded`. It then gets a turn:
it is called, the work that it asks for is done, and it is called again, until it needs none. One
operation has a turn at a time; others, that need no work, run meanwhile. Outside a turn no work is
asked for, and none is found done: what an operation left behind is never another one's.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, TypeVar

from pkernfs.errors import PkernfsError, WorkNeeded
from pkernfs.quantities import SegmentNo

T = TypeVar("T")
Call = Callable[[Callable[[], Any]], Any]


class _Outcome(NamedTuple):
    """The result of work that was done: a value, or why there is none."""

    value: Any
    error: PkernfsError | None


class PoolTurns:
    """The turns at one pool.

    :param end: called when a turn begins and when it ends, for what an operation left undone; gets
        the segments that were changed.
    """

    def __init__(self, end: Callable[[set[SegmentNo]], None]) -> None:
        self._end = end
        self._outcomes: dict[Hashable, _Outcome] = {}
        self._calling = False
        self._changing: set[SegmentNo] = set()

    @contextmanager
    def turn(self) -> Iterator[Call]:
        """Give an operation its turn; yields what calls it.

        That raises :class:`WorkNeeded` as often as the operation needs work. The caller sees that
        no other turn begins before this one ends.
        """
        self._finish()
        try:
            yield self._call
        finally:
            self._finish()

    def _call(self, operation: Callable[[], T]) -> T:
        self._calling = True
        try:
            return operation()
        finally:
            self._calling = False

    def _finish(self) -> None:
        self._outcomes.clear()
        changed, self._changing = self._changing, set()
        self._end(changed)

    def run(self, operation: Callable[[], T]) -> T:
        """Call an operation, for a caller that may wait for work; nothing else runs meanwhile."""
        try:
            return operation()
        except WorkNeeded:
            pass
        with self.turn() as call:
            while True:
                try:
                    result: T = call(operation)
                except WorkNeeded as need:
                    need.work()
                else:
                    return result

    # ------------------------------------------------------------------ for operations

    def is_done(self, key: Hashable) -> bool:
        """Tell if :meth:`result` will return the result of work."""
        return self._calling and key in self._outcomes

    def result(
        self, key: Hashable, work: Callable[[], Any], changes: SegmentNo | None = None
    ) -> Any:
        """What ``work`` returned, once it is done.

        :param changes: the segment that it changes.
        :raises WorkNeeded: it is not done yet.
        :raises PkernfsError: what ``work`` failed with.
        """
        if not self._calling:
            raise WorkNeeded(_nothing)
        outcome = self._outcomes.pop(key, None)
        if outcome is None:
            if changes is not None:
                self._changing.add(changes)
            raise WorkNeeded(partial(self._work, key, work))
        if outcome.error is not None:
            raise outcome.error
        return outcome.value

    def _work(self, key: Hashable, work: Callable[[], Any]) -> None:
        try:
            self._outcomes[key] = _Outcome(work(), None)
        except PkernfsError as e:
            self._outcomes[key] = _Outcome(None, e)

    def is_changing(self, number: SegmentNo) -> bool:
        """Tell an operation that has no turn if the pool may be changing a segment."""
        return number in self._changing and not self._calling

    def check_unchanging(self, number: SegmentNo) -> None:
        """:raises WorkNeeded: the pool may be changing that segment: it has to end first."""
        if self.is_changing(number):
            raise WorkNeeded(_nothing)


def _nothing() -> None:
    """The operation gets its turn, and says then what it needs."""
