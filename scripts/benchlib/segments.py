"""Files with memory of their own, in a pool on a tmpfs: mapped, read, truncated, and many of them.

And mapped in a pool on a hugetlbfs, where the plain path leads to the segment of a native file.

The plain path of a file and the file of its segment are mapped in one process, which works on them
in turns: they are the same pages, so what differs is the way to them. Each pass gives a pair for
the ratio. The segment is mapped twice, and how far these two are apart is the machine's noise.
"""

import json
import os
import platform
import re
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hugepages import HugePages

from .client import LatencyClient
from .machine import BIN, PYTHON
from .region import FRESH_FILE_BYTES, GIB, in_background
from .results import Results, Workload
from .systems import run, unmount
from .targets import OURS, Target, at_least, below
from .workloads import MIB, Bench

PLAIN, NATIVE, AGAIN = "plain path", "native mapping", "native again"
SEGMENT, FLAT = "segment", "flat file"
_LEAST_KERNEL = (6, 9)  # passes mappings through
_POOL_BYTES = 300 * GIB
_BASE_BYTES = 64 * MIB
_PASSES = 12  # each order of three, twice
_RANDOM_OPS = 1 << 20  # as in client.c
_PROBES_S = 0.5

MAPPED = {
    "first": Workload("segments:first", "first touch", "GB/s"),
    "touch": Workload("segments:touch", "second touch", "GB/s"),
    "copy": Workload("segments:copy", "copy, half to half", "GB/s"),
    "random": Workload("segments:random", "random 8-byte load and store", "1/s"),
}
HUGE = {
    work: Workload(f"huge-{found.key}", f"{found.title}, on hugetlbfs", found.unit)
    for work, found in MAPPED.items()
}
CACHE = Workload("segments-cache", "page cache of the file mapped by its plain path", "MiB", False)
READ = Workload("segments-io:read", "1 MiB read, direct", "GB/s")
WRITE = Workload("segments-io:write", "1 MiB write, direct", "GB/s")
TRUNCATE = Workload("segments-truncate", "truncate to 256 GiB, sparse pool", "ms", False)
MAKE = Workload("segments-make", "a new file of 2 MiB beside many segments", "ms", False)
MOUNT = Workload("segments-mount", "mount with many segments, beyond an empty one", "s", False)
PHASES = {
    "table": Workload("segments-mount-table", "of that: rows read", "ms", False),
    "restore": Workload("segments-mount-restore", "of that: files checked", "ms", False),
    "set_owner": Workload("segments-mount-owner", "of that: owners and modes", "ms", False),
    "strays": Workload("segments-mount-strays", "of that: other files looked for", "ms", False),
    "rest": Workload("segments-mount-rest", "of that: inodes and the rest", "ms", False),
}
STATFS = Workload("segments-statfs", "statfs with many segments", "ms", False)
BESIDE = Workload("segments-stat", "forced stat beside that, median", "us", False)


def segments(bench: Bench) -> None:
    """All of it in pools on one tmpfs, which is sparse; mappings on a hugetlbfs as well."""
    where = bench.scratch.directory("pools")
    run(["mount", "-t", "tmpfs", "-o", f"size={_POOL_BYTES}", "pkernfs-bench", where])
    try:
        with _pool(bench, where / "one", _BASE_BYTES + bench.sizes.data_bytes) as pool:
            _one(bench, pool)
        with _pool(bench, where / "none") as empty, _pool(bench, where / "many") as pool:
            _many(bench, pool, empty)
    finally:
        unmount(where)
    _huge(bench)


@contextmanager
def _pool(bench: Bench, path: Path, base_bytes: int = _BASE_BYTES) -> Iterator[Path]:
    """A formatted directory; its files are gone afterwards."""
    path.mkdir()
    path.chmod(0o711)
    run([BIN / "mkfs.pkernfs", "-s", str(base_bytes), path])
    try:
        yield path
    finally:
        for file in path.iterdir():
            file.unlink()


# One file: mapped, read and written, and a large one.


def _one(bench: Bench, pool: Path) -> None:
    with in_background(bench, pool) as found:
        ram = found.root / "ram"
        bench.client.run("truncate", ram, bench.sizes.data_bytes)
        (native,) = pool.glob("segment-*")
        if _kernel() < _LEAST_KERNEL:
            bench.results.note("plain paths not measured: that needs Linux 6.9")
        else:
            _map(bench, ram, native)
        _truncate(bench, found.root, pool)
    with in_background(bench, pool, "-o", "segments=no") as found:
        _transfer(bench, found.root / "ram", found.root / "flat")


def _kernel() -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", platform.release())[:2])


def _map(bench: Bench, ram: Path, native: Path) -> None:
    for turn in range(bench.sizes.rounds):
        bench.say(f"segments: mappings, round {turn + 1} of {bench.sizes.rounds}")
        pages = [_work(bench, turn, work, MAPPED[work], ram, native) for work in MAPPED]
        bench.results.add(CACHE, OURS, turn, max(pages) * 4096 / MIB)


def _work(
    bench: Bench, turn: int, work: str, workload: Workload, plain: Path, native: Path
) -> float:
    """One kind of work on both mappings, in turns; pages of the plain file in the page cache."""
    size = bench.sizes.data_bytes
    found = bench.client.run("turns", plain, native, native, size, work, _PASSES)
    amount = _RANDOM_OPS if work == "random" else size / 1e9
    for number, times in enumerate(found["seconds"], turn * _PASSES):
        for system, seconds in zip((PLAIN, NATIVE, AGAIN), times, strict=True):
            bench.results.add(workload, system, number, amount / seconds)
    return float(found["cached_pages"])


def _huge(bench: Bench) -> None:
    """A native file on a hugetlbfs, which has no page cache of its own to count."""
    pages = HugePages(bench.sizes.data_bytes + _BASE_BYTES + 2 * MIB)
    if reason := pages.borrow():
        bench.results.note(f"segments on hugetlbfs not measured: {reason}")
        return
    where = bench.scratch.directory("huge")
    try:
        run(["mount", "-t", "hugetlbfs", "-o", "pagesize=2M", "pkernfs-bench", where])
        try:
            with _pool(bench, where / "one") as pool:
                _map_native(bench, pool)
        finally:
            unmount(where)
    finally:
        pages.give_back()


def _map_native(bench: Bench, pool: Path) -> None:
    with in_background(bench, pool) as found:
        ram = found.root / "ram"
        bench.client.run("truncate", ram, bench.sizes.data_bytes)
        (native,) = pool.glob("segment-*")
        run([BIN / "pkernfs", "native", ram, "on"])
        try:
            for turn in range(bench.sizes.rounds):
                bench.say(f"segments: hugetlbfs, round {turn + 1} of {bench.sizes.rounds}")
                for work, workload in HUGE.items():
                    _work(bench, turn, work, workload, ram, native)
        finally:
            run([BIN / "pkernfs", "native", ram, "off"])


def _truncate(bench: Bench, root: Path, pool: Path) -> None:
    before = len(list(pool.iterdir()))
    for turn in range(bench.sizes.rounds):
        found = bench.client.run("truncate", root / "large", FRESH_FILE_BYTES)
        bench.results.add(TRUNCATE, OURS, turn, found["seconds"] * 1e3)
        (root / "large").unlink()
        while len(list(pool.iterdir())) > before:  # destroyed a moment later
            time.sleep(0.005)


def _transfer(bench: Bench, segment: Path, flat: Path) -> None:
    """The same mount serves both: one file has a segment already, the other gets none."""
    size = bench.sizes.data_bytes
    bench.client.run("write", flat, size, MIB, "nd")
    for turn in range(bench.sizes.rounds):
        bench.say(f"segments: read and write, round {turn + 1} of {bench.sizes.rounds}")
        for verb, workload in (("write", WRITE), ("read", READ)):
            for system, path in ((SEGMENT, segment), (FLAT, flat))[:: 1 if turn % 2 else -1]:
                found = bench.client.run(verb, path, size, MIB, "d")
                bench.results.add(workload, system, turn, found["gb_per_s"])


# Many files: mounts, and the space that is left.


def _many(bench: Bench, pool: Path, empty: Path) -> None:
    count = bench.sizes.segments
    bench.say(f"segments: {count} files")
    with in_background(bench, pool) as found:
        for number in range(count):
            made = bench.client.run("truncate", found.root / f"f{number}", 2 * MIB)
            if number >= count - bench.sizes.rounds:
                bench.results.add(MAKE, OURS, count - number - 1, made["seconds"] * 1e3)
    for turn in range(bench.sizes.rounds):
        bench.say(f"segments: mount round {turn + 1} of {bench.sizes.rounds}")
        with in_background(bench, empty) as found:
            alone = found.seconds
        with in_background(bench, pool) as found:
            bench.results.add(MOUNT, OURS, turn, found.seconds - alone)
            _statfs(bench, turn, found.root)
    probe = Path(__file__).with_name("segments_probe.py")
    command: list[str | Path] = [PYTHON, probe, str(pool), str(bench.sizes.rounds)]
    lines = run(bench.client.pinning.daemon_command(command)).splitlines()
    for turn, line in enumerate(lines):
        for key, workload in PHASES.items():
            bench.results.add(workload, OURS, turn, json.loads(line)[key])


def _statfs(bench: Bench, turn: int, root: Path) -> None:
    """Ask for the space again and again, while others ask for something else."""
    seconds: list[float] = []
    over = threading.Event()

    def ask() -> None:
        while not over.is_set():
            began = time.perf_counter()
            os.statvfs(root)
            seconds.append(time.perf_counter() - began)

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        with LatencyClient(bench.client, root / "f0") as beside:
            time.sleep(_PROBES_S)
    finally:
        over.set()
        asking.join()
    bench.results.add(STATFS, OURS, turn, statistics.median(seconds) * 1e3)
    if beside.result:
        bench.results.add(BESIDE, OURS, turn, beside.result["median_us"])


def targets(results: Results) -> list[Target]:
    """What was asked of them."""
    return [
        *(_as_native(results, workload) for workload in (*MAPPED.values(), *HUGE.values())),
        _no_cache(results),
        below(results, "truncate to 256 GiB of a sparse pool", TRUNCATE.key, 50, "ms"),
        below(results, "mount with many segments, beyond an empty one", MOUNT.key, 0.5, "s"),
        below(results, "forced stat beside statfs, many segments", BESIDE.key, 1000, "us"),
    ]


def _as_native(results: Results, workload: Workload) -> Target:
    key = workload.key
    subject = f"{workload.title}, plain path"
    found = at_least(results, subject, 0.98, (key, PLAIN), (key, NATIVE))
    noise = results.ratio((key, AGAIN), (key, NATIVE))
    if noise is None:
        return found
    remark = f"{found.measured}; native again {noise.median:.2f}"
    return Target(subject, found.required, remark, found.met)


def _no_cache(results: Results) -> Target:
    most = results.get(CACHE.key, OURS)
    if most is None or most.spread.low < 0:
        return Target(CACHE.title, "0 MiB", "-", None)
    return Target(CACHE.title, "0 MiB", f"{most.spread.high:g} MiB", most.spread.high == 0)
