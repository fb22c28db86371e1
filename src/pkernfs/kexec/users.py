"""Users of a mount's files and of its region, as /proc and /sys tell of them.

No file is looked at, only the kernel's account of it: some other file system may not answer.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from pkernfs.control.mounts import Mount
from pkernfs.errors import RegionError
from pkernfs.host.holders import Target, look
from pkernfs.host.mappings import mappings_of, maps_device
from pkernfs.host.sysroot import HOST, Host
from pkernfs.pool.pool import Pool, Segment
from pkernfs.quantities import Ino


class Process(NamedTuple):
    """A process; ``command`` is its name in /proc/PID/comm."""

    pid: int
    command: str

    def __str__(self) -> str:
        return f"process {self.pid} ({self.command})"


class SegmentMapper(NamedTuple):
    """A process that maps a segment."""

    process: Process
    row: Segment


def users_of(mount: Mount, inos: set[Ino], host: Host = HOST) -> Iterator[str]:
    """Yield who has inodes of a mount open for writing or mapped: ``PATH by PID (COMMAND)``."""
    number = maps_device(mount.device)
    ids: dict[str, set[str]] = {}
    for pid in _processes(host):
        opened = _open_files(host, pid, _mount_ids(host, pid, mount, ids), inos)
        for path in dict.fromkeys([*opened, *_mapped(host, pid, number, inos)]):
            yield f"{path} by {_process(host, pid)}"
    yield from _loop_devices(host, mount)


def mappers_of(path: str, host: Host = HOST) -> Iterator[Process]:
    """Yield the other processes that map the file or device ``path`` for writing.

    None are found for an address: /dev/mem tells nothing about ranges here.
    """
    found = (m for m in mappings_of(path, host) if m.writable)
    yield from dict.fromkeys(Process(m.pid, m.command) for m in found)


def mappers_of_segments(
    pool: Pool, rows: Iterable[Segment], host: Host = HOST
) -> Iterator[SegmentMapper]:
    """Yield the other processes that map segments of a pool; one look answers for all of them."""
    targets = {target: row for row in rows if (target := _target(pool, row)) is not None}
    for holding in look(targets, host).found:
        if holding.maps:
            process = Process(holding.pid, holding.command)
            yield SegmentMapper(process, targets[holding.target])


def _target(pool: Pool, row: Segment) -> Target | None:
    """What to look for of a segment; None if it is not there."""
    try:
        path = pool.native_path(row)
        return Target.of(os.stat(path), os.path.basename(path))
    except (OSError, RegionError):
        return None


def _mount_ids(host: Host, pid: int, mount: Mount, known: dict[str, set[str]]) -> set[str]:
    """Return the numbers of the mounts of this file system that a process sees.

    :param known: is filled; by mount namespace.
    """
    try:
        namespace = os.readlink(host.path(f"proc/{pid}/ns/mnt"))
    except OSError:
        return set()
    if namespace not in known:
        device = f"{os.major(mount.device)}:{os.minor(mount.device)}"
        fields = [line.split(" ", 3) for line in _lines(host, f"proc/{pid}/mountinfo")]
        known[namespace] = {field[0] for field in fields if field[2] == device}
    return known[namespace]


def _open_files(host: Host, pid: int, mounts: set[str], inos: set[Ino]) -> Iterator[str]:
    for fd in host.list(f"proc/{pid}/fdinfo") if mounts else []:
        lines = _lines(host, f"proc/{pid}/fdinfo/{fd}")
        told = dict(line.split(None, 1) for line in lines if ":\t" in line)
        try:
            if told["mnt_id:"].strip() not in mounts or int(told["ino:"]) not in inos:
                continue
            if int(told["flags:"], 8) & os.O_ACCMODE:
                yield os.readlink(host.path(f"proc/{pid}/fd/{fd}"))
        except (OSError, KeyError, ValueError):
            continue


def _mapped(host: Host, pid: int, number: str, inos: set[Ino]) -> Iterator[str]:
    for line in _lines(host, f"proc/{pid}/maps"):
        fields = line.rstrip("\n").split(None, 5)
        if len(fields) == 6 and fields[3] == number and int(fields[4]) in inos:
            yield fields[5]


def _loop_devices(host: Host, mount: Mount) -> Iterator[str]:
    for name in host.list("sys/block"):
        if not name.startswith("loop"):
            continue
        for line in _lines(host, f"sys/block/{name}/loop/backing_file"):
            if line.startswith(mount.mount_point + "/"):
                yield f"{line.strip()} by /dev/{name}"


def _processes(host: Host) -> list[int]:
    return sorted(int(name) for name in host.list("proc") if name.isdigit())


def _process(host: Host, pid: int) -> Process:
    return Process(pid, next(iter(_lines(host, f"proc/{pid}/comm")), "?").strip())


def _lines(host: Host, name: str) -> list[str]:
    """Return the lines of a file; none if it has gone or is not for us."""
    try:
        path = host.path(name)
        with open(path, encoding="utf-8", errors="surrogateescape", newline="\n") as file:
            return file.readlines()
    except OSError:
        return []
