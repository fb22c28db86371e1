"""A pkernfs mount as its users have it: mkfs.pkernfs, mount(8), umount, and a daemon to be killed.

Shared by the demo and by tests that mount. Standard library only; it runs the commands of the
contract and never imports pkernfs.
"""

import errno
import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import programs

_DEATH_SECONDS = 20


class CommandError(Exception):
    """A command failed, or what it should have brought about is not so; one line says which."""


def run(*command: str, seconds: float = 120) -> str:
    """Run a command and return its standard output.

    :raises CommandError: it is missing, fails, or is not done in ``seconds``.
    """
    return programs.output(*command, error=CommandError, seconds=seconds)


@dataclass(frozen=True)
class Extent:
    """A piece of a file and where in the region it lies; bytes."""

    offset: int
    length: int
    region_offset: int


@dataclass(frozen=True)
class LiveMount:
    """A region and the directory that it is mounted on (or is to be)."""

    region: Path
    directory: Path

    def mount(self) -> None:
        """Mount with mount(8), as root does."""
        run("mount", "-t", "fuse.pkernfs", str(self.region), str(self.directory))

    def unmount(self) -> None:
        """Unmount, and wait for the daemon, which has the region's last words to write."""
        daemons = self.daemons()
        run("umount", str(self.directory))
        for pid in daemons:
            _wait_until_gone(pid)

    def is_mounted(self) -> bool:
        """Tell whether something is mounted on the directory, be its daemon dead or alive."""
        mountinfo = Path("/proc/self/mountinfo").read_bytes().split(b"\n")[:-1]
        escapes = {ord(c): f"\\{ord(c):03o}" for c in " \t\n\\"}  # as proc(5) has them
        wanted = os.fsencode(str(self.directory).translate(escapes))
        return wanted in (line.split(b" ")[4] for line in mountinfo)

    def daemons(self) -> list[int]:
        """Processes whose command line serves this region on this directory."""
        return [pid for pid in _process_ids() if self._is_daemon(pid)]

    def kill_daemon(self) -> int:
        """SIGKILL the daemon, wait until it is gone, and return the process id it had.

        :raises CommandError: there is not exactly one daemon, or the mount still answers.
        """
        daemons = self.daemons()
        if len(daemons) != 1:
            raise CommandError(f"{self.directory}: expected one daemon, found {daemons}")
        os.kill(daemons[0], signal.SIGKILL)
        _wait_until_gone(daemons[0])
        try:
            os.statvfs(self.directory)
        except OSError as error:
            if error.errno == errno.ENOTCONN:
                return daemons[0]
            raise CommandError(f"{self.directory}: after SIGKILL: {error.strerror}") from error
        raise CommandError(f"{self.directory}: still answers after its daemon was killed")

    def dismantle(self) -> None:
        """Leave neither mount nor daemon behind, whatever state they are in."""
        daemons = self.daemons()
        self._detach()
        for number in (signal.SIGTERM, signal.SIGKILL):
            _end(daemons, number)
        self._detach()  # a daemon that had only been starting may have mounted meanwhile

    def _detach(self) -> None:
        while self.is_mounted():
            run("umount", "-l", str(self.directory))

    def _is_daemon(self, pid: int) -> bool:
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except OSError:
            return False
        serves = os.fsencode(self.region) in words and os.fsencode(self.directory) in words
        return serves and any(os.path.basename(word) == b"pkernfs" for word in words[:3])


@contextmanager
def fresh(live: LiveMount, size: int) -> Iterator[LiveMount]:
    """Make a region of ``size`` bytes and mount it, while the block runs; fsck finds it clean then.

    Whatever happens, neither mount nor daemon is left.

    :raises CommandError: a step fails.
    """
    run("mkfs.pkernfs", "-s", str(size), str(live.region))
    try:
        live.mount()
        yield live
        if live.is_mounted():
            live.unmount()
        run("fsck.pkernfs", "-n", str(live.region))
    finally:
        live.dismantle()


def extents(file: Path) -> list[Extent]:
    """Ask ``pkernfs extents`` where the file's bytes are in the region."""
    described = json.loads(run("pkernfs", "extents", "--json", str(file)))
    return [
        Extent(one["offset"], one["length"], one["region_offset"]) for one in described["extents"]
    ]


def read_region(region: Path, pieces: list[Extent], size: int) -> bytes:
    """The bytes of a file of ``size`` bytes, taken from the region behind any daemon's back."""
    content = bytearray(size)
    with region.open("rb") as raw:
        for piece in pieces:
            raw.seek(piece.region_offset)
            wanted = min(piece.length, size - piece.offset)
            content[piece.offset : piece.offset + wanted] = raw.read(wanted)
    return bytes(content)


def _process_ids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _end(processes: list[int], number: int) -> None:
    """Send the signal to those that do not go by themselves, and give it time to work."""
    with suppress(CommandError, ProcessLookupError):
        for pid in processes:
            if not _is_gone(pid):
                os.kill(pid, number)
                _wait_until_gone(pid)


def _wait_until_gone(pid: int) -> None:
    deadline = time.monotonic() + _DEATH_SECONDS
    while not _is_gone(pid):
        if time.monotonic() > deadline:
            raise CommandError(f"process {pid}: still there after {_DEATH_SECONDS} s")
        time.sleep(0.01)


def _is_gone(pid: int) -> bool:
    """Gone, or a zombie without other threads: the kernel has closed its files and locks."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
        threads = os.listdir(f"/proc/{pid}/task")
    except OSError:
        return True
    return status.rpartition(")")[2].split()[0] in "ZX" and len(threads) == 1
