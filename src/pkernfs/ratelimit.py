"""Messages that clients cause: so many of them, and no more, that nobody can fill a log."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable

BURST = 20
SECONDS = 10.0
_REMEMBERED = 64


class RateLimit:
    """Passes on the first messages of each span of time, and says once that there are more."""

    def __init__(self, log: logging.Logger, clock: Callable[[], float] = time.monotonic) -> None:
        self._log = log
        self._clock = clock
        self._began = -SECONDS
        self._count = 0
        self._said: deque[str] = deque(maxlen=_REMEMBERED)

    def once(self, text: str) -> None:
        """As :meth:`warning`, but nothing if it is among the last that came this way."""
        if text not in self._said:
            self._said.append(text)
            self.warning(text)

    def warning(self, text: str) -> None:
        """A warning, unless there were :data:`BURST` in these :data:`SECONDS`."""
        now = self._clock()
        if now - self._began >= SECONDS:
            self._began, self._count = now, 0
        self._count += 1
        if self._count <= BURST:
            self._log.warning("%s", text)
        elif self._count == BURST + 1:
            self._log.warning("more of these: not logged for up to %d seconds", SECONDS)
