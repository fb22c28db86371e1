"""The way to the background, and the exit status of the first process, without a mount."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from pkernfs.commands.mount import exit_status
from pkernfs.errors import BusyError
from pkernfs.fuse.background import Ready, in_background


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
