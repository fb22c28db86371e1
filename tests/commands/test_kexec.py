"""pkernfs kexec: what is undone when a step fails, and what is refused of several mounts."""

from __future__ import annotations

import os
import signal
import subprocess
from typing import Any

import pytest

from pkernfs.commands import kexec
from pkernfs.commands.kexec import Standing
from pkernfs.errors import BusyError, InvalidError
from pkernfs.kexec.crash import Needs
from pkernfs.kexec.plan import Plan

POINTS = ["/mnt/a", "/mnt/b"]


class Daemons:
    """Those of the mounts; ``fails`` are operations that fail, as ``/mnt/a handover_abort``."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[str] = []
        self.fails: list[str] = []
        monkeypatch.setattr(kexec, "call", self.call)
        monkeypatch.setattr(kexec, "hand_over", lambda point, *_: self.call(point, "handover"))
        monkeypatch.setattr(subprocess, "run", self.run)
        monkeypatch.setattr(os, "sync", lambda: None)

    def call(self, point: str, operation: str, **_: Any) -> None:
        self.asked.append(f"{point} {operation}")
        if self.asked[-1] in self.fails:
            raise BusyError(f"{operation} of {point} failed")

    def run(self, words: list[str], **_: Any) -> None:
        self.asked.append(" ".join(words))


@pytest.fixture
def daemons(monkeypatch: pytest.MonkeyPatch) -> Daemons:
    return Daemons(monkeypatch)


def go(*, replaced: bool = False) -> None:
    plan = Plan("/boot/vmlinuz", None, "quiet", crash=True)
    with kexec._ended_by_exception(), kexec._undone_if_it_fails(plan, replaced=replaced) as handed:
        for point in POINTS:
            kexec._hand_over(point, plan, handed)
        kexec._jump(POINTS)


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
    def hand_over(point: str, *_: Any) -> None:
        daemons.call(point, "handover")
        os.kill(os.getpid(), signal.SIGHUP)

    monkeypatch.setattr(kexec, "hand_over", hand_over)
    with pytest.raises(SystemExit):
        go()
    assert daemons.asked == ["/mnt/a handover", "/mnt/a handover_abort", "kexec -p -u"]
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL


def test_no_signal_between_two_units(daemons: Daemons, monkeypatch: pytest.MonkeyPatch) -> None:
    def call(point: str, operation: str, **more: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        daemons.call(point, operation, **more)

    daemons.fails = ["/mnt/b kexec_jump"]
    monkeypatch.setattr(kexec, "call", call)
    with pytest.raises(SystemExit):
        go()
    assert daemons.asked[2:5] == ["/mnt/a kexec_jump", "/mnt/b kexec_jump", "/mnt/a kexec_undo"]


def test_a_unit_has_one_root_table() -> None:
    needs = {
        "/mnt/a": Needs(["0000:00:05.0"], [], False, ["dmar0"]),
        "/mnt/b": Needs(["0000:01:00.0"], ["0000:00:07.0"], False, ["dmar1"]),
    }
    assert Standing([], needs).whole() == Needs(
        ["0000:00:05.0", "0000:01:00.0"], ["0000:00:07.0"], False, ["dmar0", "dmar1"]
    )
    needs["/mnt/b"] = needs["/mnt/b"]._replace(units=["dmar0"])
    with pytest.raises(InvalidError, match="dmar0: it can walk the tables of one file system"):
        Standing([], needs).whole()
