"""The kernel's command line: numbers, words, pkernfs=."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pkernfs.host.cmdline import (
    Named,
    format_number,
    hides_dax,
    named_regions,
    parse_number,
    quoted_words,
    spares_dax,
    values,
    with_words,
    words,
)

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
    assert values("intel-iommu=on x-y=-z", "intel_iommu") == ["on"]
    assert values("intel-iommu=on x-y=-z", "x_y") == ["-z"]
    assert quoted_words('a="3 4"  -- b') == ['a="3 4"', "--", "b"]


def test_more_parameters_are_the_kernels() -> None:
    assert with_words("quiet", ["x", "y"]) == "quiet x y"
    assert with_words("quiet -- single", ["x"]) == "quiet x -- single"
    assert with_words("", []) == ""


def test_what_keeps_dax_devices_from_the_kernel() -> None:
    line = "modprobe.blacklist=a,kmem module_blacklist=b dax.region_idle=1 kmem"
    assert spares_dax(line) == ["modprobe.blacklist=a,kmem"]
    # parameq() of the kernel, underscores() of kmod for a module's name.
    assert spares_dax("dax-hmem.region_idle=1") == ["dax-hmem.region_idle=1"]
    assert spares_dax("module-blacklist=kmem") == ["module-blacklist=kmem"]
    assert spares_dax("dax_hmem.region_idle=n dax_hmem.region_idle") == ["dax_hmem.region_idle"]
    assert spares_dax("dax_hmem.region_idle=0") == []
    assert spares_dax("quiet") == []


def test_of_several_parameters_the_last_one_counts() -> None:
    """But modprobe takes all that it is told not to load."""
    assert spares_dax("dax_hmem.region_idle dax_hmem.region_idle=n") == []
    assert spares_dax("dax_hmem.region_idle dax-hmem.region-idle=n") == []
    assert spares_dax("module_blacklist=kmem module_blacklist=floppy") == []
    assert spares_dax("module_blacklist=kmem module-blacklist=floppy") == []
    both = "modprobe.blacklist=kmem modprobe.blacklist=floppy"
    assert spares_dax(both) == ["modprobe.blacklist=kmem"]


def test_what_leaves_no_dax_device() -> None:
    for word in ("device_hmem.disable", "device-hmem.disable=y", "device_hmem.disable=1",
                 "modprobe.blacklist=x,dax-hmem",
                 "module_blacklist=device_dax"):  # fmt: skip
        assert hides_dax(f"quiet {word} ro") == word
    for line in (
        "device_hmem.disable=0",
        "device_hmem.disable=1 device_hmem.disable=n",
        "module_blacklist=device_dax module_blacklist=a",
        "modprobe.blacklist=kmem",
    ):
        assert hides_dax(line) is None
