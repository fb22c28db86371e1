"""Handing a file system over: the check of 1 TiB, digests beside a plain reader, and the mount."""

import json
from pathlib import Path

from .machine import PYTHON
from .results import Results, Workload
from .systems import run
from .targets import Target, at_least, below
from .workloads import Bench

READER = "plain reader"
FLAT = "one flat file"

HAND_OVER = Workload("handover", "1 TiB with 1,000 files", "ms", higher_is_better=False)
COMMAND = Workload("handover-command", "the same with starting Python", "ms", False)
DIGESTS = Workload("handover-digests", "digests over all cores", "GB/s")
SEGMENTS = Workload(
    "handover-digests-segments", "digests of 1 GiB in 16 segments on tmpfs, mapped anew", "GB/s"
)
FIRST_BYTE = Workload(
    "handover-first-byte-1t",
    "first byte after a mount of 1 TiB, beyond starting Python",
    "ms",
    higher_is_better=False,
)
FIRST_BYTE_SMALL = Workload(
    "handover-first-byte-1g", "the same of 1 GiB", "ms", higher_is_better=False
)


def handover(bench: Bench) -> None:
    """All of it in processes of their own, one line of figures per round."""
    bench.say("handover: check, digests, mount")
    probe = Path(__file__).with_name("handover_probe.py")
    directory = str(bench.scratch.path / "handover")
    record(bench.results, run([PYTHON, probe, directory, str(bench.sizes.rounds)]))


def record(results: Results, lines: str) -> None:
    """Take over what the probe printed."""
    for turn, line in enumerate(lines.splitlines()):
        found = json.loads(line)
        for workload, key in (
            (HAND_OVER, "handover"),
            (COMMAND, "command"),
            (FIRST_BYTE, "first-byte-1t"),
            (FIRST_BYTE_SMALL, "first-byte-1g"),
        ):
            results.add(workload, "pkernfs", turn, found[key])
        results.add(DIGESTS, "pkernfs", turn, found["digests"])
        results.add(DIGESTS, READER, turn, found["reader"])
        results.add(SEGMENTS, "pkernfs", turn, found["segments"])
        results.add(SEGMENTS, FLAT, turn, found["flat"])


def targets(results: Results) -> list[Target]:
    """The targets that they were given."""
    key = DIGESTS.key
    return [
        below(results, "handover of 1 TiB with 1,000 files", HAND_OVER.key, 50, "ms"),
        at_least(results, "digests over all cores", 0.8, (key, "pkernfs"), (key, READER)),
        at_least(
            results, "digests of segments", 0.9, (SEGMENTS.key, "pkernfs"), (SEGMENTS.key, FLAT)
        ),
        below(results, "first byte after a mount, 1 TiB", FIRST_BYTE.key, 200, "ms"),
        below(results, "first byte after a mount, 1 GiB", FIRST_BYTE_SMALL.key, 200, "ms"),
    ]
