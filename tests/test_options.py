"""Byte counts and mount options: what users may write, and what each of it means."""

from __future__ import annotations

import pytest

from pkernfs.errors import NotSupportedError, UsageError
from pkernfs.options import (
    IGNORED_OPTIONS,
    MOUNT_OPTIONS,
    VFS_OPTIONS,
    format_size,
    parse_mount_options,
    parse_size,
)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0", 0),
        ("4096", 4096),
        ("1K", 1 << 10),
        ("3M", 3 << 20),
        ("1G", 1 << 30),
        ("2t", 2 << 40),
        ("0x200000", 2 << 20),
        ("0X10m", 16 << 20),
        ("1GiB", 1 << 30),
        ("2miB", 2 << 20),
        ("0x10KiB", 16 << 10),
    ],
)
def test_size(text: str, value: int) -> None:
    assert parse_size(text) == value


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (100, "100 bytes"),
        (4096, "4 KiB"),
        (1 << 30, "1 GiB"),
        (3 << 29, "1.5 GiB"),
        (2**40, "1 TiB"),
    ],
)
def test_format_size(size: int, text: str) -> None:
    assert format_size(size) == text


def test_mount_options() -> None:
    given = "rw,dev,suid,noatime,nodev,_netdev,nofail,noauto,user,x-systemd.automount,mkfs"
    expected = {"rw", "suid", "noatime", "nodev", "mkfs"}
    assert set(parse_mount_options([given])) == expected
    assert parse_mount_options(["ro", "phys_base=0x40000000,cache=direct"]) == {
        "ro": True,
        "phys_base": 1 << 30,
        "cache": "direct",
    }
    assert parse_mount_options(["ro,rw"]) == {"rw": True}
    assert parse_mount_options(["", ",defaults,"]) == {}


@pytest.mark.parametrize(
    "text", ["", "-1", "1 G", "1GB", "1iB", "1B", "1gib", "0x", "1e9", "\u0661"]
)
def test_no_size(text: str) -> None:
    with pytest.raises(UsageError, match="bad length: got "):
        parse_size(text, "length")


@pytest.mark.parametrize("text", ["9223372036854775808", "8388608T", "9" * 5000])
def test_too_large_a_size(text: str) -> None:
    assert parse_size("9223372036854775807") == (1 << 63) - 1
    with pytest.raises(UsageError, match=r"expected less than 2\^63"):
        parse_size(text)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("ro,rw", {"rw"}),
        ("rw,ro", {"ro"}),
        ("nodev,dev", {"dev"}),
        ("noatime,atime", {"atime"}),
        ("relatime,norelatime", {"norelatime"}),
    ],
)
def test_the_last_of_two_opposites_wins(given: str, expected: set[str]) -> None:
    assert set(parse_mount_options([given])) == expected
    assert set(parse_mount_options(given.split(","))) == expected


def test_an_option_of_the_vfs_keeps_its_value() -> None:
    assert parse_mount_options(["context=system_u:object_r:x"]) == {
        "context": "system_u:object_r:x"
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bogus", "unknown mount option: bogus"),
        ("ro=1", "bad mount option: got ro=1, expected ro"),
        ("phys_base", "bad mount option: got phys_base, expected phys_base=ADDR"),
        ("phys_base=4097", "bad phys_base: got 4097, expected a multiple of 4096$"),
        (
            "phys_base=0x10000000000000",
            r"bad phys_base: got 0x1.*, expected less than 2\^52$",
        ),
        ("phys_base=here", "bad phys_base: got 'here'"),
        ("cache=none", "bad cache: got 'none', expected auto, direct, page"),
        ("segments=maybe", "bad segments: got 'maybe', expected yes, no"),
        ("segments", r"bad mount option: got segments, expected segments=yes\|no"),
        ("spin=1000001", "bad spin: got 1000001, expected up to 1000000"),
    ],
)
def test_bad_mount_options(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_mount_options(["rw", text])


def test_remount_is_refused() -> None:
    with pytest.raises(NotSupportedError, match="cannot remount"):
        parse_mount_options(["remount,ro"])


def test_an_option_is_somebodys_alone() -> None:
    """Of pkernfs itself, of the VFS or of mount(8)."""
    ours = {option.name for option in MOUNT_OPTIONS}
    assert len(ours) == len(MOUNT_OPTIONS)
    assert not ours & VFS_OPTIONS
    assert not ours & IGNORED_OPTIONS
    assert not VFS_OPTIONS & IGNORED_OPTIONS
