"""Region specs: the text by which a command names a region; nothing is opened here.

A region spec, the first argument of every command, is ``SIZE!START`` (through /dev/mem),
``/dev/daxX.Y``, a file, or ``none`` (``none:NAME``) for what ``pkernfs=`` on the kernel command
line names.
"""

from __future__ import annotations

import os
import re

from pkernfs.errors import RegionError
from pkernfs.host import cmdline, iomem
from pkernfs.host.sysroot import HOST, Host

_NONE = re.compile(r"none(:.*)?", re.DOTALL)
_DEVICE = re.compile(r"/dev/(dax|mem)\S*", re.ASCII)


def resolve(spec: str, host: Host = HOST) -> str:
    """Return a spec that means the same in another directory, in the one way to write it.

    ``none`` becomes what ``pkernfs=`` names; file names become absolute.

    :raises RegionError: no such region on the kernel command line, or no such kind of region.
    """
    if _NONE.fullmatch(spec):
        spec = cmdline.resolve_none(spec, host.command_line())
    _refuse_several(spec)
    if iomem.looks_physical(spec):
        return str(iomem.parse_span(spec))
    return os.path.realpath(spec)


def is_file_spec(spec: str) -> bool:
    """Tell whether a spec names a file region: one that can be made, sized and removed."""
    if _NONE.fullmatch(spec) or iomem.looks_physical(spec) or _is_several(spec):
        return False
    return not _DEVICE.fullmatch(os.path.realpath(spec))


def _refuse_several(spec: str) -> None:
    """Refuse a list of ranges.

    :raises RegionError: it is one.
    """
    if _is_several(spec):
        raise RegionError(f"{spec}: several ranges in one file system are not there yet: give one")


def _is_several(spec: str) -> bool:
    parts = spec.split(",")
    return len(parts) > 1 and all(
        iomem.looks_physical(part) or _DEVICE.fullmatch(part) for part in parts
    )
