"""Calls that make memory as large as it is: ftruncate and fallocate of a dax device.

Programs size a file before they map it. The kernel refuses that of a device, whatever the size; so
the supervisor of ``pkernfs exec`` says yes to what is so already. All else is the kernel's.
"""

from __future__ import annotations

import os
from typing import NamedTuple

from pkernfs.host.sysroot import HOST, Host
from pkernfs.layout import BLOCK
from pkernfs.plain.caller import Caller
from pkernfs.plain.seccomp import FALLOCATE, FTRUNCATE, Call

_KEEP_SIZE = 1
_SIGN = 1 << 63


class Fitting(NamedTuple):
    """A call that may change nothing: of descriptor ``number``, if it has from ``least`` bytes on.

    ``most`` is the size up to which that is so; None: any.
    """

    number: int
    least: int
    most: int | None


def fitting_of(call: Call) -> Fitting | None:
    """Return what a call asks for; None: it is none of these calls."""
    args = call.args
    number = args[0] & 0xFFFFFFFF
    if call.number == FTRUNCATE:
        # A file may end before the last unit of its segment.
        return Fitting(number, args[1], args[1] + BLOCK - 1)
    if call.number == FALLOCATE:
        is_plain = not args[1] & 0xFFFFFFFF & ~_KEEP_SIZE
        is_range = args[3] > 0 and not (args[2] | args[3]) & _SIGN
        return Fitting(number, args[2] + args[3] if is_plain and is_range else _SIGN, None)
    return None


def is_as_large(caller: Caller, wanted: Fitting, host: Host = HOST) -> bool:
    """Tell if a descriptor can write to a dax device that is as large as a call wants it.

    :raises OSError: the caller has no such descriptor, or it is not for us.
    """
    device = caller.writable_device(wanted.number)
    if device is None:
        return False
    place = f"sys/dev/char/{os.major(device)}:{os.minor(device)}"
    try:
        subsystem = os.readlink(host.path(f"{place}/subsystem"))
    except OSError:
        return False
    size = host.find(f"{place}/size") or ""
    if os.path.basename(subsystem) != "dax" or not size.isdecimal():
        return False
    return wanted.least <= int(size) and (wanted.most is None or int(size) <= wanted.most)
