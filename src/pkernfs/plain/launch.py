"""The processes of ``pkernfs exec``: this one becomes the command, two others supervise it.

The command keeps this process' number, parent, descriptors, terminal and signals, and its status is
seen by whoever started it: nothing is between them. The *keeper* has only to start the supervisor
again when that has been killed; a supervisor goes on when its keeper has been killed. Both end when
no process is left that the filter applies to, whatever their signals.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import signal
import socket
from collections.abc import Callable
from typing import NoReturn

from pkernfs.errors import NotSupportedError, PkernfsError
from pkernfs.plain.caller import can_be_read
from pkernfs.plain.mounts import Mounts
from pkernfs.plain.seccomp import Listener, listen
from pkernfs.plain.segments import native_path_of
from pkernfs.plain.supervisor import SLOTS_BYTES, KnownMounts, SegmentOf, Supervisor, release

#: What ps shows.
NAME = "pkernfs-exec"

_READY = b"ready"
#: What a keeper answers instead, and why it is of no use.
_FAILURES = {
    b"too old": "this kernel cannot answer opens: got one before 5.14",
    b"forbidden": "a supervisor may not read this process: see kernel.yama.ptrace_scope",
}
_MESSAGE_BYTES = 64
_IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


def supervise(
    segment_of: SegmentOf = native_path_of, make_mounts: Callable[[], KnownMounts] = Mounts
) -> None:
    """Have opens of this process, and of all that it starts, answered by a supervisor from now on.

    :raises PkernfsError: the kernel cannot, or another supervisor does so already; nothing waits.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        with theirs:
            _start_keeper(theirs, segment_of, make_mounts)
        keeper = int(_hear(ours))
        listener = listen(keeper)
        try:
            socket.send_fds(ours, [bytes([listener.waits])], [listener.fd])
        finally:
            listener.close()  # opens would wait for ourselves
        if failure := _FAILURES.get(_hear(ours)):
            raise NotSupportedError(f"exec: {failure}")


def _hear(ours: socket.socket) -> bytes:
    said = b""
    with contextlib.suppress(ConnectionError):
        said = ours.recv(_MESSAGE_BYTES)
    if not said:
        raise PkernfsError("exec: the supervisor ended before it was ready")
    return said


def run_command(words: list[str]) -> NoReturn:
    """Become a command.

    :raises OSError: it cannot be run: there is none, or it is no program.
    """
    # What Python ignores, and a program does not expect to be so (PEP 446 sees to descriptors).
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)
    os.execvp(words[0], words)


# ------------------------------------------------------------------------------- the keeper


def _start_keeper(
    theirs: socket.socket, segment_of: SegmentOf, make_mounts: Callable[[], KnownMounts]
) -> None:
    """Start the keeper, as nobody's child: the command has no child that it has not started."""
    command = os.getpid()
    between = os.fork()
    if not between:
        try:
            if not os.fork():
                _keep(theirs, command, segment_of, make_mounts)
        finally:
            os._exit(0)
    with contextlib.suppress(ChildProcessError):  # SIGCHLD is ignored
        os.waitpid(between, 0)


def _keep(
    theirs: socket.socket,
    command: int,
    segment_of: SegmentOf,
    make_mounts: Callable[[], KnownMounts],
) -> None:
    _leave(theirs.fileno())
    slots = memoryview(mmap.mmap(-1, SLOTS_BYTES))
    theirs.send(str(os.getpid()).encode())
    waits, fds, _, _ = socket.recv_fds(theirs, _MESSAGE_BYTES, 1)
    if not fds:  # no listener
        return
    listener = Listener(fds[0], waits=bool(waits[0]))
    if failure := _failure(listener, command):
        theirs.send(failure)
        return
    is_first = True
    while True:
        supervisor = os.fork()
        if not supervisor:
            try:
                Supervisor(listener, slots, make_mounts(), segment_of).serve()
            finally:
                os._exit(0)
        if is_first:
            theirs.send(_READY)
            theirs.close()
        is_first = False
        _, status = os.waitpid(supervisor, 0)
        if not os.WIFSIGNALED(status):
            return
        release(listener, slots)


def _failure(listener: Listener, command: int) -> bytes:
    if not listener.can_give():
        return b"too old"
    return b"" if can_be_read(command) else b"forbidden"


def _leave(kept: int) -> None:
    """Leave the caller's session, directory and descriptors; keep one of those."""
    os.setsid()
    os.chdir("/")
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    null = os.open(os.devnull, os.O_RDWR)
    for fd in range(3):
        os.dup2(null, fd)
    os.closerange(3, kept)
    os.closerange(kept + 1, os.sysconf("SC_OPEN_MAX"))
    with open("/proc/self/comm", "w") as name:
        name.write(NAME)
