"""pkernfs.vmm.program: programs that succeed, fail, hang, or are not there."""

from __future__ import annotations

from pathlib import Path

import pytest

from pkernfs.errors import VmmError
from pkernfs.vmm import program


def test_a_program_that_succeeds(tmp_path: Path) -> None:
    assert program.output("pwd", directory=tmp_path) == f"{tmp_path}\n"
    assert program.run("sh", "-c", "cat; exit 3").returncode == 3  # and has nothing to read


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo one >&2; echo two >&2; exit 1", "two"),
        ("echo out; exit 1", "sh: it failed"),
        ("exec sleep 60", "sh: not done in 0.1 s"),
    ],
)
def test_programs_that_fail(script: str, reason: str) -> None:
    with pytest.raises(VmmError) as failed:
        program.output("sh", "-c", script, seconds=0.1)
    assert str(failed.value) == reason


def test_a_program_that_is_not_there() -> None:
    with pytest.raises(VmmError, match="/none: no such program"):
        program.run("/none")


def test_words_that_are_not_utf_8() -> None:
    """A program of somebody else's may say anything."""
    with pytest.raises(VmmError, match=r"^\ufffd no$"):
        program.output("sh", "-c", r"printf '\377 no\n' >&2; exit 1")
