"""QEMU as a client of real mounts: guests whose memory is a file's own, on each QEMU there is."""

from __future__ import annotations

import contextlib
import errno
import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from guestlab import counter
from pagecache import cached_pages
from support.counting_guests import count_at, counting, ring_in
from support.huge_pages import free_pages
from support.mounted_pool import MountedPool, huge_pool, tmpfs
from support.mounting import MIB, run_pkernfs, wait_until
from support.passthrough import needs_passthrough

pytestmark = [pytest.mark.vm, pytest.mark.fuse]

RAM_BYTES = 32 * MIB
HUGE_RAM_BYTES = 16 * MIB
#: Below the legacy hole, where firmware lies over the memory.
LOW_BYTES = 640 << 10


@pytest.fixture(params=["installed", "new"])
def qemu(request: pytest.FixtureRequest) -> Path:
    """The QEMU that this host has, and one that is 8.2 or later, if that is another one."""
    installed = Path(shutil.which("qemu-system-x86_64") or "")
    if request.param == "installed":
        return installed
    new: Path = request.getfixturevalue("new_qemu")
    if new == installed:
        pytest.skip("the installed one is new")
    return new


@pytest.fixture
def pooled() -> Iterator[MountedPool]:
    """A mount with a pool on a tmpfs that nobody else uses; fsck finds it clean in the end."""
    needs_passthrough()
    with tmpfs() as memory, MountedPool(place=memory) as mounted:
        yield mounted


def by_plain_path(ram: Path, size: int = RAM_BYTES) -> list[str]:
    """The line of the kernel's pkernfs: nothing in it knows of pkernfs but the path."""
    return [
        "-object", f"memory-backend-file,id=pc.ram,size={size},mem-path={ram},share=on",
        "-M", "q35,memory-backend=pc.ram",
    ]  # fmt: skip


def free_bytes(directory: Path) -> int:
    """What a file system has left."""
    found = os.statvfs(directory)
    return found.f_bfree * found.f_frsize


def assert_seen_at_once(ram: Path, memory: Path) -> int:
    """What the guest stores is seen by read() on the mount and in ``memory``; return its count."""
    wait_until(lambda: count_at(memory) > 20, "the guest counts")
    counts = [count_at(place) for place in (memory, ram, memory, ram)]
    assert counts == sorted(counts)
    wait_until(lambda: count_at(ram) >= counts[-1] + 10, "read() shows later numbers")
    assert count_at(memory) >= counts[-1] + 10
    return counts[-1]


def test_by_the_plain_path(qemu: Path, pooled: MountedPool, tmp_path: Path) -> None:
    """Its stores are in the segment, and no page cache of the mount; the next QEMU finds them."""
    ram = pooled.file("guest-ram", RAM_BYTES)
    memory = pooled.pool / "segment-1"
    with ram.open("rb") as file, memory.open("rb") as own:
        with counting(qemu, by_plain_path(ram), tmp_path / "disk"):
            last = assert_seen_at_once(ram, memory)
            seen, there = cached_pages(file.fileno()), cached_pages(own.fileno())
            print(f"{qemu}: page cache: {seen} pages of guest-ram, {there} of its segment")
            assert (seen, there > 0) == (0, True)
        assert cached_pages(file.fileno()) == 0
    found = ram.read_bytes()
    assert found == memory.read_bytes()
    assert ring_in(found)[1:last] == list(range(1, last))
    in_next = tmp_path / "in-next"
    ask_next_qemu(qemu, by_plain_path(ram), f'pmemsave 0 {LOW_BYTES} "{in_next}"')
    assert in_next.read_bytes() == found[:LOW_BYTES]


def ask_next_qemu(qemu: Path, machine: list[str], question: str) -> None:
    """Ask the monitor of a QEMU whose guest runs not a single instruction."""
    command = [str(qemu), "-nodefaults", "-display", "none", *machine, "-S", "-monitor", "stdio"]
    typed = f"{question}\nquit\n"
    subprocess.run(command, input=typed, text=True, capture_output=True, check=True, timeout=20)


def assert_kept_from(mounted: MountedPool, ram: Path) -> None:
    """A file that somebody maps is not shrunk, also not by a handle that can write."""
    with ram.open("r+b") as file:
        for target, size in ((ram, 2 * MIB), (file.fileno(), 0)):
            with pytest.raises(OSError, match="busy") as refusal:
                os.truncate(target, size)
            assert refusal.value.errno == errno.EBUSY
    assert (mounted.pool / "segment-1").stat().st_size == ram.stat().st_size == RAM_BYTES


def test_the_daemon_is_killed_under_a_guest(
    qemu: Path, pooled: MountedPool, tmp_path: Path
) -> None:
    """The guest goes on; nobody takes its memory away, neither the old daemon nor the next one."""
    ram = pooled.file("guest-ram", RAM_BYTES)
    disk = tmp_path / "disk"
    with counting(qemu, by_plain_path(ram), disk) as process:
        assert_seen_at_once(ram, pooled.pool / "segment-1")
        assert_kept_from(pooled, ram)
        pooled.kill()
        assert f"process {process.pid} (" in pooled.words()
        goes_on(disk)
        pooled.start()
        assert_seen_at_once(ram, pooled.pool / "segment-1")
        assert_kept_from(pooled, ram)
        touched = (pooled.pool / "segment-1").stat().st_blocks * 512
        before = free_bytes(pooled.pool)
        ram.unlink()
        pooled.wait_until_gone(pooled.pool / "segment-1")
        goes_on(disk)
        assert free_bytes(pooled.pool) < before + touched // 2
    wait_until(lambda: free_bytes(pooled.pool) > before + touched // 2, "its memory is free")
    assert f"process {process.pid} (" in pooled.ended()


def goes_on(disk: Path) -> None:
    """The guest counts on, in a register and in its memory, none missing; else it would say so."""
    serial = Path(f"{disk}.serial")
    before = counter.numbers(serial.read_text())
    wait_until(
        lambda: len(counter.numbers(serial.read_text())) > len(before) + 20, "the guest goes on"
    )
    numbers = counter.numbers(serial.read_text())
    assert numbers == list(range(1, len(numbers) + 1))


@pytest.mark.parametrize("kind", ["huge", "tmpfs"])
def test_by_the_plain_path_of_a_native_file(qemu: Path, tmp_path: Path, kind: str) -> None:
    """On every kernel and on huge pages: the guest's memory is the segment, and has no copy."""
    with contextlib.ExitStack() as stack:
        if kind == "huge":
            mounted = stack.enter_context(huge_pool(HUGE_RAM_BYTES))
        else:
            mounted = stack.enter_context(MountedPool(place=stack.enter_context(tmpfs())))
        ram = mounted.file("guest-ram", HUGE_RAM_BYTES)
        memory = mounted.pool / "segment-1"
        with ram.open("rb") as below:
            before = cached_pages(below.fileno())
        assert run_pkernfs("native", str(ram), "on").returncode == 0
        with counting(qemu, by_plain_path(ram, HUGE_RAM_BYTES), tmp_path / "disk") as process:
            assert_seen_at_once(ram, memory)
            said = run_pkernfs("native", str(ram), "off").stderr
            assert f"process {process.pid} (" in said
            goes_on(tmp_path / "disk")
        assert run_pkernfs("native", str(ram), "off").returncode == 0
        with ram.open("rb") as below:
            after = cached_pages(below.fileno())
            assert below.read() == memory.read_bytes()
        print(f"{qemu}: page cache of guest-ram on {kind}: {after - before} pages more")
        assert after == before == 0


def test_in_huge_pages(qemu: Path, tmp_path: Path) -> None:
    """By the path of the segment itself: the kernel passes no mapping through to huge pages."""
    with huge_pool(HUGE_RAM_BYTES) as mounted:
        before = free_pages()
        ram = mounted.file("guest-ram", HUGE_RAM_BYTES)
        memory = mounted.pool / "segment-1"
        line = run_pkernfs("qemu-args", "--qemu", str(qemu), str(ram))
        assert "offset" not in line.stdout, line.stderr
        with counting(qemu, ["-M", "q35", *shlex.split(line.stdout)], tmp_path / "disk"):
            assert_seen_at_once(ram, memory)
            ram.unlink()
            mounted.wait_until_gone(memory)
            goes_on(tmp_path / "disk")
            assert free_pages() < before
        wait_until(lambda: free_pages() == before, "the huge pages are the host's again")
