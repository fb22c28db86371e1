"""The machine as a stage has it inside: commands, notes for later stages, and kexec."""

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, Protocol

import programs

KERNELS = Path("/lab/kernels")
DISKS = Path("/lab/disks")
STAGE_PARAMETER = "lab.stage"


class GuestError(Exception):
    """A command in the machine failed, or a step of a stage did; the text says which and why."""


class Channel(Protocol):
    """The way to the host."""

    def send(self, **message: Any) -> None:
        """Send one message; it has left the machine when this returns."""

    def ask(self, **message: Any) -> dict[str, Any]:
        """Send one message and wait for the answer."""


class Guest:
    """The machine as a stage sees it.

    :ivar stage: 1 for the first, one more after each kexec or panic
    :ivar notes: what earlier stages noted
    :ivar parameters: what the test passed to ``run``
    """

    def __init__(
        self, channel: Channel, stage: int, notes: dict[str, Any], parameters: dict[str, Any]
    ) -> None:
        self._channel = channel
        self.stage = stage
        self.notes = notes
        self.parameters = parameters

    def log(self, text: str) -> None:
        """Have a line in the test's log."""
        self._channel.send(log=text)

    def figure(self, name: str, value: float, unit: str = "") -> None:
        """Have a figure in the test's result."""
        self._channel.send(figure=name, value=value, unit=unit)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Have the seconds that the block takes as a figure ``name`` in the test's result."""
        started = time.monotonic()
        yield
        self.figure(name, time.monotonic() - started, "s")

    def note(self, key: str, value: Any) -> None:
        """Tell later stages something (what JSON can hold); it is on the host when this returns."""
        self.notes[key] = value
        self._channel.ask(note=key, value=value)

    def feed(self, name: str, rate: float = 100, limit: int = 1 << 62) -> None:
        """Have the host send packets to the netdev ``name`` (Machine.feeds) from now on.

        :param rate: packets in a second
        :param limit: how many packets in all; the room that there is for them
        """
        self._channel.ask(feed=name, rate=rate, limit=limit)

    def fed(self, name: str, stop: bool = False) -> int:
        """Ask how many packets the host has sent so far, kernels before included.

        :param stop: have it send no more
        """
        sent = self._channel.ask(fed=name, stop=stop)["sent"]
        assert isinstance(sent, int)
        return sent

    def run(self, *command: str, seconds: float = 120, status: int = 0, input: str = "") -> str:
        """Run a command that must exit with ``status``; return what it wrote to both outputs.

        :raises GuestError: another exit status, or not done in ``seconds``.
        """
        done = programs.run(*command, error=GuestError, seconds=seconds, input=input, merge=True)
        if done.returncode != status:
            got = f"exit status {done.returncode}, expected {status}"
            raise GuestError(f"{' '.join(command)}: {got}:\n{done.stdout[-4000:]}")
        return done.stdout

    def disk(self, serial: str) -> Path:
        """Mount the machine's disk with that serial number, read only; return where it is.

        :raises GuestError: the machine has no such disk.
        """
        place = DISKS / serial
        for named in Path("/sys/block").glob("vd*/serial"):
            if named.read_text().strip() == serial:
                place.mkdir(parents=True, exist_ok=True)
                self.run("mount", "-o", "ro", f"/dev/{named.parent.name}", str(place))
                return place
        raise GuestError(f"disk {serial}: this machine was not given it")

    def command_line(self, add: Sequence[str] = (), remove: Sequence[str] = ()) -> list[str]:
        """The running kernel's parameters for the next one: the stage counted up by one.

        :param remove: parameters to leave out, as they stand or by the name before ``=``
        """
        words = Path("/proc/cmdline").read_text().split()
        out = {STAGE_PARAMETER, "BOOT_IMAGE", "initrd", "elfcorehdr", *remove}
        kept = [word for word in words if word not in out and word.split("=")[0] not in out]
        return [*kept, *add, f"{STAGE_PARAMETER}={self.stage + 1}"]

    def load(
        self, kernel: str | None = None, add: Sequence[str] = (), remove: Sequence[str] = (),
        panic: bool = False,
    ) -> None:  # fmt: skip
        """Load a kernel for kexec (or for a panic): the running one's, or one that the test named.

        :raises GuestError: kexec refuses, or the machine was not given that kernel.
        """
        place = KERNELS / kernel if kernel else running_kernel()
        if not (place / "vmlinuz").exists():
            raise GuestError(f"kernel {kernel}: this machine was not given it (kernels=)")
        self.run(
            "kexec", "-p" if panic else "-l", str(place / "vmlinuz"),
            f"--initrd={place / 'initrd'}",
            f"--command-line={' '.join(self.command_line(add, remove))}",
        )  # fmt: skip

    def execute(self) -> NoReturn:
        """Start the loaded kernel, at once: nothing is unmounted, nothing is stopped."""
        self._channel.ask(leaving="kexec")
        self.run("kexec", "-e", seconds=60)
        raise GuestError("kexec -e: came back")

    def kexec(
        self, kernel: str | None = None, add: Sequence[str] = (), remove: Sequence[str] = ()
    ) -> NoReturn:
        """``load`` and ``execute``."""
        self.load(kernel, add, remove)
        self.execute()

    def leaving(self, how: str) -> None:
        """Tell the host that this stage ends now by something else that starts the next kernel."""
        self._channel.ask(leaving=how)

    def panic(self) -> NoReturn:
        """Panic; the kernel loaded with ``load(panic=True)`` takes over."""
        if Path("/sys/kernel/kexec_crash_loaded").read_text().strip() != "1":
            raise GuestError("panic: no kernel is loaded for it")
        self._channel.ask(leaving="panic")
        Path("/proc/sysrq-trigger").write_text("c")
        time.sleep(60)
        raise GuestError("panic: the machine is still there")


def running_kernel() -> Path:
    """Return the directory with the running kernel's files.

    :raises GuestError: on no disk of this machine.
    """
    release = os.uname().release
    for place in sorted(KERNELS.iterdir()):
        if (place / "lib/modules" / release).is_dir():
            return place
    raise GuestError(f"kernel {release}: not on a disk of this machine")
