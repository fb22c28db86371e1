"""The module kmem, which makes ordinary memory of dax devices: what keeps it from them.

Soft-reserved memory is meant for it (drivers/dax/hmem/hmem.c: IORESOURCE_DAX_KMEM), and udev loads
it by its alias. It does not get a device if

- it is not loaded: ``modprobe.blacklist=kmem``, ``module_blacklist=kmem``, or a file in modprobe.d;
- devices have no memory at first: ``dax_hmem.region_idle=1``, or that option in modprobe.d.
  This is the only one that helps if kmem is built in.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import NamedTuple

from pkernfs.host import cmdline
from pkernfs.host.kernel_image import Config
from pkernfs.host.sysroot import Host

WORD = "modprobe.blacklist=kmem"
WORD_IF_BUILT_IN = "dax_hmem.region_idle=1"
#: modprobe.d(5): a file hides those of its name in the directories behind.
_DIRECTORIES = (
    "etc/modprobe.d", "run/modprobe.d", "usr/local/lib/modprobe.d", "usr/lib/modprobe.d",
    "lib/modprobe.d",
)  # fmt: skip
_NEVER = ("true", "false")
_IDLE = re.compile(r"region_idle(=[1yYtT]\S*)?")


class Barrier(NamedTuple):
    """What keeps kmem away; ``is_word``: it stands on the command line."""

    text: str
    is_word: bool


def barrier(host: Host) -> Barrier | None:
    """Return what keeps kmem from the dax devices of this kernel; None: nothing that is seen."""
    words = cmdline.spares_dax(host.command_line())
    if words:
        return Barrier(words[0], is_word=True)
    for path, line in _lines(host):
        if _keeps_away(line):
            return Barrier(f"/{path} ({' '.join(line)})", is_word=False)
    return None


def is_kept_away_by(command_line: str, config: Config | None) -> bool:
    """Tell whether a kernel of that configuration has no use for kmem by its command line."""
    words = cmdline.spares_dax(command_line)
    if config is not None and config.get("DEV_DAX_KMEM") == "y":
        return any(word.startswith(("dax_hmem.", "dax-hmem.")) for word in words)
    return bool(words) or (config is not None and "DEV_DAX_KMEM" not in config)


def word_for(config: Config | None) -> str:
    """Return the parameter that keeps kmem from the dax devices of such a kernel."""
    is_built_in = config is not None and config.get("DEV_DAX_KMEM") == "y"
    return WORD_IF_BUILT_IN if is_built_in else WORD


def devices_of(host: Host) -> list[str]:
    """Return the dax devices that are ordinary memory now."""
    return [name for name in host.list("sys/bus/dax/drivers/kmem") if name.startswith("dax")]


def _keeps_away(words: list[str]) -> bool:
    match words:
        case ["blacklist", "kmem"]:
            return True
        case ["install", "kmem", command, *_]:
            return os.path.basename(command) in _NEVER
        case ["options", module, *options]:
            return module.replace("-", "_") == "dax_hmem" and any(map(_IDLE.fullmatch, options))
    return False


def _lines(host: Host) -> Iterator[tuple[str, list[str]]]:
    """Yield the lines of modprobe.d, as words, and the file of each."""
    seen: set[str] = set()
    for directory in _DIRECTORIES:
        for name in host.list(directory):
            if not name.endswith(".conf") or name in seen:
                continue
            seen.add(name)
            path = f"{directory}/{name}"
            for line in (host.find(path) or "").replace("\\\n", " ").splitlines():
                words = line.split()
                if words and not words[0].startswith("#"):
                    yield path, words
