"""Tables of mounts, in the kernel's form: /proc/PID/mounts and the fields of /proc/PID/mountinfo.

White space, backslash and ``#`` are octal escapes in a field (fs/proc_namespace.c: mangle()). All
other bytes stand as they are: a carriage return, or whatever else Python takes for the end of a
line, does not end one.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from pkernfs.host.sysroot import Host

#: The type of pkernfs mounts.
FSTYPE = "fuse.pkernfs"

_ESCAPE = re.compile(r"\\([0-7]{3})")


class MountLine(NamedTuple):
    """A line of /proc/PID/mounts; ``options`` are of the mount and its file system."""

    source: str
    mount_point: str
    fstype: str
    options: tuple[str, ...]


def unescape(field: str) -> str:
    """Return a field of a table of mounts as it was before the kernel escaped it."""
    if "\\" not in field:  # so it is with nearly all, and every request reads a table
        return field
    # What is escaped is ASCII, whatever the encoding of the rest.
    return _ESCAPE.sub(lambda m: chr(int(m[1], 8)), field)


def table_lines(path: str) -> list[str]:
    """Return the lines of a table, fields still escaped.

    :raises OSError: it cannot be read.
    """
    with open(path, encoding="utf-8", errors="surrogateescape", newline="\n") as file:
        return file.read().split("\n")[:-1]


def own_mounts(host: Host) -> Iterator[MountLine]:
    """Yield the mounts that this process sees; none where there is no /proc."""
    return mounts_of(host, "self")


def mounts_of(host: Host, process: str) -> Iterator[MountLine]:
    """Yield the mounts that a process sees; none where it has ended, or is not for this user."""
    try:
        lines = table_lines(host.path(f"proc/{process}/mounts"))
    except OSError:
        return
    for line in lines:
        source, where, fstype, options = line.split(" ")[:4]
        words = tuple(unescape(word) for word in options.split(","))
        yield MountLine(unescape(source), unescape(where), fstype, words)


def mounts_of_all(pids: Iterable[int], host: Host) -> Iterator[str]:
    """Yield the lines of mountinfo of every mount namespace that a process is in, fields escaped.

    What is not for this user, or has ended, is left out.
    """
    known = set()
    for pid in pids:
        try:
            namespace = os.readlink(host.path(f"proc/{pid}/ns/mnt"))
            lines = [] if namespace in known else table_lines(host.path(f"proc/{pid}/mountinfo"))
        except OSError:
            continue
        known.add(namespace)
        yield from lines
