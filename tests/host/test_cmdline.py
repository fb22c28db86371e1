"""The kernel's command line: numbers, memmap=, pkernfs=."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pkernfs.host.cmdline import (
    Kind,
    Named,
    Reservation,
    coverage,
    format_number,
    kaslr_danger,
    named_regions,
    parse_number,
    quoted_words,
    reservations,
    spares_dax,
    values,
    with_words,
    words,
)
from pkernfs.quantities import PhysAddr

G = 1 << 30
M = 1 << 20


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("0", 0),
        ("1G", G),
        ("1g", G),
        ("0x40000000", G),
        ("0X10M", 16 * M),
        ("010", 8),  # octal, as the kernel has it
        ("2T", 2 << 40),
        ("1P", 1 << 50),
        ("1E", 1 << 60),
        ("4096", 4096),
    ],
)
def test_numbers(text: str, number: int) -> None:
    assert parse_number(text) == number


@pytest.mark.parametrize("text", ["", "G", "1GB", "0x", "-1", "+1", "1.5G", "1 G", "08", "\u0661"])
def test_no_numbers(text: str) -> None:
    with pytest.raises(ValueError, match=r"not a number|invalid literal"):
        parse_number(text)


@given(st.integers(0, 1 << 62))
def test_a_number_is_read_as_it_was_written(number: int) -> None:
    assert parse_number(format_number(number)) == number


def test_words() -> None:
    assert words('a=1  "b=2 3" c="4 5"\td -- e memmap=1G%1G') == ["a=1", "b=2 3", "c=4 5", "d"]
    assert words("") == []
    assert words('open="quote') == ["open=quote"]


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
    ["exactmap", "1G", "", "1G%", "%1G", "x%1G", "1G%1G-x", "1G%1G-2", "1G%1G-2+3", "0%1G", "1G%y"],
)
def test_memmap_that_reserves_nothing(text: str) -> None:
    assert reservations(f"memmap={text}") == []


def test_several_in_one_parameter_and_later_ones_win() -> None:
    found = reservations("memmap=1G%4G,512M$4G memmap=256M@4G -- memmap=8G%4G")
    assert [r.kind for r in found] == [Kind.REMOVED, Kind.RESERVED, Kind.RAM]
    pieces = [
        (start, end, None if r is None else r.kind)
        for start, end, r in coverage(found, PhysAddr(4 * G - 2 * M), PhysAddr(5 * G + 2 * M))
    ]
    assert pieces == [
        (4 * G - 2 * M, 4 * G, None),
        (4 * G, 4 * G + 256 * M, Kind.RAM),
        (4 * G + 256 * M, 4 * G + 512 * M, Kind.RESERVED),
        (4 * G + 512 * M, 5 * G, Kind.REMOVED),
        (5 * G, 5 * G + 2 * M, None),
    ]


def test_named_regions() -> None:
    line = "pkernfs=1G!1G quiet pkernfs=b.2:/dev/dax0.0 pkernfs=c-d:2G!8G"
    found = named_regions(line)
    assert found == [
        Named(None, "1G!1G"),
        Named("b.2", "/dev/dax0.0"),
        Named("c-d", "2G!8G"),
    ]
    assert named_regions("quiet") == []


def test_what_is_given_to_a_parameter() -> None:
    assert values('a=1 ab=2 a="3 4" a -- a=5', "a") == ["1", "3 4"]
    assert quoted_words('a="3 4"  -- b') == ['a="3 4"', "--", "b"]


def test_more_parameters_are_the_kernels() -> None:
    assert with_words("quiet", ["x", "y"]) == "quiet x y"
    assert with_words("quiet -- single", ["x"]) == "quiet x -- single"
    assert with_words("", []) == ""


def test_what_keeps_dax_devices_from_the_kernel() -> None:
    line = "modprobe.blacklist=a,kmem module_blacklist=b dax-hmem.region_idle=1 kmem"
    assert spares_dax(line) == ["modprobe.blacklist=a,kmem"]
    assert spares_dax("dax_hmem.region_idle dax_hmem.region_idle=n") == ["dax_hmem.region_idle"]
    assert spares_dax("quiet") == []


@pytest.mark.parametrize(
    ("line", "parameter"),
    [
        ("memmap=2G%1G", "memmap=2G%1G"),
        ("memmap=1G%1G", None),
        ("memmap=2G$1G", None),
        ("memmap=2G%1G nokaslr", None),
        ("memmap=1M%1G,1M%2G,1M%3G,1M%4G,2G%1G", None),
    ],
)
def test_where_kaslr_may_put_the_kernel(line: str, parameter: str | None) -> None:
    assert kaslr_danger(line) == parameter
