"""A QEMU that is made up: its monitor on a Unix socket, and a process that ends by ``quit``."""

from __future__ import annotations

import json
import socket
import subprocess
import threading
from pathlib import Path
from typing import Any


class MadeUpQemu:
    """Answers one connection after the other, in a thread; its commands are noted.

    :ivar asked: the commands, in order, without those that begin a connection
    :ivar migration: the status that a migration ends with
    """

    def __init__(self, monitor: Path) -> None:
        self.asked: list[str] = []
        self.migration = "completed"
        self.state: Path | None = None
        self.process = subprocess.Popen(["sleep", "600"])
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(monitor))
        self._listener.listen(1)
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def end(self) -> None:
        """End the process and the thread."""
        self.process.kill()
        self.process.wait()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(10)
        self._listener.close()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection, connection.makefile("rw") as lines:
                self._answer_all(lines)

    def _answer_all(self, lines: Any) -> None:
        self._say(lines, {"QMP": {}})
        for line in lines:
            request = json.loads(line)
            command, arguments = request["execute"], request["arguments"]
            if command != "qmp_capabilities":
                self.asked.append(command)
            for message in self._answers(command, arguments):
                self._say(lines, message)
            if command == "quit":
                self.process.kill()
                return

    def _answers(self, command: str, arguments: dict[str, Any]) -> list[dict[str, Any]]:
        """An event before each answer: both are told apart."""
        event = {"event": "RTC_CHANGE", "data": {}}
        if command in ("migrate", "migrate-incoming"):
            self.state = Path(arguments["uri"].removeprefix("file:"))
            if command == "migrate":
                self.state.write_bytes(bytes(3 << 10))
            statuses = ("setup", "active", self.migration)
            return [
                {"return": {}},
                *({"event": "MIGRATION", "data": {"status": s}} for s in statuses),
            ]
        if command == "query-migrate":
            return [{"return": {"error-desc": "no room"}}]
        if command == "qom-get":
            return [event, {"return": "pc-i440fx-8.2-machine"}]
        if command == "frobnicate":
            return [event, {"error": {"class": "CommandNotFound", "desc": "no such command"}}]
        return [event, {"return": {}}]

    @staticmethod
    def _say(lines: Any, message: dict[str, Any]) -> None:
        lines.write(json.dumps(message) + "\n")
        lines.flush()
