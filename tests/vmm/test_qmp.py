"""pkernfs.vmm.qmp, with a QEMU that is made up."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pkernfs.errors import QemuError
from pkernfs.vmm import qmp as qmp_module
from pkernfs.vmm.qmp import Qmp
from support.made_up_qemu import MadeUpQemu


@pytest.fixture
def qemu(short_path: Path) -> Iterator[MadeUpQemu]:
    made = MadeUpQemu(short_path / "qmp")
    yield made
    made.end()


def test_commands_and_events(qemu: MadeUpQemu, short_path: Path) -> None:
    """Events between a command and its answer are kept for whoever waits for them."""
    with Qmp(short_path / "qmp") as qmp:
        assert qmp.execute("qom-get", path="/machine", property="type") == "pc-i440fx-8.2-machine"
        qmp.execute("migrate", uri=f"file:{short_path / 'state'}")
        qmp.execute("stop")
        qmp.wait_for_migration()
        with pytest.raises(QemuError, match="QEMU: frobnicate: no such command"):
            qmp.execute("frobnicate")
    assert qemu.asked == ["qom-get", "migrate", "stop", "frobnicate"]


@pytest.mark.parametrize("status", ["failed", "cancelled"])
def test_a_migration_that_fails(qemu: MadeUpQemu, short_path: Path, status: str) -> None:
    qemu.migration = status
    with Qmp(short_path / "qmp") as qmp:
        qmp.execute("migrate", uri=f"file:{short_path / 'state'}")
        with pytest.raises(QemuError, match=f"QEMU: state {status}: no room"):
            qmp.wait_for_migration()


def test_a_qemu_that_ends(qemu: MadeUpQemu, short_path: Path) -> None:
    with Qmp(short_path / "qmp") as qmp:
        qmp.execute("quit")
        with pytest.raises(QemuError, match="QEMU: it has ended"):
            qmp.execute("cont")
    with pytest.raises(QemuError, match="none: no QEMU answers: No such file"):
        Qmp(short_path / "none")


class Rogue:
    """A monitor that a tenant has made: it says the same again and again, whatever is asked."""

    def __init__(self, path: Path, first: bytes, again: bytes, every: float) -> None:
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(1)
        self._says = first, again, every
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def end(self) -> None:
        """End the thread."""
        self._over.set()
        self._thread.join(10)
        self._listener.close()

    def _serve(self) -> None:
        first, again, every = self._says
        connection, _ = self._listener.accept()
        with connection:
            try:
                connection.sendall(first)
                while not self._over.wait(every):
                    connection.sendall(again)
            except OSError:
                return


GREETING = b'{"QMP": {}}\n{"return": {}}\n'
EVENT = b'{"event": "RTC_CHANGE", "data": {}}\n'


@pytest.mark.parametrize("again", [EVENT, b" ", b'{"event": "MIGRATION"}\n'])
def test_a_monitor_that_never_comes_to_an_end(
    short_path: Path, monkeypatch: pytest.MonkeyPatch, again: bytes
) -> None:
    """There is one time for an answer, and one for a migration, whatever is said meanwhile."""
    monkeypatch.setattr(qmp_module, "TIMEOUT_SECONDS", 0.3)
    monkeypatch.setattr(qmp_module, "MIGRATION_SECONDS", 0.3)
    rogue = Rogue(short_path / "qmp", GREETING, again, 0.02)
    try:
        with Qmp(short_path / "qmp") as qmp:
            with pytest.raises(QemuError, match="QEMU: no answer in time"):
                qmp.execute("stop")
            with pytest.raises(QemuError, match="QEMU: no answer in time"):
                qmp.wait_for_migration()
    finally:
        rogue.end()


@pytest.mark.parametrize(
    ("says", "why"), [(b"\xff\n", "not JSON"), (b"{\n", "not JSON"), (b"[]\n", "no message")]
)
def test_a_monitor_that_says_something_else(short_path: Path, says: bytes, why: str) -> None:
    rogue = Rogue(short_path / "qmp", says, b"", 0.02)
    try:
        with pytest.raises(QemuError, match=f"QEMU: what its monitor says is {why}"):
            Qmp(short_path / "qmp")
    finally:
        rogue.end()
