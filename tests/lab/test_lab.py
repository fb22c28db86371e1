"""The lab itself: a machine boots, kexecs, reports; a lost one is told from a failing test."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from kexeclab import LostMachine, StageFailed, runner
from kexeclab.guest import Guest, GuestError
from kexeclab.runner import Lab
from support.lab.regions import MOUNT

pytestmark = pytest.mark.lab

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def mount_and_leave(guest: Guest) -> None:
    """A pkernfs in this kernel's memory works; then the next kernel."""
    guest.run("mkfs.pkernfs", "-s", "64M", "/dev/shm/region")
    guest.run("mount", "-t", "fuse.pkernfs", "/dev/shm/region", str(MOUNT))
    (MOUNT / "file").write_bytes(b"kept" * 4096)
    assert (MOUNT / "file").read_bytes() == b"kept" * 4096
    guest.run("umount", str(MOUNT))
    guest.run("fsck.pkernfs", "-n", "/dev/shm/region")
    guest.note("boot", _BOOT_ID.read_text())
    guest.kexec(add=["lab.test=1"])


def arrive(guest: Guest) -> None:
    """Another kernel's life, with the notes of the first and the parameter that was added."""
    assert guest.notes["boot"] != _BOOT_ID.read_text()
    assert "lab.test=1" in Path("/proc/cmdline").read_text().split()
    assert not Path("/dev/shm/region").exists()
    guest.figure("uptime", time.clock_gettime(time.CLOCK_BOOTTIME), "s")


def test_mounts_and_kexecs(lab: Lab) -> None:
    """Boot, mount(8) a pkernfs, kexec into the same kernel, come back with a result."""
    result = lab.run(mount_and_leave, arrive)
    assert result.stages == ["mount_and_leave", "arrive"]
    assert result.figures["uptime"][0] > 0


def fail(guest: Guest) -> None:
    """A test that finds something wrong."""
    with pytest.raises(GuestError, match="exit status 3, expected 0"):
        guest.run("sh", "-c", "exit 3")
    raise AssertionError("what was found")


def test_failing_stage_is_reported(lab: Lab) -> None:
    """A stage's failure comes back with its own words."""
    with pytest.raises(StageFailed, match="what was found") as failure:
        lab.run(fail)
    assert str(failure.value).splitlines()[-1] == "--- stage 1: AssertionError: what was found"


def panic(_guest: Guest) -> None:
    """The end of the machine, unannounced."""
    Path("/proc/sysrq-trigger").write_text("c")


def test_panic_is_a_lost_machine(lab: Lab) -> None:
    """A machine that panics is lost, with the kernel's own message: the test has not failed."""
    with pytest.raises(LostMachine, match="Kernel panic - not syncing"):
        lab.run(panic)


def hang(_guest: Guest) -> None:
    """Stop every thread of the agent, as a machine that hangs would."""
    os.kill(os.getpid(), signal.SIGSTOP)


def test_silent_machine_is_lost(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that says nothing any more is lost, long before the stage's time is over."""
    monkeypatch.setattr(runner, "SILENT_SECONDS", 8.0)
    with pytest.raises(LostMachine, match="silent for 8 s"):
        lab.run(hang)


def dawdle(_guest: Guest) -> None:
    """Alive, but never done."""
    time.sleep(60)


def test_stage_that_is_never_done_fails(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    """A live machine whose test does not end is a failing test; where it was is told."""
    with pytest.raises(StageFailed, match="not done in 8 s"):
        lab.run(dawdle, seconds=8)
    assert "in dawdle" in capsys.readouterr().out


def crash(guest: Guest) -> None:
    """A panic with a kernel that is loaded for it."""
    guest.load(panic=True, add=["nr_cpus=1"])
    guest.panic()


def after_crash(guest: Guest) -> None:
    """The crash kernel is a stage like any other."""
    assert Path("/proc/vmcore").exists()
    guest.log(f"crash kernel: {guest.stage}")


def test_panic_into_a_crash_kernel(lab: Lab) -> None:
    """A panic starts the kernel that was loaded for it, and the test goes on there."""
    machine = lab.machine(cmdline=["crashkernel=256M"])
    assert lab.run(crash, after_crash, machine=machine).stages == ["crash", "after_crash"]
