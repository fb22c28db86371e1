"""The lab's program inside the machine: it asks the host which stage to run, runs it, and reports.

Messages are lines of JSON on a virtio port. Started by init or by systemd; the stage's number is on
the kernel command line, which each kexec sets.
"""

import importlib.util
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kexeclab.guest import STAGE_PARAMETER, Guest, GuestError

PORT = "pkernfs.lab"
PROJECT = Path("/opt/pkernfs")
_MAIN = threading.get_ident()
_BEAT_SECONDS = 2.0
_PORT_SECONDS = 30.0


class Port:
    """The virtio port. Any thread may send; only one asks."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self._lines = os.fdopen(os.dup(self._file), "rb")
        self._sending = threading.Lock()

    def send(self, **message: Any) -> None:
        """Send one message; QEMU has it when this returns."""
        data = json.dumps(message).encode() + b"\n"
        with self._sending:
            while data:
                data = data[os.write(self._file, data) :]

    def ask(self, **message: Any) -> dict[str, Any]:
        """Send one message and wait for the host's answer."""
        self.send(**message)
        line = self._lines.readline()
        answer = json.loads(line)
        if not isinstance(answer, dict):
            raise GuestError(f"host: answered {line!r}")
        return answer


def find_port() -> Path:
    """The device file of the host's port; devices may be a moment late.

    :raises GuestError: there is none.
    """
    deadline = time.monotonic() + _PORT_SECONDS
    while time.monotonic() < deadline:
        for name in Path("/sys/class/virtio-ports").glob("*/name"):
            device = Path("/dev") / name.parent.name
            if name.read_text().strip() == PORT and device.exists():
                return device
        time.sleep(0.05)
    raise GuestError(f"no virtio port is called {PORT}")


def stage_number() -> int:
    """The stage that the kernel command line names; 1 if none."""
    for word in Path("/proc/cmdline").read_text().split():
        if word.startswith(f"{STAGE_PARAMETER}="):
            return int(word.partition("=")[2])
    return 1


def stage_function(file: str, name: str) -> Callable[[Guest], None]:
    """The function ``name`` of the test file ``file``, a path inside the checkout."""
    path = PROJECT / file
    installed = PROJECT.glob(".venv/lib/python3*/site-packages")  # the project and its extensions
    sys.path[:0] = [str(path.parent), str(PROJECT / "tests"), *map(str, installed)]
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    function = getattr(module, name)
    assert callable(function)
    return function  # type: ignore[no-any-return]


def beat(port: Port, deadline: float) -> None:
    """Tell the host now and then that the machine is alive, and near the end where the stage is."""
    told = False
    while True:
        time.sleep(_BEAT_SECONDS)
        port.send(beat=time.monotonic())
        if not told and time.monotonic() > deadline:
            told = True
            frame = sys._current_frames()[_MAIN]
            port.send(log="nearly out of time:\n" + "".join(traceback.format_stack(frame)))


def main() -> int:
    """Run one stage; return the exit status."""
    port = Port(find_port())
    stage = stage_number()
    task = port.ask(hello=stage, release=os.uname().release, uptime=time.monotonic())
    deadline = time.monotonic() + task["seconds"] - 2 * _BEAT_SECONDS
    threading.Thread(target=beat, args=(port, deadline), daemon=True).start()
    try:
        function = stage_function(task["file"], task["function"])
        function(Guest(port, stage, task["notes"], task["parameters"]))
    except BaseException:
        port.ask(failed=traceback.format_exc())
        return 1
    port.ask(passed=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
