"""The file systems that are compared: how each is started and stopped, and what it is asked.

Every system is used as it comes out of the box, but for the tuned floor.  Workloads see a
directory and, for the FUSE ones, the daemon's process.
"""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, TextIO

from .machine import BIN, PYTHON, BenchError, Pinning, child_environment, cpu_time_ms

FLOOR = Path(__file__).with_name("floor.py")
CACHE = Path(os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache"))) / "pkernfs-bench"
PREFIX = "pkernfs-bench."
PARENT = Path("/dev/shm")
_START_LIMIT_S = 30.0
_STOP_LIMIT_S = 30.0


def run(command: Sequence[str | Path], timeout_s: float = 120) -> str:
    """Run a command to its end and return its output; BenchError with its last line if it fails.

    The output goes through files, for a pipe would stay open in a daemon left in the background.
    """
    plain = [str(part) for part in command]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        try:
            done = subprocess.run(
                plain,
                stdout=out,
                stderr=err,
                env=child_environment(),
                timeout=timeout_s,
                stdin=subprocess.DEVNULL,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise BenchError(f"{plain[0]}: {error}") from None
        output, message = (_contents(stream) for stream in (out, err))
    if done.returncode:
        last = (message.strip() or output.strip() or "no message").splitlines()[-1]
        raise BenchError(f"{Path(plain[0]).name}: status {done.returncode}: {last}")
    return output


def _contents(stream: TextIO) -> str:
    stream.seek(0)
    return stream.read()


def is_mounted(path: Path) -> bool:
    return str(path) in {
        line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()
    }


def unmount(path: Path) -> None:
    """Unmount, by force in the end: abort the FUSE connection, then detach."""
    for _attempt in range(20):
        if not is_mounted(path):
            return
        if subprocess.run(["umount", str(path)], capture_output=True).returncode == 0:
            return
        time.sleep(0.1)
    abort_connection(path)
    subprocess.run(["umount", "-l", str(path)], capture_output=True)


def abort_connection(path: Path) -> None:
    """Fail every request of the FUSE mount that holds a path: its daemon does not answer."""
    mounts = [line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    holding = [m for m in mounts if path.is_relative_to(m[4])]
    minor = max(holding, key=lambda fields: len(fields[4]))[2].split(":")[1]
    with contextlib.suppress(OSError):
        Path(f"/sys/fs/fuse/connections/{minor}/abort").write_text("1")


def stop_process(process: subprocess.Popen[bytes]) -> None:
    """Wait for a daemon whose mount is gone; ask it, then kill it."""
    for request in (0, signal.SIGTERM, signal.SIGKILL):
        process.send_signal(request)  # 0 only looks
        try:
            process.wait(_STOP_LIMIT_S / 3)
            return
        except subprocess.TimeoutExpired:
            continue


class Scratch:
    """The run's directory in /dev/shm, with a tmpfs in huge pages for regions."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}.", dir=PARENT))
        self.regions = self.path / "regions"
        self.regions.mkdir()
        # 2 MiB pages, as a region on hugetlbfs has; sparse, so its limit is only a limit.
        run(["mount", "-t", "tmpfs", "-o", "huge=always,size=90%", "pkernfs-bench", self.regions])

    def directory(self, name: str) -> Path:
        path = self.path / name
        path.mkdir(exist_ok=True)
        return path

    def close(self) -> None:
        remove_scratch(self.path)


def remove_scratch(path: Path) -> None:
    """Unmount whatever is mounted below a scratch directory and remove it."""
    mounts = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
    for mountpoint in reversed([m for m in mounts if m.startswith(f"{path}/")]):
        unmount(Path(mountpoint))
    shutil.rmtree(path, ignore_errors=True)


def remove_stale_scratch() -> None:
    """Clean up after runs that were killed: their process id is in the directory's name."""
    for path in PARENT.glob(f"{PREFIX}*"):
        match = re.match(rf"{re.escape(PREFIX)}(\d+)\.", path.name)
        if match and not Path(f"/proc/{match[1]}").exists():
            remove_scratch(path)


class System:
    """One file system under test.  After start() its directory is ``root``."""

    name: ClassVar[str]
    #: Stores data well enough for the data workloads.
    data: ClassVar[bool] = True
    #: One of the file systems that pkernfs has to be ahead of.
    peer: ClassVar[bool] = False

    def __init__(self, scratch: Scratch, pinning: Pinning) -> None:
        self.scratch = scratch
        self.pinning = pinning
        self.process: subprocess.Popen[bytes] | None = None
        self.failed: str | None = None
        #: Steps that have failed and are not tried again.
        self.broken: set[str] = set()
        self.log = scratch.path / f"{self.name}.log"
        self.root = scratch.path / f"mnt-{self.name}"

    def missing(self) -> str | None:
        """Why this system cannot run here, or None."""
        return None

    def command(self) -> list[str | Path]:
        """The daemon's command line, to be run in the foreground."""
        raise NotImplementedError

    def start(self) -> None:
        """Make it and mount it; BenchError if it does not come up."""
        self.root.mkdir(exist_ok=True)
        self.start_daemon()

    def start_daemon(self) -> None:
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                self.pinning.daemon_command(self.command()),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=child_environment(),
            )
        deadline = time.monotonic() + _START_LIMIT_S
        while not is_mounted(self.root):
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                self.failed = f"{self.name} did not mount: {self.last_words()}"
                raise BenchError(self.failed)
            time.sleep(0.02)
        self.root.stat()  # answers

    def renew(self) -> bool:
        """Mount the same files anew, so that kernel and daemon have seen none of them.

        Returns False, having done nothing, for a system whose files would be gone.
        """
        return False

    def running(self) -> bool:
        return self.process is None or self.process.poll() is None

    def last_words(self) -> str:
        text = self.log.read_text(errors="replace").strip() if self.log.exists() else ""
        return text.splitlines()[-1] if text else "no message"

    def stop(self) -> None:
        self.stop_daemon()
        shutil.rmtree(self.backing, ignore_errors=True)

    def stop_daemon(self) -> None:
        unmount(self.root)
        if self.process is not None:
            stop_process(self.process)
            self.process = None

    @property
    def backing(self) -> Path:
        """Directory on tmpfs for a file system that stores nothing itself."""
        return self.scratch.path / f"back-{self.name}"

    @property
    def pid(self) -> int | None:
        return self.process.pid if self.process is not None else None

    def requests(self) -> int | None:
        """Replies the daemon has written so far (its write system calls); None without one."""
        if self.pid is None:
            return None
        match = re.search(r"syscw: (\d+)", Path(f"/proc/{self.pid}/io").read_text())
        return int(match[1]) if match else None

    def cpu_ms(self) -> float:
        return cpu_time_ms(self.pid) if self.pid is not None else 0.0


class Tmpfs(System):
    """The kernel's own, as Debian mounts it."""

    name = "tmpfs"

    def start(self) -> None:
        self.root.mkdir(exist_ok=True)
        run(["mount", "-t", "tmpfs", "pkernfs-bench", self.root])


class Floor(System):
    """An empty pyfuse3 file system with pyfuse3's defaults."""

    name = "floor"
    switches: ClassVar[list[str]] = []

    def command(self) -> list[str | Path]:
        return [PYTHON, FLOOR, self.root, *self.switches]


class TunedFloor(Floor):
    """The same with every lever pulled; the yardstick of most targets."""

    name = "floor-tuned"
    switches: ClassVar[list[str]] = [
        *("--timeout", "3600", "--tasks", "1", "--poll-us", "0", "--bdi"),
    ]


class Pkernfs(System):
    """pkernfs on a file region in huge pages."""

    name = "pkernfs"
    region_size = 4 << 30

    @property
    def region(self) -> Path:
        return self.scratch.regions / "region"

    def missing(self) -> str | None:
        absent = [n for n in ("mkfs.pkernfs", "pkernfs") if not (BIN / n).exists()]
        return f"{' and '.join(absent)} not in {BIN}: run scripts/setup" if absent else None

    def command(self) -> list[str | Path]:
        return [BIN / "pkernfs", "mount", self.region, self.root, "-f"]

    def start(self) -> None:
        run([BIN / "mkfs.pkernfs", "-s", str(self.region_size), self.region])
        super().start()

    def renew(self) -> bool:
        self.stop_daemon()
        self.start_daemon()
        return True

    def stop(self) -> None:
        super().stop()
        self.region.unlink(missing_ok=True)


class _Example(System):
    """One of pyfuse3's example programs, from its source distribution."""

    file: ClassVar[str]
    peer = True

    def missing(self) -> str | None:
        try:
            fetch_examples()
        except BenchError as error:
            return str(error)
        return None

    def program(self) -> Path:
        return fetch_examples() / self.file


class ExampleTmpfs(_Example):
    """examples/tmpfs.py: sqlite in memory; rewrites a whole file at every write."""

    name = "pyfuse3-tmpfs"
    file = "tmpfs.py"
    data = False

    def command(self) -> list[str | Path]:
        return [PYTHON, self.program(), self.root]


class ExamplePassthrough(_Example):
    """examples/passthroughfs.py over tmpfs."""

    name = "pyfuse3-passthrough"
    file = "passthroughfs.py"

    def command(self) -> list[str | Path]:
        self.backing.mkdir()
        return [PYTHON, self.program(), self.backing, self.root]


class _Packaged(System):
    """A FUSE file system written in C or C++, from a Debian package, over tmpfs."""

    peer = True

    def missing(self) -> str | None:
        if shutil.which(self.name) is None:
            return f"{self.name} is not installed: apt-get install {self.name}"
        return None

    def command(self) -> list[str | Path]:
        self.backing.mkdir()
        return [self.name, "-f", self.backing, self.root]


class Bindfs(_Packaged):
    name = "bindfs"


class Mergerfs(_Packaged):
    name = "mergerfs"


#: In the order in which a round visits them: what is compared directly is side by side.
SYSTEMS: list[type[System]] = [
    *(Tmpfs, Floor, TunedFloor, Pkernfs),
    *(ExampleTmpfs, ExamplePassthrough, Bindfs, Mergerfs),
]


def fetch_examples() -> Path:
    """The examples directory of the installed pyfuse3's source distribution, from the cache."""
    program = "from importlib import metadata; print(metadata.version('pyfuse3'))"
    version = run([PYTHON, "-c", program]).strip()
    directory = CACHE / f"pyfuse3-{version}" / "examples"
    if not (directory / "tmpfs.py").exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        requirement = ["--no-deps", "--no-binary", "pyfuse3", f"pyfuse3=={version}"]
        run([PYTHON, "-m", "pip", "download", "-q", "-d", CACHE, *requirement])
        with tarfile.open(CACHE / f"pyfuse3-{version}.tar.gz") as archive:
            archive.extractall(CACHE, filter="data")
    return directory


def install_peers() -> None:
    """apt-get install what Debian has; a failure shows up later as a missing system."""
    absent = [c.name for c in SYSTEMS if issubclass(c, _Packaged) and not shutil.which(c.name)]
    if absent and shutil.which("apt-get") and os.geteuid() == 0:
        with contextlib.suppress(BenchError):
            run(["apt-get", "install", "-y", "-qq", *absent], timeout_s=300)


def daemon_of(region: Path) -> int:
    """The process that serves a region: the youngest whose command line names it."""
    found = [pid for pid in _pids() if str(region) in _command_line(pid)]
    if not found:
        raise BenchError(f"no daemon found for {region}")
    return max(found, key=_start_time)


def _pids() -> list[int]:
    return [int(p) for p in os.listdir("/proc") if p.isdigit() and int(p) != os.getpid()]


def _command_line(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")
    except OSError:
        return []


def _start_time(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except OSError:
        return 0


def wait_gone(pid: int, limit_s: float = _STOP_LIMIT_S) -> None:
    """Wait for a background daemon to end after its unmount; kill it after the limit."""
    deadline = time.monotonic() + limit_s
    while Path(f"/proc/{pid}").exists():
        if time.monotonic() > deadline:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
            return
        time.sleep(0.005)
