"""Waiting for something to come true."""

from __future__ import annotations

import time
from collections.abc import Callable


def until(what: str, true: Callable[[], bool], seconds: float = 60, every: float = 0.05) -> None:
    """Wait until ``true`` says so; ask ``every`` so many seconds."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"not in {seconds:g} s: {what}"
        time.sleep(every)
