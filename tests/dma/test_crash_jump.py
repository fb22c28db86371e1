"""The jump's own checks, on a made-up machine; the lab has the real one (tests/lab/test_dma.py)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from pkernfs.dma.crash_jump import CrashJump
from pkernfs.errors import InvalidError, PermissionDeniedError, PkernfsError
from pkernfs.fs.filesystem import FileSystem
from pkernfs.vtd.entries import parse_bdf
from support.made_up_host import Machine, make_machine
from support.table_files import Host

EDU, NIC = "0000:00:05.0", "0000:00:06.0"


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    machine = make_machine(tmp_path)
    machine.write("sys/kernel/kexec_crash_loaded", "1")
    machine.write("proc/sysrq-trigger", "")
    return machine


@pytest.fixture
def host() -> Iterator[Host]:
    host = Host()
    yield host
    host.close()


@pytest.fixture
def fs(host: Host) -> FileSystem:
    return host.fs


def test_only_what_was_handed_over_is_left(machine: Machine, fs: FileSystem) -> None:
    for panic in (True, False):
        with pytest.raises(InvalidError, match="not handed over"):
            CrashJump(fs, machine).start(panic=panic)
    assert machine.read("proc/sysrq-trigger") == ""


def test_without_a_kernel_there_is_no_panic(machine: Machine, fs: FileSystem) -> None:
    machine.write("sys/kernel/kexec_crash_loaded", "0")
    fs.freeze()
    with pytest.raises(InvalidError, match="no kernel is loaded"):
        CrashJump(fs, machine).start(panic=True)
    assert machine.read("proc/sysrq-trigger") == ""


def test_a_trigger_that_is_not_there(machine: Machine, fs: FileSystem) -> None:
    Path(machine.path("proc/sysrq-trigger")).unlink()
    fs.freeze()
    with pytest.raises(PermissionDeniedError, match="sysrq-trigger: No such file"):
        CrashJump(fs, machine).start(panic=True)


def test_a_kernel_that_does_not_panic(machine: Machine, fs: FileSystem) -> None:
    """All is as before: the process may run everywhere, and is not kept in memory."""
    before = os.sched_getaffinity(0)
    fs.freeze()
    with pytest.raises(PkernfsError, match="asked to panic: it did not"):
        CrashJump(fs, machine).start(panic=True)
    assert machine.read("proc/sysrq-trigger") == "c"
    assert os.sched_getaffinity(0) == before
    assert "VmLck:\t       0 kB" in Path("/proc/self/status").read_text()


def test_needs_of_a_region_whose_addresses_are_made_up(machine: Machine, host: Host) -> None:
    """No unit can walk it, so nothing depends on it; what is cut off is said all the same."""
    host.dom(0)
    for name in (EDU, NIC):
        host.attach(0, parse_bdf(name)[1])
    host.tables.persist(parse_bdf(NIC)[1], False)
    assert CrashJump(host.fs, machine).needs()._asdict() == {
        "devices": [], "units": [], "cut": [NIC], "scalable": False,
    }  # fmt: skip
