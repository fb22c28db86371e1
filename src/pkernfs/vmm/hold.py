"""The hold: devices whose bus mastering is off, so that they make no requests."""

from __future__ import annotations

import time
from collections.abc import Mapping

from pkernfs.errors import TakeOverError, VfioError
from pkernfs.host import pci_config
from pkernfs.vmm import sysfs

_TIMEOUT_SECONDS = 5.0


def hold_all(commands: Mapping[str, int]) -> None:
    """Hold devices, by their BDF, that have these command registers.

    If one cannot be held, all of them go on.

    :raises TakeOverError: one cannot; their tables are the old ones, and they are at work.
    """
    try:
        for bdf in commands:
            hold(bdf)
    except (OSError, VfioError) as error:
        for bdf, command in commands.items():
            if command != pci_config.NO_ANSWER:
                sysfs.write_config(bdf, pci_config.COMMAND, command)
        raise TakeOverError(f"{error}: its tables are the old ones") from error


def hold(bdf: str) -> None:
    """Switch a device's bus mastering off, and wait until its requests under way are done.

    :raises TakeOverError: it does not answer, or does not end them.
    :raises VfioError: there is no such device.
    """
    command = sysfs.read_config(bdf, pci_config.COMMAND)
    if command == pci_config.NO_ANSWER:
        raise TakeOverError(f"{bdf}: it does not answer")

    def load(at: int) -> int:
        return sysfs.read_config(bdf, at)

    express = pci_config.find_capability(load, pci_config.EXPRESS)
    sysfs.write_config(bdf, pci_config.COMMAND, command & ~pci_config.COMMAND_MASTER)
    # The answer to this read comes behind the writes that the device has made before.
    load(pci_config.COMMAND)
    status = express + pci_config.EXPRESS_STATUS
    deadline = time.monotonic() + _TIMEOUT_SECONDS
    while express and load(status) & pci_config.TRANSACTIONS_PENDING:
        if time.monotonic() > deadline:
            raise TakeOverError(f"{bdf}: requests are under way for {_TIMEOUT_SECONDS:g} s")
