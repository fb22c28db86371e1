"""Who has a file or a character device open or mapped, as /proc tells of all processes.

One look answers for any number of files. It looks at no file, only at the kernel's account of it:
some other file system may not answer. It does not see a descriptor on its way between processes,
nor what maps a file through FUSE, nor processes of a PID namespace above this one.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from pkernfs.host.mappings import maps_device
from pkernfs.host.mount_table import mounts_of_all
from pkernfs.host.sysroot import HOST, Host

_FDINFO = re.compile(rb"^(mnt_id|ino):\t(\d+)$", re.MULTILINE)
_DELETED = " (deleted)"


class Target(NamedTuple):
    """What is looked for: a file by device and inode ``number``, or a character device (``rdev``).

    A character device is also found by other nodes of its number if they have the same ``name``,
    the last part of the path: a container has a /dev of its own.
    """

    device: int
    number: int
    name: str = ""
    rdev: int = 0

    @classmethod
    def of(cls, info: os.stat_result, name: str) -> Target:
        """Return what a file or node is, by its stat and its name."""
        rdev = info.st_rdev if stat.S_ISCHR(info.st_mode) else 0
        return cls(info.st_dev, info.st_ino, name, rdev)


class Holding(NamedTuple):
    """A process that maps a target, or else only has it open; ``command`` is from its comm."""

    target: Target
    pid: int
    command: str
    maps: bool


class Look(NamedTuple):
    """What a look has found, by process number; ``hidden`` processes let nobody look at them."""

    found: list[Holding]
    hidden: int


class _Wanted:
    """The targets, by what /proc shows of them."""

    def __init__(self, targets: Iterable[Target], pids: Iterable[int], host: Host) -> None:
        self.targets = list(dict.fromkeys(targets))
        self.by_inode = {(maps_device(t.device), t.number): t for t in self.targets}
        self.nodes = {t.name: t for t in self.targets if t.rdev}
        words = [f" {device} " for device, _ in self.by_inode] + [f"/{name}" for name in self.nodes]
        #: What the maps of a process have somewhere if it maps any of them.
        self.words = [os.fsencode(word) for word in dict.fromkeys(words)]
        self.mounts = _mounts_of(pids, {t.device for t in self.targets}, host)


def look(targets: Iterable[Target], host: Host = HOST) -> Look:
    """Look which other processes have any of ``targets`` open or mapped."""
    pids = sorted(int(name) for name in host.list("proc") if name.isdigit())
    wanted = _Wanted(targets, pids, host)
    found: list[Holding] = []
    hidden = 0
    for pid in pids:
        if pid == os.getpid():
            continue
        try:
            mapped = set(_mapped(pid, wanted, host))
            opened = set(_opened(pid, wanted, host))
        except PermissionError:
            hidden += 1
        except OSError:  # it has ended
            continue
        else:
            held = [target for target in wanted.targets if target in mapped | opened]
            found += _holdings(pid, held, mapped, host)
    return Look(found, hidden)


def is_mapped_by(pid: int, target: Target, host: Host = HOST) -> bool:
    """Tell whether a process maps ``target``; False if it lets nobody look."""
    try:
        return target in _mapped(pid, _Wanted([target], [], host), host)
    except OSError:
        return False


def _holdings(pid: int, held: list[Target], mapped: set[Target], host: Host) -> Iterator[Holding]:
    command = (host.find(f"proc/{pid}/comm") or "?") if held else ""
    return (Holding(target, pid, command, target in mapped) for target in held)


def _mounts_of(pids: Iterable[int], devices: set[int], host: Host) -> dict[int, str]:
    """Return all mounts of the devices, in whatever namespace any process is, by their numbers.

    The device is as maps has it. A process may have a descriptor of a mount that it does not see:
    from another process.
    """
    words = {f"{os.major(device)}:{os.minor(device)}": maps_device(device) for device in devices}
    found: dict[int, str] = {}
    for line in mounts_of_all(pids, host):
        number, _, device, _ = line.split(" ", 3)
        if device in words:
            found[int(number)] = words[device]
    return found


# ------------------------------------------------------------------------------ mappings


def _mapped(pid: int, wanted: _Wanted, host: Host) -> Iterator[Target]:
    """Yield what a process maps.

    :raises OSError: it has ended, or lets nobody look.
    """
    text = _read(host.path(f"proc/{pid}/maps"))
    if not any(word in text for word in wanted.words):  # most map none of them
        return
    # Only a line feed ends a line; names, which other users choose, may have all else in them.
    for line in os.fsdecode(text).split("\n"):
        fields = line.split(None, 5)
        if len(fields) < 5:
            continue
        target = wanted.by_inode.get((fields[3], int(fields[4])))
        if target is None and len(fields) > 5:
            target = wanted.nodes.get(_last_part(fields[5]))
            if target is not None and not _is_node(_map_file(pid, fields[0], host), target):
                continue
        if target is not None:
            yield target


def _map_file(pid: int, addresses: str, host: Host) -> str:
    low, high = (int(address, 16) for address in addresses.split("-"))
    return host.path(f"proc/{pid}/map_files/{low:x}-{high:x}")


# ------------------------------------------------------------------------------ descriptors


def _opened(pid: int, wanted: _Wanted, host: Host) -> Iterator[Target]:
    """Yield what a process has open.

    :raises OSError: as of :func:`_mapped`.
    """
    place = host.path(f"proc/{pid}")
    for fd in os.listdir(f"{place}/fd"):
        try:
            link = os.readlink(f"{place}/fd/{fd}")
            if not link.startswith("/"):  # a socket, a pipe
                continue
            numbers = dict(_FDINFO.findall(_read(f"{place}/fdinfo/{fd}")))
        except OSError:
            continue
        device = wanted.mounts.get(int(numbers.get(b"mnt_id", 0)))
        target = wanted.by_inode.get((device, int(numbers.get(b"ino", 0)))) if device else None
        node = wanted.nodes.get(_last_part(link))
        if target is not None:
            yield target
        elif node is not None and _is_node(f"{place}/fd/{fd}", node):
            yield node


# ------------------------------------------------------------------------------ both


def _read(path: str) -> bytes:
    with open(path, "rb", buffering=0) as file:
        return file.read()


def _last_part(link: str) -> str:
    return os.path.basename(link.removesuffix(_DELETED))


def _is_node(path: str, target: Target) -> bool:
    """This asks the file system of the node, and so only for nodes of the right name."""
    try:
        info = os.stat(path)
    except OSError:
        return False
    return stat.S_ISCHR(info.st_mode) and info.st_rdev == target.rdev
