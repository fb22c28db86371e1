"""A pytest plugin: seconds that a test may take, by its layer, and the slowest tests of a run.

A test that needs more carries ``@pytest.mark.slow("why")``. A run with a test that takes more and
has no such marker fails, and says so in one line for each. ``PKERNFS_BUDGETS=3`` allows three times
as much, for a run under a sanitizer; 0 switches the budgets off.
"""

from __future__ import annotations

import os
import time
from collections.abc import Generator, Iterator
from functools import cache
from typing import NamedTuple

import pytest

#: Layers as scripts/test runs them, the first whose marker a test has; and the seconds of processor
#: time that one test of each may take without a marker ``slow``.
BUDGETS = {"lab": 1500.0, "vm": 60.0, "crash": 60.0, "fuse": 15.0, "unit": 0.5}
_SHOWN = 10
_WORK_SECONDS = 0.0036  # for the work below, on the processor that the budgets are for
#: A second of a processor that others use as well (its caches, its other thread) is worth less.
_SHARED = 1.5
_KEY = "budget"

# Seconds of processor time, not of a clock: many machines that run this are busy, and a test does
# not compute more because another one runs beside it. All threads count, and the processes that
# ended during the test, which are its own. Waiting costs nothing here: the list of the slowest goes
# by the clock, so that a test that sleeps is seen.


class Taken(NamedTuple):
    """One test that ran: its layer, if it may be slow, processor and clock time in seconds."""

    nodeid: str
    layer: str
    may_be_slow: bool
    processor: float
    clock: float


def layer_of(item: pytest.Item) -> str:
    """Name the layer of scripts/test that runs this test."""
    return next((name for name in BUDGETS if item.get_closest_marker(name)), "unit")


def factor() -> float:
    """Read how many times its budget each test may take; 0 for no limit."""
    if os.environ.get("PKERNFS_HYPOTHESIS", "default") != "default":
        return 0  # so many examples as it takes
    return float(os.environ.get("PKERNFS_BUDGETS", "1")) * _slowness() * _SHARED


@cache
def _slowness() -> float:
    """Measure how much slower this processor is than the one that the budgets are for; 1 if not."""
    return max(1.0, min(_work() for _ in range(5)) / _WORK_SECONDS)


def _work() -> float:
    began = time.process_time()
    sum(i * i for i in range(100_000))
    return time.process_time() - began


def _processor_seconds() -> float:
    times = os.times()
    return time.process_time() + times.children_user + times.children_system


class Budgets:
    """The hooks of one run: each worker measures, the process that reports collects and judges."""

    def __init__(self) -> None:
        self.taken: list[Taken] = []

    def over(self) -> list[Taken]:
        """Tests that took more than the budget of their layer without a marker."""
        times = factor()
        return [
            one
            for one in self.taken
            if times and not one.may_be_slow and one.processor > times * BUDGETS[one.layer]
        ]

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Refuse a marker ``slow`` that gives no reason."""
        for item in items:
            for marker in item.iter_markers("slow"):
                if len(marker.args) != 1 or not isinstance(marker.args[0], str):
                    raise pytest.UsageError(f'{item.nodeid}: say why: @pytest.mark.slow("why")')

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None, object, object]:
        """Measure the test itself, without its fixtures."""
        before = _processor_seconds()
        try:
            return (yield)
        finally:
            slow = item.get_closest_marker("slow") is not None
            spent = _processor_seconds() - before
            # What is here gets from a worker of xdist to the process that reports.
            item.user_properties.append((_KEY, [layer_of(item), slow, spent]))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Collect what one test took."""
        found = dict(report.user_properties).get(_KEY)
        if report.when == "call" and isinstance(found, list):
            layer, may_be_slow, spent = found
            self.taken.append(Taken(report.nodeid, layer, may_be_slow, spent, report.duration))

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        """Fail a run that is otherwise in order for a test over its budget."""
        if exitstatus == pytest.ExitCode.OK and self.over():
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Write the slowest tests of each layer, and those that are too slow."""
        for layer in BUDGETS:
            for line in self._slowest(layer):
                terminalreporter.write_line(line)
        for one in self.over():
            terminalreporter.write_line(
                f"too slow: {one.nodeid}: {one.processor:.2f} s of processor time, "
                f"{factor() * BUDGETS[one.layer]:.3g} s allowed: cheaper, or marked as slow",
                red=True,
            )

    def _slowest(self, layer: str) -> Iterator[str]:
        tests = sorted((t for t in self.taken if t.layer == layer), key=lambda t: -t.clock)
        if tests:
            yield f"slowest of layer {layer}: seconds by the clock, and of the processor"
        for one in tests[:_SHOWN]:
            mark = " (slow)" if one.may_be_slow else ""
            yield f"{one.clock:8.2f} {one.processor:8.2f}  {one.nodeid}{mark}"


def pytest_configure(config: pytest.Config) -> None:
    """Add the hooks and the marker."""
    config.addinivalue_line("markers", "slow(why): takes longer than its layer's tests may")
    config.pluginmanager.register(Budgets(), "budgets")
