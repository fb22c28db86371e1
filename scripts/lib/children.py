"""Work for several at once, a forked process each, heard in their order. Standard library only."""

import contextlib
import os
import selectors
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")
#: Is called with each line that there is to say.
Say = Callable[[str], object]
#: Who sends one of these to the calling process means the children as well.
PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
#: For a child that was told to end; one that cannot even be killed is left behind.
GRACE_SECONDS = 5.0


class _Child:
    """A process, and what it has said.

    :ivar waited_for: the end of its pipe; then its process; None when it has ended
    :ivar status: its exit status, or minus the signal that ended it
    """

    def __init__(self, pid: int, said: int) -> None:
        self.pid = pid
        self.waited_for: int | None = said
        self.status = -int(signal.SIGKILL)
        self._heard = b""
        self._process: int | None = os.pidfd_open(pid)

    def attend(self) -> None:
        """Take what there is to take: words, or the process's end."""
        assert self.waited_for is not None
        if self._process is None:
            os.close(self.waited_for)
            self.waited_for = None
            self.status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
            return
        found = os.read(self.waited_for, 1 << 16)
        self._heard += found
        if not found:
            os.close(self.waited_for)
            self.waited_for, self._process = self._process, None

    def say(self, say: Say) -> None:
        """Say the whole lines that were heard."""
        *lines, self._heard = self._heard.split(b"\n")
        for line in lines:
            say(line.decode("utf-8", "surrogateescape"))

    def send(self, number: int) -> None:
        """Send it a signal, and to what it has started, too; it is the first of its session."""
        if self.waited_for is not None:
            try:
                os.killpg(self.pid, number)
            except ProcessLookupError:  # it has not begun
                os.kill(self.pid, number)

    def forget(self) -> None:
        """Close what is open."""
        for fd in (self.waited_for, self._process):
            if fd is not None:
                os.close(fd)
        self.waited_for = self._process = None


def run_each(
    those: Sequence[T], work: Callable[[T, Say], int], say: Say, seconds: float = float("inf")
) -> list[int]:
    """Have ``work`` done for all of them at once; return the exit statuses that it returns.

    What each says comes in their order. The calling process has no other thread. All together have
    so many seconds; whoever is late then is killed. A signal to end goes to them, and then here.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    deadline = time.monotonic() + seconds
    children: list[_Child] = []
    with _signals() as told:
        try:
            for one in those:
                children.append(_start(one, work))
            number = _attend(children, say, told, deadline)
        finally:
            for child in children:
                child.send(signal.SIGKILL)
                child.forget()
    if number:
        os.kill(os.getpid(), number)
    return [child.status for child in children]


@contextlib.contextmanager
def _signals() -> Iterator[int]:
    """Have signals to end written to a pipe; its other end is there to be waited for."""
    told, tell = os.pipe()
    os.set_blocking(tell, False)
    heeded = [n for n in PASSED_ON if signal.getsignal(n) != signal.SIG_IGN]
    before = {n: signal.signal(n, lambda n, _: os.write(tell, bytes([n]))) for n in heeded}
    try:
        yield told
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(told)
        os.close(tell)


def _attend(children: Sequence[_Child], say: Say, told: int, deadline: float) -> int:
    """Hear all of them until they have ended; return a signal that came meanwhile, or 0."""
    number, killed = 0, False
    while not all(child.waited_for is None for child in children):
        ready = _wait(children, told, deadline)
        if told in ready:
            number = os.read(told, 1)[0]
            deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
            for child in children:
                child.send(number)
        for child in children:
            if child.waited_for in ready:
                child.attend()
        _say_in_order(children, say)
        if not ready and time.monotonic() >= deadline:
            if killed:
                for child in children:
                    child.say(say)
                break
            killed, deadline = True, time.monotonic() + GRACE_SECONDS
            for child in children:
                child.send(signal.SIGKILL)
    return number


def _wait(children: Sequence[_Child], told: int, deadline: float) -> set[int]:
    """Wait until somebody has something, or the time is over; return the descriptors."""
    with selectors.DefaultSelector() as waiting:
        for fd in (told, *(child.waited_for for child in children)):
            if fd is not None:
                waiting.register(fd, selectors.EVENT_READ)
        left = None if deadline == float("inf") else max(0.0, deadline - time.monotonic())
        return {key.fd for key, _ in waiting.select(left)}


def _say_in_order(children: Sequence[_Child], say: Say) -> None:
    """Say what each has said; nobody is heard before the ones before have ended."""
    for child in children:
        child.say(say)
        if child.waited_for is not None:
            return


def _start(one: T, work: Callable[[T, Say], int]) -> _Child:
    read_end, write_end = os.pipe()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)
    pid = os.fork()
    if pid:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        os.close(write_end)
        return _Child(pid, read_end)
    status = 1
    try:
        os.close(read_end)
        status = _work(one, work, write_end, before)
    finally:
        os._exit(status)


def _work(one: T, work: Callable[[T, Say], int], write_end: int, mask: set[int]) -> int:
    """Work in a child; return its exit status. No signal comes after that."""
    status = 1
    try:
        os.setsid()  # a terminal's signals come once, from the parent
        for number in PASSED_ON:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, signal.default_int_handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        with open(write_end, "w", encoding="utf-8", errors="surrogateescape") as lines:
            status = work(one, lambda line: print(line, file=lines, flush=True))
    except KeyboardInterrupt:  # no bug, and the parent knows
        pass
    except BaseException:  # what is above this line is the parent's
        traceback.print_exc()
    signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)
    sys.stderr.flush()
    return status
