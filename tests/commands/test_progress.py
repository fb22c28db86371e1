"""Progress and remarks on stderr."""

from __future__ import annotations

import io

import pytest

from pkernfs.commands.progress import Progress, Teller


class _Screen(io.StringIO):
    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


@pytest.mark.parametrize("terminal", [True, False])
def test_progress(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = _Screen(terminal)
    monkeypatch.setattr("sys.stderr", screen)
    clock = iter(range(100))
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    with Progress("/region") as progress:
        for step in range(4):
            progress(step, 4)
    if terminal:
        assert "/region: 50%" in screen.getvalue()
        assert screen.getvalue().endswith("\r\033[K")
    else:
        assert screen.getvalue() == ""


def test_a_short_job_shows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = _Screen(terminal=True)
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setattr("time.monotonic", lambda: 1.0)
    with Progress("/region") as progress:
        progress(1, 2)
    assert screen.getvalue() == ""


def test_what_a_teller_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    teller = Teller()
    teller.say("lost with this kernel: all")
    assert isinstance(teller.progress("checking"), Progress)
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "pkernfs: lost with this kernel: all\n")
