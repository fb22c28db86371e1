"""Page tables of VT-d domains: leaves, beside a C loop over the same bytes, and checks."""

import json
from pathlib import Path

from .machine import PYTHON
from .results import Results, Workload
from .systems import run
from .targets import Target, at_least, below
from .workloads import Bench

PLAIN_C = "C loop"
#: The same bytes, so the ratio of rates is the inverse one of these times.
LEAVES = 16 * (1 << 30) // 4096

MAP_2M = Workload("iommu-map-2m", "map 64 GiB in 2 MiB leaves", "ms", higher_is_better=False)
FILL_4K = Workload("iommu-fill-4k", "16 GiB in 4 KiB leaves", "million entries/s")
OPEN = Workload("iommu-open", "mount-time walk over 4 million leaves", "ms", False)
CHECK = Workload("iommu-check", "check of 4 million leaves", "ms", higher_is_better=False)
SCAN = Workload("iommu-scan", "what 4 million leaves map, joined", "ms", higher_is_better=False)
GROWTH = Workload("iommu-growth", "memory that those three took", "KiB", higher_is_better=False)
FILE_2M = Workload("iommu-file-2m", "a file of 64 GiB, in 2 MiB leaves", "ms", False)
FILE_4K = Workload("iommu-file-4k", "16 GiB of it, in 4 KiB leaves", "ms", higher_is_better=False)
MOUNT = Workload("iommu-mount", "mount with those leaves", "ms", higher_is_better=False)
FIRST = Workload("iommu-unlink-first", "the first unlink of another file", "ms", False)
UNLINK = Workload("iommu-unlink", "the next ones", "ms", higher_is_better=False)
UNMAP = Workload("iommu-unmap-4k", "unmap 16 GiB of 4 KiB leaves", "ms", higher_is_better=False)


def iommu(bench: Bench) -> None:
    """All of it in a process of its own, one line of figures per round."""
    bench.say("iommu: page tables")
    probe = Path(__file__).with_name("iommu_probe.py")
    command = bench.client.pinning.daemon_command([PYTHON, probe, str(bench.sizes.rounds)])
    record(bench.results, run(command))


def record(results: Results, lines: str) -> None:
    """Take over what the probe printed."""
    for turn, line in enumerate(lines.splitlines()):
        found = json.loads(line)
        for workload, key in (
            (MAP_2M, "map-2m"),
            (OPEN, "open"),
            (CHECK, "check"),
            (SCAN, "scan"),
            (GROWTH, "growth"),
            (UNMAP, "unmap-4k"),
            (FILE_2M, "file-map-2m"),
            (FILE_4K, "file-map-4k"),
            (MOUNT, "mount"),
            (FIRST, "unlink-first"),
            (UNLINK, "unlink"),
        ):
            results.add(workload, "pkernfs", turn, found[key])
        results.add(FILL_4K, "pkernfs", turn, LEAVES / found["map-4k"] / 1e3)
        results.add(FILL_4K, PLAIN_C, turn, LEAVES / found["fill-c"] / 1e3)


def targets(results: Results) -> list[Target]:
    """What was asked of them."""
    key = FILL_4K.key
    return [
        below(results, "64 GiB in 2 MiB leaves", MAP_2M.key, 10, "ms"),
        at_least(results, "16 GiB in 4 KiB leaves", 0.5, (key, "pkernfs"), (key, PLAIN_C)),
        below(results, "check of 4 million leaves", CHECK.key, 1000, "ms"),
        below(results, "mount-time walk over them", OPEN.key, 1000, "ms"),
        below(results, "a file of 64 GiB in 2 MiB leaves", FILE_2M.key, 10, "ms"),
        below(results, "mount with 4 million leaves", MOUNT.key, 1000, "ms"),
    ]
