"""pkernfs exec: its own messages and statuses. What programs see is in plain/test_launch.py."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pkernfs.commands import exec as command_module
from pkernfs.errors import NotSupportedError
from support.command_lines import Command, refused
from support.mounting import run_pkernfs


@pytest.fixture
def unfiltered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No filter: it would be this process' for good; and signals are again as before."""
    monkeypatch.setattr(command_module, "supervise", lambda: None)
    before = {n: signal.getsignal(n) for n in (signal.SIGPIPE, signal.SIGXFSZ)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("unfiltered")
@pytest.mark.parametrize("words", [[], ["--"]])
def test_no_command(command: Command, words: list[str]) -> None:
    refused(command("pkernfs", "exec", *words), 125, "pkernfs", "no COMMAND")


@pytest.mark.usefixtures("unfiltered")
def test_an_option_that_is_none(command: Command) -> None:
    refused(command("pkernfs", "exec", "--what", "ls"), 125, "pkernfs", "--what")


@pytest.mark.usefixtures("unfiltered")
def test_a_command_that_cannot_be_run(command: Command, tmp_path: Path) -> None:
    refused(command("pkernfs", "exec", "no-such-program"), 127, "pkernfs", "no-such-program: ")
    refused(command("pkernfs", "exec", tmp_path / "none"), 127, "pkernfs", "No such file")
    (tmp_path / "text").write_text("no program")
    refused(command("pkernfs", "exec", tmp_path / "text"), 126, "pkernfs", "Permission denied")
    (tmp_path / "text").chmod(0o755)
    refused(command("pkernfs", "exec", tmp_path / "text"), 126, "pkernfs", "Exec format error")
    refused(command("pkernfs", "exec", tmp_path), 126, "pkernfs", "Permission denied")
    refused(command("pkernfs", "exec", "--", ""), 125, "pkernfs", "COMMAND: it is empty")
    refused(command("pkernfs", "exec", "a\nb"), 127, "pkernfs", "a\\nb: cannot be run")


def test_words_are_the_commands_own(monkeypatch: pytest.MonkeyPatch, command: Command) -> None:
    ran: list[list[str]] = []

    def run_command(words: list[str]) -> None:
        ran.append(words)
        raise PermissionError(13, "no")

    monkeypatch.setattr(command_module, "supervise", lambda: None)
    monkeypatch.setattr(command_module, "run_command", run_command)
    for words in (["ls", "--help"], ["--", "ls", "-l", "--", "x"], ["env", "-x", "--version"]):
        command("pkernfs", "exec", *words)
        assert ran.pop() == (words[1:] if words[0] == "--" else words)


def test_a_kernel_that_cannot(monkeypatch: pytest.MonkeyPatch, command: Command) -> None:
    def supervise() -> None:
        raise NotSupportedError("exec: no seccomp user notification in this kernel: too bad")

    monkeypatch.setattr(command_module, "supervise", supervise)
    refused(command("pkernfs", "exec", "true"), 125, "pkernfs", "no seccomp user notification")


def test_an_exec_inside_an_exec_is_refused() -> None:
    inner = [sys.executable, "-c", "import sys; from pkernfs.cli import main; sys.exit(main())"]
    done = run_pkernfs("exec", "--", *inner, "exec", "true")
    assert (done.returncode, done.stdout) == (125, "")
    assert done.stderr == (
        "pkernfs: exec: another supervisor listens to this process: no exec inside an exec\n"
    )


def test_the_status_is_the_commands() -> None:
    assert run_pkernfs("exec", "sh", "-c", "exit 3").returncode == 3
    assert run_pkernfs("exec", "sh", "-c", "kill -USR1 $$").returncode == -signal.SIGUSR1
    done = run_pkernfs("exec", "--", "no-such-program")
    assert done.returncode == 127
    assert done.stderr == "pkernfs: no-such-program: cannot be run: No such file or directory\n"


def test_a_shell_sees_128_and_the_signal() -> None:
    line = f"{sys.executable} -c 'from pkernfs.cli import main; main()' exec -- sh -c 'kill $$'"
    done = subprocess.run(["sh", "-c", f"{line}; echo $?"], capture_output=True, text=True)
    assert done.stdout == f"{128 + signal.SIGTERM}\n"


def test_streams_that_are_closed(tmp_path: Path) -> None:
    """The command gets no descriptor in their place."""
    line = f"{sys.executable} -c 'from pkernfs.cli import main; main()' exec -- ls /proc/self/fd"
    out = tmp_path / "out"
    subprocess.run(["sh", "-c", f"{line} <&- 2>&- >{out}"], check=True)
    assert not {int(fd) for fd in out.read_text().split()} & {2}
    assert os.path.getsize(out)
