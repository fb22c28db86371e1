"""pkernfs.vmm.takeover without a device: what is refused, and what happens in which order."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pkernfs.vmm import takeover, vfio
from pkernfs.vmm.takeover import Domain, Piece, TakeOver, TakeOverError, plan

MIB = 1 << 20
A, B, SPARE = "0000:00:05.0", "0000:00:06.0", "0000:00:07.0"
COMMAND = vfio.PCI_COMMAND_MASTER | vfio.PCI_COMMAND_MEMORY
SCRIPT = Path(__file__).parents[2] / "scripts/take-over"


class Machine:
    """Devices, groups and files of /sys, as VFIO and the plan see them; what is done is noted."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.groups = {A: 1, B: 2, SPARE: 3}
        self.drivers: dict[str, str | None] = {}
        self.reserved = "0x00000000fee00000 0x00000000feefffff msi\n"
        self.commands = {A: COMMAND, B: COMMAND, SPARE: 0}
        self.done: list[str] = []
        self.fails = ""
        self.region = root / "region"
        self.region.write_bytes(bytes(8 * MIB))
        for bdf in self.groups:
            self.device(bdf).mkdir(parents=True)
        for module, parameter in (
            ("vfio_pci", "disable_idle_d3"),
            ("vfio_iommu_type1", "allow_unsafe_interrupts"),
        ):
            self.parameter(module, parameter).parent.mkdir(parents=True)
            self.parameter(module, parameter).write_text("Y\n")

    def device(self, bdf: str) -> Path:
        return self.root / "devices" / bdf

    def parameter(self, module: str, name: str) -> Path:
        return self.root / "module" / module / "parameters" / name

    def do(self, what: str) -> None:
        if what == self.fails:
            raise vfio.VfioError(f"{what}: no")
        self.done.append(what)

    def read_config(self, bdf: str, at: int) -> int:
        return self.commands[bdf] if at == vfio.PCI_COMMAND else 0

    def write_config(self, bdf: str, at: int, word: int) -> None:
        assert at == vfio.PCI_COMMAND
        self.commands[bdf] = word
        self.do(f"{bdf} {'on' if word & vfio.PCI_COMMAND_MASTER else 'off'}")

    def reserved_regions(self, group: int) -> str:
        return self.reserved

    def members(self, group: int) -> list[str]:
        return [bdf for bdf, number in self.groups.items() if number == group]


class Space:
    """An address space that only notes."""

    machine: Machine

    def __init__(self) -> None:
        self.ready = False
        self.fds = {"container": 3}

    def prepare(self, bdf: str) -> None:
        self.machine.do(f"{bdf} prepare")

    def add(self, bdf: str) -> None:
        self.machine.do(f"{bdf} add")
        self.ready = True

    def map(self, iova: int, vaddr: int, length: int, perm: int) -> None:
        self.machine.do(f"map {iova:#x} {length:#x} {perm}")

    def open(self, bdf: str) -> Any:
        self.machine.do(f"{bdf} open")
        return Opened(self.machine, bdf)

    def close(self) -> None:
        self.machine.do("close")


class Opened:
    """A device that is open."""

    fd = 4

    def __init__(self, machine: Machine, bdf: str) -> None:
        self._machine = machine
        self.bdf = bdf

    def set_master(self, on: bool) -> None:
        self._machine.do(f"{self.bdf} {'on' if on else 'off'}")

    def close(self) -> None:
        self._machine.do(f"{self.bdf} close")


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    made = Machine(tmp_path)
    Space.machine = made
    monkeypatch.setattr(vfio, "device_path", made.device)
    monkeypatch.setattr(vfio, "driver_of", made.drivers.get)
    monkeypatch.setattr(vfio, "group_of", made.groups.__getitem__)
    monkeypatch.setattr(vfio, "group_members", made.members)
    monkeypatch.setattr(vfio, "reserved_regions", made.reserved_regions)
    monkeypatch.setattr(vfio, "bind", lambda bdf: made.do(f"{bdf} bind"))
    monkeypatch.setattr(vfio, "has_iommufd", lambda bdf: False)
    monkeypatch.setattr(vfio, "read_config", made.read_config)
    monkeypatch.setattr(vfio, "write_config", made.write_config)
    monkeypatch.setattr(vfio, "Container", Space)
    monkeypatch.setattr(takeover, "_MODULES", tmp_path / "module")
    return made


def mapping(iova: int, *pieces: tuple[int, int], **more: Any) -> dict[str, Any]:
    """Of a file that is in these pieces, ``(region offset, length)``."""
    return {
        "iova": iova,
        "length": sum(length for _at, length in pieces),
        "readable": True,
        "writeable": iova != 0x5000,
        "file": "/guest-ram",
        "offset": 0,
        "pieces": [{"region_offset": at, "length": n, "physical": at} for at, n in pieces],
        **more,
    }


def export(machine: Machine, **attached: list[dict[str, Any]]) -> dict[str, Any]:
    """Both devices in a domain each, dom_0 and dom_1, that map what is said."""
    mappings = {name.replace("_", "-"): found for name, found in attached.items()}
    return {
        "version": 1,
        "region": {
            "name": "region",
            "mmap": {"path": str(machine.region), "offset": 0, "length": 8 * MIB},
        },
        "ioas": [{"id": name, "mappings": found} for name, found in mappings.items()],
        "devices": [
            {"device": bdf, "hwpt": name, "pasid": None, "adopted_by": "dmar0"}
            for bdf, name in zip((A, B), mappings, strict=False)
        ],
    }


def two(machine: Machine) -> dict[str, Any]:
    first = [mapping(0x1000, (MIB, 0x2000), (5 * MIB, 0x1000)), mapping(0x5000, (0, 0x1000))]
    return export(machine, dom_0=first, dom_1=[mapping(0, (0, MIB))])


# ---------------------------------------------------------------------- the plan


def test_pieces(machine: Machine) -> None:
    first, second = plan(two(machine))
    assert first == Domain(
        "dom-0",
        [
            Piece(0x1000, 0x2000, 3, MIB),
            Piece(0x3000, 0x1000, 3, 5 * MIB),
            Piece(0x5000, 0x1000, 1, 0),
        ],
        [A],
    )
    assert (second.devices, second.bytes) == ([B], MIB)
    assert plan(two(machine), [B]) == [second]
    assert machine.done == []


def test_bars(machine: Machine) -> None:
    bar = mapping(0, (0, 0x4000), bar={"device": SPARE, "number": 2}, offset=0x1000)
    del bar["file"]
    [domain] = plan(export(machine, dom_0=[bar]))
    assert domain.pieces == [Piece(0, 0x4000, 3, 0x1000, (SPARE, 2))]


def other_driver(machine: Machine) -> None:
    machine.drivers[A] = "e1000e"


def other_in_group(machine: Machine) -> None:
    machine.groups[SPARE] = machine.groups[A]
    machine.drivers[SPARE] = "ahci"


def attached_in_group(machine: Machine) -> None:
    machine.groups[B] = machine.groups[A]


def sleepy(machine: Machine) -> None:
    machine.parameter("vfio_pci", "disable_idle_d3").write_text("N\n")


def forgeable(machine: Machine) -> None:
    machine.parameter("vfio_iommu_type1", "allow_unsafe_interrupts").write_text("N\n")


def firmware(machine: Machine) -> None:
    machine.reserved = "0x1000 0x1fff direct\n"


def taken_addresses(machine: Machine) -> None:
    machine.reserved = "0x3000 0x3fff reserved\n"


def few_entries(machine: Machine) -> None:
    machine.parameter("vfio_iommu_type1", "dma_entry_limit").write_text("2\n")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (other_driver, f"{A}: e1000e has it"),
        (other_in_group, f"{A}: in group 1 with {SPARE}, which ahci has"),
        (attached_in_group, f"{A}: in group 1 with {B}, which would lose its tables"),
        (sleepy, "vfio-pci: it would put devices to sleep: modprobe -r vfio_pci"),
        (firmware, f"{A}: the firmware has it use 0x1000-0x1fff"),
        (taken_addresses, f"{A}: dom-0 maps 0x3000, 0x1000 bytes: VFIO takes no addresses"),
        (few_entries, "dom-0: its memory is in 3 pieces: VFIO takes 2"),
    ],
)
def test_refused(machine: Machine, change: Callable[[Machine], None], reason: str) -> None:
    change(machine)
    with pytest.raises(TakeOverError) as refused:
        plan(two(machine))
    assert str(refused.value).startswith(reason)
    assert machine.done == []


def test_interrupts_that_are_not_remapped(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    forgeable(machine)
    monkeypatch.setattr(takeover, "_INTERRUPTS", machine.root / "interrupts")
    (machine.root / "interrupts").write_text("24: 7 PCI-MSI 0-edge x\n")
    with pytest.raises(TakeOverError, match=r"echo 1 >.*/allow_unsafe_interrupts"):
        plan(two(machine))
    (machine.root / "interrupts").write_text("24: 7 IR-PCI-MSI 0-edge x\n")
    plan(two(machine))


def test_exports_that_cannot_work(machine: Machine) -> None:
    for change, reason in (
        ({"adopted_by": None}, f"{A}: no unit of this kernel is seen to walk"),
        ({"hwpt": None}, f"{A}: attached to what is no domain"),
    ):
        whole = two(machine)
        whole["devices"][0] |= change
        with pytest.raises(TakeOverError) as refused:
            plan(whole)
        assert str(refused.value).startswith(reason)
    whole = two(machine)
    del whole["ioas"][0]["mappings"][0]["file"]
    with pytest.raises(TakeOverError, match="0x1000: maps nobody's memory"):
        plan(whole)
    with pytest.raises(TakeOverError, match=f"{SPARE}: not attached in this region"):
        plan(two(machine), [SPARE])
    with pytest.raises(TakeOverError, match=f"{B}: not spare: {B} of its group is attached"):
        plan(two(machine), [A], B)
    with pytest.raises(TakeOverError, match="root-pgtables: damaged: a cycle: run"):
        plan({**two(machine), "damaged": {"dom-1": "a hole", "root-pgtables": "a cycle"}})
    assert plan({**two(machine), "damaged": {"dom-7": "a hole"}})
    with pytest.raises(TakeOverError, match="no device is attached"):
        plan(export(machine))


# ---------------------------------------------------------------------- the order


MAPS = ["map 0x1000 0x2000 3", "map 0x3000 0x1000 3", "map 0x5000 0x1000 1"]


def test_order(machine: Machine) -> None:
    whole = two(machine)
    first, _second = plan(whole)
    (machine.device(A) / "reset_method").write_text("flr bus\n")
    with TakeOver(whole) as taking:
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


def test_a_spare_device_has_the_memory_mapped_before(machine: Machine) -> None:
    whole = two(machine)
    first, _second = plan(whole)
    with TakeOver(whole) as taking:
        taken = taking.take(first, SPARE)
        assert machine.done == [
            f"{A} bind", f"{SPARE} bind", f"{A} prepare", f"{SPARE} add", f"{SPARE} open", *MAPS,
            f"{A} off", f"{A} add", f"{A} open", f"{A} on",
        ]  # fmt: skip
        assert set(taken.hold_ms) == {A}


def test_two_devices_of_a_domain(machine: Machine) -> None:
    """One after the other; the second finds the memory mapped. In one group they go together."""
    whole = export(machine, dom_0=[mapping(0, (0, MIB))])
    whole["devices"].append({**whole["devices"][0], "device": B})
    for apart in (True, False):
        machine.groups[B] = 2 if apart else 1
        [domain] = plan(whole)
        machine.done.clear()
        with TakeOver(whole) as taking:
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


def test_a_device_that_was_no_bus_master_is_none_afterwards(machine: Machine) -> None:
    machine.commands[A] = vfio.PCI_COMMAND_MEMORY
    whole = two(machine)
    with TakeOver(whole) as taking:
        taking.take(plan(whole)[0])
        assert f"{A} on" not in machine.done


@pytest.mark.parametrize("fails", [f"{A} add", MAPS[1], f"{A} open"])
def test_what_fails_in_the_hold_leaves_the_device_stopped(machine: Machine, fails: str) -> None:
    whole = two(machine)
    first, _second = plan(whole)
    machine.fails = fails
    with TakeOver(whole) as taking:
        with pytest.raises(TakeOverError) as failed:
            taking.take(first)
        assert str(failed.value) == f"{A}: stopped, bus mastering is off: {fails}: no"
    assert not machine.commands[A] & vfio.PCI_COMMAND_MASTER
    assert machine.done[-1] == "close"


def test_what_fails_before_leaves_it_at_work(machine: Machine) -> None:
    whole = two(machine)
    first, _second = plan(whole)
    machine.fails = f"{A} prepare"
    with TakeOver(whole) as taking, pytest.raises(vfio.VfioError, match="prepare: no"):
        taking.take(first)
    assert machine.commands[A] == COMMAND


def test_a_device_that_is_asleep_or_gone(machine: Machine) -> None:
    whole = two(machine)
    first, second = plan(whole)
    (machine.device(A) / "power").mkdir()
    (machine.device(A) / "power/runtime_status").write_text("suspended\n")
    machine.commands[B] = 0xFFFF
    with TakeOver(whole) as taking:
        with pytest.raises(TakeOverError, match=f"{A}: vfio-pci has put it to sleep"):
            taking.take(first)
        with pytest.raises(TakeOverError, match=f"{B}: it does not answer"):
            taking.take(second)


def test_requests_that_do_not_end_leave_it_at_work(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its tables are the old ones, so there is no reason to stop it."""
    whole = two(machine)
    first, _second = plan(whole)

    def read(bdf: str, at: int) -> int:
        words = {0x34: 0x40, 0x40: 0x0010, 0x4A: 0x20}
        return words[at] if at in words else machine.read_config(bdf, at)

    monkeypatch.setattr(vfio, "read_config", read)
    monkeypatch.setattr(takeover, "_PATIENCE_SECONDS", 0.01)
    with TakeOver(whole) as taking:
        with pytest.raises(TakeOverError, match=f"{A}: requests are under way .*: its tables are"):
            taking.take(first)
        assert f"{A} off" in machine.done
        assert f"{A} add" not in machine.done
    assert machine.commands[A] == COMMAND


def test_requests_under_way_are_waited_for(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the capability that tells of them, behind another one."""
    words = {0x34: 0x40, 0x40: 0x5001, 0x50: 0x0010, 0x5A: 0x20}

    def read(bdf: str, at: int) -> int:
        if at == 0x5A:
            machine.done.append("asked")
            words[0x5A] = 0x20 if machine.done.count("asked") < 3 else 0
        return machine.commands[bdf] if at == vfio.PCI_COMMAND else words[at]

    monkeypatch.setattr(vfio, "read_config", read)
    takeover.hold(A)
    assert machine.done == [f"{A} off", "asked", "asked", "asked"]
    monkeypatch.setattr(takeover, "_PATIENCE_SECONDS", 0.01)
    monkeypatch.setattr(vfio, "read_config", lambda bdf, at: 0x20 if at == 0x5A else read(bdf, at))
    with pytest.raises(TakeOverError, match=f"{A}: requests are under way"):
        takeover.hold(A)


# ---------------------------------------------------------------------- memory


def test_memory_is_that_of_the_region(machine: Machine) -> None:
    content = os.urandom(8 * MIB)
    machine.region.write_bytes(content)
    whole = two(machine)
    memory = takeover.Memory(whole)
    first, _second = plan(whole)
    memory.map(first.pieces)
    for piece in first.pieces:
        found = ctypes.string_at(memory.address(piece), piece.length)
        assert found == content[piece.offset :][: piece.length]


# ---------------------------------------------------------------------- the script


def test_the_script_passes_errors_on(tmp_path: Path) -> None:
    program = tmp_path / "pkernfs"
    program.write_text("#!/bin/sh\necho 'pkernfs: nowhere: not a pkernfs' >&2\nexit 1\n")
    program.chmod(0o755)
    done = run("nowhere", path=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "take-over: pkernfs: nowhere: not a pkernfs\n"
    program.write_text(f"#!/bin/sh\necho '{json.dumps({'version': 2})}'\n")
    assert run("nowhere", path=tmp_path).stderr == "take-over: export: version 2 is not known\n"
    assert run("nowhere", path=tmp_path / "none").stderr == "take-over: pkernfs: no such program\n"
    assert "a command is wanted" in run("nowhere", "--exec", path=tmp_path).stderr
    done = run("nowhere", "--exec", "my-vmm", path=tmp_path)
    assert done.stderr == "take-over: my-vmm: no such program\n"
    assert "--spare BDF" in run("--help", path=tmp_path).stdout


def run(*words: str, path: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *words]
    return subprocess.run(
        command, env={"PATH": str(path)}, capture_output=True, text=True, check=False
    )
