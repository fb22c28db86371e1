"""Daemons that are forked from this process, which has their modules: ready in a sixth of the time.

What they do from the command line on is what ``pkernfs mount -f`` does.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import IO

from pkernfs.cli import main
from support.mounted_pool import MountedPool
from support.mounting import Process

_LAST_STREAM = 2


class Forked:
    """A fork of this process that is ``pkernfs WORDS``, with the interface of subprocess.Popen."""

    def __init__(self, words: Sequence[str]) -> None:
        self._status: int | None = None
        ours, theirs = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            _become(words, theirs)
        os.close(theirs)
        self.stderr: IO[str] | None = open(ours, encoding="utf-8")  # noqa: SIM115 - the caller's

    def poll(self) -> int | None:
        """As Popen."""
        if self._status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._status = os.waitstatus_to_exitcode(status)
        return self._status

    def wait(self, timeout: float | None = None) -> int:
        """As Popen.

        :raises subprocess.TimeoutExpired: it goes on.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while (status := self.poll()) is None:
            if deadline is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("a forked daemon", timeout or 0)
            time.sleep(0.001)
        return status

    def send_signal(self, sig: int) -> None:
        """As Popen."""
        if self.poll() is None:
            os.kill(self.pid, sig)

    def terminate(self) -> None:
        """As Popen."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """As Popen."""
        self.send_signal(signal.SIGKILL)


def _become(words: Sequence[str], stderr: int) -> None:
    """Never returns. Nothing of the tests is left: no descriptor, no handler, no stream."""
    status = 1
    try:
        os.dup2(stderr, _LAST_STREAM)
        os.closerange(_LAST_STREAM + 1, os.sysconf("SC_OPEN_MAX"))
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(_LAST_STREAM, "w")
        logging.root.handlers.clear()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        sys.argv = ["pkernfs", *words]
        status = main()
    finally:
        sys.stderr.flush()
        os._exit(status)


def _have_modules() -> None:
    """Have what a daemon imports when it serves."""
    from pkernfs.commands import mount  # noqa: F401
    from pkernfs.dma import activation  # noqa: F401
    from pkernfs.fs import placement  # noqa: F401
    from pkernfs.fuse import background, daemon, operations, session  # noqa: F401


class ForkedPool(MountedPool):
    """A mount of a directory whose daemons are forks; each ``fresh``-th is started anew."""

    fresh = 20
    _starts = 0

    def run_daemon(self, words: Sequence[str], given: Sequence[int] = ()) -> Process:
        """Start a daemon."""
        self._starts += 1
        if given or not self._starts % self.fresh:
            return super().run_daemon(words, given)
        _have_modules()
        return Forked(words)
