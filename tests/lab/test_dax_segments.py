"""A file system with segments on device-dax: made, used, and found again after a kexec.

A thousand of them: the mount takes their memory, and the devices are made behind it.
"""

from __future__ import annotations

import json
import mmap
import os
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from guestlab import counter, qemu
from guestlab.machine import QEMU
from kexeclab.guest import Guest
from kexeclab.runner import Lab
from pagecache import cached_pages
from pkernfs.control.mounts import beneath
from pkernfs.dma.mount import mount_filesystem
from pkernfs.fs.placement import open_region
from pkernfs.fs.segment_table import SegmentTable
from pkernfs.fs.segments import Segments
from pkernfs.host.iomem import Span
from pkernfs.host.sysroot import HOST
from pkernfs.layout import POOL_DAX, ROOT_INO
from pkernfs.pool.dax import DaxPool
from pkernfs.pool.pool import Segment
from pkernfs.quantities import Ino, PhysAddr
from pkernfs.region.dax import bind, device_names, read_device
from pkernfs.region.dax_making import add_piece, create, delete, set_size, unbind
from support.counting_guests import count_at, counting
from support.lab.mapped import Mapped
from support.waiting import until

pytestmark = pytest.mark.lab

M = 1 << 20
MOUNT = Path("/mnt/pkernfs")
DEVICE = "/dev/dax0.0"
FIRST, SIZE = 4096 * M, 2560 * M  # the soft-reserved memory
MANY = 1000
NAME = "dax0.9"  # of this kernel
OWNER = 1003  # of guests
RAM_BYTES = 16 * M
SECONDS = 120.0  # on a machine that is busy; a guest without KVM below one without


def mount(guest: Guest, *options: str) -> str:
    """Mount it; what the mount said."""
    guest.run("modprobe", "-a", "dax_hmem", "device_dax")
    MOUNT.mkdir(parents=True, exist_ok=True)
    words = ",".join(["allow_other", *options])
    return guest.run("mount", "-t", "fuse.pkernfs", DEVICE, str(MOUNT), "-o", words, seconds=120)


def native(guest: Guest, file: Path) -> str:
    return guest.run("pkernfs", "path", str(file)).strip()


def owner_of(path: str) -> tuple[int, int]:
    info = os.stat(path)
    return info.st_uid, info.st_mode & 0o777


def open_by_name(guest: Guest, file: Path, uid: int, word: bytes) -> None:
    """Its owner maps a native file by its name and stores a word; another user may not open it."""
    info = file.stat()
    node = Path(native(guest, file))
    assert stat.S_ISCHR(info.st_mode)
    assert info.st_rdev == node.stat().st_rdev
    assert (info.st_uid, info.st_mode & 0o777) == (uid, 0o600)
    done = as_user(uid, file, word)
    assert done.returncode == 0, done.stderr
    assert "PermissionError" in as_user(uid + 1, file, word).stderr
    below_exec(guest, file)
    start = piece_of(guest, file)
    with open("/dev/mem", "rb") as memory:
        memory.seek(start + 5 * M)
        assert memory.read(len(word)) == word


def below_exec(guest: Guest, file: Path) -> None:
    """A program that sizes its memory before it maps it takes a device for a file."""
    code = (
        "import os, sys; fd = os.open(sys.argv[1], os.O_RDWR)\n"
        f"os.ftruncate(fd, {48 * M}); os.posix_fallocate(fd, 0, {48 * M})\n"
        "try: os.ftruncate(fd, 1 << 20)\n"
        "except OSError as e: print(e.strerror)"
    )
    said = guest.run("pkernfs", "exec", "--", sys.executable, "-c", code, str(file))
    assert said.strip() == "Invalid argument"


def as_user(uid: int, file: Path, word: bytes) -> subprocess.CompletedProcess[str]:
    code = (
        "import mmap, os, sys; fd = os.open(sys.argv[1], os.O_RDWR)\n"
        f"memory = mmap.mmap(fd, {48 * M}); at = {5 * M}; word = sys.argv[2].encode()\n"
        "memory[at : at + len(word)] = word"
    )
    return subprocess.run(
        [sys.executable, "-c", code, str(file), word.decode()],
        user=uid, group=1000, extra_groups=[], capture_output=True, text=True, check=False,
    )  # fmt: skip


def piece_of(guest: Guest, file: Path) -> int:
    """Where the memory of a file begins."""
    extents = json.loads(guest.run("pkernfs", "extents", str(file), "--json"))["extents"]
    return int(extents[0]["physical"])


def use(guest: Guest) -> None:
    """Two owners' files get devices of their own; what a program stores there the mount reads."""
    guest.run("modprobe", "-a", "dax_hmem", "device_dax")
    guest.run("mkfs.pkernfs", "-s", "64M", DEVICE)
    mount(guest)
    for number, word in enumerate((b"first", b"other"), 1):
        file = MOUNT / f"ram{number}"
        file.touch(0o600)
        os.chown(file, 1000 + number, 1000)
        os.truncate(file, 32 * M)
        path = native(guest, file)
        assert owner_of(path) == (1000 + number, 0o600)
        fd = os.open(path, os.O_RDWR)
        with mmap.mmap(fd, 32 * M) as memory:
            memory[4 * M : 4 * M + 5] = word
            with file.open("rb") as opened:
                assert os.pread(opened.fileno(), 5, 4 * M) == word
            assert "busy" in guest.run("truncate", "-s", "16M", str(file), status=1)
        os.close(fd)
    measure(guest, native(guest, MOUNT / "ram1"))
    with guest.step("guests by plain path, in all"):
        run_guests(guest)
    os.truncate(MOUNT / "ram2", 48 * M)
    be_native(guest, MOUNT / "ram2")
    assert "busy" in guest.run("umount", str(MOUNT), status=32)
    guest.run("umount", "-R", str(MOUNT))
    guest.run("fsck.pkernfs", "-n", DEVICE)
    mount(guest)  # and so it is when the kexec comes: nothing is unmounted
    guest.kexec()


def be_native(guest: Guest, file: Path) -> None:
    """A file becomes a device and a file again; who has it open is named."""
    with file.open("rb"):
        said = guest.run("pkernfs", "native", str(file), "on", status=1)
        assert f"process {os.getpid()} " in said
    for way in ("on", "off", "on"):
        guest.run("pkernfs", "native", str(file), way)
        assert stat.S_ISCHR(file.stat().st_mode) == (way == "on")
    open_by_name(guest, file, 1002, b"native")
    with pytest.raises(OSError, match="Invalid argument"):
        os.truncate(file, 32 * M)
    with file.open("rb", buffering=0):
        said = guest.run("pkernfs", "native", str(file), "off", status=1)
        assert f"process {os.getpid()} " in said


def hand_over(guest: Guest) -> None:
    """With digests of both files; then somebody changes a byte of one behind everybody's back."""
    guest.run("modprobe", "-a", "dax_hmem", "device_dax")
    with timed(guest, "the base is put back"):
        open_region(DEVICE, write=False).close()
    mount(guest)
    guest.load()
    with guest.step("handover"):
        done = json.loads(guest.run("pkernfs", "handover", "--digest", "--json", str(MOUNT)))
    assert (done["digest_bytes"], done["not_digested"]) == (80 * M, 0)
    fd = os.open(native(guest, MOUNT / "ram2"), os.O_RDWR)
    with mmap.mmap(fd, 48 * M) as memory:
        memory[21 * M] ^= 1
    guest.execute()


def compare(guest: Guest) -> None:
    """The mount names that file and its 2 MiB, and nothing else; all is there."""
    said = mount(guest, "verify")
    assert "after handover 1" in said
    assert [line.split(": ", 2)[2] for line in said.splitlines() if "changed" in line] == [
        "changed since the handover: /ram2: bytes 0x1400000..0x1600000"
    ]
    assert "lost" not in said
    guest.run("umount", "-R", str(MOUNT))
    find_again(guest)


def cached() -> int:
    """The page cache, in KiB."""
    text = Path("/proc/meminfo").read_text()
    return int(text.split("\nCached:")[1].split()[0])


def measure(guest: Guest, path: str) -> None:
    """A segment beside a plain device of the same region, in turns, and the page cache."""
    region = read_device("dax0.0", HOST).region
    other = create(region, "test", HOST)
    add_piece(other, Span(PhysAddr(FIRST + SIZE - 32 * M), 32 * M), "test", HOST)
    bind(read_device(other, HOST), HOST)
    before = cached()
    with open(path, "r+b") as one, open(f"/dev/{other}", "r+b") as two:
        seconds: list[dict[str, list[float]]] = [{}, {}]
        for turn in range(18):
            fd = (one, two)[turn % 2].fileno()
            with mmap.mmap(fd, 32 * M) as memory:
                for name, work in WORKS.items():
                    start = time.monotonic()
                    work(memory)
                    seconds[turn % 2].setdefault(name, []).append(time.monotonic() - start)
    for name in WORKS:
        ratio = min(seconds[1][name]) / min(seconds[0][name])
        guest.figure(f"{name} in a segment, speed over a plain device", ratio)
    guest.figure("page cache beyond that before", cached() - before, "KiB")
    unbind(other, HOST)
    set_size(other, 0, "test", HOST)
    delete(other, region, HOST)


def touch(memory: mmap.mmap) -> None:
    memory[16 * M :] = bytes(16 * M)


def copy(memory: mmap.mmap) -> None:
    memory.move(24 * M, 16 * M, 8 * M)


def random_words(memory: mmap.mmap) -> None:
    words, at = memoryview(memory).cast("Q"), 1
    for _ in range(20000):
        at = at * 1103515245 + 12345 & M - 1
        words[2 * M + at] ^= at
    words.release()


WORKS = {"first touch": touch, "second touch": touch, "copy": copy, "random words": random_words}


def run_guests(guest: Guest) -> None:
    """Guests of the QEMUs of Debian 12 and 13: their memory is a file of their user's, by its path.

    Once the file is native, and once QEMU runs below pkernfs exec.
    """
    file = MOUNT / "guest"
    file.touch(0o600)
    os.chown(file, OWNER, OWNER)
    os.truncate(file, RAM_BYTES)
    for major, path in ((7, guest.disk("qemu-7.2") / QEMU), (10, Path(f"/usr/bin/{QEMU}"))):
        assert qemu.version(path)[0] == major
        guest.run("pkernfs", "native", str(file), "on")
        run_one(guest, f"QEMU {major} on a native file", path, file)
        if major == 7:
            needs_to_be_aligned(path, file)
        guest.run("pkernfs", "native", str(file), "off")
        run_one(guest, f"QEMU {major} below pkernfs exec", path, file, "pkernfs", "exec", "--")
    file.unlink()


def run_one(guest: Guest, name: str, path: Path, file: Path, *below: str) -> None:
    """What it stores is in read() of the mount and in physical memory at once, in no page cache."""
    with (
        tempfile.TemporaryDirectory() as directory,
        Mapped(Path("/dev/mem"), RAM_BYTES, piece_of(guest, file)) as memory,
        beneath(str(file)) as ram,
        open(ram, "rb", buffering=0) as opened,
        guest.step(name),
    ):
        os.chown(directory, OWNER, OWNER)
        disk = Path(directory) / "disk"
        before = cached_pages(opened.fileno())
        with counting(path, by_plain_path(file, "align=2M"), disk, OWNER, below):
            counts = seen_at_once(Path(ram), memory)
            growth = cached_pages(opened.fileno()) - before
        guest.log(f"{name}: in memory, by read(), and again: {counts}")
        guest.figure(f"page cache of {name}", growth, "pages")
        assert growth == before == 0
        numbers = counter.numbers(Path(f"{disk}.serial").read_text())
        assert numbers == list(range(1, len(numbers) + 1))


def by_plain_path(file: Path, *more: str) -> list[str]:
    """The options of a guest's memory, and what device-dax wants besides."""
    ram = f"memory-backend-file,id=pc.ram,size={RAM_BYTES},mem-path={file},share=on"
    return ["-M", "pc,memory-backend=pc.ram", "-object", ",".join([ram, *more])]


def seen_at_once(ram: Path, memory: Mapped) -> list[int]:
    """The guest's count as memory and read() have it in turns: neither is ever behind."""

    def in_memory() -> int:
        return memory.word(counter.COUNT_ADDRESS)

    until("the guest counts", lambda: in_memory() > 20, SECONDS)
    counts = [in_memory(), count_at(ram), in_memory(), count_at(ram)]
    assert counts == sorted(counts)
    until("read() has later numbers", lambda: count_at(ram) >= counts[-1] + 10, SECONDS)
    assert in_memory() >= counts[-1] + 10
    return counts


def needs_to_be_aligned(path: Path, file: Path) -> None:
    """Where QEMU does not know how a device has to be mapped, it says what the kernel says."""
    command = [str(path), "-nodefaults", "-display", "none", *by_plain_path(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=SECONDS)
    assert "unable to map backing store for guest RAM: Invalid argument" in done.stderr


def make_many() -> None:
    """A thousand rows whose devices are not there, as after a kexec."""
    region = open_region(DEVICE, write=True)
    fs = mount_filesystem(region)
    table, pool = fs.segments.table, fs.segments.pool
    assert pool is not None
    wanted = Segment(table.new_number(), Ino(0), POOL_DAX, MANY * 2 * M)
    planned = pool.plan(wanted, list(table.rows.values()))
    assert len(planned.pieces) == 1
    directory = fs.mkdir(ROOT_INO, b"many", 0o755, 0, 0).ino
    for at in range(MANY):
        ino = fs.create(directory, b"%d" % at, stat.S_IFREG | 0o600, 0, 0).ino
        piece = Span(PhysAddr(planned.pieces[0].start + at * 2 * M), 2 * M)
        row = planned._replace(
            number=table.new_number(),
            ino=ino,
            length=2 * M,
            valid=2 * M,
            pieces=(piece,),
            name=NAME,
        )
        inode = fs.inode(ino)
        with fs.super.store:
            table.add(row)
            inode.size = row.length
            fs.segments.become(inode, row)
    fs.unmount()
    region.close()


@contextmanager
def timed(guest: Guest, what: str) -> Iterator[None]:
    start = time.monotonic()
    yield
    guest.figure(what, time.monotonic() - start, "s")


def clocked(function: Callable[..., Any], took: dict[str, float]) -> Callable[..., Any]:
    def call(*args: Any, **words: Any) -> Any:
        start = time.monotonic()
        try:
            return function(*args, **words)
        finally:
            took[function.__name__] = time.monotonic() - start

    return call


def park(guest: Guest) -> None:
    """What a mount does with a thousand segments, by its parts; then it is killed."""
    region = open_region(DEVICE, write=True)
    took: dict[str, float] = {}
    with pytest.MonkeyPatch.context() as patched, timed(guest, "the file system is opened"):
        for owner, name in ((SegmentTable, "__init__"), (Segments, "restore"), (DaxPool, "park")):
            patched.setattr(owner, name, clocked(getattr(owner, name), took))
        fs = mount_filesystem(region, park=True)
    guest.figure("of that, rows read", took["__init__"], "s")
    guest.figure("of that, memory taken", took["park"], "s")
    guest.figure("of that, files checked and the rest", took["restore"] - took["park"], "s")
    beyond = took["__init__"] + took["restore"]
    guest.figure(f"{MANY} segments, beyond start-up", beyond, "s")
    assert len(fs.segments.absent) == MANY
    assert not fs.segments.lost
    start = time.monotonic()
    for number in list(fs.segments.absent)[:20]:
        fs.segments.turns.run(lambda number=number: fs.segments.bring(number))  # type: ignore[misc]
    guest.figure("each device made later", (time.monotonic() - start) * 50, "ms")
    fs.segments.close()
    region.close()


def find_again(guest: Guest) -> None:
    """Every device is made again at its own memory, and is its owner's."""
    mount(guest)
    for number, word, size in ((1, b"first", 32 * M), (2, b"other", 48 * M)):
        file = MOUNT / f"ram{number}"
        if number == 2:
            open_by_name(guest, file, 1002, b"again")
            guest.run("pkernfs", "native", str(file), "off")
        assert file.stat().st_size == size
        path = native(guest, file)
        assert owner_of(path) == (1000 + number, 0o600)
        with file.open("rb") as opened:
            assert os.pread(opened.fileno(), 5, 4 * M) == word
            assert os.pread(opened.fileno(), 5, size - 5) == bytes(5)
        file.unlink()
    guest.run("umount", str(MOUNT))
    guest.run("fsck.pkernfs", "-n", DEVICE)
    many(guest)


def many(guest: Guest) -> None:
    """A thousand that have no device yet: a mount that was killed, and one that serves."""
    make_many()
    park(guest)
    with timed(guest, "mount, with all start-up"):
        mount(guest)
    start = time.monotonic()
    for number in (0, MANY // 2):
        with timed(guest, "read of one that is not there yet"):
            assert len((MOUNT / "many" / str(number)).read_bytes()) == 2 * M
    until("others are made", lambda: len(device_names(HOST)) > 100, 120, every=0.1)
    guest.figure("100 devices made while others are served", time.monotonic() - start, "s")
    [daemon] = guest.run("pgrep", "-x", "pkernfs").split()
    os.kill(int(daemon), signal.SIGKILL)
    guest.run("umount", str(MOUNT))


@pytest.mark.parametrize("kernel", ["6.12"])
def test_dax_segments(lab: Lab, kernel: str) -> None:
    """A file system with segments on device-dax, over a kexec in the midst of its use, and another
    one after a handover with digests.
    """
    machine: Any = lab.machine(
        kernel=kernel,
        memory=7168,
        cmdline=[
            "memmap=2560M%4G-1+0xefffffff",
            "modprobe.blacklist=kmem",
            "pkernfs=/dev/dax0.0",
            "iomem=relaxed",
        ],
        qemus=["7.2"],
    )
    lab.run(use, hand_over, compare, machine=machine, seconds=420)
