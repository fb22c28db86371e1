"""A lab machine: what it is made of, and QEMU running it, its console and side channel watched."""

import ctypes
import json
import os
import selectors
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import programs
from guestlab.machine import QEMU, accelerators, file_option
from kexeclab import LabError, LostMachine, cache, kernels, project, qemus, rootfs
from kexeclab.agent import PORT
from kexeclab.debian import run
from kexeclab.feed import Feed

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_CPU = "max,la57=off"  # page tables of five levels cost a fifth more time without KVM
_UPPER_BYTES = 1 << 30
_LOOK_SECONDS = 1.0  # how often a machine is looked at that says nothing
_SYSTEMD = "/lib/systemd/systemd"
_COMMON = ("console=ttyS0", "oops=panic", "panic=-1", "net.ifnames=0")


@dataclass(frozen=True)
class Machine:
    """A machine to boot.

    :ivar kernel: the first kernel, a key of kernels.SUITES
    :ivar memory: MiB
    :ivar cmdline: kernel parameters, beside the lab's own
    :ivar devices: QEMU options (``-device``, ``edu,addr=05.0``, ...)
    :ivar feeds: names of netdevs that the host feeds with packets (``-device``,
        ``e1000e,netdev=NAME``); see Guest.feed
    :ivar kernels: further kernels that kexec is to find
    :ivar qemus: further QEMUs, keys of qemus.SUITES; Guest.disk mounts them
    :ivar systemd: boot systemd instead of the lab's own init
    :ivar persistent: what is written to the root file system is there after a kexec as well
    """

    kernel: str = kernels.DEFAULT
    memory: int = 1024
    cpus: int = 1
    cmdline: Sequence[str] = ()
    devices: Sequence[str] = ()
    feeds: Sequence[str] = ()
    kernels: Sequence[str] = ()
    qemus: Sequence[str] = ()
    systemd: bool = False
    persistent: bool = False
    machine: str = "q35"

    def parameters(self, *more: str) -> str:
        """The kernel command line of the first boot."""
        init = (f"lab.init={_SYSTEMD}",) if self.systemd else ()
        return " ".join((*_COMMON, *init, *self.cmdline, *more))


@dataclass(frozen=True)
class Parts:
    """The files that a machine is started from."""

    kernel: kernels.Kernel
    disks: dict[str, Path]


def prepare(machine: Machine) -> Parts:
    """Have everything in the cache that ``machine`` needs.

    :raises LabError: something cannot be downloaded or built.
    """
    with cache.locked():
        chosen = kernels.fetch(machine.kernel)
        disks = {"root": rootfs.fetch().image, "project": project.fetch()}
        disks[f"kernel-{chosen.name}"] = chosen.disk
        for name in machine.kernels:
            disks[f"kernel-{name}"] = kernels.fetch(name).disk
        for name in machine.qemus:
            disks[qemus.serial(name)] = qemus.fetch(name)
    return Parts(chosen, disks)


def _threads(accelerator: str, cpus: int) -> str:
    """Emulate several processors in one thread.

    With a thread for each, a kernel that patches its own code (text_poke_bp) now and then panics at
    the place that another processor has just patched.
    """
    return f"{accelerator},thread=single" if accelerator == "tcg" and cpus > 1 else accelerator


def command(
    machine: Machine, parts: Parts, scratch: Path, parameters: Sequence[str], accelerator: str
) -> list[str]:
    """The QEMU command line, without a console and a side channel."""
    words = [
        QEMU, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
        "-accel", _threads(accelerator, machine.cpus), "-cpu", _CPU, "-machine", machine.machine,
        "-m", str(machine.memory), "-smp", str(machine.cpus), "-kernel", str(parts.kernel.image),
        "-initrd", str(parts.kernel.initramfs), "-append", machine.parameters(*parameters),
        "-device", "virtio-serial-pci",
    ]  # fmt: skip
    for serial, path in parts.disks.items():
        words += _disk(serial, path, "readonly=on")
    if machine.persistent:
        upper = scratch / "upper.ext4"
        run("mke2fs", "-q", "-t", "ext4", str(upper), f"{_UPPER_BYTES >> 10}k")
        words += _disk("upper", upper, "cache=unsafe")
    return [*words, *machine.devices]


def _disk(serial: str, path: Path, option: str) -> list[str]:
    name = serial.replace(".", "-")
    return [
        "-drive", f"if=none,id={name},format=raw,{option},file={file_option(path)}",
        "-device", f"virtio-blk-pci,drive={name},serial={serial}",
    ]  # fmt: skip


class Clock:
    """A machine's time, in seconds: what limits are counted in.

    It stands while the machine waits for a processor, which says nothing of the machine, and while
    its watcher does; but it does no less than a quarter of the time that really passes, for a limit
    has to come.

    :param waited: how long the machine has waited so far
    """

    def __init__(
        self, waited: Callable[[], float], time_now: Callable[[], float] = time.monotonic
    ) -> None:
        self._waited = waited
        self._time_now = time_now
        self._last = time_now(), waited()
        self._reading = 0.0

    def now(self) -> float:
        """Read the clock; every second or so, for a longer time counts as one in which we slept."""
        before, self._last = self._last, (self._time_now(), self._waited())
        passed, waited = (new - old for new, old in zip(self._last, before, strict=True))
        seen = min(passed, 2 * _LOOK_SECONDS)
        self._reading += max(seen - max(waited, 0.0), seen / 4)
        return self._reading


@dataclass
class Running:
    """A QEMU at work. ``receive`` returns the machine's messages, one after the other.

    :ivar heard: when each line of the console came (time.monotonic)
    """

    process: subprocess.Popen[bytes]
    channel: socket.socket
    accelerator: str
    echo: bool
    feeds: dict[str, Feed] = field(default_factory=dict)
    console: list[str] = field(default_factory=list)
    heard: list[float] = field(default_factory=list)
    _messages: list[dict[str, Any]] = field(default_factory=list)
    _partial: dict[str, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert self.process.stdout is not None
        self.clock = Clock(self.waited_seconds)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self.process.stdout, selectors.EVENT_READ, "console")
        self._selector.register(self.channel, selectors.EVENT_READ, "channel")

    def receive(self, deadline: float) -> dict[str, Any] | None:
        """The next message, or None when ``deadline`` (of :attr:`clock`) has passed.

        :raises LostMachine: QEMU ended.
        """
        while not self._messages:
            left = deadline - self.clock.now()
            ready = self._selector.select(min(max(left, 0.0), _LOOK_SECONDS))
            for key, _ in ready:
                self._read(key.data)
            if left <= 0 and not ready:
                return None
        return self._messages.pop(0)

    def send(self, **message: Any) -> None:
        """Answer the machine. If it is gone, ``receive`` says so."""
        with suppress(BrokenPipeError, ConnectionResetError):
            self.channel.sendall(json.dumps(message).encode() + b"\n")

    def cpu_seconds(self) -> float:
        """Return the CPU time of QEMU so far: unlike time, the same on a busy machine."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def waited_seconds(self) -> float:
        """Return the time that QEMU has waited for a processor: of its threads, the most."""
        waited = 0
        for path in Path(f"/proc/{self.process.pid}/task").glob("*/schedstat"):
            with suppress(OSError, IndexError):  # a thread that ends; a kernel without the figures
                waited = max(waited, int(path.read_text().split()[1]))
        return waited / 1e9

    def last_words(self, lines: int = 30) -> str:
        """The end of the console."""
        return "\n".join(self.console[-lines:]) if self.console else "(nothing on the console)"

    def close(self) -> None:
        """End QEMU, whatever it is doing."""
        self._selector.close()
        programs.end(self.process, seconds=10)
        if self.process.stdout is not None:
            self.process.stdout.close()
        self.channel.close()

    def _read(self, source: str) -> None:
        if source == "console":
            assert self.process.stdout is not None
            data = self.process.stdout.read1(65536)  # type: ignore[attr-defined]
        else:
            data = self.channel.recv(1 << 20)
        if not data:
            if source == "channel":
                self._selector.unregister(self.channel)
                return
            raise LostMachine(f"{QEMU} ended (exit status {self.process.wait(10)})")
        *lines, rest = (self._partial.get(source, b"") + data).split(b"\n")
        self._partial[source] = rest
        for line in lines:
            if source == "console":
                self._heard(line)
            else:
                self._messages.append(json.loads(line))

    def _heard(self, raw: bytes) -> None:
        line = raw.decode(errors="replace").rstrip()
        self.console.append(line)
        self.heard.append(time.monotonic())
        if self.echo:
            print(line, flush=True)


@contextmanager
def running(machine: Machine, parts: Parts, echo: bool = False) -> Iterator[Running]:
    """Start QEMU; whatever happens, it is gone when the block is left.

    :param echo: print the console as it comes
    :raises LabError: QEMU does not start.
    """
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pkernfs-lab.")))
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(str(scratch / "channel"))
        listener.listen(1)
        accelerator = accelerators()[0]
        feeds = {name: Feed(name) for name in machine.feeds}
        for feed in feeds.values():
            stack.callback(feed.close)
        words = [
            *command(machine, parts, scratch, ("lab.stage=1",), accelerator),
            *(word for feed in feeds.values() for word in feed.options()),
            "-chardev", "stdio,id=console,signal=off", "-serial", "chardev:console",
            "-chardev", f"socket,id=lab,path={scratch / 'channel'}",
            "-device", f"virtserialport,chardev=lab,name={PORT}",
        ]  # fmt: skip
        try:
            process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                start_new_session=True, preexec_fn=_end_with_parent,
                pass_fds=[feed.descriptor for feed in feeds.values()],
            )  # fmt: skip
        except FileNotFoundError as error:
            raise LabError(f"{QEMU}: command not found") from error
        stack.callback(programs.end, process, signal.SIGKILL, seconds=10)
        for feed in feeds.values():
            feed.passed_on()
        listener.settimeout(30)
        try:
            channel, _ = listener.accept()
        except TimeoutError as error:
            process.kill()
            said = process.communicate()[0].decode(errors="replace").strip().splitlines()
            raise LabError(f"{QEMU}: does not start: {(said or ['no message'])[-1]}") from error
        alive = Running(process, channel, accelerator, echo, feeds)
        stack.callback(alive.close)
        yield alive


def _end_with_parent() -> None:
    """Have the kernel end QEMU if this process is killed, which no ``finally`` notices."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
