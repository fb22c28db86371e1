"""pkernfs.vmm.qmp, with a QEMU that is made up."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pkernfs.errors import QemuError
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
