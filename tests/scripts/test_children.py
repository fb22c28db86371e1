"""children: several processes at once, and what they say in order."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import children
from children import Say, run_each
from support.waiting import until


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


def test_one_that_stops_itself_does_not_stop_the_others() -> None:
    """It is killed with what it has started, and those after it are heard."""

    def work(name: str, say: Say) -> int:
        if name == "stops":
            child = subprocess.Popen(["sleep", "600"])
            say(str(child.pid))
            os.kill(os.getpid(), signal.SIGSTOP)
        for number in range(2000):
            say(f"{number} " + "x" * 80)
        return 0

    said: list[str] = []
    assert run_each(["well", "stops", "well"], work, said.append, 1.0) == [0, -9, 0]
    assert len(said) == 4001
    until("its child has ended", lambda: has_ended(int(said[2000])), 10)


def test_a_time_that_is_not_needed_changes_nothing() -> None:
    assert run_each([1, 2], lambda one, _say: one, lambda _line: None, 600) == [1, 2]


PROGRAM = """
import os, sys, time
sys.path.insert(0, sys.argv[1])
from children import run_each

def work(name, say):
    say(str(os.getpid()))
    time.sleep(600)
    return 0

run_each(["first"], work, lambda line: print(line, flush=True))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_end_ends_the_children_first(number: signal.Signals) -> None:
    """They are in sessions of their own, where a terminal's signals do not come."""
    lib = str(Path(children.__file__).parent)
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, lib],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        child = int(process.stdout.readline())
        assert os.getsid(child) == child
        process.send_signal(number)
        said = process.stderr.read()
        assert process.wait(30) == -number
    assert has_ended(child)
    assert said.count("Traceback") == (number == signal.SIGINT)  # the program's own


def has_ended(pid: int) -> bool:
    """Tell if a process is no more, or waits for somebody to hear of its end."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True
