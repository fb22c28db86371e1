"""Live update of a virtual machine: QEMU ends, its guest's memory stays, another QEMU goes on.

The guest's memory is a file of the mount. QEMU maps the file's segment, or its place in the region,
as ``pkernfs qemu-args`` says. So only the device state is written: QEMU's migration mode cpr-reboot
(8.2) with the capability x-ignore-shared. docs/operations.md, "Live update of a guest", has the
rules that are kept here. Root is not needed: :mod:`pkernfs.vmm.owners` has each owner do the work.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import select
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from pkernfs.errors import LiveUpdateError, QemuError, VmmError
from pkernfs.host.mappings import mappings_of
from pkernfs.vmm import program
from pkernfs.vmm.qmp import TIMEOUT_SECONDS, Qmp

RUN = Path("/run")
#: Bytes of a guest's memory for which nobody names a size.
DEFAULT_BYTES = 16 << 20
#: For a program to answer, or to start: a machine that has just booted has much else to do.
_PROGRAM_SECONDS = 300.0
#: For save and restore alike: without them QEMU would write all of the memory into the state.
CAPABILITIES = ("x-ignore-shared", "events")


class Phase(NamedTuple):
    """A part of a start, a save or a restore, and the milliseconds that it took."""

    name: str
    ms: float


#: Is called with each phase when it is done.
Tell = Callable[[Phase], object]


@dataclass(frozen=True)
class Settings:
    """The way to run QEMU: the members of ``vm.json``.

    :ivar qemu: the program
    :ivar machine: its machine type; versioned as soon as the machine has been started
    :ivar accel: its accelerator
    :ivar options: more options; relative paths in them are relative to the machine's directory
    """

    qemu: str
    machine: str
    accel: str
    options: list[str]

    @classmethod
    def read(cls, path: Path) -> Settings:
        """Read ``vm.json``; members that are not known here are left out.

        :raises LiveUpdateError: it is no JSON, or lacks a member.
        :raises OSError: it cannot be read.
        """
        try:
            found = json.loads(path.read_text())
            return cls(**{member.name: found[member.name] for member in fields(cls)})
        except (ValueError, TypeError, KeyError) as error:
            raise LiveUpdateError(f"{path}: not the settings of a machine: {error}") from error


class _Clock:
    """Tells of each phase when it is done."""

    def __init__(self, tell: Tell) -> None:
        self._tell = tell
        self._began = self._last = time.monotonic()

    def done(self, name: str) -> None:
        """Tell of the phase since the last one."""
        now = time.monotonic()
        self._tell(Phase(name, (now - self._last) * 1e3))
        self._last = now

    @property
    def ms(self) -> float:
        """Milliseconds since the beginning."""
        return (time.monotonic() - self._began) * 1e3


def _tell_nobody(_phase: Phase) -> None:
    """Take no notice of a phase."""


def run_directory(uid: int) -> Path:
    """Return the directory for the monitors of a user's machines; only root's is there for sure."""
    return RUN / "live-update" / str(uid) if uid else RUN


class Machine:
    """A virtual machine: the files in its directory, and a QEMU while it runs.

    Everything is done as the user that this process is, who need not be root.

    :ivar ram: the guest's memory
    :ivar state: the device state, only while the machine is saved
    :ivar config: how QEMU is run (:class:`Settings`)
    :ivar monitor: the socket of QEMU's monitor
    :ivar pid: the file with the number of QEMU's process
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory.resolve()
        self.ram = self.directory / "ram"
        self.state = self.directory / "state"
        self.config = self.directory / "vm.json"
        # As long as a socket's path may be, however deep the directory is.
        name = hashlib.sha256(os.fsencode(self.directory)).hexdigest()[:16]
        run = run_directory(os.geteuid())
        self.monitor = run / f"live-update-{name}.qmp"
        self.pid = run / f"live-update-{name}.pid"

    # -------------------------------------------------------------------------- start

    def check_absent(self) -> None:
        """Refuse a directory that has a machine: no device state goes without its memory.

        Memory alone, without settings and state, is no machine: somebody has prepared it.

        :raises LiveUpdateError: it has one, or there is no such directory.
        """
        if not self.directory.is_dir():
            raise LiveUpdateError(
                f"{self.directory}: no such directory: make one in a mounted pkernfs"
            )
        for file in (self.config, self.state):
            if file.is_file():
                raise LiveUpdateError(f"{file}: there is a machine: restore it, or remove it")

    def start(
        self,
        size: int | None,
        settings: Settings,
        tell: Tell = _tell_nobody,
        files: Mapping[str, bytes] = MappingProxyType({}),
    ) -> float:
        """Make the memory, of ``size`` bytes, and run a new machine in it.

        Memory that is there already is taken as it is.

        :param size: None for the size of the memory that is there, else DEFAULT_BYTES
        :param files: files that QEMU needs, with their contents, to be made in the directory
        :returns: the milliseconds that it took
        :raises VmmError: there is a machine, the memory that is there has another size, or QEMU
            does not run; what was made is removed again.
        :raises OSError: a file cannot be made; likewise.
        """
        self.check_absent()
        clock = _Clock(tell)
        made: list[Path] = []
        try:
            if not self.ram.exists():
                _make_memory(self.ram, DEFAULT_BYTES if size is None else size, made)
            clock.done("memory")
            memory = self._memory_options(settings.qemu, size)  # before anything else is made
            for name, content in files.items():
                _write(self.directory / name, content, made)
            self._run_qemu(settings, memory)
        except BaseException:
            _remove(made)
            raise
        clock.done("QEMU")
        try:
            self._keep_settings(settings, made)
        except BaseException as error:
            self._end_after(error)
            _remove(made)
            raise
        return clock.ms

    def _keep_settings(self, settings: Settings, made: list[Path]) -> None:
        """Write down how the machine is run, that is which one of the versions of "pc" it is."""
        with Qmp(self.monitor) as qmp:
            machine = qmp.execute("qom-get", path="/machine", property="type")
        if not isinstance(machine, str):
            raise LiveUpdateError("QEMU: its machine has no type")
        settings = replace(settings, machine=machine.removesuffix("-machine"))
        _write(self.config, json.dumps(asdict(settings), indent=2).encode() + b"\n", made)

    def _end_after(self, error: BaseException) -> None:
        """End the QEMU that has been started; nobody may take its memory away before.

        :raises LiveUpdateError: it does not end.
        """
        try:
            with self._process() as process, Qmp(self.monitor) as qmp:
                qmp.execute("quit")
                _wait_until_gone(process)
        except (VmmError, OSError):
            raise LiveUpdateError(f"{error}: QEMU goes on: its process is in {self.pid}") from error

    def _run_qemu(self, settings: Settings, memory: Sequence[str], *more: str) -> None:
        """Start QEMU in the background; its monitor answers when this returns."""
        run = self.monitor.parent
        if not run.is_dir():
            raise LiveUpdateError(
                f"{run}: no such directory: as root: install -d -m 700 -o {os.geteuid()} {run}"
            )
        command = [
            settings.qemu, "-nodefaults", "-no-user-config", "-display", "none",
            "-machine", settings.machine, "-accel", settings.accel,
            *memory, *settings.options,
            "-qmp", f"unix:{self.monitor},server=on,wait=off",
            "-pidfile", str(self.pid), "-daemonize", *more,
        ]  # fmt: skip
        program.output(*command, directory=self.directory, seconds=_PROGRAM_SECONDS)

    def _check_memory(self, qemu: str) -> None:
        """Refuse to save a machine whose memory is not the file's: the file may have been removed.

        Its device state would be saved without memory. Its segment ends with QEMU; its place in the
        region may be another file's.

        :raises LiveUpdateError: there is no such file, or QEMU maps another place.
        """
        if not self.ram.exists():
            raise LiveUpdateError(f"{self.ram}: the memory's file was removed: nothing is saved")
        place = self._ask_place(qemu)["object"]
        start = place.get("offset", 0)  # a segment is mapped as a whole
        end = start + place["size"]
        pids = [int(self.pid.read_text())]
        for mapping in mappings_of(place["mem-path"], pids=pids):
            if mapping.start <= start and end <= mapping.end:
                return
        raise LiveUpdateError(
            f"{self.ram}: not the memory that QEMU runs in, which was removed: nothing is saved"
        )

    def _ask_place(self, qemu: str) -> dict[str, Any]:
        """What QEMU is to map; asked anew each time."""
        words = ("pkernfs", "qemu-args", "--live-update", "--json", "--qemu", qemu, str(self.ram))
        answer: dict[str, Any] = json.loads(program.output(*words, seconds=_PROGRAM_SECONDS))
        return answer

    def _memory_options(self, qemu: str, size: int | None = None) -> list[str]:
        """Options that map the memory itself, which is to have ``size`` bytes."""
        answer = self._ask_place(qemu)
        found = answer["object"]["size"]
        if size not in (None, found):
            raise LiveUpdateError(f"{self.ram}: it is there: got {found} bytes, expected {size}")
        options: list[str] = answer["args"]
        return options

    # -------------------------------------------------------------------------- save

    def save(self, tell: Tell = _tell_nobody) -> float:
        """Stop the machine, write its device state, end QEMU.

        :returns: the milliseconds that it took
        :raises VmmError: the memory is not in the file any more, or the state cannot be written
            (the machine goes on); or QEMU does not end.
        :raises OSError: the state cannot be synced.
        """
        clock = _Clock(tell)
        with Qmp(self.monitor) as qmp, self._process() as process:
            self._check_memory(Settings.read(self.config).qemu)
            _set_up(qmp)
            clock.done("prepare")
            qmp.execute("stop")
            clock.done("stop")
            self._write_state(qmp)
            clock.done(f"state ({self.state.stat().st_size >> 10} KiB)")
            qmp.execute("quit")
            _wait_until_gone(process)
            clock.done("end of QEMU")
        with self.state.open("rb") as state:
            os.fsync(state.fileno())
        clock.done("sync")
        return clock.ms

    def _write_state(self, qmp: Qmp) -> None:
        """Write the device state; if that fails the machine goes on, without half of a state."""
        try:
            qmp.execute("migrate", uri=f"file:{self.state}")
            qmp.wait_for_migration()
        except QemuError:
            self.state.unlink(missing_ok=True)
            qmp.execute("cont")
            raise

    # -------------------------------------------------------------------------- restore

    def restore(self, tell: Tell = _tell_nobody) -> float:
        """Run QEMU with the saved state, and let the machine go on.

        :returns: the milliseconds that it took
        :raises VmmError: nothing is saved, or QEMU does not read it; the state is kept.
        :raises OSError: a file cannot be read.
        """
        if not self.state.exists():
            raise LiveUpdateError(f"{self.state}: no machine is saved here")
        clock = _Clock(tell)
        settings = Settings.read(self.config)
        self._run_qemu(settings, self._memory_options(settings.qemu), "-incoming", "defer")
        clock.done("QEMU")
        with Qmp(self.monitor) as qmp, self._process() as process:
            self._read_state(qmp, process)
            clock.done("state")
            # Once the machine runs its memory is newer than the state: never use that again.
            self.state.unlink()
            qmp.execute("cont")
        clock.done("running")
        return clock.ms

    def _read_state(self, qmp: Qmp, process: int) -> None:
        """Read the device state; if that fails QEMU ends."""
        try:
            _set_up(qmp)
            qmp.execute("migrate-incoming", uri=f"file:{self.state}")
            qmp.wait_for_migration()
        except QemuError as error:
            with contextlib.suppress(VmmError, OSError):
                qmp.execute("quit")
            _wait_until_gone(process)
            raise LiveUpdateError(f"{self.state}: not restored: {error}") from error

    @contextlib.contextmanager
    def _process(self) -> Iterator[int]:
        """A descriptor of the QEMU process, to wait for its end."""
        try:
            handle = os.pidfd_open(int(self.pid.read_text()))
        except (OSError, ValueError) as error:
            raise LiveUpdateError(f"{self.pid}: QEMU has ended") from error
        try:
            yield handle
        finally:
            os.close(handle)


def _make_memory(path: Path, size: int, made: list[Path]) -> None:
    """Make a guest's memory, and add it to ``made``."""
    with open(path, "xb", opener=_private) as ram:
        made.append(path)
        ram.truncate(size)


def _write(path: Path, content: bytes, made: list[Path]) -> None:
    """Write a file; it is added to ``made`` if it was not there before."""
    if not path.exists():
        made.append(path)
    path.write_bytes(content)


def _remove(made: list[Path]) -> None:
    """Remove files that were made for nothing."""
    for path in made:
        path.unlink(missing_ok=True)


def _private(path: str, flags: int) -> int:
    """Open a file that is nobody else's business: it is all that a guest knows."""
    return os.open(path, flags, 0o600)


def _set_up(qmp: Qmp) -> None:
    """Have the device state alone saved, or restored: the memory stays where it is."""
    wanted = [{"capability": name, "state": True} for name in CAPABILITIES]
    qmp.execute("migrate-set-capabilities", capabilities=wanted)
    qmp.execute("migrate-set-parameters", mode="cpr-reboot")


def _wait_until_gone(process: int) -> None:
    """Wait until QEMU has ended, and its mapping of the region with it."""
    if not select.select([process], [], [], TIMEOUT_SECONDS)[0]:
        raise LiveUpdateError(f"QEMU: still there after {TIMEOUT_SECONDS:g} s")
