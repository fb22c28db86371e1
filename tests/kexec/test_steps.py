"""The steps of a kexec: their order, and what is undone when one fails."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pkernfs.control.mounts import Mount
from pkernfs.errors import BusyError, NotFoundError, PkernfsError
from pkernfs.host.sysroot import Host
from pkernfs.kexec import loaded, steps, systemd
from pkernfs.kexec.observer import Observer
from pkernfs.kexec.plan import Plan
from pkernfs.kexec.prepare import Prepared
from pkernfs.kexec.signals import EndedBySignal
from pkernfs.kexec.spans import KexecError
from support.made_up_host import Machine

POINTS = ["/mnt/a", "/mnt/b"]
LOAD = ["kexec", "-s", "-l", "/boot/vmlinuz"]


class World(Observer):
    """Daemons and programs that note what is asked of them; ``fails`` are steps that fail."""

    def __init__(self) -> None:
        self.steps: list[str] = []
        self.said: list[str] = []
        self.fails: dict[str, BaseException] = {}

    def step(self, *words: str) -> None:
        self.steps.append(" ".join(words))
        if self.steps[-1] in self.fails:
            raise self.fails[self.steps[-1]]

    def say(self, text: str) -> None:
        self.said.append(text)

    def hand_over(
        self,
        point: str,
        *,
        command_line: str | None,
        force: bool,
        needs_initrd: bool,
        observer: Observer,
    ) -> None:
        assert observer is self
        assert not needs_initrd  # the plans here have none
        self.step("hand over", point, str(command_line), *["forced"] * force)

    def run(self, words: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        try:
            self.step(*words)
        except PkernfsError as e:
            return subprocess.CompletedProcess(words, 3, "out", f"{e}\n and\tmore")
        return subprocess.CompletedProcess(words, 0, "", "")


class FakeDaemon:
    """The daemon of one mount."""

    def __init__(self, world: World, point: str) -> None:
        self._step = partial(world.step, point)

    def abort(self) -> None:
        self._step("abort")

    def crash_jump(self, *, panic: bool) -> None:
        self._step("panic" if panic else "switch")

    def undo_crash_jump(self) -> None:
        self._step("switch back")


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    world = World()
    monkeypatch.setattr(steps, "Daemon", partial(FakeDaemon, world))
    monkeypatch.setattr(steps, "hand_over_mount", world.hand_over)
    monkeypatch.setattr(subprocess, "run", world.run)
    monkeypatch.setattr(shutil, "which", lambda name: None if name == "none" else name)
    monkeypatch.setattr(os, "sync", lambda: world.step("sync"))
    return world


def orderly(start: str = "systemctl kexec") -> Prepared:
    plan = Plan("/boot/vmlinuz", None, "quiet", load=LOAD, start=start.split())
    return Prepared(plan, POINTS, [])


def crash() -> Prepared:
    return Prepared(Plan("/boot/vmlinuz", None, "quiet", crash=True, load=LOAD), POINTS, POINTS)


# ---------------------------------------------------------------------- loading


def test_loading(world: World, tmp_path: Path) -> None:
    machine = Machine(str(tmp_path))
    assert not steps.load(orderly().plan, machine)
    assert not steps.load(crash().plan, machine)
    machine.write("sys/kernel/kexec_crash_loaded", "1\n")
    assert not steps.load(orderly().plan, machine)  # that one stays
    assert steps.load(crash().plan, machine)
    assert world.steps == ["kexec -s -l /boot/vmlinuz"] * 4


def test_a_program_that_fails_has_said_why(world: World) -> None:
    world.fails["kexec -s -l /boot/vmlinuz"] = PkernfsError("no such syscall")
    reason = "^kexec -s -l: failed with 3: no such syscall and more$"
    with pytest.raises(PkernfsError, match=reason):
        steps.load(orderly().plan)
    with pytest.raises(NotFoundError, match=r"none: not found$"):
        steps.hand_over_and_start(orderly("none -e"), world)
    assert world.steps[-1] == "kexec -u"


def test_a_remedy_is_that_of_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(NotFoundError, match=r"^kexec: not found: apt install kexec-tools$"):
        steps.load(orderly().plan)


# ---------------------------------------------------------------------- an orderly kexec


def test_an_orderly_start(world: World) -> None:
    steps.hand_over_and_start(orderly(), world)
    assert world.steps == ["hand over /mnt/a None", "hand over /mnt/b None", "systemctl kexec"]
    assert world.said == []


@pytest.mark.parametrize("forced", [False, True])
def test_what_a_unit_will_refuse_is_refused_before_anything_stops(
    world: World, monkeypatch: pytest.MonkeyPatch, forced: bool
) -> None:
    def refuse(spec: str, *, host: Host) -> None:
        world.step("check", spec)
        raise KexecError(f"{spec}: the kernel loaded for kexec has no initrd")

    monkeypatch.setattr(loaded, "check", refuse)
    monkeypatch.setattr(systemd, "is_told_of_kernel", lambda point, host: forced)
    monkeypatch.setattr(systemd, "options_file", lambda point: "/etc/pkernfs/mnt-c")
    mount = Mount(3, "/mnt/c", "fuse.pkernfs", "1G!1G")
    prepared = replace(orderly(), by_systemd=[mount])
    if forced:
        steps.hand_over_and_start(prepared, world)
        assert world.steps[0] == "check 1G!1G"
        assert world.steps[-1] == "systemctl kexec"
        return
    with pytest.raises(
        KexecError, match=r"no initrd; .*unless /etc/pkernfs/mnt-c has HANDOVER=--f"
    ):
        steps.hand_over_and_start(prepared, world)
    assert world.steps == ["check 1G!1G", "kexec -u"]


def test_a_start_that_fails_is_undone(world: World) -> None:
    world.fails["systemctl kexec"] = PkernfsError("not now")
    with pytest.raises(PkernfsError, match="systemctl kexec: failed with 3: not now"):
        steps.hand_over_and_start(orderly(), world, replaced=False)
    assert world.steps[3:] == ["/mnt/a abort", "/mnt/b abort", "kexec -u"]


@pytest.mark.parametrize("stays", [0, 1])
def test_a_handover_that_is_interrupted_may_be_one(world: World, stays: int) -> None:
    world.fails[f"hand over {POINTS[stays]} None"] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        steps.hand_over_and_start(orderly(), world)
    aborts = [f"{point} abort" for point in POINTS[: stays + 1]]
    assert world.steps[stays + 1 :] == [*aborts, "kexec -u"]


# ---------------------------------------------------------------------- by a panic


def test_the_last_daemon_panics(world: World) -> None:
    """That ends this kernel. Here it does not, so that all is undone."""
    with pytest.raises(PkernfsError, match="it has not panicked"):
        steps.hand_over_and_start(crash(), world, replaced=True)
    assert world.steps == [
        "hand over /mnt/a quiet", "hand over /mnt/b quiet", "sync",
        "/mnt/a switch", "/mnt/b panic", "/mnt/a switch back", "/mnt/b switch back",
        "/mnt/a abort", "/mnt/b abort", "kexec -p -u",
    ]  # fmt: skip
    assert world.said == ["the kernel that was loaded for a panic before is gone: load it again"]


def test_what_cannot_be_undone_is_said(world: World) -> None:
    world.fails = {
        "/mnt/b panic": BusyError("no"), "/mnt/a switch back": BusyError("stuck"),
        "/mnt/a abort": BusyError("gone"),
    }  # fmt: skip
    with pytest.raises(BusyError, match=r"^no$"):
        steps.hand_over_and_start(crash(), world)
    assert world.steps[-2:] == ["/mnt/b abort", "kexec -p -u"]
    assert world.said == ["/mnt/a: not undone: stuck", "/mnt/a: not undone: gone"]


def test_a_signal_ends_it_undone(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def hand_over(point: str, **_: Any) -> None:
        world.step("hand over", point)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(steps, "hand_over_mount", hand_over)
    with pytest.raises(EndedBySignal) as caught:
        steps.hand_over_and_start(crash(), world)
    assert caught.value.number == signal.SIGTERM
    assert world.steps == ["hand over /mnt/a", "/mnt/a abort", "kexec -p -u"]
