"""The supervisor of ``pkernfs exec``: decides for each stopped call, and answers it.

An open is answered with a descriptor of a segment's native file, which the caller's own permissions
open; or the kernel does it as if there were no supervisor. Whatever is unclear, not allowed, or
fails here is the kernel's, so that nothing is ever decided in its place.

Threads: any number of them wait for calls, one at least, as a path may lead to a file system whose
daemon is itself a program that waits for an answer.
"""

from __future__ import annotations

import os
import select
import stat
import syslog
import threading
from collections.abc import Callable
from typing import Protocol

from pkernfs.plain.caller import Caller, Identity, own_control_groups, own_identity
from pkernfs.plain.fitting import fitting_of, is_as_large
from pkernfs.plain.lookup import find, may_access, open_native
from pkernfs.plain.opens import Opening, opening_of
from pkernfs.plain.seccomp import CALL_BYTES, Call, Listener, last_call

#: Threads that may be held up at once. Opens that come when all are go to the kernel at once.
MOST_THREADS = 32
#: Bytes of the memory in which the kernel stores the calls that threads receive.
SLOTS_BYTES = MOST_THREADS * CALL_BYTES

#: Returns the native path of the segment of a found file (O_PATH); None: it has no segment.
SegmentOf = Callable[[int], str | None]


class KnownMounts(Protocol):
    """What a supervisor wants to know of mounts; :class:`pkernfs.plain.mounts.Mounts` has it."""

    def are_there(self) -> bool:
        """Tell if there is any."""

    def has(self, device: int) -> bool:
        """Tell if a file with this ``st_dev`` is on one of them."""

    def is_trusted(self, device: int, uid: int) -> bool:
        """Tell if what a mount says of its files counts for a program of the user ``uid``."""


def release(listener: Listener, slots: memoryview) -> None:
    """Let the kernel do the calls that a supervisor had received when it was killed."""
    for at in range(0, SLOTS_BYTES, CALL_BYTES):
        if call_id := last_call(slots[at : at + CALL_BYTES]):
            listener.go_on(call_id)


class Supervisor:
    """Answers the calls of one listener."""

    def __init__(
        self, listener: Listener, slots: memoryview, mounts: KnownMounts, segment_of: SegmentOf
    ) -> None:
        """Prepare to serve.

        :param slots: :data:`SLOTS_BYTES` bytes, for :func:`release` by another process
        """
        self._listener = listener
        self._slots = slots
        self._mounts = mounts
        self._segment_of = segment_of
        self._own = own_identity()
        self._lock = threading.Lock()
        self._threads = 0
        self._idle = 0
        self._is_over = False

    def serve(self) -> None:
        """Answer calls until no process is left that the filter applies to."""
        self._listener.run_in_turn()
        self._start_thread()
        hung_up = select.poll()
        hung_up.register(self._listener.fd, 0)  # POLLHUP comes unasked
        while not hung_up.poll():
            pass
        self._is_over = True

    # --------------------------------------------------------------------------- threads

    def _start_thread(self) -> None:
        slot = self._slots[self._threads * CALL_BYTES :][:CALL_BYTES]
        self._threads += 1
        self._idle += 1
        threading.Thread(target=self._serve_calls, args=(slot,), daemon=True).start()

    def _serve_calls(self, slot: memoryview) -> None:
        while not self._is_over:
            call = self._listener.receive(slot)
            if call is None:  # interrupted; or the last process has ended (6.11 and later)
                continue
            if not self._leave_a_waiter() or not self._answers(call):
                self._listener.go_on(call.id)
            with self._lock:
                self._idle += 1

    def _leave_a_waiter(self) -> bool:
        """See to it that some thread waits for the next call; False if there can be none."""
        with self._lock:
            self._idle -= 1
            if not self._idle and self._threads < MOST_THREADS:
                self._start_thread()
            return self._idle > 0

    # --------------------------------------------------------------------------- decisions

    def _answers(self, call: Call) -> bool:
        try:
            return self.answer(call)
        except OSError:
            return False
        except Exception:  # a bug; its program must not wait for ever
            import traceback  # takes long, and is for this alone

            syslog.syslog(syslog.LOG_ERR, f"pkernfs exec: {traceback.format_exc()}")
            return False

    def answer(self, call: Call) -> bool:
        """Answer an open with a segment's native file; return False if the kernel is to do it.

        ftruncate and fallocate of a dax device succeed if it is as large as they ask for.

        :raises OSError: the same: something is not there, or not for us.
        """
        if not self._mounts.are_there():
            return False
        caller = Caller(call.tid)
        if (fitting := fitting_of(call)) is not None:
            fits = is_as_large(caller, fitting) and self._listener.is_valid(call.id)
            return fits and self._listener.succeed(call.id)
        opening = opening_of(call, caller.read)
        if opening is None:
            return False
        path = caller.path(opening.path)
        fd = find(caller, opening, path)
        try:
            found = os.fstat(fd)
            if not stat.S_ISREG(found.st_mode) or not self._mounts.has(found.st_dev):
                return False
            native = self._segment_of(fd)
            if native is None:
                return False
            identity = caller.identity()
            if not self._is_for(identity, opening, found):
                return False
            who = None if identity.may_all_of(self._own) else identity
            if who and not _finds(caller, opening, path, who, found):
                return False
            # What was read by the thread's number is the caller's, and not of a later thread.
            if not self._listener.is_valid(call.id) or not may_access(who, fd, opening.access):
                return False
            return self._give(call, opening, fd, native, who, found.st_size)
        finally:
            os.close(fd)

    def _is_for(self, identity: Identity, opening: Opening, found: os.stat_result) -> bool:
        """Tell if an answer may be looked for on behalf of a caller.

        The kernel may refuse O_CREAT of another user's file (fs.protected_regular).
        """
        if opening.flags & os.O_CREAT and found.st_uid != identity.uid:
            return False
        return self._mounts.is_trusted(found.st_dev, identity.uid)

    def _give(
        self, call: Call, opening: Opening, fd: int, native: str, who: Identity | None, size: int
    ) -> bool:
        given = open_native(who, native, opening)
        try:
            # While it is open the segment stays; what it was before may be another file's by now.
            if not _is_memory(given, call.tid, size) or self._segment_of(fd) != native:
                return False
            on_exec = bool(opening.flags & os.O_CLOEXEC)
            return self._listener.give(call.id, given, close_on_exec=on_exec)
        finally:
            os.close(given)


def _finds(
    caller: Caller, opening: Opening, path: bytes, who: Identity, found: os.stat_result
) -> bool:
    """Tell if the path leads to the same file with the caller's permissions instead of ours."""
    fd = find(caller, opening, path, who)
    try:
        again = os.fstat(fd)
    finally:
        os.close(fd)
    return (again.st_dev, again.st_ino) == (found.st_dev, found.st_ino)


def _is_memory(fd: int, tid: int, size: int) -> bool:
    """Tell if it is a file, or a device that the caller's control group may use if ours may.

    A file has the ``size`` that the file in the mount has: a program that reads to the end, or
    appends there, would have another one.
    """
    native = os.fstat(fd)
    if stat.S_ISCHR(native.st_mode):
        return Caller(tid).control_groups() == own_control_groups()
    return stat.S_ISREG(native.st_mode) and native.st_size == size
