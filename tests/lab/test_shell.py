"""``scripts/lab shell``: what README and docs have typed in it, typed as it stands there."""

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

from support.sessions import DOCUMENTS, compare, typed_at

pytestmark = pytest.mark.lab

_ROOT = Path(__file__).resolve().parents[2]
_PROMPT = rb"~ # "
_TIMEOUT_SECONDS = 300  # a boot, or a command, on a machine with much else to do
#: How a document names a machine, and what ``scripts/lab shell`` is told to have it.
_MACHINES = {"lab": [], "lab=units": ["--units"]}
#: What the kernel writes on the console by itself.
_KERNEL_LINE = re.compile(r"^\[ *\d+\.\d{6}\] .*\n", re.MULTILINE)
#: What has been on the line before it was erased: progress.
_ERASED = re.compile(r"[^\n]*\x1b\[K")


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
        """Type a command; what it has written until it ends, or another kernel is up."""
        # The echo of the line has no digit behind the two words.
        self.type(f"echo begin=$((1)); {command}; echo end=$((1))")
        end = rb"(?:end=1|Linux \S+ is up)\r?\n.*?"
        found = self.wait_for(rb"(?s)begin=1\r?\n(.*?)" + end + _PROMPT)
        said = found[1].decode(errors="replace").replace("\r\n", "\n")
        return _KERNEL_LINE.sub("", _ERASED.sub("", said))


@contextmanager
def shell(options: list[str]) -> Iterator[Terminal]:
    """``scripts/lab shell``, ended in any case with all that it has started."""
    process = subprocess.Popen(
        [sys.executable, str(_ROOT / "scripts/lab"), "shell", *options],
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


@pytest.mark.parametrize(
    ("document", "machine"),
    [(d, m) for d in DOCUMENTS for m in _MACHINES if typed_at(d, m)],
    ids=lambda value: value.name if isinstance(value, Path) else value,
)
def test_shell(document: Path, machine: str) -> None:
    """What a document has typed in the shell: README's kexecs, and the same file after them."""
    commands = [command for block in typed_at(document, machine) for command in block.commands()]
    with shell(_MACHINES[machine]) as terminal:
        terminal.wait_for(_PROMPT)
        compare(commands, [terminal.run(command.typed) for command in commands])
        terminal.type("exit")
