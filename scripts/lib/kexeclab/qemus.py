"""Debian's other QEMUs, each a disk with what a plain guest needs, run by its own dynamic loader.

The root file system has the QEMU of its own suite. A disk is 46 MiB, where an unpacked QEMU with
all that it depends on is 170 MiB.
"""

import re
import shutil
from pathlib import Path

from guestlab import qemu
from guestlab.machine import QEMU
from kexeclab import LabError, cache
from kexeclab.debian import mmdebstrap_options, run, source_line
from kexeclab.guest import DISKS

SUITES = {"7.2": "bookworm"}
_LIBRARIES = "usr/lib/x86_64-linux-gnu"
_MODULE = f"{_LIBRARIES}/qemu/accel-tcg-x86_64.so"
#: What the firmware of a PC is, where the script that runs QEMU looks for it.
_FIRMWARE = ("usr/share/qemu/kvmvapic.bin", "usr/share/seabios/bios-256k.bin")
_LOADER = "ld-linux-x86-64.so.2"
_FOUND = re.compile(r"\s(/\S+) \(0x")
_REVISION = "1"


def serial(name: str) -> str:
    """The serial number of the disk, for Guest.disk."""
    return f"qemu-{name}"


def fetch(name: str) -> Path:
    """The disk of the QEMU ``name``, a key of SUITES, from the cache or made now.

    :raises LabError: it is not to be had.
    """
    if name not in SUITES:
        raise LabError(f"QEMU {name}: unknown; there are {', '.join(SUITES)}")
    recipe = cache.key(_REVISION, SUITES[name], *_FIRMWARE)
    return cache.entry(serial(name), recipe, lambda place: _build(place, name)) / "disk.ext4"


def _build(scratch: Path, name: str) -> None:
    unpacked, content = scratch / "unpacked", scratch / "content"
    suite = SUITES[name]
    run(*qemu.extraction(suite, unpacked, source_line(suite), *mmdebstrap_options()))
    _take(unpacked, content / "root")
    qemu.write_runner(content / QEMU, suite, DISKS / serial(name) / "root")
    cache.make_image(content, scratch / "disk.ext4", "lab-qemu", spare_bytes=1 << 20)
    for tree in (unpacked, content):
        shutil.rmtree(tree)


def _take(unpacked: Path, root: Path) -> None:
    """Copy the program, the libraries that it loads, its emulation and its firmware."""
    # Debian 12's packages have some files in /lib that a system has in /usr/lib.
    places = [unpacked / _LIBRARIES.removeprefix("usr/"), unpacked / _LIBRARIES]
    program = f"usr/bin/{QEMU}"
    for file in (program, _MODULE, *_FIRMWARE):
        _copy(unpacked / file, root / file)
    loader = next((place / _LOADER for place in places if (place / _LOADER).exists()), None)
    if loader is None:
        raise LabError(f"{QEMU}: no {_LOADER} among its packages")
    _copy(loader, root / "usr/lib64" / _LOADER)
    path = ":".join(map(str, places))
    listed = run(str(loader), "--library-path", path, "--list", str(unpacked / program))
    for library in map(Path, _FOUND.findall(listed)):
        if not library.is_relative_to(unpacked):
            raise LabError(f"{QEMU}: loads the host's {library}")
        _copy(library, root / _LIBRARIES / library.name)


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(source, target)
