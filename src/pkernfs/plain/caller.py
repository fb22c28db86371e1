"""The thread that waits for an answer: its memory, its place in the file tree, its permissions.

All of it is read from /proc by the thread's number, and counts only if the call still waits
afterwards (:meth:`pkernfs.plain.seccomp.Listener.is_valid`): till then the number is that thread's.
"""

from __future__ import annotations

import os
import stat
from typing import NamedTuple

from pkernfs.native._native import ffi, lib

#: Bytes of the longest path, with the zero at its end.
PATH_MAX = 4096


class Identity(NamedTuple):
    """Whose permissions count for file systems: fsuid, fsgid, groups, effective capabilities.

    Capabilities count only in the user namespace that they belong to; those of another namespace
    than ours are none.
    """

    uid: int
    gid: int
    groups: frozenset[int]
    capabilities: int

    def may_all_of(self, other: Identity) -> bool:
        """Tell if nothing that ``other`` may do is more than this one may."""
        return self[:3] == other[:3] and not other.capabilities & ~self.capabilities


class Caller:
    """A stopped thread."""

    def __init__(self, tid: int) -> None:
        self.tid = tid
        self._proc = f"/proc/{tid}"

    def read(self, address: int, length: int) -> bytes:
        """Return up to ``length`` bytes of its memory: fewer where the memory ends.

        :raises OSError: there are none, or they are not for us.
        """
        out = ffi.new("uint8_t[]", length)
        done = lib.pk_read_process(self.tid, address, out, length)
        if done < 0:
            raise OSError(-done, os.strerror(-done))
        return bytes(ffi.buffer(out, done))

    def path(self, address: int) -> bytes:
        """Return the path that is at an address of its memory.

        :raises OSError: there is none, or it is too long.
        """
        text, end, _ = self.read(address, PATH_MAX).partition(b"\0")
        if not end:
            raise OSError("a path without an end")
        return text

    @property
    def root(self) -> str:
        """A path that leads us to its root directory."""
        return f"{self._proc}/root"

    def directory(self, number: int | None) -> int:
        """Open its descriptor ``number``, or its working directory if None, as a place to start at.

        :raises OSError: it is no directory, or not for us.
        """
        name = "cwd" if number is None else f"fd/{number}"
        return os.open(f"{self._proc}/{name}", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)

    def writable_device(self, number: int) -> int | None:
        """Return the device that its descriptor ``number`` can write to, as st_rdev; None: none.

        :raises OSError: it has no such descriptor, or it is not for us.
        """
        info = os.stat(f"{self._proc}/fd/{number}")
        if not stat.S_ISCHR(info.st_mode):
            return None
        lines = _read(f"{self._proc}/fdinfo/{number}").splitlines()
        fields = dict(line.split(b":\t", 1) for line in lines[:3])
        can_write = int(fields[b"flags"], 8) & os.O_ACCMODE in (os.O_WRONLY, os.O_RDWR)
        return info.st_rdev if can_write else None

    def identity(self) -> Identity:
        """Read whose permissions it has.

        :raises OSError: it has ended, or is not for us.
        """
        return _identity(self._proc)

    def control_groups(self) -> bytes:
        """Return the control groups that it is in, as the kernel writes them.

        :raises OSError: it has ended.
        """
        return _read(f"{self._proc}/cgroup")


_MARK = ffi.new("char[]", b"what a fork has at the same place")


def can_be_read(tid: int) -> bool:
    """Tell if we may read the memory of a process that we were forked from; Yama may forbid it."""
    mark = bytes(ffi.buffer(_MARK))
    try:
        return Caller(tid).read(int(ffi.cast("uintptr_t", _MARK)), len(mark)) == mark
    except OSError:
        return False


def own_identity() -> Identity:
    """Read whose permissions this thread has."""
    return _identity("/proc/thread-self")


def own_control_groups() -> bytes:
    """Return the control groups that this process is in."""
    return _read("/proc/self/cgroup")


def _identity(proc: str) -> Identity:
    fields = {}
    for line in _read(f"{proc}/status").split(b"\n"):
        name, _, value = line.partition(b":")
        fields[name] = value.split()
    namespace, ours = (os.readlink(f"{p}/ns/user") for p in (proc, "/proc/thread-self"))
    return Identity(
        int(fields[b"Uid"][3]),
        int(fields[b"Gid"][3]),
        frozenset(map(int, fields[b"Groups"])),
        int(fields[b"CapEff"][0], 16) if namespace == ours else 0,
    )


def _read(path: str) -> bytes:
    with open(path, "rb", buffering=0) as file:
        return file.readall()
