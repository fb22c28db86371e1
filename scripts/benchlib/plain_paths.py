"""pkernfs exec: what an open costs below it, and what all else does; the start of a program."""

import json
import time
from collections.abc import Sequence
from pathlib import Path

from .machine import BIN
from .results import Workload
from .systems import run, unmount
from .workloads import MIB, Bench

COUNT = 20_000
#: What is put before a client, and how its figures are called.
_WAYS: dict[str, list[str | Path]] = {
    "": [],
    ", below pkernfs exec": [BIN / "pkernfs", "exec", "--"],
}


def plain_paths(bench: Bench) -> None:
    """Each figure with a supervisor and without, in turns."""
    bench.say("exec: plain paths")
    pool, mount = bench.scratch.directory("pool"), bench.scratch.directory("segments")
    run([BIN / "mkfs.pkernfs", "-s", "64M", f"{pool}/"])
    run(bench.client.pinning.daemon_command([BIN / "pkernfs", f"{pool}/", mount]))
    try:
        segment, other = mount / "ram", bench.scratch.path / "other"
        for file in (segment, other):
            run(["truncate", "-s", str(4 * MIB), file])
        for turn in range(bench.sizes.rounds):
            for way, before in _WAYS.items():
                _measure(bench, turn, way, before, segment, other)
    finally:
        unmount(mount)


def _measure(
    bench: Bench, turn: int, way: str, before: Sequence[str | Path], segment: Path, other: Path
) -> None:
    for verb, file, title in (
        ("open", other, "open and close of a file elsewhere"),
        ("open", segment, "open and close of a file with a segment"),
        ("fstat", other, "fstat, which no filter stops"),
    ):
        client: list[str | Path] = [bench.client.binary, verb, file, str(COUNT)]
        done = json.loads(run(bench.client.pinning.client_command([*before, *client])))
        _add(bench, turn, f"{title}{way}", "us", 1e6 / done["rate"])
    began = time.perf_counter()
    run([*before, "true"])
    _add(
        bench, turn, f"a program that does nothing{way}", "ms", (time.perf_counter() - began) * 1e3
    )


def _add(bench: Bench, turn: int, title: str, unit: str, value: float) -> None:
    key = "exec-" + title.replace(",", "").replace(" ", "-")
    bench.results.add(Workload(key, title, unit, higher_is_better=False), "pkernfs", turn, value)
