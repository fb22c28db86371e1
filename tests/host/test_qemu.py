"""Which version a program that is to be QEMU says that it has."""

from __future__ import annotations

from pathlib import Path

import pytest

from pkernfs.host import qemu


def program(path: Path, text: str) -> str:
    """A program that prints that text, whatever it is asked."""
    path.write_text(f"#!/bin/sh\ncat <<'END'\n{text}\nEND\n")
    path.chmod(0o755)
    return str(path)


def test_the_first_line_is_read(tmp_path: Path) -> None:
    text = "QEMU emulator version 8.2.1 (Debian 1:8.2.1+ds-1)\nCopyright (c) version 9.9"
    line = qemu.version_line(program(tmp_path / "qemu", text))
    assert line == text.splitlines()[0]
    assert qemu.parse_version(line) == "8.2.1"


@pytest.mark.parametrize(
    ("line", "version"),
    [
        ("QEMU emulator version 10.0", "10.0"),
        ("QEMU emulator version 7.2.17 (Debian 1:7.2+dfsg-7)", "7.2.17"),
        ("QEMU emulator version new", None),
        ("GNU bash, version 5.2.15", None),
        ("", None),
    ],
)
def test_the_version_in_a_line(line: str, version: str | None) -> None:
    assert qemu.parse_version(line) == version


def test_why_there_is_no_line(tmp_path: Path) -> None:
    assert "No such file" in qemu.version_line(str(tmp_path / "none"))
    (tmp_path / "file").write_text("")
    assert "Permission denied" in qemu.version_line(str(tmp_path / "file"))


def test_a_program_that_does_not_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qemu, "_SECONDS", 0.05)
    path = tmp_path / "qemu"
    path.write_text("#!/bin/sh\nexec sleep 60\n")
    path.chmod(0o755)
    assert "timed out" in qemu.version_line(str(path))
