"""scripts/lib/programs: programs that succeed, fail, hang, or are not there; ends by signals."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

import pytest

import programs


class ProgramError(Exception):
    pass


def test_what_a_program_wrote(tmp_path: Path) -> None:
    said = programs.output("sh", "-c", "pwd; echo not this >&2", error=ProgramError, cwd=tmp_path)
    assert said == f"{tmp_path}\n"
    done = programs.run(
        "sh", "-c", "cat; echo err >&2; exit 3", error=ProgramError, input="in\n", merge=True
    )
    assert (done.returncode, done.stdout) == (3, "in\nerr\n")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (("sh", "-c", "echo one >&2; echo two >&2; exit 2"), "exit status 2: two"),
        (("sh", "-c", "echo out; exit 1"), "exit status 1: out"),
        (("false",), "false: exit status 1: no message"),
        (("sleep", "60"), "sleep 60: not done in 0.1 s"),
        (("/none",), "/none: command not found: install it"),
        (("false", *"abcdefghij"), "false a b c d e f g: exit status 1: no message"),
    ],
)
def test_failures(command: tuple[str, ...], message: str) -> None:
    with pytest.raises(ProgramError) as failed:
        programs.output(*command, error=ProgramError, advice="install it", seconds=0.1)
    assert str(failed.value).endswith(message)


def test_an_end_by_one_signal_after_the_other() -> None:
    stubborn = ["sh", "-c", "trap '' TERM; echo ready; while :; do sleep 0.01; done"]
    with subprocess.Popen(stubborn, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert not programs.end(process, signal.SIGTERM, seconds=0.1)
        assert programs.end(process, signal.SIGTERM, signal.SIGKILL, seconds=0.1)
        assert process.returncode == -signal.SIGKILL
        assert programs.end(process, seconds=0.1)  # has ended already
