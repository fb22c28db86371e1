"""QMP: the monitor of a running QEMU, over a Unix socket (QEMU, docs/interop/qmp-spec.rst)."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from pathlib import Path
from typing import Any

from pkernfs.errors import QemuError

TIMEOUT_SECONDS = 60.0


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
        self._lines = self._socket.makefile("r", encoding="utf-8")
        self._events: list[dict[str, Any]] = []
        try:
            self._receive()  # the greeting
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
        self._lines.close()
        self._socket.close()

    def execute(self, command: str, **arguments: object) -> Any:
        """Run a command, and return the value that QEMU returns.

        :raises QemuError: QEMU refuses it, or has gone.
        """
        request = {"execute": command, "arguments": arguments}
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the answer will tell
            self._socket.sendall(json.dumps(request).encode() + b"\n")
        while True:
            reply = self._receive()
            if "return" in reply:
                return reply["return"]
            if "error" in reply:
                raise QemuError(f"QEMU: {command}: {reply['error']['desc']}")
            self._events.append(reply)

    def wait_for_migration(self) -> None:
        """Wait until the device state is written, or read. The capability ``events`` is on.

        :raises QemuError: that failed, or QEMU has gone.
        """
        while True:
            event = self._events.pop(0) if self._events else self._receive()
            status = event["data"]["status"] if event.get("event") == "MIGRATION" else ""
            if status == "completed":
                return
            if status in ("failed", "cancelled"):
                why = self.execute("query-migrate").get("error-desc", "QEMU does not say why")
                raise QemuError(f"QEMU: state {status}: {why}")

    def _receive(self) -> dict[str, Any]:
        try:
            line = self._lines.readline()
        except TimeoutError as error:
            raise QemuError(f"QEMU: no answer in {TIMEOUT_SECONDS:g} s") from error
        except OSError:
            line = ""
        if not line:
            raise QemuError("QEMU: it has ended")
        message: dict[str, Any] = json.loads(line)
        return message
