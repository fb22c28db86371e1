"""pkernfs.vmm.live_update, with a QEMU that is made up; with a real one: tests/scripts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from pkernfs.errors import LiveUpdateError, QemuError, VmmError
from pkernfs.host.mappings import Mapping
from pkernfs.vmm import live_update, program
from pkernfs.vmm.live_update import Machine, Settings
from support.made_up_qemu import MadeUpQemu

SETTINGS = Settings("my-qemu", "pc", "tcg", ["-smp", "2"])
SET_UP = ["migrate-set-capabilities", "migrate-set-parameters"]


class Host:
    """Runs programs: ``pkernfs qemu-args``, and a QEMU that is made up.

    :ivar ran: the command line of each QEMU
    """

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.refusal = ""
        self.no_start = ""
        self.ran: list[list[str]] = []
        self.mapped = [(2 << 20, 4 << 20)]
        self.place = {"mem-path": "/region", "offset": 2 << 20, "size": 1 << 20}
        self.qemus: list[MadeUpQemu] = []
        self.migration = "completed"

    def output(self, *command: str, directory: Path | None = None, seconds: float = 0) -> str:
        if command[0] == "pkernfs":
            assert command == (
                "pkernfs", "qemu-args", "--live-update", "--json", "--qemu", "my-qemu",
                str(self.machine.ram),
            )  # fmt: skip
            if self.refusal:
                raise VmmError(self.refusal)
            answer = {"qemu": "my-qemu", "args": ["-object", "memory"]}
            return json.dumps({**answer, "object": self.place})
        if self.no_start:
            raise VmmError(self.no_start)
        assert directory == self.machine.directory
        self.ran.append(list(command))
        self.machine.monitor.unlink(missing_ok=True)
        self.qemus.append(MadeUpQemu(self.machine.monitor))
        self.qemus[-1].migration = self.migration
        self.machine.pid.write_text(f"{self.qemus[-1].process.pid}\n")
        return ""

    def mappings(self, path: str, *, pids: list[int]) -> list[Mapping]:
        assert (path, pids) == ("/region", [self.qemus[-1].process.pid])
        return [Mapping(pids[0], "my-qemu", start, end) for start, end in self.mapped]


@pytest.fixture
def host(tmp_path: Path, short_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    monkeypatch.setattr(live_update, "RUN", short_path)
    (tmp_path / "vm").mkdir()
    made = Host(Machine(tmp_path / "vm"))
    monkeypatch.setattr(program, "output", made.output)
    monkeypatch.setattr(live_update, "mappings_of", made.mappings)
    yield made
    for qemu in made.qemus:
        qemu.end()


def test_start_save_restore(host: Host) -> None:
    machine, phases = host.machine, []
    took = machine.start(1 << 20, SETTINGS, lambda phase: phases.append(phase.name))
    assert took >= 0
    assert (machine.ram.stat().st_size, machine.ram.stat().st_mode & 0o777) == (1 << 20, 0o600)
    [qemu] = host.qemus
    assert host.ran[0][:9] == [
        "my-qemu", "-nodefaults", "-no-user-config", "-display", "none", "-machine", "pc",
        "-accel", "tcg",
    ]  # fmt: skip
    assert host.ran[0][9:13] == ["-object", "memory", "-smp", "2"]
    assert json.loads(machine.config.read_text()) == {
        "qemu": "my-qemu", "machine": "pc-i440fx-8.2", "accel": "tcg", "options": ["-smp", "2"]
    }  # fmt: skip
    machine.save(lambda phase: phases.append(phase.name))
    assert qemu.asked == ["qom-get", *SET_UP, "stop", "migrate", "quit"]
    assert machine.state.exists()
    machine.restore(lambda phase: phases.append(phase.name))
    assert "pc-i440fx-8.2" in host.ran[1]
    assert host.ran[1][-2:] == ["-incoming", "defer"]
    assert host.qemus[1].asked == [*SET_UP, "migrate-incoming", "cont"]
    assert not machine.state.exists()
    assert phases == [
        "memory", "QEMU",
        "prepare", "stop", "state (3 KiB)", "end of QEMU", "sync",
        "QEMU", "state", "running",
    ]  # fmt: skip


def test_a_machine_that_is_there_is_left_alone(host: Host) -> None:
    host.machine.start(1 << 20, SETTINGS)
    with pytest.raises(LiveUpdateError, match="there is a machine: restore it, or remove it"):
        host.machine.start(2 << 20, SETTINGS)
    assert host.machine.ram.stat().st_size == 1 << 20
    assert len(host.ran) == 1


def test_memory_that_is_there_is_taken_as_it_is(host: Host) -> None:
    """Whoever has prepared it has given it its owner, its size and its path."""
    host.machine.ram.write_bytes(bytes(1 << 20))
    host.machine.ram.chmod(0o640)
    before = host.machine.ram.stat()
    host.machine.start(None, SETTINGS)
    found = host.machine.ram.stat()
    assert (found.st_ino, found.st_mode, found.st_mtime_ns) == (
        before.st_ino, before.st_mode, before.st_mtime_ns
    )  # fmt: skip


def test_memory_that_is_there_with_another_size(host: Host) -> None:
    host.machine.ram.write_bytes(bytes(1 << 20))
    with pytest.raises(LiveUpdateError, match="ram: it is there: got 1048576 bytes, expected 2097"):
        host.machine.start(2 << 20, SETTINGS, files={"boot.img": b"disk"})
    assert [path.name for path in host.machine.directory.iterdir()] == ["ram"]
    assert host.ran == []


def test_memory_of_no_size_has_the_usual_one(host: Host) -> None:
    host.machine.start(None, SETTINGS)
    assert host.machine.ram.stat().st_size == live_update.DEFAULT_BYTES


def test_a_user_has_a_directory_for_monitors(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 4711)
    machine = Machine(host.machine.directory)
    assert machine.monitor.parent == machine.pid.parent == live_update.RUN / "live-update/4711"
    with pytest.raises(LiveUpdateError, match=r"as root: install -d -m 700 -o 4711 /.*/4711$"):
        machine.start(1 << 20, SETTINGS)
    assert list(machine.directory.iterdir()) == []


def test_files_that_qemu_needs_are_made_with_the_memory(host: Host) -> None:
    host.machine.start(1 << 20, SETTINGS, files={"boot.img": b"disk"})
    assert (host.machine.directory / "boot.img").read_bytes() == b"disk"


@pytest.mark.parametrize("fails", ["refusal", "no_start"])
def test_a_start_that_fails_leaves_nothing(host: Host, fails: str) -> None:
    setattr(host, fails, "QEMU: too old, or not on a pkernfs mount")
    with pytest.raises(VmmError, match="too old"):
        host.machine.start(1 << 20, SETTINGS, files={"boot.img": b"disk"})
    assert list(host.machine.directory.iterdir()) == []


def test_a_start_that_fails_leaves_what_was_there(host: Host) -> None:
    (host.machine.directory / "boot.img").write_bytes(b"mine")
    host.no_start = "QEMU: no"
    with pytest.raises(VmmError, match="QEMU: no"):
        host.machine.start(1 << 20, SETTINGS, files={"boot.img": b"disk"})
    assert [path.name for path in host.machine.directory.iterdir()] == ["boot.img"]


def test_a_machine_whose_settings_cannot_be_kept_is_ended(host: Host) -> None:
    """No machine runs that could not be restored, and none without its memory."""
    host.machine.config.mkdir()
    with pytest.raises(IsADirectoryError):
        host.machine.start(1 << 20, SETTINGS, files={"boot.img": b"disk"})
    assert host.qemus[0].asked == ["qom-get", "quit"]
    assert list(host.machine.directory.iterdir()) == [host.machine.config]


def test_memory_stays_as_long_as_its_qemu_does(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(process: int) -> None:
        raise LiveUpdateError("QEMU: still there")

    monkeypatch.setattr(live_update, "_wait_until_gone", never)
    host.machine.config.mkdir()
    with pytest.raises(LiveUpdateError, match="QEMU goes on: its process is in"):
        host.machine.start(1 << 20, SETTINGS)
    assert host.machine.ram.exists()


def test_a_directory_that_is_not_there(host: Host) -> None:
    machine = Machine(host.machine.directory / "none")
    with pytest.raises(LiveUpdateError, match=r"none: no such directory: make one in a mounted"):
        machine.start(1 << 20, SETTINGS)


def test_a_save_that_fails_lets_the_machine_go_on(host: Host) -> None:
    host.machine.start(1 << 20, SETTINGS)
    host.qemus[0].migration = "failed"
    with pytest.raises(QemuError, match="QEMU: state failed: no room"):
        host.machine.save()
    assert host.qemus[0].asked[-1] == "cont"
    assert not host.machine.state.exists()


def test_no_save_without_the_file_of_the_memory(host: Host) -> None:
    """QEMU would go on as if nothing had happened: it maps the region, not the file."""
    host.machine.start(1 << 20, SETTINGS)
    host.machine.ram.unlink()
    with pytest.raises(LiveUpdateError, match="ram: the memory's file was removed: nothing is"):
        host.machine.save()
    assert host.qemus[0].asked == ["qom-get"]
    assert not host.machine.state.exists()


@pytest.mark.parametrize("mapped", [[], [(0, 2 << 20)], [(2 << 20, (3 << 20) - 4096)]])
def test_no_save_of_memory_that_is_another_file(host: Host, mapped: list[tuple[int, int]]) -> None:
    """The file was removed, and one of its name made: QEMU maps the blocks of the old one."""
    host.machine.start(1 << 20, SETTINGS)
    host.mapped = mapped
    with pytest.raises(LiveUpdateError, match="not the memory that QEMU runs in, which was rem"):
        host.machine.save()
    assert "stop" not in host.qemus[0].asked
    assert not host.machine.state.exists()


def test_memory_that_is_a_segment_is_mapped_as_a_whole(host: Host) -> None:
    host.place.pop("offset")
    host.mapped = [(0, 1 << 20)]
    host.machine.start(1 << 20, SETTINGS)
    host.machine.save()
    host.machine.restore()
    host.mapped = []
    with pytest.raises(LiveUpdateError, match="not the memory that QEMU runs in"):
        host.machine.save()


def test_a_restore_that_fails_keeps_the_state(host: Host) -> None:
    host.machine.start(1 << 20, SETTINGS)
    host.machine.save()
    host.migration = "failed"
    with pytest.raises(LiveUpdateError, match="state: not restored: QEMU: state failed"):
        host.machine.restore()
    assert host.qemus[1].asked[-1] == "quit"
    assert host.machine.state.exists()


def test_what_is_not_there(host: Host) -> None:
    with pytest.raises(LiveUpdateError, match="no machine is saved here"):
        host.machine.restore()
    with pytest.raises(VmmError, match="no QEMU answers"):
        host.machine.save()
    host.machine.state.touch()
    host.machine.config.write_text('{"qemu": "my-qemu"}')
    with pytest.raises(LiveUpdateError, match=r"vm\.json: not the settings of a machine"):
        host.machine.restore()
