"""A log that does not fill."""

from __future__ import annotations

import logging

import pytest

from pkernfs.ratelimit import BURST, SECONDS, Quiet


def test_the_log_goes_on_later(caplog: pytest.LogCaptureFixture) -> None:
    now = 0.0
    quiet = Quiet(logging.getLogger("pkernfs.test"), lambda: now)
    for number in range(BURST + 5):
        quiet.warning(f"first {number}")
    now = SECONDS
    quiet.warning("second")
    said = [r.getMessage() for r in caplog.records]
    assert said[:BURST] == [f"first {number}" for number in range(BURST)]
    assert said[BURST + 1 :] == ["second"]
