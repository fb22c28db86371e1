"""Workloads for every system: metadata, scale, sequential data, mappings.

A round visits the systems one after the other for each step (A B A B), so that a drift of the
machine meets them all.  A system that fails is left out from then on and noted.
"""

import contextlib
import copy
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from .client import Client
from .machine import BenchError, Pinning, can_drop_caches, drop_caches, wait_quiet
from .results import Cost, Results, Workload
from .systems import SYSTEMS, Scratch, System

MIB = 1 << 20
SPLIT = "split:"
_WARM_SECONDS = 0.15
_WARMUP = -1


@dataclass(frozen=True)
class Sizes:
    """The size of everything: the full run, or --quick."""

    rounds: int = 7
    names: int = 2000
    few: int = 1000
    many: int = 100_000
    batch: int = 500
    data_bytes: int = 256 * MIB
    random_reads: int = 5000
    region_names: int = 100_000
    zero_bytes: int = 3072 * MIB
    segments: int = 1000

    @classmethod
    def quick(cls) -> "Sizes":
        return cls(
            rounds=3, names=500, many=20_000, batch=200, data_bytes=64 * MIB,
            random_reads=1000, region_names=20_000, zero_bytes=512 * MIB,
            segments=200,
        )  # fmt: skip


@dataclass
class Bench:
    """One run: what it uses, and where its figures go."""

    client: Client
    scratch: Scratch
    results: Results
    sizes: Sizes
    systems: list[System]
    #: Put before the keys of the workloads that run a second time, placed differently.
    prefix: str = ""

    def say(self, text: str) -> None:
        print(f"bench: {text}", file=sys.stderr, flush=True)

    def alive(self) -> list[System]:
        return [system for system in self.systems if not system.failed]

    def daemons(self) -> list[int]:
        return [system.pid for system in self.alive() if system.pid is not None]

    def quiet(self) -> None:
        if not wait_quiet(self.daemons()):
            self.results.note("a daemon was still busy when the next step began")

    @contextlib.contextmanager
    def mounted(self, wanted: Callable[[System], bool]) -> Iterator[list[System]]:
        """Fresh mounts of the wanted systems; all are gone afterwards, whatever happens."""
        started: list[System] = []
        try:
            for system in [s for s in self.alive() if wanted(s)]:
                with self.guard(system, "start"):
                    started.append(system)
                    system.start()
            yield usable(started, "start")
        finally:
            for system in started:
                system.stop()

    @contextlib.contextmanager
    def guard(self, system: System, what: str) -> Iterator[None]:
        """A failure costs this system this step for the rest of the run, or, dead, all others."""
        try:
            yield
        except (BenchError, OSError) as error:
            reason = f"{system.name}: {what}: {error}"
            system.broken.add(what)
            if not system.running():
                system.failed = f"{reason}; {system.last_words()}"
            self.results.note(f"{system.failed or reason} (left out from there on)")
            self.say(system.failed or reason)

    def placed(self, pinning: Pinning) -> "Bench":
        """Return the same run with client and daemons elsewhere, under keys of its own."""
        client = copy.copy(self.client)
        client.pinning = pinning
        systems = [type(s)(self.scratch, pinning) for s in self.alive()]
        return replace(self, client=client, systems=systems, prefix=SPLIT)

    def named(self, workload: Workload) -> Workload:
        if not self.prefix:
            return workload
        key, title = self.prefix + workload.key, f"{workload.title}, two CPUs"
        return replace(workload, key=key, title=title)

    def forget_names(self) -> None:
        """Make the kernel forget every name and inode it may, and the daemons hear of it."""
        drop_caches(2)
        self.quiet()

    def measure(
        self, workload: Workload, system: System, turn: int, *arguments: object
    ) -> dict[str, float]:
        """Run the client once and record its rate with the requests and the daemon's CPU time."""
        before, cpu_before = system.requests(), system.cpu_ms()
        found = self.client.run(*arguments)
        after, cpu_after = system.requests(), system.cpu_ms()
        ops = found.get("ops", found.get("bytes", 0) / MIB)
        if turn != _WARMUP:
            cost = None
            if before is not None and after is not None:
                daemon_us = (cpu_after - cpu_before) * 1e3 / ops
                client_us = found["cpu_seconds"] * 1e6 / ops
                cost = Cost((after - before) / ops, daemon_us, daemon_us + client_us)
            value = found.get("rate") or found["gb_per_s"]
            self.results.add(self.named(workload), system.name, turn, value, cost)
        return found


def make_systems(bench: Bench, only: set[str]) -> list[System]:
    """All systems that can run here, or the named ones; a note for each that cannot."""
    found: list[System] = []
    for cls in SYSTEMS:
        if only and cls.name not in only:
            continue
        system = cls(bench.scratch, bench.client.pinning)
        reason = system.missing()
        if reason is None:
            found.append(system)
        else:
            bench.results.note(f"{cls.name} skipped: {reason}")
            bench.say(f"{cls.name} skipped: {reason}")
    return found


def usable(systems: list[System], what: str) -> list[System]:
    """Those that have not failed altogether or in this step."""
    return [s for s in systems if not s.failed and what not in s.broken]


@dataclass(frozen=True)
class Step:
    """One thing done to one system in a round; ``act`` records what there is to record."""

    workload: Workload
    act: Callable[["Bench", System, Path, int, Workload], None]
    cold: bool = False


def run_rounds(bench: Bench, systems: list[System], steps: list[Step], tag: str) -> None:
    """All rounds of some steps, interleaved; the first, unrecorded one warms things up."""
    for turn in range(_WARMUP, bench.sizes.rounds):
        bench.say(f"{tag}: round {turn + 1} of {bench.sizes.rounds}")
        for system in usable(systems, "start"):
            with bench.guard(system, "start"):
                (system.root / f"{tag}{turn}").mkdir()
        for step in steps:
            for system in usable(systems, step.workload.title):
                with bench.guard(system, step.workload.title):
                    if step.cold:
                        bench.forget_names()
                    step.act(bench, system, system.root / f"{tag}{turn}", turn, step.workload)


# Metadata: one directory a round, filled, used and emptied.


def _rate(key: str, title: str) -> Workload:
    return Workload(key, title, "1/s")


def _names(verb: str) -> Callable[[Bench, System, Path, int, Workload], None]:
    def act(bench: Bench, system: System, at: Path, turn: int, workload: Workload) -> None:
        bench.measure(workload, system, turn, verb, at, bench.sizes.names, 0)

    return act


def _rename(bench: Bench, system: System, at: Path, turn: int, workload: Workload) -> None:
    bench.measure(workload, system, turn, "rename", at, bench.sizes.names, 0, "f", "g")
    bench.client.run("rename", at, bench.sizes.names, 0, "g", "f")


def _lookup(bench: Bench, system: System, at: Path, turn: int, workload: Workload) -> None:
    names = bench.sizes.names
    bench.measure(workload, system, turn, "stat", at, names, 0, names, 1, turn + 2)


def _first_lookup(bench: Bench, system: System, at: Path, turn: int, workload: Workload) -> None:
    if system.renew():
        bench.quiet()
    _lookup(bench, system, at, turn, workload)


def _warm_stat(bench: Bench, system: System, at: Path, turn: int, workload: Workload) -> None:
    names = bench.sizes.names
    first = bench.client.run("stat", at, names, 0, names, 2, 1)
    repeat = max(1, int(first["rate"] * _WARM_SECONDS / names))
    bench.measure(workload, system, turn, "stat", at, names, 0, names, repeat, 1)


def _warm_list(bench: Bench, system: System, at: Path, turn: int, workload: Workload) -> None:
    first = bench.client.run("list", at, 1)
    repeat = max(1, int(first["rate"] * _WARM_SECONDS / bench.sizes.names))
    bench.measure(workload, system, turn, "list", at, repeat)


def _cold_list(bench: Bench, system: System, at: Path, turn: int, workload: Workload) -> None:
    bench.measure(workload, system, turn, "list", at, 1)


META = [
    Step(_rate("mkdir", "mkdir"), _names("mkdir")),
    Step(_rate("rmdir", "rmdir"), _names("rmdir")),
    Step(_rate("create", "create (open O_EXCL, close)"), _names("create")),
    Step(_rate("stat", "stat, warm"), _warm_stat),
    Step(_rate("list", "readdir with stat, warm (entries)"), _warm_list),
    Step(_rate("lookup", "uncached lookup (stat)"), _lookup, cold=True),
    Step(_rate("lookup-first", "lookup right after mounting (stat)"), _first_lookup, cold=True),
    Step(_rate("list-cold", "readdir with stat, cold (entries)"), _cold_list, cold=True),
    Step(_rate("rename", "rename"), _rename),
    Step(_rate("unlink", "unlink"), _names("unlink")),
]
_NEEDED = {"create", "unlink"}


def meta(bench: Bench, only: set[str]) -> None:
    """Create, unlink, rename, mkdir, rmdir, lookups, stat and readdir in one directory."""
    steps = [s for s in META if not only or s.workload.key in only | _NEEDED]
    if not can_drop_caches():
        steps = [s for s in steps if not s.cold]
        bench.results.note("uncached lookups not measured: /proc/sys/vm/drop_caches not writable")
    with bench.mounted(lambda system: True) as systems:
        run_rounds(bench, systems, steps, "split" if bench.prefix else "meta")


def split(bench: Bench, only: set[str]) -> None:
    """The same with the daemon on another CPU: waking that one costs more than the daemon does."""
    there = Pinning.named("split")
    if there.client == there.daemon:
        bench.results.note("two CPUs: not measured, there is one")
    elif bench.client.pinning != there:
        meta(bench.placed(there), only)


# Scale: the same batch of operations in a small and in a large directory.

SCALE_SYSTEMS = {"tmpfs", "floor-tuned", "pkernfs"}
SCALE_STEPS = [
    *("create", "stat", "lookup", "rename", "unlink", "mkdir", "rmdir", "list", "list-cold"),
]


def scale(bench: Bench) -> None:
    """Every metadata operation with few and with many files in the directory."""
    sizes = bench.sizes
    with bench.mounted(lambda system: system.name in SCALE_SYSTEMS) as systems:
        for system in systems:
            bench.say(f"scale: {sizes.many} files in {system.name}")
            for count in (sizes.few, sizes.many):
                with bench.guard(system, f"{count} files"):
                    (system.root / str(count)).mkdir()
                    bench.client.run("create", system.root / str(count), count, 0)
        for turn in range(_WARMUP, sizes.rounds):
            bench.say(f"scale: round {turn + 1} of {sizes.rounds}")
            for step in SCALE_STEPS:
                for system in usable(systems, f"scale {step}"):
                    with bench.guard(system, f"scale {step}"):
                        _scale_step(bench, system, turn, step)


def _scale_step(bench: Bench, system: System, turn: int, step: str) -> None:
    sizes = bench.sizes
    for count in (sizes.few, sizes.many):
        workload = scale_workload(step, count)
        at = system.root / str(count)
        batch, start = sizes.batch, count * 2
        if step in ("lookup", "list-cold"):
            if not can_drop_caches():
                continue
            system.renew()
            bench.forget_names()
        if step == "stat":
            arguments = ["stat", at, sizes.few, 0, count, 1, 1]
            bench.client.run(*arguments)
            bench.measure(workload, system, turn, "stat", at, sizes.few, 0, count, 50, 1)
        elif step == "lookup":
            bench.measure(workload, system, turn, "stat", at, batch, 0, count, 1, turn + 2)
        elif step == "rename":
            bench.measure(workload, system, turn, "rename", at, batch, start, "f", "g")
            bench.client.run("rename", at, batch, start, "g", "f")
        elif step in ("list", "list-cold"):
            repeat = 1 if step == "list-cold" or count == sizes.many else 20
            if step == "list":
                bench.client.run("list", at, 1)
            bench.measure(workload, system, turn, "list", at, repeat)
        else:
            bench.measure(workload, system, turn, step, at, batch, start)


def scale_workload(step: str, count: int) -> Workload:
    return _rate(f"{step}@{count}", f"{step} among {count:,} files")


# Data and mappings: one file a round.


def _transfer(verb: str, flags: str, name: str) -> Callable[..., None]:
    def act(bench: Bench, system: System, at: Path, turn: int, workload: Workload) -> None:
        if verb == "read" and "d" not in flags and can_drop_caches():
            drop_caches(1)
        size = bench.sizes.data_bytes
        bench.measure(workload, system, turn, verb, at / name, size, MIB, flags)

    return act


def _random_reads(bench: Bench, system: System, at: Path, turn: int, workload: Workload) -> None:
    sizes = bench.sizes
    arguments = ("pread", at / "direct", sizes.data_bytes, 4096, sizes.random_reads)
    bench.measure(workload, system, turn, *arguments)
    for name in ("buffered", "direct"):
        (at / name).unlink()
    bench.quiet()


def _bytes(key: str, title: str) -> Workload:
    return Workload(key, title, "GB/s")


DATA = [
    Step(_bytes("write-new", "1 MiB write, new file"), _transfer("write", "n", "buffered")),
    Step(_bytes("write", "1 MiB write, overwrite"), _transfer("write", "-", "buffered")),
    Step(_bytes("read", "1 MiB read"), _transfer("read", "-", "buffered")),
    Step(_bytes("dwrite-new", "1 MiB write, direct, new file"), _transfer("write", "nd", "direct")),
    Step(_bytes("dwrite", "1 MiB write, direct, overwrite"), _transfer("write", "d", "direct")),
    Step(_bytes("dread", "1 MiB read, direct"), _transfer("read", "d", "direct")),
    Step(_rate("pread", "4 KiB read, direct, random"), _random_reads),
]


def data(bench: Bench) -> None:
    """Sequential reads and writes, through the page cache and past it."""
    with bench.mounted(lambda system: system.data) as systems:
        run_rounds(bench, systems, DATA, "data")


TOUCH = {
    "first": _bytes("touch-first", "MAP_SHARED, first touch"),
    "second": _bytes("touch-second", "MAP_SHARED, second touch"),
    "msync_s": Workload("msync", "msync of it all", "s", higher_is_better=False),
    "after_msync": _bytes("touch-again", "MAP_SHARED, touch after msync"),
}


def _touch(bench: Bench, system: System, at: Path, turn: int, workload: Workload) -> None:
    bench.quiet()
    found = bench.client.run("touch", at / "mapped", bench.sizes.data_bytes)
    (at / "mapped").unlink()
    if turn != _WARMUP:
        for key, shown in TOUCH.items():
            bench.results.add(shown, system.name, turn, found[key])


def mapping(bench: Bench) -> None:
    """A shared mapping: what a guest's memory costs."""
    with bench.mounted(lambda system: system.data) as systems:
        run_rounds(bench, systems, [Step(TOUCH["second"], _touch)], "mmap")
