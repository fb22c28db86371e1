"""The machine: its facts, pinned command lines, caches.  Starts no file system."""

import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
#: The virtual environment that scripts/setup makes; without it, whatever runs this.
BIN = PROJECT / ".venv" / "bin" if (PROJECT / ".venv").is_dir() else Path(sys.executable).parent
PYTHON = BIN / "python"

_DROP_CACHES = Path("/proc/sys/vm/drop_caches")
_QUIET_MS = 1.0
_QUIET_WINDOW_S = 0.03
_QUIET_SAMPLES = 6


class BenchError(Exception):
    """Something that keeps one figure, or the whole run, from being measured."""


@dataclass(frozen=True)
class Pinning:
    """Which CPU the client and the daemons run on; None leaves it to the scheduler."""

    client: int | None
    daemon: int | None

    @classmethod
    def named(cls, how: str) -> "Pinning":
        """same: one CPU for both, the steadiest; split: one each; none: unpinned."""
        cpus = sorted(os.sched_getaffinity(0))
        if how == "none":
            return cls(None, None)
        if how == "split" and len(cpus) > 1:
            return cls(cpus[-1], cpus[-2])
        return cls(cpus[-1], cpus[-1])

    def client_command(self, command: Iterable[str | Path]) -> list[str]:
        return _pinned(self.client, command)

    def daemon_command(self, command: Iterable[str | Path]) -> list[str]:
        return _pinned(self.daemon, command)


def _pinned(cpu: int | None, command: Iterable[str | Path]) -> list[str]:
    prefix = [] if cpu is None else ["taskset", "-c", str(cpu)]
    return prefix + [str(part) for part in command]


def child_environment() -> dict[str, str]:
    """The environment of all processes measured; byte code is cached, as on a user's machine."""
    environment = dict(os.environ, PYTHONUNBUFFERED="1", LC_ALL="C.UTF-8")
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    environment["PATH"] = f"{BIN}:{environment.get('PATH', os.defpath)}"
    return environment


def cpu_time_ms(pid: int) -> float:
    """CPU time that all threads of a process have had; 0 for one that has gone."""
    total = 0
    try:
        for task in os.listdir(f"/proc/{pid}/task"):
            total += int(Path(f"/proc/{pid}/task/{task}/schedstat").read_text().split()[0])
    except (OSError, IndexError):
        return 0.0
    return total / 1e6


def is_ready(pid: int) -> bool:
    """Tell whether any thread of a process computes or would if it were given a CPU."""
    try:
        for task in os.listdir(f"/proc/{pid}/task"):
            state = Path(f"/proc/{pid}/task/{task}/stat").read_text().rpartition(")")[2].split()[0]
            if state == "R":
                return True
    except OSError:
        pass
    return False


def wait_quiet(pids: Iterable[int], limit_s: float = 60.0) -> bool:
    """Wait until none of the processes computes any more (forgets, for one, come unasked).

    Returns whether that came to pass within the limit. On a busy machine a process may get no CPU
    for a while, so having used none is not enough.
    """
    pids = list(pids)
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        before = sum(map(cpu_time_ms, pids))
        ready = False
        for _sample in range(_QUIET_SAMPLES):
            time.sleep(_QUIET_WINDOW_S / _QUIET_SAMPLES)
            ready = ready or any(map(is_ready, pids))
        if not ready and sum(map(cpu_time_ms, pids)) - before < _QUIET_MS:
            return True
    return False


def can_drop_caches() -> bool:
    return os.access(_DROP_CACHES, os.W_OK)


def drop_caches(what: int) -> None:
    """1: clean page cache, 2: dentries and inodes, 3: both; machine-wide."""
    _DROP_CACHES.write_text(f"{what}\n")


def memory_of(pid: int) -> dict[str, float]:
    """The VmRSS family of a process in MiB."""
    found: dict[str, float] = {}
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        match = re.match(r"(VmHWM|VmRSS|RssAnon|RssFile|RssShmem):\s+(\d+) kB", line)
        if match:
            found[match[1]] = int(match[2]) / 1024
    return found


def facts() -> dict[str, str]:
    """Return the facts about this machine that a reader needs to compare figures."""
    cpuinfo = Path("/proc/cpuinfo").read_text()
    model = re.search(r"model name\s*:\s*(.+)", cpuinfo)
    memory = re.search(r"MemTotal:\s+(\d+)", Path("/proc/meminfo").read_text())
    return {
        "cpu": model[1] if model else platform.machine(),
        "virtual": "yes" if "hypervisor" in cpuinfo else "no",
        "cpus": str(len(os.sched_getaffinity(0))),
        "memory": f"{int(memory[1]) / (1 << 20):.1f} GiB" if memory else "?",
        "kernel": platform.release(),
        "distribution": _distribution(),
        "python": _output([PYTHON, "-c", "import platform; print(platform.python_version())"]),
        "pyfuse3": _installed("pyfuse3"),
        "trio": _installed("trio"),
        "libfuse": _output(["pkg-config", "--modversion", "fuse3"]),
        "load": " ".join(f"{value:.2f}" for value in os.getloadavg()),
        "commit": _output(["git", "-C", PROJECT, "describe", "--always", "--dirty"]),
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    }


def _distribution() -> str:
    release = Path("/etc/os-release")
    match = re.search(r'PRETTY_NAME="(.+)"', release.read_text()) if release.exists() else None
    return match[1] if match else "?"


def _installed(package: str) -> str:
    program = f"from importlib import metadata; print(metadata.version({package!r}))"
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return _output([PYTHON, "-c", program])


def _output(command: list[str | Path]) -> str:
    if shutil.which(str(command[0])) is None:
        return "?"
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "?"
