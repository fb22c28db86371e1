"""The speed and memory targets, each judged from the figures of one run."""

from collections.abc import Iterator
from dataclasses import dataclass

from .results import Results, Spread
from .systems import SYSTEMS
from .workloads import SCALE_STEPS, SPLIT, Sizes

OURS = "pkernfs"
YARDSTICK = "floor-tuned"
#: Two kernels' caches answer equally fast; a difference this small is the machine's noise.
LEVEL = 0.95
_SENDS_NOTHING = 0.01


@dataclass(frozen=True)
class Target:
    """One requirement: what was asked, what was measured, and whether that meets it."""

    subject: str
    required: str
    measured: str
    met: bool | None

    @property
    def verdict(self) -> str:
        return {True: "met", False: "**not met**", None: "not measured"}[self.met]


def _span(spread: Spread) -> str:
    return f"{spread.median:.2f} ({spread.low:.2f} to {spread.high:.2f})"


def at_least(
    results: Results, subject: str, limit: float, over: tuple[str, str], under: tuple[str, str]
) -> Target:
    """A ratio of two rates, taken round by round."""
    spread = results.ratio(over, under)
    required = f">= {limit:g} of {under[1]}" if over[1] != under[1] else f">= {limit:g}"
    if spread is None:
        return Target(subject, required, "-", None)
    measured = _span(spread) + _by_cpu(results, over, under)
    return Target(subject, required, measured, spread.median >= limit)


def _by_cpu(results: Results, over: tuple[str, str], under: tuple[str, str]) -> str:
    """The ratio of the CPU times as a remark; only on one CPU do they make the rate."""
    ratio = None if over[0].startswith(SPLIT) else results.cpu_ratio(over, under)
    return "" if ratio is None else f", by CPU time {ratio:.2f}"


def below(results: Results, subject: str, key: str, limit: float, unit: str) -> Target:
    """A median under a limit."""
    value = results.median(key, OURS)
    if value is None:
        return Target(subject, f"< {limit:g} {unit}", "-", None)
    return Target(subject, f"< {limit:g} {unit}", f"{value:.4g} {unit}", value < limit)


def ahead(results: Results, subject: str, key: str, peer: str) -> Target:
    """Faster than a peer, or level with it where neither sends a request."""
    spread = results.ratio((key, OURS), (key, peer))
    if spread is None:
        return Target(subject, f"ahead of {peer}", "-", None)
    sent = [results.requests(key, name) for name in (OURS, peer)]
    both_cached = all(count is not None and count < _SENDS_NOTHING for count in sent)
    level = both_cached and LEVEL <= spread.median < 1
    measured = _span(spread) + _by_cpu(results, (key, OURS), (key, peer))
    measured += ", the kernel answers for both: level" if level else ""
    return Target(subject, f"ahead of {peer}", measured, level or spread.median > 1)


def evaluate(results: Results, sizes: Sizes) -> list[Target]:
    """Every target, in the order of the requirements."""
    return [
        *_metadata(results),
        *_peers(results),
        *_scale(results, sizes),
        *_data(results),
        *_region(results),
    ]


def _metadata(results: Results) -> Iterator[Target]:
    for key in ("create", "unlink", "rename", "mkdir", "lookup", "lookup-first"):
        yield at_least(results, f"{key}, one CPU", 0.5, (key, OURS), (key, YARDSTICK))
        apart = SPLIT + key
        yield at_least(results, f"{key}, two CPUs", 0.5, (apart, OURS), (apart, YARDSTICK))


def _peers(results: Results) -> Iterator[Target]:
    for key, subject in (
        ("create", "create"),
        ("stat", "warm stat"),
        ("list", "readdir with stat, warm"),
        ("list-cold", "readdir with stat, cold"),
    ):
        for peer in [cls.name for cls in SYSTEMS if cls.peer]:
            yield ahead(results, f"{subject}, one CPU", key, peer)
            yield ahead(results, f"{subject}, two CPUs", SPLIT + key, peer)
    sent = results.requests("stat", OURS)
    measured = "-" if sent is None else f"{sent:.4f} requests per stat"
    met = None if sent is None else sent < _SENDS_NOTHING
    yield Target("a warm stat never reaches the daemon", "0 requests", measured, met)


def _scale(results: Results, sizes: Sizes) -> Iterator[Target]:
    for step in SCALE_STEPS:
        many, few = (f"{step}@{count}" for count in (sizes.many, sizes.few))
        subject = f"{step}: rate among {sizes.many:,} files over rate among {sizes.few:,}"
        found = at_least(results, subject, 0.8, (many, OURS), (few, OURS))
        control = results.ratio((many, YARDSTICK), (few, YARDSTICK))
        if control is not None and found.met is not None:
            remark = f"{found.measured}; {YARDSTICK} {control.median:.2f}"
            found = Target(subject, found.required, remark, found.met)
        yield found


def _data(results: Results) -> Iterator[Target]:
    for key, subject in (
        ("read", "1 MiB sequential read"),
        ("write", "1 MiB sequential write, overwrite"),
        ("write-new", "1 MiB sequential write, new file"),
        ("dread", "1 MiB sequential read, direct"),
        ("dwrite", "1 MiB sequential write, direct, overwrite"),
        ("dwrite-new", "1 MiB sequential write, direct, new file"),
    ):
        yield at_least(results, subject, 0.8, (key, OURS), (key, YARDSTICK))
    second = "touch-second"
    yield at_least(results, "MAP_SHARED second touch", 0.7, (second, OURS), (second, "tmpfs"))


def _region(results: Results) -> Iterator[Target]:
    mount, imports = results.median("mount", OURS), results.median("imports", OURS)
    subject = "mount of a clean 1 TiB region with files, over starting Python with its imports"
    if mount is None or imports is None:
        yield Target(subject, "< 0.2 s", "-", None)
    else:
        more = mount - imports
        yield Target(subject, "< 0.2 s", f"{more:.3f} s ({mount:.3f} - {imports:.3f})", more < 0.2)
    yield below(results, "daemon memory, just mounted", "memory-mounted", 100, "MiB")
    yield below(results, "daemon memory, every file listed", "memory-listed", 100, "MiB")
    yield below(results, "mkfs of 1 TiB", "mkfs", 1, "s")
    yield below(results, "truncate of a fresh 256 GiB file", "truncate", 20, "ms")
    extents = results.median("extents", OURS)
    if extents is None:
        yield Target("extents of that file", "1", "-", None)
    else:
        yield Target("extents of that file", "1", f"{extents:g}", extents == 1)
    zeroing, memset = ("zeroing", OURS), ("memset", OURS)
    yield at_least(results, "zeroing over memset of the same memory", 0.8, zeroing, memset)
    yield below(results, "stat during zeroing, median", "stat-zeroing", 5000, "us")
