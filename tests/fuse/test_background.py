"""The way to the background, and the exit status of the first process, without a mount."""

from __future__ import annotations

import fcntl
import os
import select
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pkernfs.commands.mount import exit_status
from pkernfs.errors import BusyError
from pkernfs.fuse.background import Ready, in_background
from support.mounting import wait_until


def status_of(serve: Callable[[Ready], None]) -> int:
    """The exit status of the first process, by way of the command."""
    return exit_status(lambda: in_background(serve, 5), "REGION", "/mnt")


def test_a_failure_is_the_first_process_status(capfd: pytest.CaptureFixture[str]) -> None:
    def fail(ready: Ready) -> None:
        raise BusyError("busy:\n says the test: \udcff")

    assert status_of(fail) == 32
    assert capfd.readouterr().err == "pkernfs: REGION: busy:\\n says the test: \\udcff\n"


def test_an_end_without_being_ready_is_a_failure(capfd: pytest.CaptureFixture[str]) -> None:
    assert status_of(lambda ready: None) == 32, "ended without being ready"
    assert capfd.readouterr().err == "pkernfs: the daemon ended before the mount answered\n"


def test_the_first_process_ends_when_the_daemon_is_ready(tmp_path: object) -> None:
    read_end, write_end = os.pipe()

    def serve(ready: Ready) -> None:
        os.write(write_end, b"1")
        ready()
        os.write(write_end, b"2")
        raise BusyError("nobody reads this")

    assert status_of(serve) == 0
    os.close(write_end)
    with open(read_end, "rb") as f:
        assert f.read() == b"12"
    _, status = os.wait()
    assert os.waitstatus_to_exitcode(status) == 5


def test_a_daemon_keeps_none_of_its_callers_descriptors(tmp_path: Path) -> None:
    """A lock below flock(1), a supervisor's pipe, a directory: let go before it says it is up.

    Until then the daemon has them: its region may be one, /proc/self/fd/N.
    """
    lock = tmp_path / "lock"
    lock.touch()
    program = f"""
import os, sys
from pkernfs.fuse.background import in_background

given = [int(word) for word in sys.argv[1:]]

def serve(ready):
    mine = os.open({str(tmp_path)!r}, os.O_RDONLY)
    before = set(given) & set(map(int, os.listdir("/proc/self/fd")))
    ready()
    os.fstat(mine)
    after = set(given) & set(map(int, os.listdir("/proc/self/fd")))
    os.mkfifo({str(tmp_path / "end")!r})
    with open({str(tmp_path / "end")!r}, "w") as end:
        end.write(repr((len(before), len(after))))

in_background(serve, 5)
print("up", flush=True)
"""
    supervisor, given = os.pipe()
    held = os.open(lock, os.O_RDWR)
    fcntl.flock(held, fcntl.LOCK_EX)
    try:
        # The output is a pipeline: it ends when nobody has it open any more.
        done = subprocess.run(
            [sys.executable, "-c", program, str(given), str(held)],
            pass_fds=(given, held),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=20,
        )
        os.close(given)
        os.close(held)
        assert (done.returncode, done.stdout, done.stderr) == (0, "up\n", "")
        assert select.select([supervisor], [], [], 0)[0], "nobody else has the pipe"
        with open(lock) as again:
            fcntl.flock(again, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(supervisor)
        wait_until((tmp_path / "end").exists, "the daemon's last words")
        words = (tmp_path / "end").read_text()
    assert words == "(2, 0)"


def test_a_daemon_that_dies_is_said(capfd: pytest.CaptureFixture[str]) -> None:
    def die(ready: Ready) -> None:
        os.kill(os.getpid(), 9)

    assert status_of(die) == 32
    assert capfd.readouterr().err == "pkernfs: the daemon died: Killed\n"


def test_a_bug_in_the_daemon_is_said(capfd: pytest.CaptureFixture[str]) -> None:
    def fail(ready: Ready) -> None:
        raise KeyError("oops")

    assert status_of(fail) == 32
    assert "the daemon failed: KeyError('oops')" in capfd.readouterr().err
