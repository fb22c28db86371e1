"""The outcome as JSON and as Markdown tables.  Computes nothing but the layout."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from .results import Figure, Results, Workload
from .systems import SYSTEMS
from .targets import Target
from .workloads import SPLIT

_COSTS = """### Requests and CPU time per operation, one CPU

Requests / CPU time of the daemon / of daemon and client together, in microseconds. The last is
what remains of a rate when the machine is busy with other things."""


def as_json(
    results: Results, targets: list[Target], facts: dict[str, str], settings: dict[str, Any]
) -> dict[str, Any]:
    """The whole run; stable keys, one entry per workload and system."""
    return {
        "machine": facts,
        "settings": settings,
        "figures": [figure.as_json() for figure in results.figures.values()],
        "targets": [dataclasses.asdict(target) for target in targets],
        "notes": results.notes,
    }


def as_markdown(results: Results, targets: list[Target], facts: dict[str, str]) -> str:
    """The tables of docs/performance.md."""
    parts = [
        ", ".join(f"{key} {value}" for key, value in facts.items()),
        "### Figures\n\nMedian (min to max); rates a second in thousands (k) or GB/s.",
        *_tables(results),
        _COSTS,
        _costs(results),
        "### Targets",
        _target_table(targets),
    ]
    if results.notes:
        parts.append("### Notes\n\n" + "\n".join(f"- {note}" for note in results.notes))
    return "\n\n".join(part for part in parts if part) + "\n"


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _tables(results: Results) -> Iterator[str]:
    """Workloads of several systems side by side; those of one system as a list."""
    shared = [w for w in results.workloads() if len(results.systems(w.key)) > 1]
    alone = [w for w in results.workloads() if len(results.systems(w.key)) == 1]
    kinds = {_kind(w): None for w in shared}
    for kind in kinds:
        yield _side_by_side(results, [w for w in shared if _kind(w) == kind])
    if alone:
        rows = [_single(results, workload) for workload in alone]
        yield _table(["", "system", "median", "min to max"], rows)


def _kind(workload: Workload) -> str:
    """Name the table of a workload: by the key's prefix, else by unit; the scale group has one."""
    if ":" in workload.key:
        return workload.key.split(":")[0]
    return "@" if "@" in workload.key else "plain" if workload.unit == "1/s" else "data"


def _columns(results: Results, workloads: list[Workload]) -> list[str]:
    present = {s: None for workload in workloads for s in results.systems(workload.key)}
    known = [cls.name for cls in SYSTEMS if cls.name in present]
    return known + [system for system in present if system not in known]


def _side_by_side(results: Results, workloads: list[Workload]) -> str:
    columns = _columns(results, workloads)
    rows = [
        [f"{w.title}, {w.unit}"] + [_cell(results.get(w.key, system)) for system in columns]
        for w in workloads
    ]
    return _table(["", *columns], rows)


def _cell(figure: Figure | None) -> str:
    if figure is None:
        return "-"
    spread, unit = figure.spread, figure.workload.unit
    return (
        f"{quantity(spread.median, unit)} "
        f"({quantity(spread.low, unit)} to {quantity(spread.high, unit)})"
    )


def _single(results: Results, workload: Workload) -> list[str]:
    system = results.systems(workload.key)[0]
    figure = results.get(workload.key, system)
    assert figure is not None
    spread, unit = figure.spread, workload.unit
    low, high = (quantity(value, unit) for value in (spread.low, spread.high))
    shown = f"{quantity(spread.median, unit)} {unit}".strip()
    return [workload.title, system, shown, f"{low} to {high}"]


def quantity(value: float, unit: str) -> str:
    """Three significant digits; rates in thousands."""
    if unit == "1/s":
        return f"{value / 1e3:.3g}k" if value < 1e6 else f"{value / 1e3:.0f}k"
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _costs(results: Results) -> str:
    workloads = [
        w for w in results.workloads()
        if w.unit == "1/s" and "@" not in w.key and SPLIT not in w.key and any(_counted(results, w))
    ]  # fmt: skip
    if not workloads:
        return ""
    columns = [c for c in _columns(results, workloads) if c != "tmpfs"]
    rows = [[w.title] + [_cost(results.get(w.key, c)) for c in columns] for w in workloads]
    return _table(["", *columns], rows)


def _counted(results: Results, workload: Workload) -> Iterator[bool]:
    for system in results.systems(workload.key):
        figure = results.get(workload.key, system)
        yield figure is not None and bool(figure.requests_per_op)


def _cost(figure: Figure | None) -> str:
    if figure is None or not figure.requests_per_op:
        return "-"
    found = figure.as_json()
    parts = ("requests_per_op", ".2f"), ("daemon_us_per_op", ".1f"), ("total_us_per_op", ".1f")
    return " / ".join(format(found[key], how) for key, how in parts)


def _target_table(targets: list[Target]) -> str:
    rows = [[t.subject, t.required, t.measured, t.verdict] for t in targets]
    return _table(["target", "required", "measured", ""], rows)
