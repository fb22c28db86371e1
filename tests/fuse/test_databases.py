"""PostgreSQL as a client of a real mount, below ``pkernfs exec`` and without it."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pkernfs.host.sysroot import HOST
from support.mounted_pool import GRANULE, MountedPool, has_segment, native_of
from support.mounting import MIB, run_pkernfs, wait_until

pytestmark = pytest.mark.fuse

USER = "postgres"
#: PostgreSQL's own files are as small as they may be: one of its log is one unit of a segment.
SETTINGS = {
    "listen_addresses": "",
    "shared_buffers": "4MB",
    "max_connections": "10",
    "dynamic_shared_memory_type": "mmap",  # files of the mount, too
    "autovacuum": "off",
    "min_wal_size": "16MB",
    "max_wal_size": "16MB",
}
_EXEC = [sys.executable, "-c", "from pkernfs.cli import main; main()", "exec", "--"]
_BALANCES = "select md5(string_agg(aid || ':' || abalance, ',' order by aid)) from pgbench_accounts"


def _programs() -> Path | None:
    """The programs of the newest PostgreSQL that Debian has installed here."""
    found = Path("/usr/lib/postgresql").glob("*/bin/initdb")
    return max(
        (path.parent for path in found), key=lambda path: int(path.parent.name), default=None
    )


class Cluster:
    """A PostgreSQL in a directory of a mount.

    :param below: what its server is started with: ``pkernfs exec``, or nothing
    """

    def __init__(self, programs: Path, data: Path, sockets: Path, below: list[str]) -> None:
        self.data = data
        self.acknowledged = sockets / "acknowledged"
        self._programs = programs
        self._sockets = sockets
        self._below = below
        self._server: subprocess.Popen[bytes] | None = None

    def command(self, name: str, *words: object) -> list[str]:
        """The command line of one of PostgreSQL's programs, as its user."""
        to_user = ["setpriv", f"--reuid={USER}", f"--regid={USER}", "--init-groups"]
        return [*to_user, str(self._programs / name), *map(str, words)]

    def run(self, name: str, *words: object) -> str:
        """Run one of PostgreSQL's programs."""
        command = self.command(name, *words)
        done = subprocess.run(command, capture_output=True, text=True, cwd="/", timeout=60)
        assert done.returncode == 0, (name, done.stdout, done.stderr)
        return done.stdout

    def ask(self, question: str) -> str:
        """What psql answers."""
        return self.run("psql", "-h", self._sockets, "-Atqc", question, USER).strip()

    def bench(self, *words: object) -> None:
        """Run pgbench."""
        self.run("pgbench", "-h", self._sockets, *words, USER)

    def start(self) -> None:
        """Start the server, and wait until it answers; it has recovered then."""
        settings = [word for item in SETTINGS.items() for word in ("-c", "=".join(item))]
        words = ["-D", self.data, "-k", self._sockets, *settings]
        with (self._sockets / "log").open("ab") as log:
            self._server = subprocess.Popen(
                [*self._below, *self.command("postgres", *words)], cwd="/", stdout=log, stderr=log
            )
        ready = self.command("pg_isready", "-q", "-h", self._sockets)
        wait_until(lambda: self._has_ended() or not subprocess.call(ready), "the server")
        assert not self._has_ended(), (self._sockets / "log").read_text()

    def _has_ended(self) -> bool:
        return self._server is None or self._server.poll() is not None

    def stop(self) -> None:
        """A fast shutdown."""
        assert self._server is not None
        self._server.send_signal(signal.SIGINT)
        assert self._server.wait(20) == 0

    def processes(self) -> list[int]:
        """The server, and what it has started."""
        assert self._server is not None
        of_server = [pid for pid in map(int, filter(str.isdigit, HOST.list("proc")))
                     if _parent(pid) == self._server.pid]  # fmt: skip
        return [self._server.pid, *of_server]

    def kill(self) -> None:
        """SIGKILL to the server; wait for the end of what it has started, which sees that."""
        if self._has_ended():
            return
        assert self._server is not None
        self._server.send_signal(signal.SIGSTOP)  # it starts nothing from here on
        there = self.processes()
        self._server.kill()
        self._server.wait()
        wait_until(lambda: not any(map(_parent, there)), "the end of its processes")

    @contextlib.contextmanager
    def inserting(self) -> Iterator[None]:
        """A client inserts numbers, and writes down each that the server has promised to keep."""
        line = "insert into numbers select coalesce(max(n), 0) + 1 from numbers returning n;\n"
        command = self.command("psql", "-h", self._sockets, "-Atq", USER)
        with self.acknowledged.open("wb") as out:
            client = subprocess.Popen(
                command, cwd="/", stdin=subprocess.PIPE, stdout=out, stderr=subprocess.DEVNULL
            )
        assert client.stdin is not None
        os.set_blocking(client.stdin.fileno(), False)
        with contextlib.suppress(BrokenPipeError, BlockingIOError):
            client.stdin.raw.write(line.encode() * 700)  # type: ignore[attr-defined]
        yield
        with contextlib.suppress(BrokenPipeError):
            client.stdin.close()
        client.wait(20)

    def promised(self) -> int:
        """The last number that was written down; 0: none yet."""
        lines = self.acknowledged.read_bytes().split(b"\n")
        return int(lines[-2]) if len(lines) > 1 else 0

    def log_files(self) -> list[Path]:
        """The files of PostgreSQL's log of changes, the last one last."""
        return sorted(path for path in (self.data / "pg_wal").iterdir() if path.is_file())

    def held(self) -> set[str]:
        """What its processes have open, by the names that the kernel gives."""
        found = set()
        for pid in self.processes():
            for fd in HOST.list(f"proc/{pid}/fd"):
                with contextlib.suppress(OSError):
                    found.add(os.readlink(f"/proc/{pid}/fd/{fd}"))
        return found


def _parent(pid: int) -> int:
    """The parent of a process; 0: it has ended."""
    text = (HOST.find(f"proc/{pid}/stat") or "").rpartition(")")[2].split()
    return int(text[1]) if text and text[0] != "Z" else 0


@pytest.fixture
def clusters() -> Iterator[tuple[MountedPool, list[Cluster]]]:
    """A mount, and two equal clusters in it: one to be run below exec, and one without."""
    programs = _programs()
    if programs is None:
        missing = "no PostgreSQL (scripts/setup --databases)"
        if "fuse" in os.environ.get("PKERNFS_REQUIRE", "").split(","):
            pytest.fail(f"fuse is required (PKERNFS_REQUIRE): {missing}")
        pytest.skip(missing)
    user = pwd.getpwnam(USER)
    with MountedPool(192 * MIB, "allow_other") as mounted, contextlib.ExitStack() as ends:
        made = []
        for name, below in (("below", _EXEC), ("beside", [])):
            sockets = mounted.directory / f"{name}.sockets"
            sockets.mkdir()
            os.chown(sockets, user.pw_uid, user.pw_gid)
            made.append(Cluster(programs, mounted.path / name, sockets, below))
            ends.callback(made[-1].kill)
        first, second = made
        first.data.mkdir()
        os.chown(first.data, user.pw_uid, user.pw_gid)
        words = ("--no-sync", "--data-checksums", "--wal-segsize=2", "--auth=trust", "--no-locale")
        first.run("initdb", "-D", first.data, *words)
        first.start()
        first.bench("--initialize", "--quiet")
        first.ask("create table numbers (n int primary key)")
        first.stop()
        subprocess.run(["cp", "-a", first.data, second.data], check=True)
        yield mounted, made


def give_segments(cluster: Cluster) -> None:
    """Segments for the files of the log, and for the largest table, which does not end with it."""
    table = max((cluster.data / "base").glob("*/*"), key=lambda path: path.stat().st_size)
    assert table.stat().st_size > GRANULE
    assert table.stat().st_size % GRANULE
    for path in [*cluster.log_files(), table]:
        done = run_pkernfs("segment", str(path), "on")
        assert done.returncode == 0, done.stderr
        assert has_segment(path)


def test_postgresql(clusters: tuple[MountedPool, list[Cluster]]) -> None:
    """Below exec it works as it does without: also with segments, and when it is killed.

    Files of its log are segments, which its processes have open. A table that is one grows.
    """
    mounted, (below, beside) = clusters
    give_segments(below)
    balances = []
    for cluster in (below, beside):
        cluster.start()
        cluster.bench("--client=2", "--transactions=400", "--random-seed=7", "--no-vacuum")
        balances.append(cluster.ask(_BALANCES))
    assert balances[0] == balances[1]
    natives = {str(native_of(path)) for path in below.log_files() if has_segment(path)}
    assert natives & below.held()
    for cluster in (below, beside):
        with cluster.inserting():
            wait_until(lambda c=cluster: c.promised() > 100, "some numbers")  # type: ignore[misc]
            cluster.kill()
        cluster.start()
        promised = cluster.promised()
        count, last = map(int, cluster.ask("select count(*), max(n) from numbers").split("|"))
        assert count == last
        assert promised <= last <= promised + 1
        assert cluster.ask(_BALANCES) == balances[0]
        cluster.stop()
    mounted.unmount()
    mounted.start()
    for cluster in (below, beside):
        cluster.run("pg_checksums", "--check", "-D", cluster.data)
        cluster.start()
        assert cluster.ask(_BALANCES) == balances[0]
        cluster.stop()
        shutil.rmtree(cluster.data)
    wait_until(lambda: not mounted.segments(), "no segments")
