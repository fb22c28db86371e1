"""The kernel's own code against the model of it, over random command lines.

Where they differ, the model is wrong: pkernfs would believe a region safe that is not.
"""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from kexeclab import LabError, sources
from pkernfs.host import memmap
from pkernfs.host.memmap import Action, Entry, Kaslr, Rules
from pkernfs.iommu.memory import merge_ranges, without_ranges
from pkernfs.quantities import PhysAddr, PhysRange
from support import kernel_oracle
from support.kernel_oracle import Oracle, Said

pytestmark = pytest.mark.slow("downloads and unpacks a kernel's source once; asks its code")

G = 1 << 30
#: A question takes 1 ms, so there may be many.
MANY = settings(max_examples=8 * settings().max_examples)
#: A machine with a hole below 4 GiB, reserved memory and ACPI tables: start, size, type.
MEMORY = [
    (0, 640 << 10, 1),
    (1 << 20, 3 * G - (1 << 20), 1),
    (3 * G, 1 << 20, 2),
    (3 * G + (1 << 20), 1 << 20, 3),
    (4 * G, 60 * G, 1),
    (64 * G, G, memmap.SOFT_RESERVED),
]
#: All that there could be, for the question of where an image goes.
ALL_MEMORY = [(1 << 20, 1 << 46, 1)]


@dataclass
class Kernel:
    """One kernel: the rules of the model, and its own code."""

    rules: Rules
    decompressor: Oracle
    kernel: Oracle


@pytest.fixture(scope="module", params=["6.1", "6.12", "7"])
def kernel(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Kernel]:
    """The kernel of a series, from its source."""
    why = None
    if platform.machine() != "x86_64":
        why = "the kernel's code is that of x86-64"
    elif shutil.which("cc") is None:
        why = "no C compiler"
    try:
        source = sources.fetch(request.param, kernel_oracle.FILES) if why is None else None
    except LabError as error:
        why = f"no kernel source: {error}"
    if why is not None or source is None:
        if "lab" in os.environ.get("PKERNFS_REQUIRE", "").split(","):
            pytest.fail(f"the kernel's source is required (PKERNFS_REQUIRE): {why}")
        pytest.skip(why or "")
    directory = tmp_path_factory.mktemp("oracle")
    rules = memmap.rules_for(source.version)
    assert len(rules) == 1, f"{source.version}: the model does not know this kernel: {rules}"
    with ExitStack() as stack:
        programs = [
            stack.enter_context(Oracle(build(source, directory)))
            for build in (kernel_oracle.build_decompressor, kernel_oracle.build_kernel)
        ]
        yield Kernel(rules[0], *programs)


# ---------------------------------------------------------------------------- command lines

_NUMBERS = st.one_of(
    st.sampled_from(
        "0 1 1G 2G 3g 512M 8G 1K 4096 0x40000000 0X80000000 010 010G 08 0x 0xg K G 16E 1E 2P "
        "18446744073709551615 18446744073709551616 17179869184G 0xffffffffffffffffffff -1 +1 x "
        "1t 70T 1GB 4Gx 1.5G".split()
    ),
    st.just(""),
    st.integers(0, 80).map(lambda n: f"{n}G"),
    st.integers(0, 1 << 66).map(str),
    st.integers(0, 1 << 66).map(hex),
)
_TAILS = st.sampled_from(
    ["", "", "", "-1", "+2", "-1+2", "-1+0xefffffff", "+0xefffffff", "-1+1", "-2+1", "-3", "+12",
     "-0x100000001", "-", "+", "-+7", "+1-1", "B", "-1B", "-1+2;", ":0x40000", ":0x40001", ":1",
     ":+0x40000", ":0x40000x", ":262144", ":01000000", ":0xfffffffffffffffff"]
)  # fmt: skip
_RANGES = st.builds(
    "{}{}{}{}".format, _NUMBERS, st.sampled_from(["@", "#", "$", "!", "%", "%", "$", "", "\\$"]),
    _NUMBERS, _TAILS,
)  # fmt: skip
#: Plain ranges as well, so that there often are more than four.
_PLAIN = st.builds(
    "{}{}{}".format, st.sampled_from(["1G", "256M", "4K"]), st.sampled_from("#$!%@"),
    st.integers(1, 60).map("{}G".format),
)  # fmt: skip
#: Few ranges, of few bytes or none, behind exactmap.
_EXACT = st.lists(
    st.builds(
        "{}{}{}{}".format, st.sampled_from(["0", "1G", "2G"]), st.sampled_from("@$%%"),
        st.sampled_from(["0", "1G", "2G"]), st.sampled_from(["", "", "-1", "-1+2", "-2", "+2"]),
    ),
    max_size=3,
).map(lambda ranges: ",".join(["exactmap", *ranges]))  # fmt: skip
_VALUES = st.lists(
    st.one_of(_RANGES, _PLAIN, _PLAIN, st.sampled_from(["exactmap", "exactmapx", "", "1G"])),
    min_size=1,
    max_size=6,
).map(",".join)
_QUOTED = st.sampled_from(["{}={}", "{}={}", "{}={}", '{}="{}"', '"{}={}"', "'{}={}'", '{}="{}'])
_PARAMETERS = st.one_of(
    st.builds(str.format, _QUOTED, st.sampled_from(["memmap", "memmap", "efi_fake_mem"]), _VALUES),
    st.builds(str.format, _QUOTED, st.just("memmap"), st.one_of(_PLAIN, _EXACT)),
    st.builds(str.format, _QUOTED, st.just("mem"), st.one_of(_NUMBERS, st.just("nopentium"))),
    st.builds(
        str.format, _QUOTED, st.sampled_from(["hugepages", "hugepagesz", "default_hugepagesz"]),
        _NUMBERS,
    ),
    st.sampled_from(
        ["nokaslr", "no", "nok", '"nokaslr"', "nokaslrx", "xnokaslr", "nokaslr=1", "--", '"--"',
         "quiet", "memmap", "mem-map=1G$1G", "=", "==1", '"', '""', "a=b", "\xe0\xa0",
         "\x01nokaslr"]
    ),
    st.text('mem=ap"$%!@#,-+1G0x \t\x0b', max_size=12),
)  # fmt: skip
_LINES = st.lists(
    st.tuples(_PARAMETERS, st.sampled_from([" ", " ", " ", "  ", "\t", "\n", "\x0b", "\xa0"])),
    max_size=8,
).map(lambda pairs: "".join(word + space for word, space in pairs))


def read_address_0(line: str) -> bool:
    """Tell if the decompressor reads what is at address 0, which a program cannot."""
    names = ("mem", "hugepages", "hugepagesz")
    return any(one.name in names and one.value is None for one in memmap.arguments(line))


def numbers(said: list[Said], what: str) -> list[tuple[int, int]]:
    return [(one.first, one.second) for one in said if one.what == what]


# ---------------------------------------------------------------------------- the comparisons


@MANY
@given(line=_LINES)
@example(line="memmap=1M$1G,1M$2G,1M$3G,1M$4G,")
@example(line="memmap=1M$1G,1M$2G,1M$3G,1M$4G memmap=1M$5G")
@example(line="no nokaslr")
@example(line="no  nokaslr")
@example(line="-- nokaslr")
@example(line="efi_fake_mem=1G@1G:0x40000 memmap=1G$3G")
@example(line="memmap=K$1G,1G!2G")
@example(line="memmap=1G$2G mem=0 memmap=1G$4G")
@example(line="quiet " * 340 + "memmap=1G$1G memmap=1G$2G")
def test_what_the_decompressor_keeps(kernel: Kernel, line: str) -> None:
    """The ranges to avoid, the limit, the switch, huge pages, and nokaslr."""
    said = kernel.decompressor.ask(line, [])
    if numbers(said, "killed"):
        assert read_address_0(line)
        return
    found = memmap.handle_mem_options(line, kernel.rules)
    ranges = [(one.start, one.size) for one in found.avoided]
    assert ranges + [(0, 0)] * (memmap.MAX_MEMMAP_REGIONS - len(ranges)) == numbers(said, "avoid")
    assert numbers(said, "limit") == [(found.mem_limit, found.memmap_too_large)]
    nokaslr = memmap.cmdline_find_option_bool(line, "nokaslr")
    assert numbers(said, "pages") == [(found.max_gb_huge_pages, nokaslr)]


@MANY
@given(line=_LINES, start=st.integers(0, 64), size=st.integers(1, 16))
@example(line="memmap=1G%4G", start=4, size=1)
@example(line="memmap=8G%4G", start=4, size=8)
@example(line="memmap=1G$4G", start=4, size=1)
@example(line="memmap=1G$4G", start=4, size=2)
@example(line="memmap=1G$4G,1G$5G", start=4, size=2)
@example(line="memmap=1G$4G nokaslr", start=8, size=1)
@example(line="memmap=1G$1G,1G$2G,1G$3G,1G$4G,1G$5G", start=5, size=1)
@example(line="memmap=1G$1G,1G$2G memmap=1G$3G,1G$4G memmap=1G$5G", start=5, size=1)
def test_where_the_image_may_be_put(kernel: Kernel, line: str, start: int, size: int) -> None:
    """No place for the image is in a region that is avoided, and some are in one that is not."""
    said = kernel.decompressor.ask(line, ALL_MEMORY)
    assume(not numbers(said, "killed"))
    low, high = start * G, (start + size) * G
    verdict = memmap.kaslr(line, PhysAddr(low), PhysAddr(high), (kernel.rules,))
    places = [
        (at, at + number * kernel_oracle.ALIGN) for at, number in numbers(said, "slot") if number
    ]
    inside = any(at < high and low < end for at, end in places)
    if verdict.kaslr is not Kaslr.NOT_AVOIDED:
        assert not inside, verdict
        assert verdict.kaslr is not Kaslr.OFF or not places
        return
    options = memmap.handle_mem_options(line, kernel.rules)
    ranges = [PhysRange(PhysAddr(a.start), PhysAddr(a.start + a.size)) for a in options.avoided]
    if options.max_gb_huge_pages or any(end >= 1 << 64 for _, end in ranges):
        return
    reach = PhysRange(
        PhysAddr(max(low, kernel_oracle.MINIMUM)), PhysAddr(min(high, options.mem_limit))
    )
    free = without_ranges([reach], merge_ranges(ranges)) if reach.start < reach.end else []
    if any(end - start >= 2 * kernel_oracle.ALIGN for start, end in free):
        assert inside, verdict


@MANY
@given(line=_LINES)
@example(line="memmap=1G%4G memmap=512M@4G")
@example(line="memmap=1G$4G memmap=512M@4G")
@example(line="memmap=1G!4G,1G$4G")
@example(line="memmap=1G%4G-2+1,1G%5G-1+2")
@example(line="memmap=exactmap memmap=4G@0,1G$1G")
@example(line="mem=8G memmap=1G@9G")
@example(line="memmap=exactmap memmap=4G@0")
@example(line="memmap=exactmap memmap=4G@0,1G%1G")
@example(line="memmap=exactmap memmap=4G@0,0%1G")
@example(line="memmap=exactmap memmap=4G@0,0%1G-1+2")
@example(line="memmap=exactmap memmap=4G@0,0%0")
@example(line="memmap=exactmap memmap=4G@0,0%4G")
@example(line="memmap=exactmap memmap=0@1G,1G%1G-1+2")
@example(line="memmap=exactmap memmap=4G@0,0@1G")
@example(line="memmap=exactmap memmap=4G@0,4G%0-1")
@example(line="memmap=exactmap memmap=4G@0,4G%0-1+2")
@example(line="memmap=64GB$128GB")
@example(line="memmap=1G%4G-1+1")
@example(line="quiet " * 340 + "memmap=1G$4G memmap=1G$5G")
def test_what_the_kernel_makes_of_its_memory(kernel: Kernel, line: str) -> None:
    """The memory map after all words; and whether the kernel stops at one."""
    said = kernel.kernel.ask(line, MEMORY)
    words = memmap.e820_words(line, kernel.rules)
    changes = [word.change for word in words if word.change is not None]
    is_bug = any(c.action is Action.UPDATE and c.old == c.new for c in changes)
    assert is_bug == bool(numbers(said, "bug"))
    if is_bug:
        return
    # What goes beyond the last address stops the kernel, unless a later word takes it away.
    assume(not any(c.action is Action.ADD and c.start + c.size >= 1 << 64 for c in changes))
    assert bool(numbers(said, "panic")) == (memmap.stops_boot(line, kernel.rules) is not None)
    if numbers(said, "panic"):
        return
    firmware = [Entry(start, start + size, kind) for start, size, kind in MEMORY]
    entries = numbers(said, "entry")
    kinds = [kind for kind, _ in numbers(said, "type")]
    merged: list[Entry] = []
    for (start, size), kind in zip(entries, kinds, strict=True):
        end = start + size
        if merged and merged[-1].end == start and merged[-1].kind == kind:
            start = merged.pop().start
        merged.append(Entry(start, end, kind))
    assert memmap.memory_map(firmware, words) == merged
