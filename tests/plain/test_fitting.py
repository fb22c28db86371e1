"""Calls that make a dax device as large as it is: which succeed, and which are the kernel's."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pkernfs.host.sysroot import Host
from pkernfs.plain.caller import Caller
from pkernfs.plain.fitting import Fitting, fitting_of, is_as_large
from pkernfs.plain.seccomp import FALLOCATE, FTRUNCATE, OPEN, Call

MIB = 1 << 20
SIZE = 32 * MIB
KEEP_SIZE, PUNCH = 1, 2
MINUS = (1 << 64) - 4096


@pytest.fixture
def host(tmp_path: Path) -> Host:
    """A machine on which /dev/null is a dax device of 32 MiB."""
    rdev = os.stat("/dev/null").st_rdev
    place = tmp_path / f"sys/dev/char/{os.major(rdev)}:{os.minor(rdev)}"
    place.mkdir(parents=True)
    (place / "size").write_text(f"{SIZE}\n")
    (place / "subsystem").symlink_to("../../bus/dax")
    return Host(str(tmp_path))


def succeeds(host: Host, number: int, *args: int, flags: int = os.O_RDWR) -> bool:
    fd = os.open("/dev/null", flags)
    try:
        wanted = fitting_of(Call(1, os.getpid(), number, (fd, *args)))
        assert wanted is not None
        return is_as_large(Caller(os.getpid()), wanted, host)
    finally:
        os.close(fd)


@pytest.mark.parametrize(
    ("length", "fits"),
    [
        (SIZE, True), (SIZE - 2 * MIB + 1, True), (SIZE - 2 * MIB, False), (SIZE + 1, False),
        (0, False), (MINUS, False),
    ],
)  # fmt: skip
def test_ftruncate(host: Host, length: int, fits: bool) -> None:
    assert succeeds(host, FTRUNCATE, length) is fits


@pytest.mark.parametrize(
    ("mode", "offset", "length", "fits"),
    [
        (0, 0, SIZE, True), (KEEP_SIZE, 4096, MIB, True), (0, MIB, SIZE, False), (0, 0, 0, False),
        (PUNCH | KEEP_SIZE, 0, MIB, False), (0, MINUS, 4096, False), (0, 0, MINUS, False),
    ],
)  # fmt: skip
def test_fallocate(host: Host, mode: int, offset: int, length: int, fits: bool) -> None:
    assert succeeds(host, FALLOCATE, mode, offset, length) is fits


def test_who_may_not_write_is_refused_by_the_kernel(host: Host) -> None:
    assert not succeeds(host, FTRUNCATE, SIZE, flags=os.O_RDONLY)
    assert succeeds(host, FTRUNCATE, SIZE, flags=os.O_WRONLY)


def test_what_is_no_dax_device(host: Host, tmp_path: Path) -> None:
    assert fitting_of(Call(1, 1, OPEN, (0, 0, 0))) is None
    assert not is_as_large(Caller(os.getpid()), Fitting(0, 0, None), Host(str(tmp_path / "none")))
    file = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    assert not is_as_large(Caller(os.getpid()), Fitting(file, 0, None), host)
    os.close(file)
    with pytest.raises(OSError, match="No such file"):
        is_as_large(Caller(os.getpid()), Fitting(file, 0, None), host)
    link = next(Path(host.path("sys/dev/char")).iterdir()) / "subsystem"
    link.unlink()
    assert not succeeds(host, FTRUNCATE, SIZE)
    link.symlink_to("../../bus/mem")
    assert not succeeds(host, FTRUNCATE, SIZE)
