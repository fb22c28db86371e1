"""Workloads that only pkernfs has: mkfs, the mount of a large region, memory, extents, zeroing.

Each part makes its own region file in the scratch tmpfs (huge pages) and removes it.
"""

import contextlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .client import LatencyClient
from .machine import BIN, PYTHON, BenchError, memory_of
from .results import Workload
from .systems import daemon_of, is_mounted, run, unmount, wait_gone
from .workloads import MIB, Bench

TIB = 1 << 40
GIB = 1 << 30
FRESH_FILE_BYTES = 256 * GIB
_PROBES_S = 0.5

MKFS = Workload("mkfs", "mkfs.pkernfs of 1 TiB", "s", higher_is_better=False)
TRUNCATE = Workload("truncate", "truncate of a fresh 256 GiB file", "ms", higher_is_better=False)
EXTENTS = Workload("extents", "its extents", "", higher_is_better=False)
IMPORTS = Workload("imports", "python -c 'import trio, pyfuse3'", "s", higher_is_better=False)
MOUNT = Workload("mount", "pkernfs mount, 1 TiB with files", "s", higher_is_better=False)
OWN_AFTER_MOUNT = Workload(
    "memory-mounted", "daemon memory, just mounted", "MiB", higher_is_better=False
)
OWN_AFTER_LIST = Workload(
    "memory-listed", "daemon memory, every file listed", "MiB", higher_is_better=False
)
RSS_AFTER_LIST = Workload(
    "rss-listed", "the same with the region's pages (VmRSS)", "MiB", higher_is_better=False
)
MEMSET = Workload("memset", "memset of the same memory, one thread", "GB/s")
MEMSET_TWO = Workload("memset-2", "memset of the same memory, two threads", "GB/s")
ZEROING = Workload("zeroing", "freed blocks zeroed and handed out again", "GB/s")
IDLE_LATENCY = Workload("stat-idle", "forced stat, idle, median", "us", higher_is_better=False)
BUSY_LATENCY = Workload("stat-zeroing", "forced stat, zeroing, median", "us", False)
BUSY_WORST = Workload("stat-zeroing-p99", "forced stat, zeroing, 99th percentile", "us", False)


@dataclass
class Mounted:
    """A region mounted in the background, as a user does it."""

    root: Path
    pid: int
    seconds: float


def _mkfs(bench: Bench, size: int) -> tuple[Path, float]:
    region = bench.scratch.regions / "big"
    region.unlink(missing_ok=True)
    began = time.perf_counter()
    run(bench.client.pinning.daemon_command([BIN / "mkfs.pkernfs", "-s", str(size), region]))
    return region, time.perf_counter() - began


@contextlib.contextmanager
def in_background(
    bench: Bench, region: Path, *options: str, pinned: bool = True
) -> Iterator[Mounted]:
    """``pkernfs mount`` until it answers; the clean unmount has ended on the way out."""
    root = bench.scratch.directory("mnt-region")
    command: list[str | Path] = [BIN / "pkernfs", "mount", region, root, *options]
    if pinned:
        command = [*bench.client.pinning.daemon_command(command)]
    began = time.perf_counter()
    run(command)
    seconds = time.perf_counter() - began
    if not is_mounted(root):
        raise BenchError("pkernfs mount came back, but nothing is mounted")
    pid = daemon_of(region)
    try:
        yield Mounted(root, pid, seconds)
    finally:
        unmount(root)
        wait_gone(pid)


def _own_mib(pid: int) -> float:
    """Memory of the daemon itself: resident, without the region's pages, which are the data."""
    memory = memory_of(pid)
    return memory["RssAnon"] + memory["RssFile"]


def region(bench: Bench) -> None:
    """mkfs of 1 TiB, truncate in it; mount time and memory with many files in it."""
    add = bench.results.add
    for turn in range(bench.sizes.rounds):
        bench.say(f"region: mkfs round {turn + 1} of {bench.sizes.rounds}")
        path, seconds = _mkfs(bench, TIB)
        add(MKFS, "pkernfs", turn, seconds)
        with in_background(bench, path) as mounted:
            file = mounted.root / "guest-ram"
            found = bench.client.run("truncate", file, FRESH_FILE_BYTES)
            add(TRUNCATE, "pkernfs", turn, found["seconds"] * 1e3)
            listed = json.loads(run([BIN / "pkernfs", "extents", "--json", file]))
            add(EXTENTS, "pkernfs", turn, len(listed["extents"]))
    path, _ = _mkfs(bench, TIB)
    bench.say(f"region: {bench.sizes.region_names} files")
    with in_background(bench, path) as mounted:
        (mounted.root / "files").mkdir()
        bench.client.run("create", mounted.root / "files", bench.sizes.region_names, 0)
    _mount_times(bench, path)
    path.unlink()


def _mount_times(bench: Bench, path: Path) -> None:
    add = bench.results.add
    imports = bench.client.pinning.daemon_command([PYTHON, "-c", "import trio, pyfuse3"])
    for turn in range(bench.sizes.rounds):
        bench.say(f"region: mount round {turn + 1} of {bench.sizes.rounds}")
        began = time.perf_counter()
        run(imports)
        add(IMPORTS, "pkernfs", turn, time.perf_counter() - began)
        with in_background(bench, path) as mounted:
            add(MOUNT, "pkernfs", turn, mounted.seconds)
            add(OWN_AFTER_MOUNT, "pkernfs", turn, _own_mib(mounted.pid))
            if turn == 0:
                bench.client.run("list", mounted.root / "files", 1)
                add(OWN_AFTER_LIST, "pkernfs", turn, _own_mib(mounted.pid))
                add(RSS_AFTER_LIST, "pkernfs", turn, memory_of(mounted.pid)["VmRSS"])


def zeroing(bench: Bench) -> None:
    """Time how fast the space of a written, unlinked file is handed out again, as zeros.

    Unpinned whatever --pin says: zeroing has its own thread, and stat must be answered beside it.
    """
    size = bench.sizes.zero_bytes
    path, _ = _mkfs(bench, size + 256 * MIB)
    plain = bench.scratch.regions / "plain"
    with in_background(bench, path, pinned=False) as mounted:
        probe, old, new = (mounted.root / name for name in ("probe", "old", "new"))
        probe.touch()
        bench.client.run("write", old, size, MIB, "nd", pinned=False)
        for turn in range(bench.sizes.rounds):
            bench.say(f"zeroing: round {turn + 1} of {bench.sizes.rounds}")
            for workload, threads in ((MEMSET, 1), (MEMSET_TWO, 2)):
                found = bench.client.run("memset", plain, size, threads, 3, pinned=False)
                bench.results.add(workload, "pkernfs", turn, sorted(found["passes"])[1])
            _zero_once(bench, turn, probe, (old, new))
            new.rename(old)
            bench.client.run("write", old, size, MIB, "d", pinned=False)
    for file in (path, plain):
        file.unlink()


def _zero_once(bench: Bench, turn: int, probe: Path, files: tuple[Path, Path]) -> None:
    add = bench.results.add
    with LatencyClient(bench.client, probe) as idle:
        time.sleep(_PROBES_S)
    with LatencyClient(bench.client, probe) as busy:
        found = bench.client.run("reuse", *files, bench.sizes.zero_bytes, pinned=False)
    add(ZEROING, "pkernfs", turn, found["gb_per_s"])
    for workload, result, key in (
        (IDLE_LATENCY, idle.result, "median_us"),
        (BUSY_LATENCY, busy.result, "median_us"),
        (BUSY_WORST, busy.result, "p99_us"),
    ):
        if result:
            add(workload, "pkernfs", turn, result[key])
