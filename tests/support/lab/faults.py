"""Requests of devices that failed, as the kernel's log and the unit have them."""

from __future__ import annotations

import json
import re
from typing import Any

from kexeclab.guest import Guest
from support.lab.commands import iommu

#: A line of the kernel's, for a request for memory or an interrupt.
FAULT = re.compile(r"DMAR: \[(?:DMA|INTR).*")


def no_faults(guest: Guest) -> dict[str, Any]:
    """Neither the kernel nor the unit has seen a request that failed; what is said of the unit."""
    assert not FAULT.findall(guest.run("dmesg"))
    found: dict[str, Any]
    [found] = json.loads(iommu("units", "--json"))["units"]
    assert not found.get("faults"), found
    return found
