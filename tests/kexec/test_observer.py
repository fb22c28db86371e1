"""Who is told of progress: nobody, unless somebody asks."""

from __future__ import annotations

import pytest

from pkernfs.kexec.observer import SILENT, Observer


def test_nobody_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with SILENT.progress("copying") as progress:
        progress(0, 10)
        progress(10, 10)
        with SILENT.progress("a stage in it") as inner:
            inner(3, 0)
    SILENT.say("something")
    assert capsys.readouterr() == ("", "")


def test_a_failure_ends_a_stage() -> None:
    with pytest.raises(ZeroDivisionError), SILENT.progress("copying"):
        raise ZeroDivisionError


def test_an_observer_may_take_notice_of_one_thing_only() -> None:
    class Lines(Observer):
        def __init__(self) -> None:
            self.lines: list[str] = []

        def say(self, text: str) -> None:
            self.lines.append(text)

    lines = Lines()
    with lines.progress("copying") as progress:
        progress(1, 2)
    lines.say("done")
    assert lines.lines == ["done"]
