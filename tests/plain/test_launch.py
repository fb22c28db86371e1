"""Whole programs below a supervisor: what they see of a file, of us, and of signals."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from support.mounting import MIB
from support.pooled import Pooled
from support.supervised import NATIVE, PLAIN, Files, make_files

SUPPORT = Path(__file__).parents[1] / "support"
WHAT = NATIVE.decode().strip()


@pytest.fixture
def files(tmp_path: Path) -> Files:
    """A file with a segment."""
    return make_files(tmp_path)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the compiled programs."""
    directory = tmp_path_factory.mktemp("programs")
    for name, words in (("opener", ["-static", "-pthread"]), ("bare", ["-static", "-nostdlib"])):
        source = SUPPORT / f"{name}.c"
        command = [
            "gcc",
            "-O1",
            "-Wall",
            "-Werror",
            *words,
            "-o",
            str(directory / name),
            str(source),
        ]
        subprocess.run(command, check=True)
    return directory


def wait_until(condition: Callable[[], object], what: str) -> None:
    """Wait for something that another process does."""
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, f"not in 20 s: {what}"
        time.sleep(0.005)


def name_of(fd: int) -> str:
    """A name of a descriptor that sh can redirect to: by number it takes those of one digit."""
    return f"/proc/self/fd/{fd}"


def supervisors(files: Files) -> list[int]:
    """Keeper and supervisor of the directory's programs, the keeper first; zombies do not count."""
    found: dict[int, int] = {}
    for name in os.listdir("/proc"):
        try:
            if Path(f"/proc/{name}/comm").read_text() != "pkernfs-exec\n":
                continue
            if str(files.directory) in Path(f"/proc/{name}/cmdline").read_text():
                found[int(name)] = parent(int(name))
        except OSError:
            continue
    return sorted(found, key=lambda pid: found[pid] in found)


def parent(pid: int) -> int:
    """The parent of a process.

    :raises OSError: it has ended.
    """
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def gone(files: Files) -> None:
    """Wait for the end of the supervisor."""
    wait_until(lambda: not supervisors(files), "the supervisor ends")


def test_a_static_program_uses_the_segment_as_memory(files: Files, compiled: Path) -> None:
    done = files.run(compiled / "opener", files.plain)
    assert done.stdout.splitlines() == [
        f"open: {WHAT}",
        "memory: stored by a mapping",
        f"/proc/self/fd: {WHAT}",
        f"openat2: {WHAT}",
        f"O_CREAT: {WHAT}",
        f"thread: {WHAT}",
        f"child: {WHAT}",
        f"passed on: {WHAT}",
        f"openat: {WHAT}",
    ]
    assert (done.returncode, done.stderr) == (0, "")
    native, plain = files.native.read_bytes(), files.plain.read_bytes()
    assert native[4096:].startswith(b"stored by a mapping\0")
    assert not any(native[8192:]), "a private mapping"
    assert plain == PLAIN.ljust(len(plain), b"\0")
    gone(files)


def test_a_program_without_a_library(files: Files, compiled: Path) -> None:
    done = files.run(compiled / "bare", files.plain)
    assert (done.returncode, done.stdout) == (0, NATIVE.decode()[:20])


def test_a_program_with_a_loader_of_its_own(files: Files, tmp_path: Path) -> None:
    """Not the system's, or run by name: no library of ours is in the program, so none is missed."""
    loader, program = tmp_path / "loader", tmp_path / "opener"
    systems = Path("/lib64/ld-linux-x86-64.so.2")
    shutil.copy(systems, loader)
    words = ["-O1", "-pthread", f"-Wl,--dynamic-linker={loader}", "-o", str(program)]
    subprocess.run(["gcc", *words, str(SUPPORT / "opener.c")], check=True)
    done = files.run(program, files.plain)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"passed on: {WHAT}" in done.stdout
    assert files.native.read_bytes()[4096:].startswith(b"stored by a mapping\0")
    done = files.run(systems, shutil.which("head"), "-n1", files.plain)
    assert (done.stdout, done.stderr) == (NATIVE.decode(), "")


def test_a_relative_path_and_a_child_that_goes_elsewhere(files: Files) -> None:
    script = "cd plain && head -n1 ram && (cd .. && head -n1 plain/ram) && head -n1 < ../plain/ram"
    done = files.run("sh", "-c", script, cwd=files.directory)
    assert done.stdout.splitlines() == [WHAT] * 3


@pytest.mark.parametrize("flag", ["O_TRUNC", "O_CREAT | os.O_EXCL", "O_PATH"])
def test_what_is_the_kernels(files: Files, flag: str) -> None:
    program = f"import os; os.open({str(files.plain)!r}, os.O_RDWR | os.{flag})"
    done = files.run(sys.executable, "-I", "-S", "-c", program)
    assert ("FileExistsError" in done.stderr) == ("O_EXCL" in flag)
    assert files.native.read_bytes().startswith(NATIVE)
    assert (files.plain.stat().st_size == 0) == (flag == "O_TRUNC")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_another_user_gets_what_its_rights_open(files: Files) -> None:
    for directory in (*files.plain.parents, files.native.parent):
        directory.chmod(directory.stat().st_mode | 0o1)
    as_nobody = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
    for mode, expected in ((0o644, NATIVE), (0o600, PLAIN)):
        files.native.chmod(mode)
        done = files.run(*as_nobody, "head", "-n1", files.plain)
        assert done.stdout.encode() == expected
    files.plain.chmod(0o600)
    files.native.chmod(0o644)
    done = files.run(*as_nobody, "head", "-n1", files.plain)
    assert "Permission denied" in done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_an_ordinary_user_needs_no_privilege(files: Files) -> None:
    for directory in (*files.plain.parents, files.native.parent):
        directory.chmod(directory.stat().st_mode | 0o5)
    os.chown(files.plain, 65534, 65534)
    command = f"{Path(sys.executable).resolve()} -c pass"
    as_nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    if subprocess.run([*as_nobody, *command.split()], capture_output=True).returncode:
        pytest.skip("this interpreter is root's alone")
    show = f"head -n1 {files.plain}; grep NoNewPrivs /proc/self/status"
    done = subprocess.run(
        [*as_nobody, *files.command("sh", "-c", show)], capture_output=True, text=True, timeout=30
    )
    assert done.stdout.splitlines() == [WHAT, "NoNewPrivs:\t1"], done.stderr


def test_the_command_is_the_process_that_was_started(files: Files) -> None:
    """Number, parent, session, descriptors, terminal, status: nothing is between."""
    read_end, write_end = os.pipe()
    script = f"echo $$ $PPID; cat; ls /proc/$$/fd; echo told >{name_of(write_end)}; kill -TERM $$"
    command = files.command("sh", "-c", script)
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, pass_fds=[write_end]
    ) as process:
        os.close(write_end)
        out, _ = process.communicate("from its standard input\n", timeout=20)
    first, second, *rest = out.splitlines()
    assert first == f"{process.pid} {os.getpid()}"
    assert second == "from its standard input"
    assert process.returncode == -signal.SIGTERM
    assert sorted(map(int, rest)) == [0, 1, 2, write_end]
    with open(read_end) as pipe:
        assert pipe.read() == "told\n", "and nobody else holds its pipe open"
    gone(files)


def test_signals_are_as_a_program_expects_them(files: Files) -> None:
    done = files.run("grep", "-E", "SigIgn|SigBlk|NoNewPrivs", "/proc/self/status")
    values = dict(line.split(":\t") for line in done.stdout.splitlines())
    mask = 1 << signal.SIGPIPE - 1 | 1 << signal.SIGXFSZ - 1 | 1 << signal.SIGINT - 1
    assert not int(values["SigIgn"], 16) & mask
    assert not int(values["SigBlk"], 16)
    assert values["NoNewPrivs"] == ("0" if os.geteuid() == 0 else "1")


def test_a_program_that_stays_is_served_on(files: Files) -> None:
    """The command ends; what it has started in the background does not."""
    read_end, write_end = os.pipe()
    go = files.directory / "go"
    script = f"(read x <{go}; head -n1 {files.plain} >{name_of(write_end)}) & exit 3"
    os.mkfifo(go)
    done = subprocess.run(files.command("sh", "-c", script), pass_fds=[write_end], timeout=20)
    os.close(write_end)
    assert done.returncode == 3
    assert len(supervisors(files)) == 2
    go.write_text("go\n")
    with open(read_end, "rb") as pipe:
        assert pipe.read() == NATIVE
    gone(files)


@pytest.mark.parametrize(
    ("patch", "expected"),
    [
        ("launch.can_be_read = lambda pid: False", "exec: a supervisor may not read this process"),
        ("launch.Listener.can_give = lambda listener: False", "exec: this kernel cannot answer"),
        ("launch.os.setsid = lambda: 1 / 0", "exec: the supervisor ended before it was ready"),
    ],
)
def test_a_supervisor_that_cannot_start(patch: str, expected: str) -> None:
    """The process goes on without one, and says why; nothing of it waits."""
    program = (
        "from pkernfs.errors import PkernfsError\n"
        f"from pkernfs.plain import launch\n{patch}\n"
        "try: launch.supervise()\n"
        "except PkernfsError as error: print(error)\n"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    assert done.stdout.startswith(expected)
    assert done.returncode == 0


class Reader:
    """``sh`` below a supervisor: it prints the file's first line for each line that it gets."""

    def __init__(self, files: Files) -> None:
        script = f"while read x; do head -n1 {files.plain}; done"
        self.process = subprocess.Popen(
            files.command("sh", "-c", script),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self) -> str:
        """One line of the file."""
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip()

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *exc: object) -> None:
        self.process.communicate(timeout=20)


@pytest.mark.parametrize("which", ["keeper", "supervisor"])
def test_one_of_the_two_may_be_killed(files: Files, which: str) -> None:
    with Reader(files) as reader:
        assert reader.ask() == WHAT
        keeper, supervisor = supervisors(files)
        killed = keeper if which == "keeper" else supervisor
        os.kill(killed, signal.SIGKILL)
        assert reader.ask() == WHAT
        wait_until(lambda: killed not in supervisors(files), "it is gone")
        assert reader.ask() == WHAT
        assert len(supervisors(files)) == (1 if which == "keeper" else 2)
    assert reader.process.returncode == 0
    gone(files)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT])
def test_signals_do_not_end_them(files: Files, number: signal.Signals) -> None:
    """systemd sends one to each process of a service that it stops; programs still open files."""
    with Reader(files) as reader:
        assert reader.ask() == WHAT
        before = supervisors(files)
        for pid in before:
            os.kill(pid, number)
        assert reader.ask() == WHAT
        assert supervisors(files) == before
    gone(files)


def test_they_leave_the_callers_directory_and_session(files: Files) -> None:
    with Reader(files) as reader:
        assert reader.ask() == WHAT
        for pid in supervisors(files):
            assert os.readlink(f"/proc/{pid}/cwd") == "/"
            assert os.getsid(pid) not in (os.getsid(0), reader.process.pid)
            open_files = {os.readlink(fd) for fd in Path(f"/proc/{pid}/fd").iterdir()}
            assert not [name for name in open_files if name.startswith(("pipe:", "/tmp"))]
        assert Path(f"/proc/{reader.process.pid}/task").exists()
    gone(files)


# ------------------------------------------------------------------------------- real mounts

_PKERNFS = [sys.executable, "-c", "import sys; from pkernfs.cli import main; sys.exit(main())"]
#: Prints, for each line that it gets, what it has opened by the name that is its argument.
_LOOK = """\
import os, sys
for _ in sys.stdin:
    try:
        fd = os.open(sys.argv[1], os.O_RDWR)
        print(os.readlink(f"/proc/self/fd/{fd}"), flush=True)
        os.close(fd)
    except OSError as error:
        print(error.strerror, flush=True)
"""


@pytest.mark.fuse
def test_a_real_segment_is_the_programs_memory(compiled: Path) -> None:
    with Pooled() as mounted:
        file = mounted.path / "ram"
        file.touch()
        os.truncate(file, 4 * MIB)
        with open(file, "r+b") as written:
            written.write(NATIVE)
        done = subprocess.run(
            [*_PKERNFS, "exec", "--", compiled / "opener", file],
            capture_output=True,
            text=True,
            timeout=30,
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert f"passed on: {WHAT}" in done.stdout
        with open(file, "rb") as seen:
            seen.seek(4096)
            assert seen.read(20) == b"stored by a mapping\0"
        (mounted.path / "small").write_bytes(NATIVE)
        command = [*_PKERNFS, "exec", "cat", str(mounted.path / "small")]
        assert subprocess.check_output(command, timeout=30) == NATIVE, "a file without a segment"


@pytest.mark.fuse
def test_the_daemon_may_come_and_go() -> None:
    with Pooled() as mounted:
        file = mounted.path / "ram"
        file.touch()
        os.truncate(file, 4 * MIB)
        native = mounted.pool / "segment-1"
        command = [*_PKERNFS, "exec", sys.executable, "-c", _LOOK, str(file)]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as process:

            def seen() -> str:
                assert process.stdin
                assert process.stdout
                process.stdin.write("\n")
                process.stdin.flush()
                return process.stdout.readline().strip()

            assert seen() == str(native)
            assert mounted.daemon
            mounted.daemon.kill()
            mounted.daemon.wait()
            assert seen() == "Transport endpoint is not connected"
            mounted.kill()
            assert seen() == "No such file or directory"
            mounted.start()
            assert seen() == str(native)
            process.communicate(timeout=20)


@pytest.mark.crash
def test_killed_again_and_again_under_load(files: Files) -> None:
    """No open fails, hangs, or reads anything but one of the two files."""
    program = (
        "import sys\n"
        "for _ in range(3000):\n"
        f"    with open({str(files.plain)!r}, 'rb') as f: print(f.readline().decode(), end='')\n"
    )
    with subprocess.Popen(
        files.command(sys.executable, "-c", program), stdout=subprocess.PIPE, text=True
    ) as process:
        killed = 0
        assert process.stdout
        lines = []
        for line in process.stdout:
            lines.append(line.strip())
            if len(lines) % 30 == 0 and len(both := supervisors(files)) == 2:
                os.kill(both[1], signal.SIGKILL)
                killed += 1
    assert process.returncode == 0
    assert len(lines) == 3000
    assert set(lines) <= {WHAT, PLAIN.decode().strip()}
    assert killed > 30
    assert lines.count(WHAT) >= 3000 - killed
    gone(files)
