"""How the running kernel was started, and what it says that it did with the units that it found."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import NamedTuple

from pkernfs.host import cmdline
from pkernfs.host.sysroot import Host

_RECORD_BYTES = 8192  # of /dev/kmsg at most (Documentation/ABI/testing/dev-kmsg)
_MAX_RECORDS = 100_000
#: Linux, drivers/iommu/intel/iommu.c, init_dmars(): whether the tables were adopted.
_SAID = (
    (re.compile(r"DMAR: Copied translation tables from previous kernel for (\w+)"), True),
    (re.compile(r"DMAR: Failed to copy translation tables from previous kernel for (\w+)"), False),
    (re.compile(r"DMAR: Translation was enabled for (\w+) but we are not in kdump mode"), False),
)


class Adoption(NamedTuple):
    """Whether a unit's tables were adopted, and the kernel's own line about it."""

    unit: str
    adopted: bool
    log: str


def by_panic(host: Host) -> bool:
    """Whether this kernel was started by the panic of another one, as it knows itself."""
    return bool(cmdline.values(host.command_line(), "elfcorehdr"))


def adoptions(host: Host) -> list[Adoption]:
    """What became of the tables that were in force when the kernel started.

    A unit of which nothing is said was off, or the kernel's log does not go back that far, or is
    not for this user.
    """
    found: dict[str, Adoption] = {}
    for line in _log(host):
        for pattern, adopted in _SAID:
            match = pattern.search(line)
            if match is not None:
                found.setdefault(match[1], Adoption(match[1], adopted, line))
    return list(found.values())


def _log(host: Host) -> Iterator[str]:
    """The messages of the kernel's log, oldest first."""
    try:
        log = os.open(host.path("dev/kmsg"), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return
    try:
        for _ in range(_MAX_RECORDS):
            try:
                data = os.read(log, _RECORD_BYTES)
            except BrokenPipeError:
                continue  # records were overwritten; the next read is of those that are there
            except OSError:
                return  # the end
            if not data:
                return
            for line in data.decode("utf-8", "replace").splitlines():
                yield line.partition(";")[2]
    finally:
        os.close(log)
