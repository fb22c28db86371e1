"""pkernfs.vmm.hold without a device: requests under way are waited for."""

from __future__ import annotations

import pytest

from pkernfs.errors import TakeOverError
from pkernfs.host import pci_config
from pkernfs.vmm import hold, sysfs
from support.vfio_machine import A, VfioMachine


def test_requests_under_way_are_waited_for(
    machine: VfioMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the capability that tells of them, behind another one."""
    words = {0x34: 0x40, 0x40: 0x5001, 0x50: 0x0010, 0x5A: 0x20}

    def read(bdf: str, at: int) -> int:
        if at == 0x5A:
            machine.done.append("asked")
            words[0x5A] = 0x20 if machine.done.count("asked") < 3 else 0
        return machine.commands[bdf] if at == pci_config.COMMAND else words[at]

    monkeypatch.setattr(sysfs, "read_config", read)
    hold.hold(A)
    assert machine.done == [f"{A} off", "asked", "asked", "asked"]
    monkeypatch.setattr(hold, "_TIMEOUT_SECONDS", 0.01)
    monkeypatch.setattr(sysfs, "read_config", lambda bdf, at: 0x20 if at == 0x5A else read(bdf, at))
    with pytest.raises(TakeOverError, match=f"{A}: requests are under way"):
        hold.hold(A)
