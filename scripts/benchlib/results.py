"""Figures and what follows from them: medians, ratios within a round.  Runs nothing."""

import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Spread:
    """A median with what lies around it."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> "Spread":
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class Workload:
    """Something measured: its key in the JSON file, its title in the table, its unit."""

    key: str
    title: str
    unit: str
    higher_is_better: bool = True


@dataclass(frozen=True)
class Cost:
    """The cost of one operation on average: requests, and CPU time of the daemon and of both."""

    requests: float
    daemon_us: float
    total_us: float


@dataclass
class Figure:
    """All runs of one workload on one system, by round."""

    workload: Workload
    system: str
    runs: dict[int, float] = field(default_factory=dict)
    requests_per_op: list[float] = field(default_factory=list)
    daemon_us_per_op: list[float] = field(default_factory=list)
    #: CPU time of client and daemon together: what is left of a figure on a busy machine.
    total_us_per_op: list[float] = field(default_factory=list)

    @property
    def spread(self) -> Spread:
        return Spread.of(list(self.runs.values()))

    def as_json(self) -> dict[str, Any]:
        spread = self.spread
        found: dict[str, Any] = {
            "workload": self.workload.key,
            "system": self.system,
            "unit": self.workload.unit,
            "median": spread.median,
            "min": spread.low,
            "max": spread.high,
            "runs": list(self.runs.values()),
        }
        if self.requests_per_op:
            found["requests_per_op"] = statistics.median(self.requests_per_op)
            found["daemon_us_per_op"] = statistics.median(self.daemon_us_per_op)
            found["total_us_per_op"] = statistics.median(self.total_us_per_op)
        return found


class Results:
    """Every figure of a run, and notes on what could not be measured."""

    def __init__(self) -> None:
        self.figures: dict[tuple[str, str], Figure] = {}
        self.notes: list[str] = []

    def add(
        self, workload: Workload, system: str, turn: int, value: float, cost: Cost | None = None
    ) -> None:
        """Record one run; ``turn`` is the round, by which runs of several systems are paired."""
        key = (workload.key, system)
        figure = self.figures.setdefault(key, Figure(workload, system))
        figure.runs[turn] = value
        if cost is not None:
            figure.requests_per_op.append(cost.requests)
            figure.daemon_us_per_op.append(cost.daemon_us)
            figure.total_us_per_op.append(cost.total_us)

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def get(self, workload: str, system: str) -> Figure | None:
        return self.figures.get((workload, system))

    def median(self, workload: str, system: str) -> float | None:
        figure = self.get(workload, system)
        return figure.spread.median if figure else None

    def requests(self, workload: str, system: str) -> float | None:
        """Median number of requests that one operation of a workload sent."""
        figure = self.get(workload, system)
        if figure is None or not figure.requests_per_op:
            return None
        return statistics.median(figure.requests_per_op)

    def ratio(self, over: tuple[str, str], under: tuple[str, str]) -> Spread | None:
        """``over`` divided by ``under`` (each workload and system), round by round."""
        a, b = self.figures.get(over), self.figures.get(under)
        if a is None or b is None:
            return None
        pairs = [a.runs[turn] / b.runs[turn] for turn in a.runs if b.runs.get(turn)]
        return Spread.of(pairs) if pairs else None

    def cpu_ratio(self, over: tuple[str, str], under: tuple[str, str]) -> float | None:
        """The ratio of two rates if nothing but CPU time counted: the inverse one of the costs."""
        a, b = self.figures.get(over), self.figures.get(under)
        if a is None or b is None or not a.total_us_per_op or not b.total_us_per_op:
            return None
        return statistics.median(b.total_us_per_op) / statistics.median(a.total_us_per_op)

    def workloads(self) -> Iterator[Workload]:
        """In the order in which they were first measured."""
        seen = {figure.workload.key: figure.workload for figure in self.figures.values()}
        yield from seen.values()

    def systems(self, workload: str) -> list[str]:
        return [system for key, system in self.figures if key == workload]
