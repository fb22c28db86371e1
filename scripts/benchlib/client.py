"""Compiles client.c and runs its verbs; measures and judges nothing itself."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

from .machine import BenchError, Pinning, child_environment
from .systems import abort_connection

SOURCE = Path(__file__).with_name("client.c")


class Client:
    """The compiled client; every run is a process of its own."""

    def __init__(self, directory: Path, pinning: Pinning, timeout_s: float = 180) -> None:
        self.binary = directory / "client"
        self.pinning = pinning
        self.timeout_s = timeout_s
        compiler = shutil.which("cc") or shutil.which("gcc")
        if compiler is None:
            raise BenchError("a C compiler is needed for the client: apt-get install gcc")
        command = [compiler, "-O2", "-Wall", "-pthread", "-o", str(self.binary), str(SOURCE)]
        subprocess.run(command, check=True)

    def command(self, *arguments: object, pinned: bool = True) -> list[str]:
        plain = [str(self.binary), *map(str, arguments)]
        return self.pinning.client_command(plain) if pinned else plain

    def run(self, *arguments: object, pinned: bool = True) -> dict[str, Any]:
        """Run one verb to its end and return what it printed.

        :raises BenchError: the verb failed or took too long; its message is the client's.
        """
        command = self.command(*arguments, pinned=pinned)
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            try:
                output, error = process.communicate(timeout=self.timeout_s)
            except subprocess.TimeoutExpired:
                process.kill()
                abort_connection(Path(str(arguments[1])))  # or it would wait for its answer
                raise BenchError(f"client {arguments[0]}: no end in {self.timeout_s} s") from None
        if process.returncode:
            raise BenchError(error.strip() or f"client {arguments[0]}: status {process.returncode}")
        result: dict[str, Any] = json.loads(output)
        return result


class LatencyClient:
    """Forced getattr requests on one file, in the background of a ``with`` block."""

    def __init__(self, client: Client, path: Path) -> None:
        self.command = client.command("latency", path, pinned=False)
        self.result: dict[str, float] = {}

    def __enter__(self) -> "LatencyClient":
        self.process = subprocess.Popen(
            self.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=child_environment(),
        )
        assert self.process.stdout is not None
        self.process.stdout.readline()  # it says when it starts
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            output, _ = self.process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            output, _ = self.process.communicate()
        if self.process.returncode == 0 and output:
            self.result = json.loads(output)
