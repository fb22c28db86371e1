"""Locks on physical memory: one namespace by address, between processes, whatever the device."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from pkernfs.errors import LockedError, RegionError
from pkernfs.host.iomem import Span
from pkernfs.host.sysroot import Host
from pkernfs.quantities import PhysAddr
from pkernfs.region import locks
from support.made_up_host import make_machine

M = 1 << 20
G = PhysAddr(1 << 30)

HOLDER = """
import sys
from pkernfs.host.sysroot import Host
from pkernfs.host.iomem import Span
from pkernfs.region.locks import lock_physical
spans = [Span(int(a), int(b)) for a, b in (w.split("+") for w in sys.argv[3:])]
lock = lock_physical("theirs", spans, Host(sys.argv[1]), exclusive=sys.argv[2] != "r")
if sys.argv[2] == "s":
    lock.serving(True)
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return make_machine(tmp_path)


def holder(host: Host, mode: str, *spans: Span) -> subprocess.Popen[str]:
    """Another process with a lock: mode r, w, or s for one that serves; ends with its stdin."""
    words = [f"{span.start}+{span.size}" for span in spans]
    command = [sys.executable, "-c", HOLDER, host.root, mode, *words]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    assert process.stdout.readline() == "ready\n"
    return process


def attempt(host: Host, *spans: Span, exclusive: bool = True) -> None:
    lock = locks.lock_physical("ours", list(spans), host, exclusive=exclusive)
    os.close(lock.fd)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(
    ("start", "size", "message"),
    [
        (G, 512 * M, "ours: in use: it is mounted or being checked"),
        (G, G, "ours: in use: it overlaps 512M!1G, which is mounted or being checked"),
        (G + 510 * M, 4 * M, "ours: in use: it overlaps 512M!1G, which is mounted or"),
        (G - 2 * M, 4 * M, "ours: in use: it overlaps 512M!1G, which is mounted or"),
        (G + 8 * M, 2 * M, "ours: in use: it overlaps 512M!1G, which is mounted or"),
    ],
)
def test_overlapping_ranges(start: PhysAddr, size: int, message: str, host: Host) -> None:
    span, free = Span(start, size), Span(PhysAddr(2 * G), 2 * M)
    process = holder(host, "s", Span(G, 512 * M))
    try:
        with pytest.raises(LockedError) as caught:
            attempt(host, free, span)
        assert str(caught.value).startswith(message)
        attempt(host, free)  # what a refused attempt had is free again
    finally:
        process.communicate(timeout=20)
    attempt(host, span)


def test_neighbours_do_not_overlap(host: Host) -> None:
    process = holder(host, "s", Span(G, 512 * M))
    try:
        attempt(host, Span(PhysAddr(G - 2 * M), 2 * M), Span(PhysAddr(G + 512 * M), 2 * M))
    finally:
        process.communicate(timeout=20)


def test_readers_share(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "_CLOSING_WAIT_SECONDS", 0.05)
    process = holder(host, "r", Span(G, 512 * M))
    try:
        attempt(host, Span(G, G), exclusive=False)
        with pytest.raises(LockedError):
            attempt(host, Span(G, G))
    finally:
        process.communicate(timeout=20)


def test_a_contender_waits_for_one_that_is_closing(host: Host) -> None:
    process = holder(host, "w", Span(G, 512 * M))  # not serving
    assert process.stdin
    process.stdin.close()
    attempt(host, Span(G, G))
    process.wait(timeout=20)
    assert process.stdout
    process.stdout.close()


def test_a_contender_waits_a_moment_for_one_that_serves(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "_SERVED_WAIT_SECONDS", 10.0)
    process = holder(host, "s", Span(G, 512 * M))  # unmounted, but does not know yet
    assert process.stdin
    process.stdin.close()
    attempt(host, Span(G, G))
    process.wait(timeout=20)
    assert process.stdout
    process.stdout.close()


@pytest.mark.usefixtures("impatient")
def test_locks_that_come_and_go(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """One descriptor has them all; a part of what it took may be let go."""
    first, second = Span(G, 4 * M), Span(PhysAddr(G + 4 * M), 4 * M)

    def is_free(span: Span) -> bool:
        try:
            held = locks.lock_physical("theirs", [span], host, exclusive=True)
        except LockedError:
            return False
        os.close(held.fd)
        return True

    ours = locks.PhysicalLocks("ours", host, exclusive=True)
    ours.take([first, second])
    ours.take([first])  # again
    assert not is_free(Span(G, 2 * M))
    ours.let_go([first])
    assert is_free(first)
    assert not is_free(second)
    ours.take([first])
    ours.close()
    ours.close()
    assert is_free(first)
    monkeypatch.setattr(locks, "_CLOSING_WAIT_SECONDS", 0.0)
    readers = [locks.PhysicalLocks(who, host, exclusive=False) for who in "ab"]
    for each in readers:
        each.take([first])
    with pytest.raises(LockedError, match="in use"):
        locks.PhysicalLocks("writer", host, exclusive=True).take([second, first])
    assert is_free(second)  # it got none of them
    for each in readers:
        each.close()


def test_where_the_locks_are(host: Host) -> None:
    attempt(host, Span(G, G))
    directory = Path(host.path("run/pkernfs"))
    assert stat.S_IMODE(directory.stat().st_mode) == 0o755
    assert stat.S_IMODE((directory / "physical.lock").stat().st_mode) == 0o600
    directory.chmod(0o777)
    with pytest.raises(RegionError, match="only this user can write to"):
        attempt(host, Span(G, G))
    directory.chmod(0o755)
    (directory / "physical.lock").unlink()
    (directory / "physical.lock").symlink_to("elsewhere")
    with pytest.raises(RegionError, match=r"cannot lock: .*physical.lock: "):
        attempt(host, Span(G, G))
    assert not (directory / "elsewhere").exists()


def test_who_has_it_is_said(host: Host) -> None:
    with holder(host, "s", Span(G, 512 * M)) as other, pytest.raises(LockedError) as caught:
        locks.lock_physical("ours", [Span(G, 2 * M)], host, exclusive=True)
    other.wait()
    says = "ours: in use: it overlaps 512M!1G, which is mounted or being checked: "
    assert str(caught.value) == f"{says}by process {other.pid} (python)"


@pytest.mark.skipif(os.geteuid() != 0, reason="a mount namespace needs root")
def test_the_mount_namespace_is_said_if_it_is_another_one(host: Host, tmp_path: Path) -> None:
    region = tmp_path / "region"
    region.write_bytes(bytes(4096))
    program = (
        "import os, sys\nfrom pkernfs.region.locks import lock_file\n"
        "from support.mounting import own_mount_namespace\nown_mount_namespace()\n"
        "lock = lock_file(os.open(sys.argv[1], os.O_RDWR), 'theirs', exclusive=True)\n"
        "lock.serving(True)\nprint(os.readlink('/proc/self/ns/mnt'), flush=True)\nsys.stdin.read()"
    )
    command = [sys.executable, "-c", program, str(region)]
    tests = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    fd = os.open(region, os.O_RDWR)
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=tests
    ) as other:
        assert other.stdout
        namespace = other.stdout.readline().strip()
        with pytest.raises(LockedError) as caught:
            locks.lock_file(fd, "ours", exclusive=True)
    os.close(fd)
    assert str(caught.value) == (
        f"ours: in use: it is mounted or being checked: by process {other.pid} (python), in the "
        f"mount namespace {namespace}"
    )
