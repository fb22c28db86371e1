"""A guest in QEMU whose RAM is a file, started, watched on its serial console, and stopped."""

import os
import queue
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import programs
from guestlab import GuestLabError
from guestlab.kernel import Kernel

QEMU = "qemu-system-x86_64"
READY_LINE = re.compile(r"guest: user space is up, (\S+) is in (\d+) pages")
BANNER = re.compile(r"Linux version [^\r\n]+")
_STOP_SECONDS = 30
_TIMEOUT_SECONDS = 15  # with an accelerator that something slower can replace


def qemu_path() -> str | None:
    """Return the path of QEMU, or None."""
    return shutil.which(QEMU)


def file_option(path: Path) -> str:
    """Write a path as a value of a QEMU option: a comma is doubled in it."""
    return str(path).replace(",", ",,")


def accelerators() -> list[str]:
    """The accelerators worth trying here, the fastest first; ``tcg`` always works.

    A /dev/kvm alone promises nothing: inside some virtual machines it is there, and a guest hangs.
    """
    flags = Path("/proc/cpuinfo").read_text().split()
    kvm = os.access("/dev/kvm", os.R_OK | os.W_OK) and ("vmx" in flags or "svm" in flags)
    return ["kvm", "tcg"] if kvm else ["tcg"]


@dataclass(frozen=True)
class Recipe:
    """A guest to boot: ``pages`` of its memory are to hold the marker.

    :ivar ram: the file that is the guest's memory; it has ``ram_bytes`` bytes
    :ivar busy: the guest goes on storing to other memory after its first user-space line
    """

    kernel: Kernel
    initramfs: Path
    ram: Path
    ram_bytes: int
    marker: str
    pages: int
    busy: bool = False

    def command(self, accelerator: str) -> list[str]:
        """The QEMU command line; the serial console is standard output."""
        append = f"console=ttyS0 panic=-1 marker={self.marker} pages={self.pages}"
        if self.busy:
            append += " busy=1"
        path = file_option(self.ram)
        backend = f"memory-backend-file,id=pc.ram,size={self.ram_bytes},mem-path={path},share=on"
        return [
            QEMU, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
            "-accel", accelerator, "-machine", "q35,memory-backend=pc.ram", "-object", backend,
            "-m", f"size={self.ram_bytes}B", "-kernel", str(self.kernel.image),
            "-initrd", str(self.initramfs), "-append", append, "-serial", "stdio",
        ]  # fmt: skip


@dataclass
class Guest:
    """A running QEMU; use :func:`running`, which never leaves one behind."""

    process: subprocess.Popen[bytes]
    accelerator: str
    console: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._reader = threading.Thread(target=self._pump, daemon=True)
        self._reader.start()

    def wait_until_ready(self, seconds: float) -> None:
        """Wait for the first user-space line.

        :raises GuestLabError: QEMU ended first, or ``seconds`` went by.
        """
        deadline = time.monotonic() + seconds
        while True:
            try:
                line = self._lines.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise GuestLabError(
                    f"guest: no user-space line in {seconds:g} s; {self._last_words()}"
                ) from None
            if line is None:
                raise GuestLabError(f"{QEMU}: ended before user space; {self._last_words()}")
            if READY_LINE.search(line):
                return

    def banner(self) -> str:
        """The kernel's "Linux version ..." text as the console showed it.

        :raises GuestLabError: the console showed none.
        """
        return self._console_text(BANNER)

    def ready_line(self) -> str:
        """The first user-space line.

        :raises GuestLabError: there was none yet.
        """
        return self._console_text(READY_LINE)

    def stop(self, signal_number: int = signal.SIGTERM) -> None:
        """End QEMU and wait until it is gone, and with it its mapping of the memory file.

        :raises GuestLabError: it does not end even by SIGKILL, as when its memory's writes hang.
        """
        if not programs.end(self.process, signal_number, signal.SIGKILL, seconds=_STOP_SECONDS):
            raise GuestLabError(f"{QEMU}: process {self.process.pid} outlives SIGKILL")
        self._reader.join()

    def _console_text(self, pattern: re.Pattern[str]) -> str:
        for line in self.console:
            if found := pattern.search(line):
                return found.group()
        raise GuestLabError(f"guest: its console shows no {pattern.pattern!r}")

    def _pump(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as console:
            for raw in console:
                line = raw.decode(errors="replace").rstrip()
                self.console.append(line)
                self._lines.put(line)
        self._lines.put(None)

    def _last_words(self) -> str:
        return f"its last line: {self.console[-1]!r}" if self.console else "it printed nothing"


@contextmanager
def running(recipe: Recipe, accelerator: str) -> Iterator[Guest]:
    """Start the guest; whatever happens, QEMU is gone when the block is left."""
    process = subprocess.Popen(
        recipe.command(accelerator),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # Ctrl-C is ours to answer: the guest is stopped on the way out
    )
    guest = Guest(process, accelerator)
    try:
        yield guest
    finally:
        guest.stop(signal.SIGKILL)


@contextmanager
def booted(recipe: Recipe, seconds: float) -> Iterator[Guest]:
    """Start the guest and wait for its user space, with the first accelerator that gets there.

    :raises GuestLabError: none does, each within ``seconds``.
    """
    with ExitStack() as stack:
        yield _first_that_boots(recipe, seconds, stack)


def _first_that_boots(recipe: Recipe, seconds: float, stack: ExitStack) -> Guest:
    candidates = accelerators()
    for accelerator in candidates[:-1]:
        with ExitStack() as attempt:
            guest = attempt.enter_context(running(recipe, accelerator))
            with suppress(GuestLabError):
                guest.wait_until_ready(min(seconds, _TIMEOUT_SECONDS))
                stack.push(attempt.pop_all())
                return guest
        os.truncate(recipe.ram, 0)  # nothing of a failed attempt is to be found later
        os.truncate(recipe.ram, recipe.ram_bytes)
    guest = stack.enter_context(running(recipe, candidates[-1]))
    guest.wait_until_ready(seconds)
    return guest
