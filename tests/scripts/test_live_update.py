"""scripts/live-update without a kexec: a guest goes on after its QEMU, an unmount and a mount.

The same over a real kexec is in tests/lab.
"""

from __future__ import annotations

import errno
import hashlib
import os
import select
import signal
import sys
from collections.abc import Iterator
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType

import pytest

from guestlab import counter
from hugepages import HugePages
from livemount import CommandError, LiveMount, extents, fresh, read_region, run
from support.waiting import until

pytestmark = [pytest.mark.vm, pytest.mark.fuse]

MIB = 1 << 20
REGION_BYTES = 64 * MIB
RAM_BYTES = 16 * MIB
SEGMENT_BYTES = 2 * RAM_BYTES
SCRIPT = Path(__file__).parents[2] / "scripts" / "live-update"
REQUEST_TIMEOUT_SECONDS = 30


@pytest.fixture(params=["tmpfs", "hugetlbfs"])
def live(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[LiveMount]:
    """An empty file system on a region in memory; in the end fsck finds it clean.

    With a slash the region is a directory, with room for segments.
    """
    kind, slash, _ = request.param.partition("/")
    memory = tmp_path / "memory"
    memory.mkdir()
    live = LiveMount(memory / "region", tmp_path / "mnt")
    live.directory.mkdir()
    size = REGION_BYTES + (SEGMENT_BYTES if slash else 0)
    pages = HugePages(size if kind == "hugetlbfs" else 0)
    reason = pages.borrow()
    if reason:
        pytest.skip(f"no huge pages: {reason}")
    try:
        run("mount", "-t", kind, "-o", f"size={size}", "test", str(memory))
        try:
            if slash:
                live.region.mkdir(mode=0o711)
            with fresh(live, REGION_BYTES):
                yield live
        finally:
            run("umount", "-l", str(memory))
    finally:
        pages.give_back()


class Counting:
    """The counting machine of scripts/live-update, in a directory of the mount."""

    def __init__(self, live: LiveMount, qemu: Path, name: str = "vm") -> None:
        self.directory = live.directory / name
        self.serial = self.directory / "serial.log"
        self._qemu = qemu
        self.directory.mkdir()

    def start(self) -> str:
        return self("start", "--size", f"{RAM_BYTES // MIB}M", "--qemu", str(self._qemu))

    def __call__(self, command: str, *options: str) -> str:
        """One run of the script."""
        return run(str(SCRIPT), command, str(self.directory), *options)

    def numbers(self) -> list[int]:
        """Every number written so far; only if the guest was never reset."""
        return counter.numbers(self.serial.read_text()) if self.serial.exists() else []

    def wait_for(self, count: int) -> None:
        """Wait until so many numbers are written."""
        enough = f"{count} numbers"
        until(enough, lambda: len(self.numbers()) >= count, REQUEST_TIMEOUT_SECONDS, every=0.02)

    def end(self) -> None:
        """No QEMU of this machine is left, whatever happened."""
        name = hashlib.sha256(os.fsencode(self.directory.resolve())).hexdigest()[:16]
        pid_file = Path(f"/run/live-update-{name}.pid")
        if pid_file.exists():
            process = os.pidfd_open(int(pid_file.read_text()))
            signal.pidfd_send_signal(process, signal.SIGKILL)
            select.select([process], [], [], REQUEST_TIMEOUT_SECONDS)
            os.close(process)
            pid_file.unlink(missing_ok=True)
        pid_file.with_suffix(".qmp").unlink(missing_ok=True)


@pytest.fixture
def pair(live: LiveMount, new_qemu: Path) -> Iterator[list[Counting]]:
    """Two counting machines that have not been started."""
    both = [Counting(live, new_qemu, name) for name in ("one", "two")]
    try:
        yield both
    finally:
        for vm in both:
            vm.end()


@pytest.fixture
def vm(live: LiveMount, new_qemu: Path) -> Iterator[Counting]:
    """A counting machine that has not been started."""
    vm = Counting(live, new_qemu)
    try:
        yield vm
    finally:
        vm.end()


def fill(directory: Path) -> list[Path]:
    """Files that leave some 64 KiB free: room for the guest's numbers, not for its state."""
    fillers: list[Path] = []
    for size, count in (("1M", 1 << 20), ("64K", 1)):
        full = False
        while not full:
            fillers.append(directory / f"filler.{len(fillers)}")
            words = (f"of={fillers[-1]}", f"bs={size}", f"count={count}", "status=none")
            try:
                run("dd", "if=/dev/zero", *words)
            except CommandError as error:
                if "No space left" not in str(error):
                    raise
                full = True
    for _ in range(2):  # the one that did not fit, and one that did
        fillers.pop().unlink()
    return fillers


def memory_of(live: LiveMount, ram: Path) -> bytes:
    """The bytes of a guest's memory where they are, without the daemon."""
    if live.region.is_dir():
        return Path(run("pkernfs", "path", str(ram)).rstrip("\n")).read_bytes()
    return read_region(live.region, extents(ram), RAM_BYTES)


def word(memory: bytes, address: int) -> int:
    """Four bytes of the guest's memory as a number."""
    return int.from_bytes(memory[address : address + 4], "little")


@pytest.mark.parametrize("live", ["tmpfs", "hugetlbfs", "hugetlbfs/"], indirect=True)
def test_goes_on_after_unmount_and_mount(live: LiveMount, vm: Counting) -> None:
    """Twice: no number is lost or repeated, and the guest was never reset."""
    said = vm.start()
    assert "in all" in said
    vm.wait_for(50)
    for _ in range(2):
        said = vm("save")
        assert "state (" in said
        numbers = vm.numbers()
        assert numbers == list(range(1, len(numbers) + 1))
        live.unmount()
        live.mount()
        memory = memory_of(live, vm.directory / "ram")
        assert memory == (vm.directory / "ram").read_bytes()
        count = word(memory, counter.COUNT_ADDRESS)
        assert count - len(numbers) in (0, 1)  # saved, perhaps, amid writing it
        ring = [word(memory, counter.RING_ADDRESS + 4 * n) for n in range(1, count)]
        assert ring == list(range(1, count))
        said = vm("restore")
        assert "running" in said
        assert not (vm.directory / "state").exists()
        vm.wait_for(len(numbers) + 50)
        numbers = vm.numbers()
        assert numbers == list(range(1, len(numbers) + 1))
    vm("save")


def test_goes_on_after_the_daemons_sigkill(live: LiveMount, vm: Counting) -> None:
    """The daemon is killed under the running guest: its memory does not pass through it."""
    vm.start()
    vm.wait_for(20)
    vm("save")
    saved = len(vm.numbers())
    live.kill_daemon()
    run("umount", str(live.directory))
    live.mount()
    vm("restore")
    vm.wait_for(saved + 20)
    numbers = vm.numbers()
    assert numbers == list(range(1, len(numbers) + 1))
    vm("save")


def test_a_save_that_fails_lets_the_guest_go_on(live: LiveMount, vm: Counting) -> None:
    """No space for the device state: one line, no half of a state, and the numbers go on."""
    vm.start()
    vm.wait_for(10)
    fillers = fill(live.directory)
    with pytest.raises(CommandError, match="live-update: QEMU: state failed"):
        vm("save")
    assert not (vm.directory / "state").exists()
    for filler in fillers:
        filler.unlink()
    vm.wait_for(len(vm.numbers()) + 20)
    vm("save")
    vm("restore")
    vm.wait_for(len(vm.numbers()) + 20)
    vm("save")


def test_a_restore_that_fails_can_be_done_again(live: LiveMount, vm: Counting) -> None:
    """A damaged device state ends QEMU with one line; the right one still works."""
    vm.start()
    vm.wait_for(10)
    vm("save")
    state = vm.directory / "state"
    right = state.read_bytes()
    state.write_bytes(b"QEVM" + bytes(1000))
    with pytest.raises(CommandError, match="state: not restored: QEMU: "):
        vm("restore")
    state.write_bytes(right)
    vm("restore")
    vm.wait_for(len(vm.numbers()) + 20)
    vm("save")


def test_refusals(live: LiveMount, vm: Counting, tmp_path: Path) -> None:
    """In one line each, and nothing is changed."""
    with pytest.raises(CommandError, match="no machine is saved here"):
        vm("restore")
    with pytest.raises(CommandError, match="no QEMU answers"):
        vm("save")
    with pytest.raises(CommandError, match="not on a pkernfs mount"):
        run(str(SCRIPT), "start", str(tmp_path))
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == []
    vm.start()
    before = {path.name: path.stat().st_ctime_ns for path in vm.directory.glob("[!s]*")}
    assert set(before) == {"ram", "boot.img", "vm.json"}
    with pytest.raises(CommandError, match="there is a machine"):
        vm.start()
    assert before == {path.name: path.stat().st_ctime_ns for path in vm.directory.glob("[!s]*")}
    vm.wait_for(10)
    vm("save")


@pytest.mark.parametrize("live", ["tmpfs/"], indirect=True)
def test_several_machines_in_one_run(
    live: LiveMount,
    pair: list[Counting],
    new_qemu: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """They are dealt with at once. If one cannot be saved the other goes on, and it can be later.

    The memory of one has been made before, and is taken as it is. Those go on, too, whose save
    fails when their QEMU has ended.
    """
    directories = [str(vm.directory) for vm in pair]
    ram = pair[0].directory / "ram"
    ram.touch(0o640)
    os.truncate(ram, RAM_BYTES)
    ino = ram.stat().st_ino
    said = run(str(SCRIPT), "start", *directories, "--qemu", str(new_qemu))
    assert [line.split(":")[0] for line in said.splitlines()] == [
        f"start {directory}" for directory in directories for _ in range(3)
    ]
    assert (ram.stat().st_ino, ram.stat().st_mode & 0o777) == (ino, 0o640)
    for vm in pair:
        vm.wait_for(10)
    aside = pair[1].directory / "aside"
    (pair[1].directory / "ram").rename(aside)
    with pytest.raises(CommandError, match="1 not saved: the others go on: 1 of 1"):
        run(str(SCRIPT), "save", *directories)
    for vm in pair:
        assert not (vm.directory / "state").exists()
        vm.wait_for(len(vm.numbers()) + 10)
    aside.rename(pair[1].directory / "ram")
    for command in ("save", "restore"):
        run(str(SCRIPT), command, *directories)
    for vm in pair:
        vm.wait_for(len(vm.numbers()) + 10)
        assert vm.numbers() == list(range(1, len(vm.numbers()) + 1))
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", [str(SCRIPT), "save", *directories])
        patch.setattr(os, "fsync", fail_to_sync)
        assert script().main() == 1
    complaints = capfd.readouterr().err.splitlines()
    assert complaints[-1] == "live-update: not all went well: the guests go on: 2 of 2"
    assert sorted(complaints[:-1]) == [f"live-update: {d}: Input/output error" for d in directories]
    for vm in pair:
        assert not (vm.directory / "state").exists()
        vm.wait_for(len(vm.numbers()) + 10)
        assert vm.numbers() == list(range(1, len(vm.numbers()) + 1))
    run(str(SCRIPT), "save", *directories)


def fail_to_sync(_fd: int) -> None:
    """What fsync does on a device that is broken."""
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def script() -> ModuleType:
    """The script, as a module."""
    spec = spec_from_loader(
        "live_update_script", SourceFileLoader("live_update_script", str(SCRIPT))
    )
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("live", ["tmpfs", "hugetlbfs", "tmpfs/"], indirect=True)
@pytest.mark.parametrize("again", [False, True])
def test_no_save_of_a_guest_whose_memory_was_removed(
    live: LiveMount, vm: Counting, again: bool
) -> None:
    """The removal succeeds, for a segment stays as long as its QEMU; the save must not."""
    vm.start()
    vm.wait_for(10)
    ram = vm.directory / "ram"
    ram.unlink()
    if again:
        ram.touch()
        os.truncate(ram, RAM_BYTES)
    with pytest.raises(CommandError, match="was removed: nothing is saved"):
        vm("save")
    assert not (vm.directory / "state").exists()
    vm.wait_for(len(vm.numbers()) + 5)
