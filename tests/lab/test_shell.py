"""``scripts/lab shell``: the session that docs/lab.md shows, typed as it stands there."""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

pytestmark = pytest.mark.lab

_ROOT = Path(__file__).resolve().parents[2]
_DIGEST = "md5sum /mnt/pkernfs/guest-ram"
_PROMPT = rb"~ # "
_TIMEOUT_SECONDS = 300  # a boot, or a command, on a machine with much else to do


def session() -> list[str]:
    """What the reader is told to type in "Inside the shell"."""
    text = (_ROOT / "docs/lab.md").read_text()
    section = text.partition("## Inside the shell")[2].partition("\n## ")[0]
    return re.findall(r"^    # (.+)$", section, re.MULTILINE)


class Terminal:
    """Somebody at the machine's console."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self._seen = bytearray()

    def wait_for(self, pattern: bytes) -> re.Match[bytes]:
        """Read until ``pattern`` is there; what comes up to its end is done with."""
        assert self._process.stdout
        deadline = time.monotonic() + _TIMEOUT_SECONDS
        while not (found := re.search(pattern, bytes(self._seen))):
            ready = select.select([self._process.stdout], [], [], 1.0)[0]
            data = os.read(self._process.stdout.fileno(), 65536) if ready else b""
            self._seen += data
            late = time.monotonic() > deadline or (ready and not data)
            assert not late, f"no {pattern!r}: {self._seen[-2000:].decode(errors='replace')}"
        del self._seen[: found.end()]
        return found

    def type(self, line: str) -> None:
        """Type a line."""
        assert self._process.stdin
        self._process.stdin.write(line.encode() + b"\n")
        self._process.stdin.flush()

    def run(self, command: str) -> str:
        """Type a command that succeeds; what it has written."""
        self.type(f"{command}; echo end=$?")
        found = self.wait_for(rb"(?s)(.*?)\bend=(\d+)\s.*?" + _PROMPT)
        said = found[1].decode(errors="replace")
        assert found[2] == b"0", f"{command}: exit status {int(found[2])}: {said}"
        return said


@contextmanager
def shell() -> Iterator[Terminal]:
    """``scripts/lab shell``, ended in any case with all that it has started."""
    process = subprocess.Popen(
        [sys.executable, str(_ROOT / "scripts/lab"), "shell"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        yield Terminal(process)
        process.communicate(timeout=_TIMEOUT_SECONDS)
        assert process.returncode == 0
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_shell() -> None:
    """The session of docs/lab.md: mkfs, mount, a file, a handover, a kexec, and the same file."""
    commands = session()
    assert commands[-1] == "exit"
    assert "kexec -e" in commands
    said: dict[str, list[str]] = {}
    with shell() as terminal:
        terminal.wait_for(_PROMPT)
        for command in commands[:-1]:
            if command == "kexec -e":
                terminal.type(command)
                terminal.wait_for(_PROMPT)
                continue
            said.setdefault(command, []).append(terminal.run(command))
        terminal.type("exit")
    before, after = (re.findall(r"\b[0-9a-f]{32}\b", text) for text in said[_DIGEST])
    assert len(before) == 1
    assert before == after
    mounts = said["mount -t fuse.pkernfs none /mnt/pkernfs"]
    assert "live update: mounted" in mounts[1]
    assert "changed" not in mounts[1]
