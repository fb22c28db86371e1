"""QMP: the monitor of a running QEMU, over a Unix socket (QEMU, docs/interop/qmp-spec.rst)."""

from __future__ import annotations

import json
import os
import socket
import time
from collections import deque
from pathlib import Path
from typing import Any

from pkernfs.errors import QemuError

#: For an answer, however many events come before it; and for a migration as a whole.
TIMEOUT_SECONDS = 60.0
MIGRATION_SECONDS = 200.0
#: Whoever has made a monitor may not fill the memory of whoever asks it.
_LINE_BYTES = 16 << 20
_EVENTS = 64


class Qmp:
    """A connection to a QEMU's monitor, as a context manager.

    :param path: the monitor's socket
    :raises QemuError: no QEMU answers there.
    """

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(TIMEOUT_SECONDS)
        try:
            self._socket.connect(os.fspath(path))
        except OSError as error:
            self._socket.close()
            raise QemuError(f"{path}: no QEMU answers: {error.strerror}") from error
        self._read = bytearray()
        self._events: deque[dict[str, Any]] = deque(maxlen=_EVENTS)
        try:
            self._receive(_in(TIMEOUT_SECONDS))  # the greeting
            self.execute("qmp_capabilities")
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Qmp:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """End the connection; QEMU goes on."""
        self._socket.close()

    def execute(self, command: str, **arguments: object) -> Any:
        """Run a command, and return the value that QEMU returns.

        :raises QemuError: QEMU refuses it, or has gone.
        """
        deadline = _in(TIMEOUT_SECONDS)
        request = {"execute": command, "arguments": arguments}
        self._socket.settimeout(TIMEOUT_SECONDS)
        try:
            self._socket.sendall(json.dumps(request).encode() + b"\n")
        except TimeoutError as error:
            raise QemuError(f"QEMU: {command}: it does not listen") from error
        except OSError:
            pass  # the answer will tell
        while True:
            reply = self._receive(deadline)
            if "return" in reply:
                return reply["return"]
            if "error" in reply:
                raise QemuError(f"QEMU: {command}: {_member(reply, 'error', 'desc')}")
            if reply.get("event") == "MIGRATION":
                self._events.append(reply)

    def wait_for_migration(self) -> None:
        """Wait until the device state is written, or read. The capability ``events`` is on.

        :raises QemuError: that failed, or QEMU has gone.
        """
        deadline = _in(MIGRATION_SECONDS)
        while True:
            event = self._events.popleft() if self._events else self._receive(deadline)
            status = _member(event, "data", "status") if event.get("event") == "MIGRATION" else ""
            if status == "completed":
                return
            if status in ("failed", "cancelled"):
                found = self.execute("query-migrate")
                why = _member({"found": found}, "found", "error-desc") or "QEMU does not say why"
                raise QemuError(f"QEMU: state {status}: {why}")

    def _receive(self, deadline: float) -> dict[str, Any]:
        while b"\n" not in self._read:
            self._read_more(deadline)
        line, _, self._read = self._read.partition(b"\n")
        try:
            message = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise QemuError("QEMU: what its monitor says is not JSON") from error
        if not isinstance(message, dict):
            raise QemuError("QEMU: what its monitor says is no message")
        return message

    def _read_more(self, deadline: float) -> None:
        left = deadline - time.monotonic()
        try:
            if left <= 0 or len(self._read) > _LINE_BYTES:
                raise TimeoutError
            self._socket.settimeout(left)
            more = self._socket.recv(1 << 16)
        except TimeoutError as error:
            raise QemuError("QEMU: no answer in time") from error
        except OSError:
            more = b""
        if not more:
            raise QemuError("QEMU: it has ended")
        self._read += more


def _in(seconds: float) -> float:
    return time.monotonic() + seconds


def _member(message: dict[str, Any], name: str, member: str) -> str:
    """Return a text that is a member of a member, or nothing if there is none."""
    inner = message.get(name)
    found = inner.get(member) if isinstance(inner, dict) else None
    return found if isinstance(found, str) else ""
