"""The kernel's part of ``pkernfs exec``: a filter of system calls, and its listener.

seccomp_unotify(2) describes both. What a call means is the subject of ``pkernfs.plain.opens``.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Sequence
from typing import NamedTuple

from pkernfs.errors import BusyError, NotSupportedError, PkernfsError
from pkernfs.native._native import ffi, lib

#: The native system calls that open a file by its path, on x86-64 (asm/unistd_64.h).
OPEN, OPENAT, OPENAT2 = 2, 257, 437
#: Those that change the size of a file, or have memory put behind it.
FTRUNCATE, FALLOCATE = 77, 285

_AUDIT_ARCH_X86_64 = 0xC000003E
# struct seccomp_data: where the filter finds the call.
_NUMBER, _ARCH, _ARGS = 0, 4, 16
#: Flags of which each leaves an open to the kernel: it changes no file that is there, or cuts it.
_KERNEL_ONLY = os.O_PATH | os.O_DIRECTORY | os.O_TRUNC
_NEW = os.O_CREAT | os.O_EXCL

_RET_ALLOW, _RET_USER_NOTIF = 0x7FFF0000, 0x7FC00000
# linux/bpf_common.h
_LOAD, _JUMP, _JEQ, _JSET, _AND, _RETURN = 0x20, 0x05, 0x15, 0x45, 0x54, 0x06

#: Bytes of a :class:`Call` as the kernel stores it.
CALL_BYTES: int = ffi.sizeof("struct pk_notified")


class Call(NamedTuple):
    """A system call that waits for an answer; ``tid`` is the thread's number, as we see it."""

    id: int
    tid: int
    number: int
    args: Sequence[int]


# ------------------------------------------------------------------------------- the filter


def filter_program() -> list[int]:
    """Return the filter as BPF instructions of 64 bits: it notifies of five calls, allows others.

    Calls of another architecture, x32 among them, are others. The flags of open and openat are in
    registers, so that the filter allows what the supervisor would only hand back.
    """
    return _assemble(
        [
            ("", _LOAD, _ARCH, "", ""),
            ("", _JEQ, _AUDIT_ARCH_X86_64, "", "allow"),
            ("", _LOAD, _NUMBER, "", ""),
            ("", _JEQ, OPENAT2, "notify", ""),
            ("", _JEQ, FTRUNCATE, "notify", ""),
            ("", _JEQ, FALLOCATE, "notify", ""),
            ("", _JEQ, OPENAT, "openat", ""),
            ("", _JEQ, OPEN, "", "allow"),
            ("", _LOAD, _ARGS + 8, "", ""),
            ("", _JUMP, 0, "flags", ""),
            ("openat", _LOAD, _ARGS + 16, "", ""),
            ("flags", _JSET, _KERNEL_ONLY, "allow", ""),
            ("", _AND, _NEW, "", ""),
            ("", _JEQ, _NEW, "allow", ""),
            ("notify", _RETURN, _RET_USER_NOTIF, "", ""),
            ("allow", _RETURN, _RET_ALLOW, "", ""),
        ]
    )


def _assemble(lines: list[tuple[str, int, int, str, str]]) -> list[int]:
    """Turn lines (label, operation, operand, where to go if true, if false) into instructions."""
    labels = {label: at for at, (label, *_) in enumerate(lines) if label}
    program = []
    for at, (_, operation, operand, true, false) in enumerate(lines):
        skips = [labels[name] - at - 1 if name else 0 for name in (true, false)]
        if operation == _JUMP:
            operand, skips = skips[0], [0, 0]
        program.append(int.from_bytes(struct.pack("=HBBI", operation, *skips, operand), "little"))
    return program


def is_left_to_kernel(flags: int) -> bool:
    """Tell if an open with these flags is never answered, by the rule of the filter."""
    return bool(flags & _KERNEL_ONLY) or flags & _NEW == _NEW


def listen(supervisor: int) -> Listener:
    """Filter the calls of this thread, and of what it starts from now on; return the listener.

    From here on, opens of this process wait for whoever receives from the listener.

    :param supervisor: the process that may read this one's memory where Yama restricts that
    :raises BusyError: another supervisor listens to this process already.
    :raises NotSupportedError: this kernel or machine has no seccomp user notification.
    """
    if (machine := os.uname().machine) != "x86_64":
        raise NotSupportedError(f"exec: x86_64 only: got {machine}")
    if not _is_admin():
        lib.pk_no_new_privs()
    lib.pk_let_trace(supervisor)
    program = filter_program()
    waits = ffi.new("int *")
    fd = lib.pk_seccomp_listen(program, len(program), waits)
    if fd == -errno.EBUSY:
        raise BusyError("exec: another supervisor listens to this process: no exec inside an exec")
    if fd == -errno.EPERM:
        raise PkernfsError("exec: a seccomp filter of this process, or its container, forbids more")
    if fd < 0:
        raise NotSupportedError(
            f"exec: no seccomp user notification in this kernel: {os.strerror(-fd)}"
        )
    return Listener(fd, waits=bool(waits[0]))


def _is_admin() -> bool:
    """Tell if this thread may install a filter without no_new_privs: it has CAP_SYS_ADMIN."""
    with open("/proc/thread-self/status", encoding="ascii", errors="replace") as file:
        line = next((line for line in file if line.startswith("CapEff:")), "CapEff: 0")
    return bool(int(line.split()[1], 16) >> 21 & 1)


# ------------------------------------------------------------------------------- the listener


class Listener:
    """The descriptor that tells of stopped calls. Any number of threads may use it at once.

    :ivar waits: a call that was received is interrupted by nothing but the end of its thread (5.19)
    """

    def __init__(self, fd: int, *, waits: bool) -> None:
        self.fd = fd
        self.waits = waits

    def close(self) -> None:
        """Close this process' descriptor; when nobody has one, stopped calls fail with ENOSYS."""
        os.close(self.fd)

    def run_in_turn(self) -> None:
        """Have the kernel run caller and supervisor on one processor, where it can (6.6)."""
        lib.pk_notify_in_turn(self.fd)

    def receive(self, slot: bytearray | memoryview) -> Call | None:
        """Wait for a call; return it, or None if it was interrupted.

        :param slot: :data:`CALL_BYTES` bytes for the kernel; another process may look there which
            call was the last
        """
        notified = ffi.cast("struct pk_notified *", ffi.from_buffer(slot, require_writable=True))
        if lib.pk_notify_receive(self.fd, notified):
            return None
        args = tuple(notified.args)
        return Call(notified.id, notified.pid, notified.number, args)

    def is_valid(self, call_id: int) -> bool:
        """Tell if the call still waits: until now its thread's number was nobody else's."""
        return bool(lib.pk_notify_is_valid(self.fd, call_id))

    def go_on(self, call_id: int) -> None:
        """Let the kernel do the call as if there were no filter; nothing, if it waits no more."""
        lib.pk_notify_go_on(self.fd, call_id)

    def succeed(self, call_id: int) -> bool:
        """Have the call return 0 without the kernel; False: it waits no more."""
        return not lib.pk_notify_done(self.fd, call_id)

    def give(self, call_id: int, fd: int, *, close_on_exec: bool) -> bool:
        """Answer the call with a new descriptor of what ``fd`` is.

        Return False if the caller got none: it waits no more, or it has too many descriptors.
        """
        flags = os.O_CLOEXEC if close_on_exec else 0
        return bool(lib.pk_notify_give(self.fd, call_id, fd, flags, not self.waits) >= 0)

    def can_give(self) -> bool:
        """Tell if the kernel can answer with a descriptor (5.14 and later)."""
        return bool(lib.pk_notify_give(self.fd, 0, self.fd, 0, True) == -errno.ENOENT)


def last_call(slot: bytes | bytearray | memoryview) -> int:
    """Return the id of the last call that was received into a slot; 0: none."""
    return int.from_bytes(slot[:8], "little")
