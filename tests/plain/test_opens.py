"""What a call asks for, of all three kinds; and which ones are the kernel's."""

from __future__ import annotations

import os
import struct

import pytest

from pkernfs.plain.opens import AT_FDCWD, RESOLVE_BENEATH, Opening, opening_of
from pkernfs.plain.seccomp import OPEN, OPENAT, OPENAT2, Call

PATH = 0x7FFF_0000_1000
RESOLVE_CACHED = 32


def decode(number: int, *args: int, memory: bytes = b"") -> Opening | None:
    """Decode a call of a process with that memory at each address."""
    return opening_of(Call(1, 2, number, args), lambda _address, length: memory[:length])


def decode_how(flags: int, mode: int = 0, resolve: int = 0, size: int = 24) -> Opening | None:
    """Decode an openat2."""
    how = struct.pack("QQQ", flags, mode, resolve)
    return decode(OPENAT2, 0xFFFFFF9C, PATH, 1, size, memory=how)


def test_the_three_calls_mean_the_same() -> None:
    flags = os.O_RDWR | os.O_CLOEXEC
    expected = Opening(AT_FDCWD, PATH, flags)
    # A register's upper half is no part of an int.
    assert decode(OPEN, PATH, 0xABCD << 32 | flags, 0o644) == expected
    assert decode(OPENAT, 0x1234_FFFF_FF9C, PATH, flags, 0) == expected
    assert decode_how(flags) == expected
    assert decode(OPENAT, 7, PATH, flags, 0) == Opening(7, PATH, flags)


def test_openat2_has_more_to_say() -> None:
    found = decode_how(os.O_RDONLY, resolve=RESOLVE_BENEATH)
    assert found == Opening(AT_FDCWD, PATH, 0, RESOLVE_BENEATH)
    assert decode_how(os.O_RDWR | os.O_CREAT, mode=0o600) is not None
    assert decode_how(os.O_RDWR, mode=0o600) is None, "EINVAL"
    assert decode_how(os.O_RDWR, resolve=RESOLVE_CACHED) is None
    assert decode_how(os.O_RDWR, resolve=1 << 40) is None
    assert decode_how(os.O_RDWR | 1 << 40) is None, "EINVAL"
    assert decode_how(os.O_RDWR, size=32) is None, "of a later kernel"
    assert decode(OPENAT2, 0, PATH, 1, 24, memory=b"short") is None


@pytest.mark.parametrize(
    "flags",
    [
        os.O_PATH,
        os.O_DIRECTORY,
        os.O_TMPFILE | os.O_RDWR,
        os.O_RDWR | os.O_TRUNC,
        os.O_RDWR | os.O_CREAT | os.O_EXCL,
        os.O_RDWR | os.O_WRONLY,
        os.O_RDWR | 1 << 30,
    ],
)
def test_the_kernels_flags(flags: int) -> None:
    assert decode(OPEN, PATH, flags, 0) is None
    assert decode_how(flags) is None


def test_other_calls_are_none() -> None:
    assert decode(0, 0, PATH, 1) is None


@pytest.mark.parametrize(
    ("flags", "access"),
    [
        (os.O_RDONLY, os.R_OK),
        (os.O_WRONLY | os.O_APPEND, os.W_OK),
        (os.O_RDWR | os.O_SYNC, os.R_OK | os.W_OK),
    ],
)
def test_the_access_mode_is_the_right_that_is_needed(flags: int, access: int) -> None:
    assert Opening(AT_FDCWD, PATH, flags).access == access
