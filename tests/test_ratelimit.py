"""Messages that clients cause: so many are logged, then one that says so, then none for a while."""

from __future__ import annotations

import logging

import pytest

from pkernfs.ratelimit import BURST, SECONDS, RateLimit


def test_the_log_goes_on_later(caplog: pytest.LogCaptureFixture) -> None:
    now = 0.0
    limit = RateLimit(logging.getLogger("pkernfs.test"), lambda: now)
    for number in range(BURST + 5):
        limit.warning(f"first {number}")
    now = SECONDS
    limit.warning("second")
    said = [r.getMessage() for r in caplog.records]
    assert said[:BURST] == [f"first {number}" for number in range(BURST)]
    assert said[BURST + 1 :] == ["second"]


def test_what_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    limit = RateLimit(logging.getLogger("pkernfs.test"))
    for text in ("lost", "lost", "cut", "lost"):
        limit.once(text)
    limit.warning("lost")
    assert [r.getMessage() for r in caplog.records] == ["lost", "cut", "lost"]


def test_it_is_said_once_that_there_are_more(caplog: pytest.LogCaptureFixture) -> None:
    now = 100.0
    limit = RateLimit(logging.getLogger("pkernfs.test"), lambda: now)
    for _ in range(10 * BURST):
        limit.warning("100 % of it")
        now += SECONDS / (20 * BURST)
    said = [r.getMessage() for r in caplog.records]
    assert said == ["100 % of it"] * BURST + ["more of these: not logged for up to 10 seconds"]
