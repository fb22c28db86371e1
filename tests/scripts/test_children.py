"""children: several processes at once, and what they say in order."""

from __future__ import annotations

import os

import pytest

from children import Say, run_each


def test_they_are_at_work_at_once_and_heard_in_order() -> None:
    """The first one ends when the last one has begun, which says more than a pipe holds."""
    read_end, write_end = os.pipe()

    def work(name: str, say: Say) -> int:
        if name == "first":
            os.read(read_end, 1)
            say("first")
            return 3
        os.write(write_end, b"x")
        for number in range(2000):
            say(f"{name} {number} " + "x" * 80)
        return 0

    said: list[str] = []
    assert run_each(["first", "last"], work, said.append) == [3, 0]
    os.close(read_end)
    os.close(write_end)
    assert said[0] == "first"
    assert [line.split()[1] for line in said[1:]] == [str(n) for n in range(2000)]


def test_one_that_is_killed_or_wrong_has_failed(capfd: pytest.CaptureFixture[str]) -> None:
    def work(signal: int, say: Say) -> int:
        say(f"{signal}")
        if signal:
            os.kill(os.getpid(), signal)
        raise ZeroDivisionError("a bug")

    said: list[str] = []
    assert run_each([9, 0], work, said.append) == [-9, 1]
    assert said == ["9", "0"]
    assert "ZeroDivisionError: a bug" in capfd.readouterr().err


def test_nobody_to_work_for() -> None:
    assert run_each([], lambda _one, _say: 0, lambda _line: None) == []
