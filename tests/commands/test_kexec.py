"""pkernfs kexec: what is undone when a step fails, and what is said of it."""

from __future__ import annotations

import os
import signal
import subprocess
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pkernfs.commands import kexec
from pkernfs.errors import BusyError
from pkernfs.kexec import steps
from pkernfs.kexec.plan import Plan
from pkernfs.kexec.prepare import Prepared
from support.mounting import run_pkernfs

POINTS = ["/mnt/a", "/mnt/b"]


class Daemons:
    """Those of the mounts; ``fails`` are operations that fail, as ``/mnt/a handover_abort``."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[str] = []
        self.fails: list[str] = []
        monkeypatch.setattr(steps, "Daemon", partial(FakeDaemon, self))
        monkeypatch.setattr(
            steps, "hand_over_mount", lambda point, **_: self.call(point, "handover")
        )
        monkeypatch.setattr(subprocess, "run", self.run)
        monkeypatch.setattr(os, "sync", lambda: None)

    def call(self, point: str, operation: str) -> None:
        self.asked.append(f"{point} {operation}")
        if self.asked[-1] in self.fails:
            raise BusyError(f"{operation} of {point} failed")

    def run(self, words: list[str], **_: Any) -> None:
        self.asked.append(" ".join(words))


class FakeDaemon:
    """The daemon of one mount."""

    def __init__(self, daemons: Daemons, point: str) -> None:
        self._ask = partial(daemons.call, point)

    def abort(self) -> None:
        self._ask("handover_abort")

    def crash_jump(self, *, panic: bool) -> None:
        self._ask("kexec_jump")

    def undo_crash_jump(self) -> None:
        self._ask("kexec_undo")


@pytest.fixture
def daemons(monkeypatch: pytest.MonkeyPatch) -> Daemons:
    return Daemons(monkeypatch)


def go(*, replaced: bool = False) -> None:
    plan = Plan("/boot/vmlinuz", None, "quiet", crash=True)
    kexec.start(Prepared(plan, POINTS, POINTS), replaced=replaced)


def test_everything_is_undone_although_something_cannot_be(
    daemons: Daemons, capsys: pytest.CaptureFixture[str]
) -> None:
    daemons.fails = ["/mnt/b kexec_jump", "/mnt/a kexec_undo", "/mnt/a handover_abort"]
    with pytest.raises(BusyError, match="kexec_jump of /mnt/b failed"):
        go(replaced=True)
    assert daemons.asked[2:] == [
        "/mnt/a kexec_jump", "/mnt/b kexec_jump", "/mnt/a kexec_undo",
        "/mnt/a handover_abort", "/mnt/b handover_abort", "kexec -p -u",
    ]  # fmt: skip
    assert capsys.readouterr().err.splitlines() == [
        "pkernfs: /mnt/a: not undone: kexec_undo of /mnt/a failed",
        "pkernfs: /mnt/a: not undone: handover_abort of /mnt/a failed",
        "pkernfs: the kernel that was loaded for a panic before is gone: load it again",
    ]


def test_a_handover_that_fails_is_none_to_be_undone(daemons: Daemons) -> None:
    daemons.fails = ["/mnt/b handover"]
    with pytest.raises(BusyError):
        go()
    assert daemons.asked[2:] == ["/mnt/a handover_abort", "kexec -p -u"]


def test_a_terminal_that_goes_away(daemons: Daemons, monkeypatch: pytest.MonkeyPatch) -> None:
    def hand_over(point: str, **_: Any) -> None:
        daemons.call(point, "handover")
        os.kill(os.getpid(), signal.SIGHUP)

    monkeypatch.setattr(steps, "hand_over_mount", hand_over)
    with pytest.raises(SystemExit):
        go()
    assert daemons.asked == ["/mnt/a handover", "/mnt/a handover_abort", "kexec -p -u"]
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL


def test_no_signal_between_two_units(daemons: Daemons, monkeypatch: pytest.MonkeyPatch) -> None:
    call = daemons.call

    def interrupted(point: str, operation: str) -> None:
        if operation != "handover":
            os.kill(os.getpid(), signal.SIGTERM)
        call(point, operation)

    daemons.fails = ["/mnt/b kexec_jump"]
    monkeypatch.setattr(daemons, "call", interrupted)
    with pytest.raises(SystemExit):
        go()
    assert daemons.asked[2:5] == ["/mnt/a kexec_jump", "/mnt/b kexec_jump", "/mnt/a kexec_undo"]


@pytest.mark.slow("runs the command twice, as a program of its own")
def test_the_command_says_what_is_missing(tmp_path: Path) -> None:
    done = run_pkernfs("kexec", "--dry-run", "--kernel", str(tmp_path / "none"))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"pkernfs: {tmp_path}/none: no such file\n"
    kernel = tmp_path / "kernel"
    kernel.touch()
    words = ("kexec", "--dry-run", "--kernel", str(kernel), "--append", "quiet")
    done = run_pkernfs(*words)
    assert (done.returncode, done.stdout) == (1, "")
    assert "started with an initrd, and none is given for" in done.stderr
    done = run_pkernfs(*words, "--initrd", "none", "--force")  # others' mounts may be on tmpfs
    assert done.returncode == 0
    assert "initrd" not in done.stderr
    assert f"kexec -s -l {kernel}" in done.stdout
