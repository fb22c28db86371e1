"""Messages about work that goes on: how far it has come, and what people should know of it."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from pkernfs.kexec.observer import Observer

_INTERVAL_SECONDS = 0.2


class Progress:
    """A line on stderr that rewrites itself, on a terminal only.

    Call it with what is done of how much; leaving the context wipes the line.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._active = sys.stderr.isatty()
        self._next = time.monotonic() + _INTERVAL_SECONDS  # a short job shows nothing
        self._shown = False

    def __call__(self, done: int, total: int) -> None:
        """Show ``done`` of ``total`` as a percentage, at most five times a second."""
        if not self._active or (now := time.monotonic()) < self._next:
            return
        self._next = now + _INTERVAL_SECONDS
        self._shown = True
        sys.stderr.write(f"\r\033[K{self._what}: {done / max(total, 1):.0%}")
        sys.stderr.flush()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._shown:
            sys.stderr.write("\r\033[K")
            sys.stderr.flush()


class Teller(Observer):
    """Tells on stderr how a handover or a kexec goes."""

    def progress(self, what: str) -> Progress:
        """Show how far a stage has come."""
        return Progress(what)

    def say(self, text: str) -> None:
        """Print one line."""
        print(f"pkernfs: {text}", file=sys.stderr)
