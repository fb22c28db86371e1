"""Fixtures: a machine without a device, and a directory in which sockets have short names."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from pkernfs.vmm import plan, sysfs, vfio
from support.vfio_machine import Space, VfioMachine


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> VfioMachine:
    made = VfioMachine(tmp_path)
    Space.machine = made
    monkeypatch.setattr(sysfs, "device_path", made.device)
    monkeypatch.setattr(sysfs, "driver_of", made.drivers.get)
    monkeypatch.setattr(sysfs, "group_of", made.groups.__getitem__)
    monkeypatch.setattr(sysfs, "group_members", made.members)
    monkeypatch.setattr(sysfs, "reserved_ranges", made.reserved_ranges)
    monkeypatch.setattr(sysfs, "bind", lambda bdf: made.do(f"{bdf} bind"))
    monkeypatch.setattr(vfio, "has_iommufd", lambda bdf: False)
    monkeypatch.setattr(sysfs, "read_config", made.read_config)
    monkeypatch.setattr(sysfs, "write_config", made.write_config)
    monkeypatch.setattr(vfio, "Container", Space)
    monkeypatch.setattr(plan, "_MODULES", tmp_path / "module")
    return made


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A directory for sockets, whose paths have 107 bytes at most (unix(7)): not below TMPDIR."""
    with tempfile.TemporaryDirectory(prefix="vmm.", dir="/tmp") as directory:
        yield Path(directory)
