"""Kernel images, and what belongs to one: its release, its configuration, its modules' aliases.

Nothing is loaded or changed. A kernel is what kexec(8) is given, a bzImage; what belongs to it is
where distributions put it (/boot, /lib/modules), or beside the image.
"""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Iterator

from pkernfs.host.sysroot import Host

# Documentation/arch/x86/boot.rst, "The Real-Mode Kernel Header".
_SIGNATURE_AT, _SIGNATURE = 0x202, b"HdrS"
_VERSION_AT, _VERSION_BASE = 0x20E, 0x200
_MAX_VERSION = 256

Config = dict[str, str]


def release_of(host: Host, image: str) -> str | None:
    """Return the release (``uname -r``) of a bzImage; None: it is none, or does not say."""
    try:
        with open(host.path(image.lstrip("/")), "rb") as file:
            head = file.read(_VERSION_AT + 2)
            if head[_SIGNATURE_AT : _SIGNATURE_AT + 4] != _SIGNATURE:
                return None
            file.seek(_VERSION_BASE + int.from_bytes(head[_VERSION_AT:], "little"))
            text = file.read(_MAX_VERSION)
    except OSError:
        return None
    words = text.partition(b"\0")[0].decode("ascii", "replace").split()
    return words[0] if words else None


def running_config(host: Host) -> Config | None:
    """Return the running kernel's configuration; None: it is nowhere to be found."""
    import gzip  # a handover looks at images, and at no compressed configuration

    try:
        with gzip.open(host.path("proc/config.gz"), "rt") as file:
            return _parse(file.read())
    except OSError:
        return config_of(host, host.find("proc/sys/kernel/osrelease") or "")


def config_of(host: Host, release: str, image: str | None = None) -> Config | None:
    """Return a kernel's configuration, without ``CONFIG_``; None: it is nowhere to be found."""
    names = [f"boot/config-{release}", *_modules(release, image, "config")]
    if image is not None:
        names.append(os.path.join(os.path.dirname(image).lstrip("/"), f"config-{release}"))
    text = next((t for name in names if (t := host.find(name)) is not None), None)
    return None if text is None else _parse(text)


def _parse(text: str) -> Config:
    return dict(re.findall(r"^CONFIG_(\w+)=(.*)$", text, re.MULTILINE))


def claiming_modules(host: Host, release: str, image: str, modalias: str) -> dict[str, bool] | None:
    """Return the modules of a kernel that take a device of that modalias.

    :returns: True for each module that is built in. None: the modules are nowhere to be found, or
        it is not known which are built in.
    """
    texts = [host.find(name) for name in _modules(release, image, "modules.alias")]
    aliases = next((text for text in texts if text is not None), None)
    texts = [host.find(name) for name in _modules(release, image, "modules.builtin.modinfo")]
    built_in = next((text for text in texts if text is not None), None)
    if aliases is None or built_in is None:
        return None
    found = {m: False for pattern, m in _aliases(aliases) if fnmatch.fnmatchcase(modalias, pattern)}
    for pattern, module in _built_in(built_in):
        if fnmatch.fnmatchcase(modalias, pattern):
            found[module] = True
    return found


def _modules(release: str, image: str | None, name: str) -> list[str]:
    """Return the places where a file of a kernel's modules may be."""
    places = [f"lib/modules/{release}/{name}"]
    if image is not None:
        places.append(os.path.join(os.path.dirname(image).lstrip("/"), places[0]))
    return places


def _aliases(text: str) -> Iterator[tuple[str, str]]:
    for line in text.splitlines():
        words = line.split()
        if len(words) == 3 and words[0] == "alias":
            yield words[1], words[2]


def _built_in(text: str) -> Iterator[tuple[str, str]]:
    """Parse modules.builtin.modinfo: ``MODULE.alias=PATTERN`` with zero bytes in between."""
    for item in text.split("\0"):
        name, _, pattern = item.partition(".alias=")
        if pattern:
            yield pattern, name
