"""A thread of this process whose opens wait for this process: a filter is of one thread alone."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable
from contextlib import suppress

import pytest

from pkernfs.plain.seccomp import CALL_BYTES, Call, Listener, listen


class Stopped:
    """Runs a function in a thread with a filter. As a context, it lets the thread end."""

    def __init__(self, work: Callable[[], object]) -> None:
        self.result: object = None
        self.slot = memoryview(bytearray(CALL_BYTES))
        self._work = work
        self._listeners: queue.Queue[Listener | Exception] = queue.Queue()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Stopped:
        self._thread.start()
        found = self._listeners.get(timeout=10)
        if isinstance(found, Exception):
            pytest.skip(f"no seccomp user notification: {found}")
        self.listener = found
        return self

    def __exit__(self, *exc: object) -> None:
        with suppress(OSError):  # a test may have closed it
            self.listener.close()
        self._thread.join(10)

    def receive(self) -> Call:
        """Wait for the thread's next open."""
        call = self.listener.receive(self.slot)
        assert call is not None
        return call

    def end(self) -> object:
        """Wait for the thread; return the function's value, or the OSError that it raised."""
        self._thread.join(10)
        assert not self._thread.is_alive()
        return self.result

    def _run(self) -> None:
        try:
            self._listeners.put(listen(os.getpid()))
        except Exception as error:
            self._listeners.put(error)
            return
        try:
            self.result = self._work()
        except OSError as error:
            self.result = error
