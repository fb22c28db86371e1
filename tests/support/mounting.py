"""Real mounts for tests: a region on tmpfs, a daemon in the foreground, and no leftovers.

A :class:`Mounted` is a context manager. Waiting is for conditions (the mount answers, the process
has ended), never for a time; whatever a test does, the end unmounts and kills.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Protocol, Self

from pkernfs.fs import mkfs
from pkernfs.host.mount_table import FSTYPE, mounts_of, own_mounts
from pkernfs.host.sysroot import HOST
from pkernfs.region.region import Region
from support.checking import assert_clean

MIB = 1 << 20
REQUEST_TIMEOUT_SECONDS = 20.0

libc = ctypes.CDLL(None, use_errno=True)


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Wait until ``condition`` holds.

    :raises TimeoutError: it did not for :data:`REQUEST_TIMEOUT_SECONDS`.
    """
    deadline = time.monotonic() + REQUEST_TIMEOUT_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited in vain: {what}")
        time.sleep(0.002)


def is_mounted(path: Path | str) -> bool:
    """Tell if something is mounted at ``path``, dead or alive."""
    with open("/proc/self/mountinfo") as table:
        return any(line.split(" ")[4] == str(path) for line in table)


def own_mount_namespace(keep: Path | None = None) -> None:
    """Put this process into a mount namespace of its own, without pkernfs mounts but ``keep``.

    A copy of a mount keeps its daemon serving after umount(8), for as long as the namespace is
    there: on a busy machine that made other tests wait for 20 s, and fail.
    """
    assert libc.unshare(0x20000) == 0  # CLONE_NEWNS
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    for mount in own_mounts(HOST):
        if mount.fstype == FSTYPE and mount.mount_point != str(keep):
            subprocess.run(["umount", "-l", mount.mount_point], check=True)


_PROGRAM = "import sys; from pkernfs.cli import main; sys.exit(main())"


def run_pkernfs(*words: str) -> subprocess.CompletedProcess[str]:
    """``pkernfs WORDS``, and what came of it."""
    command = [sys.executable, "-c", _PROGRAM, *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=REQUEST_TIMEOUT_SECONDS)


class Process(Protocol):
    """A daemon: what subprocess.Popen has of it."""

    pid: int
    stderr: IO[str] | None

    def poll(self) -> int | None:
        """Its status, if it has ended."""

    def wait(self, timeout: float | None = None) -> int:
        """Its status, when it has ended."""

    def send_signal(self, sig: int) -> None:
        """Send it a signal, if it is there."""

    def terminate(self) -> None:
        """SIGTERM."""

    def kill(self) -> None:
        """SIGKILL."""


class Mounted:
    """A formatted region and a daemon that serves it at :attr:`path`."""

    def __init__(self, size: int = 64 * MIB, options: str = "", directory: str = "/dev/shm"):
        self.directory = Path(tempfile.mkdtemp(prefix="pkernfs-test.", dir=directory))
        self.region = self.directory / "region"
        self.path = self.directory / "mnt"
        self.options = options
        self.program = ["-c", _PROGRAM]  # what Python runs as the daemon
        self.daemon: Process | None = None
        self.directory.chmod(0o755)
        self.path.mkdir()
        self.make_region(size)

    def make_region(self, size: int) -> None:
        """Format a new region of ``size`` bytes."""
        Region.create(str(self.region), size)
        with Region.open(str(self.region), write=True) as region:
            mkfs.make_filesystem(region)

    @property
    def spec(self) -> str:
        """The region as the daemon is told it."""
        return str(self.region)

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: object, *exc: object) -> None:
        try:
            if kind is None:
                self.check()
        finally:
            self.close()

    def check(self) -> None:
        """Unmount if mounted; fsck finds nothing wrong."""
        if is_mounted(self.path):
            subprocess.run(["umount", "-R", str(self.path)], check=True)
        if self.daemon is not None:
            self.wait()
        with Region.open(str(self.region), write=False) as region:
            assert_clean(region)

    def start(self, given: Sequence[int] = ()) -> None:
        """Start the daemon, with these descriptors of ours, and wait until the mount answers.

        :raises AssertionError: the daemon ended instead.
        """
        self._close_pipe()
        options = ["-o", self.options] if self.options else []
        daemon = self.daemon = self.run_daemon(
            ["mount", "-f", *options, self.spec, str(self.path)], given
        )
        wait_until(
            lambda: is_mounted(self.path) or daemon.poll() is not None, "the mount, or an end"
        )
        assert daemon.poll() is None, f"the daemon ended: {self.words()}"
        try:
            os.statvfs(self.path)  # answered by the daemon
        except OSError as e:
            with contextlib.suppress(subprocess.TimeoutExpired):
                daemon.wait(10)
            raise AssertionError(f"no answer: {e}: {daemon.poll()}: {self.words()}") from e

    def run_daemon(self, words: Sequence[str], given: Sequence[int] = ()) -> Process:
        """Start ``pkernfs WORDS``."""
        command = [sys.executable, *self.program, *words]
        return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, pass_fds=given)

    def words(self) -> str:
        """Return the text that the ended daemon wrote to stderr."""
        assert self.daemon is not None
        assert self.daemon.stderr is not None
        return self.daemon.stderr.read()

    def wait(self) -> int:
        """The exit status of the daemon, which has been made to end.

        :raises TimeoutError: it does not, and what it does instead.
        """
        assert self.daemon is not None
        try:
            return self.daemon.wait(REQUEST_TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"the daemon goes on: {self._doing()}") from None

    def _doing(self) -> str:
        """Where the daemon's threads wait, and who sees its mount."""
        assert self.daemon is not None
        tasks = f"proc/{self.daemon.pid}/task"
        waits = [HOST.find(f"{tasks}/{task}/wchan") for task in HOST.list(tasks)]
        seen = [pid for pid in HOST.list("proc") if pid.isdigit() and self._is_seen_by(pid)]
        return f"its threads wait in {waits}; its mount is seen by processes {seen}"

    def _is_seen_by(self, pid: str) -> bool:
        return any(mount.mount_point == str(self.path) for mount in mounts_of(HOST, pid))

    def unmount(self) -> None:
        """umount(8), and the daemon's end."""
        subprocess.run(["umount", str(self.path)], check=True)
        assert self.wait() == 0, self.words()

    def kill(self) -> None:
        """SIGKILL to the daemon, and the dead mount taken away."""
        assert self.daemon is not None
        self.daemon.kill()
        self.daemon.wait()
        subprocess.run(["umount", "-l", str(self.path)], check=True)

    def in_region(self, data: bytes) -> bool:
        """Tell if ``data`` stands somewhere in the region's own bytes."""
        return data in self.region.read_bytes()

    def _close_pipe(self) -> None:
        if self.daemon is not None and self.daemon.stderr is not None:
            self.daemon.stderr.close()

    def close(self) -> None:
        """Leave nothing behind."""
        if is_mounted(self.path):
            subprocess.run(["umount", "-l", str(self.path)], check=False)
        if self.daemon is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.daemon.wait(2)
            if self.daemon.poll() is None:
                self.daemon.kill()
                self.daemon.wait()
        self._close_pipe()
        shutil.rmtree(self.directory, ignore_errors=True)


@contextlib.contextmanager
def child(work: Callable[[], object], uid: int = 0) -> Iterator[int]:
    """A forked process that runs ``work`` as user and group ``uid``; yields its pid."""
    pid = os.fork()
    if not pid:
        status = 1
        try:
            if uid:
                os.setgroups([uid])
                os.setresgid(uid, uid, uid)
                os.setresuid(uid, uid, uid)
            work()
            status = 0
        except BaseException as e:
            print(f"child: {e!r}", file=sys.stderr, flush=True)
        finally:
            os._exit(status)
    try:
        yield pid
    finally:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def run_as(uid: int, work: Callable[[], object]) -> None:
    """Run ``work`` in a child as ``uid``.

    :raises AssertionError: it raised.
    """
    with child(work, uid) as pid:
        _, status = os.waitpid(pid, 0)
    assert status == 0, f"the child failed: {status}"


class Mapper:
    """Another process with a shared mapping of a file, told what to do through pipes."""

    def __init__(self, path: Path, length: int) -> None:
        import multiprocessing

        context = multiprocessing.get_context("fork")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_map_and_obey, args=(theirs, str(path), length), daemon=True
        )
        self._process.start()
        theirs.close()
        self._pipe.recv()

    @property
    def pid(self) -> int:
        """The number of the process."""
        return self._process.pid or 0

    def _ask(self, *words: object) -> object:
        self._pipe.send(words)
        return self._pipe.recv()

    def store(self, offset: int, data: bytes) -> None:
        self._ask("store", offset, data)

    def load(self, offset: int, length: int) -> object:
        return self._ask("load", offset, length)

    def tell(self, word: str) -> None:
        """``msync``, ``fsync``, ``close`` (a descriptor) or ``munmap``."""
        self._ask(word)

    def end(self, *, kill: bool = False) -> None:
        """The process ends, by itself or by SIGKILL; waits for it."""
        if kill:
            self._process.kill()
        elif self._process.is_alive():
            self._pipe.send(("end",))
        self._process.join()
        self._pipe.close()

    def __enter__(self) -> Mapper:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._process.is_alive():
            self.end(kill=True)


def _map_and_obey(pipe: object, path: str, length: int) -> None:
    import mmap
    from multiprocessing.connection import Connection

    assert isinstance(pipe, Connection)
    fd = os.open(path, os.O_RDWR)
    memory = mmap.mmap(fd, length)
    pipe.send("ready")
    while True:
        match pipe.recv():
            case ("store", offset, data):
                memory[offset : offset + len(data)] = data
                pipe.send(None)
            case ("load", offset, count):
                pipe.send(memory[offset : offset + count])
            case ("msync",):
                memory.flush()
                pipe.send(None)
            case ("fsync",):
                os.fsync(fd)
                pipe.send(None)
            case ("close",):
                os.close(fd)
                pipe.send(None)
            case ("munmap",):
                memory.close()
                pipe.send(None)
            case _:
                os._exit(0)
