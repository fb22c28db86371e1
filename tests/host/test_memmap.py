"""memmap= as the model has it: each rule once, by example; test_memmap_oracle.py has the proof."""

from __future__ import annotations

import pytest

from pkernfs.host import memmap
from pkernfs.host.memmap import (
    KNOWN,
    NEWEST,
    Action,
    Change,
    Entry,
    Kaslr,
    Kind,
    Number,
    Reservation,
    arguments,
    coverage,
    handle_mem_options,
    kaslr,
    memory_map,
    memparse,
    parse_memmap_one,
    reservations,
    rules_for,
)
from pkernfs.quantities import PhysAddr

G = 1 << 30
M = 1 << 20
ALL = (1 << 64) - 1
OLD, MIDDLE, NEW = KNOWN
FOUR = "1M$60G,1M$61G,1M$62G,1M$63G"


def at(start: int, end: int, line: str, release: str | None = None) -> memmap.Verdict:
    return kaslr(line, PhysAddr(start), PhysAddr(end), rules_for(release))


# ---------------------------------------------------------------------------- words and numbers


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("memmap=1G$1G  quiet", [("memmap", "1G$1G"), ("quiet", None)]),
        (' memmap="1G$1G 2" x', [("memmap", "1G$1G 2"), ("x", None)]),
        ('"memmap=1G$1G 2" x', [("memmap", "1G$1G 2"), ("x", None)]),
        ("'memmap=1G$1G'", [("'memmap", "1G$1G'")]),
        ('memmap=1G"$1G"', [("memmap", '1G"$1G"')]),
        ("a=b=c", [("a", "b=c")]),
        ("=a=b", [("=a", "b")]),
        ("x -- memmap=1G$1G", [("x", None)]),
        ("x --=1 y", [("x", None), ("--", "1"), ("y", None)]),
        ("a\xa0b", [("a\xc2", None), ("b", None)]),  # a byte of UTF-8 that is a space to Linux
        ("x" * 2046 + " memmap=1G$1G", [("x" * 2046, None)]),
    ],
)
def test_arguments(text: str, found: list[tuple[str, str | None]]) -> None:
    assert [(one.name, one.value) for one in arguments(text)] == found


@pytest.mark.parametrize(
    ("text", "old", "new"),
    [
        ("1G$", Number(G, 2), Number(G, 2)),
        ("1GB", Number(G, 2), Number(G, 2)),
        ("0x10k", Number(16 << 10, 5), Number(16 << 10, 5)),
        ("0x", Number(0, 1), Number(0, 1)),
        ("010", Number(8, 3), Number(8, 3)),
        ("08", Number(0, 1), Number(0, 1)),
        ("", Number(0, 0), Number(0, 0)),
        ("K$", Number(0, 1), Number(0, 0)),
        ("16E", Number(0, 3), Number(ALL, 3)),
        ("17E", Number(1 << 60, 3), Number(ALL, 3)),
        ("18446744073709551616", Number(0, 20), Number(ALL, 20)),
    ],
)
def test_numbers_of_old_and_new_kernels(text: str, old: Number, new: Number) -> None:
    assert memparse(text, MIDDLE) == old
    assert memparse(text, NEW) == new


def test_the_decompressor_never_saturates_digits() -> None:
    assert memparse("18446744073709551617", NEW, decompressor=True) == Number(1, 20)
    assert memparse("17E", NEW, decompressor=True) == Number(ALL, 3)


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("a nokaslr b", True),
        ("a -- nokaslr", True),
        ('"nokaslr"', False),
        ("nokaslr=1", False),
        ("no nokaslr", False),
        ("no  nokaslr", True),
        ("x\x01nokaslr", True),
    ],
)
def test_how_nokaslr_is_found(line: str, found: bool) -> None:
    assert memmap.cmdline_find_option_bool(line, "nokaslr") == found


@pytest.mark.parametrize(
    ("release", "rules"),
    [
        ("6.1.0-50-cloud-amd64", [OLD]),
        ("6.12.117", [MIDDLE]),
        ("7.3.4", [NEW]),
        ("5.10.0", [OLD]),
        ("6.6.1", [OLD, MIDDLE]),
        ("7.0.0", [MIDDLE, NEW]),
        ("8.0", [NEW]),
        (None, list(KNOWN)),
        ("custom", list(KNOWN)),
    ],
)
def test_rules_of_a_kernel_in_between_are_those_of_both_sides(
    release: str | None, rules: list[memmap.Rules]
) -> None:
    assert list(rules_for(release)) == rules


# ---------------------------------------------------------------------------- the decompressor


@pytest.mark.parametrize(
    ("line", "avoided"),
    [
        ("memmap=1G$1G,1G!2G memmap=1G#3G", [(G, G), (2 * G, G), (3 * G, G)]),
        ("memmap=1G%1G,1G@2G,1G$3G", [(3 * G, G)]),
        ("memmap=exactmap,1G$1G memmap=1G$2G", [(2 * G, G)]),
        ("memmap=x,1G$1G", []),
        ("mem=0 memmap=1G$1G", []),
        ("mem memmap=1G$1G", []),
        ("mem=nopentium memmap=1G$1G", [(G, G)]),
        ("-- memmap=1G$1G", []),
    ],
)
def test_ranges_that_are_avoided(line: str, avoided: list[tuple[int, int]]) -> None:
    assert [(a.start, a.size) for a in handle_mem_options(line).avoided] == avoided


@pytest.mark.parametrize(
    ("line", "limit", "word"),
    [
        ("memmap=1G%4G", G, "memmap=1G%4G"),
        ("memmap=2G", 2 * G, "memmap=2G"),
        ("memmap=1G$0", G, "memmap=1G$0"),
        ("mem=3G memmap=4G%5G", 3 * G, "mem=3G"),
        ("memmap=4G%5G mem=3G", 3 * G, "mem=3G"),
        ("memmap=1G@4G", memmap.MAXMEM, None),
        ("memmap=64GB$128GB", 64 * G, "memmap=64GB$128GB"),
    ],
)
def test_the_limit(line: str, limit: int, word: str | None) -> None:
    found = handle_mem_options(line)
    assert (found.mem_limit, found.limit_word) == (limit, word)


@pytest.mark.parametrize(
    ("line", "too_large"),
    [
        (f"memmap={FOUR}", False),
        (f"memmap={FOUR},1G$1G", True),
        (f"memmap={FOUR},", True),
        (f"memmap={FOUR} memmap=1G$1G", False),
        ("memmap=1M%60G,1M%61G,1M%62G,1M%63G,1M%64G", False),
        (f"memmap=1M$59G memmap={FOUR}", True),
    ],
)
def test_what_switches_kaslr_off(line: str, too_large: bool) -> None:
    assert handle_mem_options(line).memmap_too_large == too_large


def test_efi_fake_mem_takes_a_place_on_old_kernels_only() -> None:
    line = "efi_fake_mem=1G@1G:0x40000,1G@2G:1"
    assert [a.word for a in handle_mem_options(line, OLD).avoided] == ["efi_fake_mem=1G@1G:0x40000"]
    assert handle_mem_options(line, MIDDLE).avoided == ()


def test_huge_pages_of_one_gib() -> None:
    line = "hugepagesz=1G hugepages=4x"
    assert handle_mem_options(line, MIDDLE).max_gb_huge_pages == 4
    assert handle_mem_options(line, NEW).max_gb_huge_pages == 0
    assert handle_mem_options("hugepages=4", MIDDLE).max_gb_huge_pages == 0


@pytest.mark.parametrize(
    ("line", "verdict", "why"),
    [
        ("memmap=4G$2G", Kaslr.AVOIDED, "memmap=4G$2G"),
        ("memmap=2G$2G,2G!4G", Kaslr.AVOIDED, "memmap=2G$2G, memmap=2G!4G"),
        ("memmap=2G%2G", Kaslr.AVOIDED, "memmap=2G%2G"),  # its limit: nothing above 2G
        ("memmap=4G%2G", Kaslr.NOT_AVOIDED, "it takes memmap=4G%2G for a limit of 4G"),
        ("memmap=4G%2G mem=2G", Kaslr.AVOIDED, "mem=2G"),
        ("memmap=4G$2G nokaslr", Kaslr.OFF, "nokaslr"),
        ("nokaslr", Kaslr.OFF, "nokaslr"),
        (
            f"memmap={FOUR} memmap=4G$2G",
            Kaslr.NOT_AVOIDED,
            "memmap=4G$2G comes after the 4 ranges that it counts",
        ),
        (f"memmap=4G$2G,{FOUR}", Kaslr.OFF, "a parameter goes on behind the fourth range"),
        ("mem=0 memmap=4G$2G", Kaslr.NOT_AVOIDED, "it does not get as far as memmap=4G$2G"),
        ("memmap=4G@2G", Kaslr.NOT_AVOIDED, "it does not count memmap=4G@2G"),
        ("quiet", Kaslr.NOT_AVOIDED, "no memmap= covers it"),
    ],
)
def test_what_becomes_of_a_region(line: str, verdict: Kaslr, why: str) -> None:
    found = at(2 * G, 6 * G, line)
    assert (found.kaslr, found.why) == (verdict, why)


def test_the_first_address_that_is_not_avoided() -> None:
    assert at(2 * G, 6 * G, "memmap=1G$2G,1G$4G").at == 3 * G
    assert at(2 * G, 6 * G, "memmap=3G%9G").kaslr is Kaslr.NOT_AVOIDED
    assert at(3 * G, 6 * G, "memmap=3G%9G").kaslr is Kaslr.AVOIDED


def test_the_worst_of_the_kernels_that_it_may_be() -> None:
    """efi_fake_mem= takes the fourth place on 6.1, so that memmap= comes too late there."""
    line = "efi_fake_mem=1G@60G:0x40000 memmap=1M$61G,1M$62G,1M$63G memmap=1G$2G"
    assert at(2 * G, 3 * G, line, "6.1.0").kaslr is Kaslr.NOT_AVOIDED
    assert at(2 * G, 3 * G, line, "6.12.0").kaslr is Kaslr.AVOIDED
    assert at(2 * G, 3 * G, line, "6.6.0").kaslr is Kaslr.NOT_AVOIDED
    assert at(2 * G, 3 * G, line).kaslr is Kaslr.NOT_AVOIDED


# ---------------------------------------------------------------------------- the kernel


@pytest.mark.parametrize(
    ("text", "change"),
    [
        ("1G@4G", Change(Action.ADD, 4 * G, G, 0, memmap.RAM)),
        ("1G#4G", Change(Action.ADD, 4 * G, G, 0, memmap.ACPI)),
        ("1G$4G", Change(Action.ADD, 4 * G, G, 0, memmap.RESERVED)),
        ("1G!4G", Change(Action.ADD, 4 * G, G, 0, memmap.PRAM)),
        ("1G%4G", Change(Action.REMOVE, 4 * G, G, 0, 0)),
        ("1G%4G-1", Change(Action.REMOVE, 4 * G, G, 1, 0)),
        ("1G%4G+2", Change(Action.ADD, 4 * G, G, 0, 2)),
        ("1G%4G-1+0xefffffff", Change(Action.UPDATE, 4 * G, G, 1, memmap.SOFT_RESERVED)),
        ("1G%4G-0x100000001", Change(Action.REMOVE, 4 * G, G, 1, 0)),
        ("4G", Change(Action.REMOVE, 4 * G, ALL - 4 * G, 1, 0)),
        ("exactmap", Change(Action.CLEAR, 0, ALL, 0, 0)),
        ("", None),
        ("$4G", None),
        ("1G%4G-x", None),
        ("1G%4G+1-2", None),
    ],
)
def test_what_a_word_does(text: str, change: Change | None) -> None:
    assert parse_memmap_one(text).change == change


@pytest.mark.parametrize(
    ("text", "trouble"),
    [
        ("64G$128G", None),
        ("64G", None),
        ("64G28G", "the kernel takes it for memmap=64G, and uses no memory above 64G"),
        ("64G\\$128G", "the kernel takes it for memmap=64G, and uses no memory above 64G"),
        ("64GB$128GB", "the kernel takes it for memmap=64G, and uses no memory above 64G"),
        ("64G$128GB", "the kernel takes it for memmap=64G$128G"),
        ("64G$128G;", "the kernel takes it for memmap=64G$128G"),
        ("64G%128GB", "the kernel ignores it for 'B' behind it"),
        ("x", "the kernel ignores it"),
        ("1G%4G-1+1", "the kernel stops at boot: it changes a type to itself"),
        ("1G$0xffffffffffffffff", "the kernel stops at boot: it goes beyond the last address"),
    ],
)
def test_what_is_wrong_with_a_word(text: str, trouble: str | None) -> None:
    word = parse_memmap_one(text)
    assert (word.text, word.trouble) == (f"memmap={text}", trouble)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("memmap=exactmap", "memmap=exactmap: fewer than two ranges are given behind it"),
        ("memmap=exactmap,4G@0", "memmap=exactmap: fewer than two ranges are given behind it"),
        ("memmap=exactmap,4G@0,1G$1G", None),
        ("memmap=exactmap,4G@0,1G%1G", None),
        ("memmap=1G$4G,1G%4G-2+2", "memmap=1G%4G-2+2: it changes a type to itself"),
        ("mem=4G", None),
    ],
)
def test_what_stops_the_kernel_at_boot(line: str, why: str | None) -> None:
    assert memmap.stops_boot(line) == why


def test_words_that_only_look_like_it() -> None:
    assert memmap.lost_words("'memmap=1G$4G' memmap=1G$8G memmap") == ["'memmap=1G$4G'"]
    assert [w.text for w in memmap.e820_words("memmap=a,1G$1G mem=4G x=memmap=1G$2G")] == [
        "memmap=a",
        "memmap=1G$1G",
        "mem=4G",
    ]


def test_the_highest_type_counts_wherever_it_stands() -> None:
    firmware = [Entry(0, 8 * G, memmap.RAM)]
    for line in ("memmap=1G$4G,1G!4G", "memmap=1G!4G,1G$4G", "memmap=1G!4G,1G@4G"):
        assert memory_map(firmware, memmap.e820_words(line)) == [
            Entry(0, 4 * G, memmap.RAM),
            Entry(4 * G, 5 * G, memmap.PRAM),
            Entry(5 * G, 8 * G, memmap.RAM),
        ]


# ---------------------------------------------------------------------------- regions


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("1G%4G", Kind.REMOVED),
        ("1G%4G-1", Kind.REMOVED),
        ("1G%4G-1+2", Kind.RESERVED),
        ("1G%4G+0x2", Kind.RESERVED),
        ("1G$4G", Kind.RESERVED),
        ("1G!4G", Kind.PMEM),
        ("1G%4G+12", Kind.PMEM),
        ("1G%4G-1+0xefffffff", Kind.SOFT),
        ("1G@4G", Kind.RAM),
        ("1G#4G", Kind.OTHER),
        ("1G%4G+1", Kind.RAM),
        ("0x40000000%0x100000000", Kind.REMOVED),
    ],
)
def test_kinds_of_memmap(text: str, kind: Kind) -> None:
    parameter = f"memmap={text}"
    assert reservations(f"quiet {parameter} ro") == [
        Reservation(PhysAddr(4 * G), PhysAddr(5 * G), kind, parameter)
    ]


@pytest.mark.parametrize(
    "text",
    ["exactmap", "1G", "", "%1G", "x%1G", "1G%1G-x", "1G%1G-2", "1G%1G-2+3", "0%1G", "1G%y"],
)
def test_memmap_that_reserves_nothing(text: str) -> None:
    assert reservations(f"memmap={text}") == []


def pieces(line: str, start: int, end: int) -> list[tuple[int, int, Kind | None]]:
    found = coverage(line, PhysAddr(start), PhysAddr(end), NEWEST)
    return [(p.start, p.end, p.reservation and p.reservation.kind) for p in found]


def test_several_words_together() -> None:
    line = "memmap=1G%4G,512M$4G memmap=256M@4G -- memmap=8G%4G"
    assert pieces(line, 4 * G - 2 * M, 5 * G + 2 * M) == [
        (4 * G - 2 * M, 4 * G, None),
        (4 * G, 4 * G + 512 * M, Kind.RESERVED),  # @ does not make RAM of what is reserved
        (4 * G + 512 * M, 5 * G, Kind.REMOVED),
        (5 * G, 5 * G + 2 * M, None),
    ]
    assert pieces("memmap=1G%4G memmap=1G@4G", 4 * G, 5 * G) == [(4 * G, 5 * G, Kind.RAM)]
    assert pieces("memmap=1G$4G memmap=1G%4G", 4 * G, 5 * G) == [(4 * G, 5 * G, Kind.REMOVED)]
    assert pieces("memmap=1G%4G-2", 4 * G, 5 * G) == [(4 * G, 5 * G, None)]


def test_limits_keep_memory_apart_as_well() -> None:
    for line in ("mem=4G", "memmap=4G", "memmap=4GB$8GB", "memmap=exactmap,4G@0"):
        assert pieces(line, 4 * G, 5 * G) == [(4 * G, 5 * G, Kind.REMOVED)], line
    assert pieces("mem=5G memmap=exactmap,6G@0", 4 * G, 5 * G) == [(4 * G, 5 * G, Kind.RAM)]
    piece = coverage("quiet mem=4G", PhysAddr(4 * G), PhysAddr(5 * G))[0]
    assert piece.reservation is not None
    assert piece.reservation.parameter == "mem=4G"
