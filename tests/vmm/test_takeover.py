"""pkernfs.vmm.takeover without a device: what happens in which order."""

from __future__ import annotations

import pytest

from pkernfs.errors import TakeOverError, VfioError
from pkernfs.host import pci_config
from pkernfs.vmm import hold, sysfs
from pkernfs.vmm.export import parse_export
from pkernfs.vmm.plan import plan
from pkernfs.vmm.takeover import TakeOver
from support.vfio_machine import (
    COMMAND,
    MIB,
    SPARE,
    A,
    B,
    VfioMachine,
    export_of,
    mapping,
    two_domains,
)

MAPS = ["map 0x1000 0x2000 3", "map 0x3000 0x1000 3", "map 0x5000 0x1000 1"]


def test_order(machine: VfioMachine) -> None:
    export = parse_export(two_domains(machine))
    first, _second = plan(export)
    (machine.device(A) / "reset_method").write_text("flr bus\n")
    with TakeOver(export) as taking:
        taken = taking.take(first)
        assert machine.done == [
            f"{A} bind", f"{A} prepare",
            f"{A} off", f"{A} add", *MAPS, f"{A} open", f"{A} on",
        ]  # fmt: skip
        assert (machine.device(A) / "reset_method").read_text() == "\n"
        assert set(taken.devices) == set(taken.hold_ms) == {A}
        assert 0 <= taken.mapping_ms <= taken.hold_ms[A]
        machine.done.clear()
    assert machine.done == [f"{A} close", "close"]


def test_a_spare_device_has_the_memory_mapped_before(machine: VfioMachine) -> None:
    export = parse_export(two_domains(machine))
    first, _second = plan(export)
    with TakeOver(export) as taking:
        taken = taking.take(first, SPARE)
        assert machine.done == [
            f"{A} bind", f"{SPARE} bind", f"{A} prepare", f"{SPARE} add", f"{SPARE} open", *MAPS,
            f"{A} off", f"{A} add", f"{A} open", f"{A} on",
        ]  # fmt: skip
        assert set(taken.hold_ms) == {A}


def test_two_devices_of_a_domain(machine: VfioMachine) -> None:
    """One after the other; the second finds the memory mapped. In one group they go together."""
    whole = export_of(machine, dom_0=[mapping(0, (0, MIB))])
    whole["devices"].append({**whole["devices"][0], "device": B})
    export = parse_export(whole)
    for apart in (True, False):
        machine.groups[B] = 2 if apart else 1
        [domain] = plan(export)
        machine.done.clear()
        with TakeOver(export) as taking:
            taking.take(domain)
            done = [d for d in machine.done if d.split()[1] not in ("bind", "prepare")]
            maps = "map 0x0 0x100000 3"
            if apart:
                assert done == [
                    f"{A} off", f"{A} add", maps, f"{A} open", f"{A} on",
                    f"{B} off", f"{B} add", f"{B} open", f"{B} on",
                ]  # fmt: skip
            else:
                assert done == [
                    f"{A} off", f"{B} off", f"{A} add", f"{B} add", maps,
                    f"{A} open", f"{B} open", f"{A} on", f"{B} on",
                ]  # fmt: skip
        machine.commands.update({A: COMMAND, B: COMMAND})


def test_a_device_that_was_no_bus_master_is_none_afterwards(machine: VfioMachine) -> None:
    machine.commands[A] = pci_config.COMMAND_MEMORY
    export = parse_export(two_domains(machine))
    with TakeOver(export) as taking:
        taking.take(plan(export)[0])
        assert f"{A} on" not in machine.done


@pytest.mark.parametrize("fails", [f"{A} add", MAPS[1], f"{A} open"])
def test_what_fails_in_the_hold_leaves_the_device_stopped(machine: VfioMachine, fails: str) -> None:
    export = parse_export(two_domains(machine))
    first, _second = plan(export)
    machine.fails = fails
    with TakeOver(export) as taking:
        with pytest.raises(TakeOverError) as failed:
            taking.take(first)
        assert str(failed.value) == f"{A}: stopped, bus mastering is off: {fails}: no"
    assert not machine.commands[A] & pci_config.COMMAND_MASTER
    assert machine.done[-1] == "close"


def test_what_fails_before_leaves_it_at_work(machine: VfioMachine) -> None:
    export = parse_export(two_domains(machine))
    first, _second = plan(export)
    machine.fails = f"{A} prepare"
    with TakeOver(export) as taking, pytest.raises(VfioError, match="prepare: no"):
        taking.take(first)
    assert machine.commands[A] == COMMAND


@pytest.mark.parametrize(
    "fails", [f"{B} prepare", f"{B} add", "map 0x0 0x100000 3", f"{B} open", f"{B} off"]
)
def test_a_domain_that_fails_does_not_end_the_others(machine: VfioMachine, fails: str) -> None:
    """Nothing of it stays open, and the one that has been taken is at work."""
    export = parse_export(two_domains(machine))
    first, second = plan(export)
    with TakeOver(export) as taking:
        taken = taking.take(first)
        machine.done.clear()
        machine.fails = fails
        with pytest.raises((TakeOverError, VfioError)):
            taking.take(second)
        assert taking.taken == [taken]
        assert not {f"{A} off", f"{A} close"} & set(machine.done)
        assert machine.done[-1] == "close", "its own address space"
        machine.done.clear()
        machine.fails = ""
        machine.commands[B] = COMMAND
        assert taking.take(second).devices.keys() == {B}, "it may be tried again"


def test_a_group_that_fails_does_not_end_the_domain(machine: VfioMachine) -> None:
    """Its other devices have been taken over: they are at work, and their space is kept."""
    whole = export_of(machine, dom_0=[mapping(0, (0, MIB))])
    whole["devices"].append({**whole["devices"][0], "device": B})
    export = parse_export(whole)
    [domain] = plan(export)
    machine.fails = f"{B} add"
    with TakeOver(export) as taking:
        with pytest.raises(TakeOverError, match=f"{B}: stopped, bus mastering is off"):
            taking.take(domain)
        [taken] = taking.taken
        assert taken.hold_ms.keys() == taken.devices.keys() == {A}
        assert not {f"{A} close", "close"} & set(machine.done)


def test_a_device_that_is_asleep_or_gone(machine: VfioMachine) -> None:
    export = parse_export(two_domains(machine))
    first, second = plan(export)
    (machine.device(A) / "power").mkdir()
    (machine.device(A) / "power/runtime_status").write_text("suspended\n")
    machine.commands[B] = 0xFFFF
    with TakeOver(export) as taking:
        with pytest.raises(TakeOverError, match=f"{A}: vfio-pci has put it to sleep"):
            taking.take(first)
        with pytest.raises(TakeOverError, match=f"{B}: it does not answer"):
            taking.take(second)


def test_requests_that_do_not_end_leave_it_at_work(
    machine: VfioMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its tables are the old ones, so there is no reason to stop it."""
    export = parse_export(two_domains(machine))
    first, _second = plan(export)

    def read(bdf: str, at: int) -> int:
        words = {0x34: 0x40, 0x40: 0x0010, 0x4A: 0x20}
        return words[at] if at in words else machine.read_config(bdf, at)

    monkeypatch.setattr(sysfs, "read_config", read)
    monkeypatch.setattr(hold, "_TIMEOUT_SECONDS", 0.01)
    with TakeOver(export) as taking:
        with pytest.raises(TakeOverError, match=f"{A}: requests are under way .*: its tables are"):
            taking.take(first)
        assert f"{A} off" in machine.done
        assert f"{A} add" not in machine.done
    assert machine.commands[A] == COMMAND
