"""Turns at a pool: who works, who waits, and what becomes of what is given up."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pkernfs.errors import BusyError, NoSpaceError, WorkNeeded
from pkernfs.fs.pool_turns import PoolTurns
from pkernfs.quantities import SegmentNo

ONE = SegmentNo(1)


class Rig:
    """Turns, and what was done in them."""

    def __init__(self) -> None:
        self.ended: list[set[SegmentNo]] = []
        self.done: list[str] = []
        self.turns = PoolTurns(self.ended.append)

    def work(self, name: str) -> Callable[[], str]:
        def work() -> str:
            self.done.append(name)
            return f"result of {name}"

        return work

    def operation(self, *names: str) -> Callable[[], list[str]]:
        """One that needs work, step after step; each is a change for good."""
        results: list[str] = []

        def run() -> list[str]:
            for name in names[len(results) :]:
                results.append(self.turns.result(name, self.work(name), ONE))
            return results

        return run


@pytest.fixture
def rig() -> Rig:
    return Rig()


def test_an_operation_is_called_until_it_needs_no_work(rig: Rig) -> None:
    assert rig.turns.run(rig.operation("a", "b")) == ["result of a", "result of b"]
    assert rig.done == ["a", "b"]
    assert rig.ended == [set(), {ONE}]


def test_one_that_needs_none_gets_no_turn(rig: Rig) -> None:
    assert rig.turns.run(lambda: 5) == 5
    assert not rig.ended


def test_outside_a_turn_nothing_is_asked_for(rig: Rig) -> None:
    with pytest.raises(WorkNeeded) as caught:
        rig.operation("a")()
    caught.value.work()
    assert not rig.done
    assert not rig.turns.is_changing(ONE)


def test_what_was_given_up_is_nobody_elses(rig: Rig) -> None:
    with rig.turns.turn() as call:
        with pytest.raises(WorkNeeded) as caught:
            call(rig.operation("a"))
        caught.value.work()
        assert rig.turns.is_changing(ONE)
        with pytest.raises(WorkNeeded):  # it came between, without a turn
            rig.operation("a")()
        assert not rig.turns.is_done("a")
    assert not rig.turns.is_changing(ONE)
    rig.turns.run(rig.operation("a"))
    assert rig.done == ["a", "a"], "the result of the first one was used by the second one"


def test_who_has_no_turn_waits_for_a_change(rig: Rig) -> None:
    operation = rig.operation("a")
    with rig.turns.turn() as call:
        with pytest.raises(WorkNeeded) as need:
            call(operation)
        with pytest.raises(WorkNeeded):
            rig.turns.check_unchanging(ONE)
        rig.turns.check_unchanging(SegmentNo(2))
        need.value.work()

        def second_call() -> None:
            rig.turns.check_unchanging(ONE)  # nothing works while an operation is called
            operation()

        call(second_call)
    rig.turns.check_unchanging(ONE)


def test_work_fails_with_the_operation(rig: Rig) -> None:
    def work() -> None:
        raise NoSpaceError("full")

    with pytest.raises(NoSpaceError, match="full"):
        rig.turns.run(lambda: rig.turns.result("a", work))


def test_a_turn_ends_with_any_error(rig: Rig) -> None:
    def operation() -> None:
        rig.turns.result("a", rig.work("a"), ONE)
        raise BusyError("held")

    with pytest.raises(BusyError):
        rig.turns.run(operation)
    assert rig.ended == [set(), {ONE}]
