"""The units of ``pkernfs install-units`` with systemd as process 1, through ``systemctl kexec``."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kexeclab.guest import Guest
from kexeclab.runner import Lab
from support.lab import regions
from support.lab.regions import MOUNT
from support.waiting import until

pytestmark = pytest.mark.lab

LOG = MOUNT / "vm.log"
UNIT = "pkernfs@mnt-pkernfs.service"
HANDOVER_UNIT = "pkernfs-handover@mnt-pkernfs.service"
VM = f"""
[Unit]
Description=What a virtual machine would be
Wants={UNIT}
AssertPathIsMountPoint={MOUNT}
After={UNIT} pkernfs.target
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/bin/sh -c 'echo started >>{LOG}'
ExecStop=/bin/sh -c 'echo stopped >>{LOG}'
[Install]
WantedBy=multi-user.target
"""
#: So that the test itself goes on while systemd stops everything for a kexec that is called off.
SURVIVE = "[Unit]\nDefaultDependencies=no\nIgnoreOnIsolate=yes\n"
REQUEST_TIMEOUT_SECONDS = 90


def wait_until(condition: Callable[[], bool], what: str) -> None:
    until(what, condition, REQUEST_TIMEOUT_SECONDS, every=0.2)


def systemctl(guest: Guest, *words: str) -> str:
    return guest.run("systemctl", "--no-pager", *words).strip()


def shown(guest: Guest, unit: str, name: str) -> str:
    """A property of a unit."""
    return systemctl(guest, "show", "--value", "-p", name, unit)


@contextmanager
def explained(guest: Guest) -> Iterator[None]:
    """If the block fails: what systemd was doing, in the test's log."""
    try:
        yield
    except BaseException:
        units = [word for unit in (UNIT, HANDOVER_UNIT, "vm.service") for word in ("-u", unit)]
        guest.log(guest.run("journalctl", "-b", "--no-pager", *units))
        guest.log(systemctl(guest, "list-jobs"))
        guest.log(f"vm.log: {life_of_vm()}")
        raise


def life_of_vm() -> list[str]:
    """What the virtual machine's service has done; nothing while there is no mount."""
    try:
        return LOG.read_text().split()
    except OSError:
        return []


def install(guest: Guest) -> None:
    """Units as an administrator installs them, and a service that has its data in the mount."""
    guest.run("mkfs.pkernfs", "none")
    guest.run("pkernfs", "install-units")
    units = Path("/etc/systemd/system")
    (units / "vm.service").write_text(VM)
    (units / "lab-agent.service.d").mkdir()
    (units / "lab-agent.service.d/survive.conf").write_text(SURVIVE)
    systemctl(guest, "daemon-reload")
    systemctl(guest, "enable", "--now", UNIT, "vm.service")
    for unit in (UNIT, HANDOVER_UNIT, "pkernfs.target", "vm.service"):
        assert shown(guest, unit, "ActiveState") == "active", unit
    assert MOUNT.is_mount()
    assert life_of_vm() == ["started"]


def kill_daemon(guest: Guest) -> None:
    """systemd starts another one, which takes the dead mount's place; services go on meanwhile."""
    before = int(shown(guest, UNIT, "MainPID"))
    os.kill(before, signal.SIGKILL)
    wait_until(
        lambda: int(shown(guest, UNIT, "MainPID")) not in (0, before), "another daemon is started"
    )
    wait_until(lambda: life_of_vm() == ["started"], "the file is there again")


def refused_kexec(guest: Guest) -> None:
    """A file is open for writing: no handover, no kexec, and everything is started again."""
    with (MOUNT / "busy").open("w"):
        systemctl(guest, "kexec", "--no-block")
        # Of a refused handover nothing is left, not even its mount: LOG is read anew.
        again = ["started", "stopped", "started"]
        wait_until(lambda: life_of_vm() == again, "the virtual machine is started again")
    said = guest.run("journalctl", "-b", "--no-pager", "-u", HANDOVER_UNIT)
    assert "open for writing" in said
    assert "no handover, no kexec" in said
    wait_until(lambda: shown(guest, HANDOVER_UNIT, "ActiveState") == "active", "all is as before")
    wait_until(lambda: not systemctl(guest, "list-jobs", "--no-legend"), "nothing is to be done")
    assert MOUNT.is_mount()


def hand_over(guest: Guest) -> None:
    """Install, be killed, be refused, and then go by ``systemctl kexec``."""
    with explained(guest):
        install(guest)
        kill_daemon(guest)
        guest.load()
        refused_kexec(guest)
    guest.leaving("systemctl kexec")
    systemctl(guest, "kexec", "--no-block")
    signal.pause()


def come_back(guest: Guest) -> None:
    """The file system was mounted early, before the service, and the handover was seen."""
    wait_until(lambda: shown(guest, "vm.service", "ActiveState") == "active", "the service is up")
    assert life_of_vm() == ["started", "stopped"] * 2 + ["started"]
    reached = int(shown(guest, "pkernfs.target", "ActiveEnterTimestampMonotonic"))
    basic = int(shown(guest, "basic.target", "ActiveEnterTimestampMonotonic"))
    began = int(shown(guest, "vm.service", "InactiveExitTimestampMonotonic"))
    assert 0 < reached < basic < began
    guest.figure("mounted after", reached / 1e6, "s")
    info = json.loads(guest.run("pkernfs", "info", "--json", str(MOUNT)))
    assert info["arrival"] == "live update"
    newest = info["history"][0]
    assert newest["handover"] is not None
    assert newest["changed"] == 0
    said = guest.run("journalctl", "-b", "--no-pager", "-u", UNIT)
    assert "after handover" in said


def test_systemctl_kexec_hands_over(lab: Lab) -> None:
    """Mounted early, restarted when killed, handed over at `systemctl kexec`, or no kexec."""
    machine = lab.machine(
        memory=regions.MEMORY_MIB,
        cmdline=regions.PARAMETERS["devmem"],
        systemd=True,
        persistent=True,
    )
    lab.run(hand_over, come_back, machine=machine, seconds=400)
