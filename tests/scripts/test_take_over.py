"""scripts/take-over without a device: errors are passed on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType

import pytest

from pkernfs.vmm.export import parse_export
from support.vfio_machine import SPARE, A, B, VfioMachine, two_domains

SCRIPT = Path(__file__).parents[2] / "scripts/take-over"


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


# ---------------------------------------------------------------------- several domains


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> VfioMachine:
    """Two devices in a domain each; the one in dom-0 cannot be put into its new address space."""
    made = VfioMachine.instead_of_this_one(tmp_path, monkeypatch)
    made.fails = f"{A} add"
    return made


@pytest.fixture
def script(machine: VfioMachine, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, for a machine that is made up, and where SIGTERM comes at once."""
    loader = SourceFileLoader("take_over", str(SCRIPT))
    spec = spec_from_loader("take_over", loader)
    assert spec
    module = module_from_spec(spec)
    loader.exec_module(module)
    monkeypatch.setattr(module, "read_export", lambda mnt: parse_export(two_domains(machine)))
    monkeypatch.setattr(module, "release", lambda mnt, bdf: machine.do(f"{bdf} detach"))
    monkeypatch.setattr(signal, "pthread_sigmask", lambda how, signals: set())
    monkeypatch.setattr(signal, "sigwait", lambda signals: machine.do("SIGTERM"))
    return module


def test_a_domain_that_fails_does_not_end_the_others(
    script: ModuleType,
    machine: VfioMachine,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["take-over", "/mnt"])
    assert script.main() == 1
    told = capsys.readouterr()
    why = f"{A}: stopped, bus mastering is off: {A} add: no"
    assert told.err == f"take-over: dom-0: not taken over: {why}\n"
    assert f"take-over: {B}: taken over; held for " in told.out
    assert told.out.endswith("take-over: stopped\n")
    assert f"{B} on" in machine.done
    assert machine.done[-4:] == [f"{B} detach", "SIGTERM", f"{B} close", "close"]


def test_the_vmm_gets_what_was_taken_and_learns_of_the_rest(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    run: list[dict[str, str]] = []
    monkeypatch.setattr(os, "execvpe", lambda file, words, variables: run.append(variables))
    monkeypatch.setattr(os, "set_inheritable", lambda fd, on: None)
    monkeypatch.setattr(sys, "argv", ["take-over", "/mnt", "--exec", "true"])
    assert script.main() == 1
    (variables,) = run
    taken = {"dom-1": {"fds": {"container": 3}, "devices": {B: 4}}}
    assert json.loads(variables["TAKEN_OVER"]) == taken
    assert "stopped, bus mastering is off" in json.loads(variables["NOT_TAKEN_OVER"])["dom-0"]


def test_if_every_domain_fails_it_ends(
    script: ModuleType, machine: VfioMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["take-over", "/mnt", "--device", A])
    assert script.main() == 1
    assert "SIGTERM" not in machine.done


def test_a_spare_device_is_for_one_domain(
    script: ModuleType,
    machine: VfioMachine,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Its group can be in one address space only."""
    machine.fails = ""
    monkeypatch.setattr(sys, "argv", ["take-over", "/mnt", "--spare", SPARE])
    assert script.main() == 0
    assert machine.done.count(f"{SPARE} add") == 1
    assert {f"{A} on", f"{B} on"} <= set(machine.done)
    says = f"{SPARE}: in use for dom-0: memory of others is mapped in the hold"
    assert f"take-over: {says}\n" in capsys.readouterr().out
