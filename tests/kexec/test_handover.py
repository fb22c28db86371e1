"""The handover's sequence, without a mount: what it tells, what it refuses, what it leaves."""

from __future__ import annotations

import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from pkernfs.dma.mount import mount_filesystem
from pkernfs.errors import CorruptionError, NoSpaceError, PkernfsError, RegionError
from pkernfs.fs import state_page
from pkernfs.fs.filesystem import FileSystem
from pkernfs.kexec import handover, loaded
from pkernfs.kexec.handover import hand_over, hand_over_mount
from pkernfs.kexec.local import LocalFileSystem
from pkernfs.kexec.mounted import Frozen, ManifestFile
from pkernfs.kexec.observer import Observer, Progress
from pkernfs.layout import (
    HANDOVER_FLAG_DIGESTS,
    MAGIC_STATE,
    PAGE,
    ROOT_INO,
    STATE_PAGE,
    HandoverFields,
)
from pkernfs.quantities import Ino, RegionOff
from support.handover import verify

MIB = 1 << 20
REG = stat.S_IFREG | 0o644


class Watching(Observer):
    """Notes what it is told."""

    def __init__(self) -> None:
        self.stages: list[str] = []
        self.last: dict[str, tuple[int, int]] = {}
        self.said: list[str] = []

    @contextmanager
    def progress(self, what: str) -> Iterator[Progress]:
        def tell(done: int, total: int) -> None:
            self.last[what] = (done, total)

        self.stages.append(f"begin {what}")
        yield tell
        self.stages.append(f"end {what}")

    def say(self, text: str) -> None:
        self.said.append(text)


class Mapped(LocalFileSystem):
    """The region has users beside us."""

    def other_mappers(self) -> Iterator[str]:
        yield "process 7 (other)"


class Full(LocalFileSystem):
    """There is no space for a manifest."""

    def make_manifest(self, size: int) -> ManifestFile:
        raise NoSpaceError("full")


@pytest.fixture
def watching() -> Watching:
    return Watching()


@pytest.fixture
def name(fs: FileSystem) -> str:
    """Of the file system in messages; with some files in it."""
    for i, size in enumerate((10, 5 * MIB, 3 * MIB)):
        ino = fs.create(ROOT_INO, b"f%d" % i, REG, 0, 0).ino
        fs.run(lambda ino=ino, size=size: fs.write(ino, 0, b"x" * size))  # type: ignore[misc]
    return fs.region.name


def record_of(fs: FileSystem) -> HandoverFields:
    return state_page.read_record(fs.store.read(STATE_PAGE, MAGIC_STATE))


def test_what_is_told_and_recorded(fs: FileSystem, name: str, watching: Watching) -> None:
    done = hand_over(LocalFileSystem(fs), digests=True, observer=watching)
    stages = [f"{name}: checking", f"{name}: digests"]
    assert watching.stages == [f"{w} {s}" for s in stages for w in ("begin", "end")]
    assert list(watching.last) == stages
    assert watching.last[stages[1]] == (done.digest_bytes, done.digest_bytes)
    assert watching.said == []
    assert (done.number, done.inodes) == (1, 5)
    assert done.metadata_pages > 5
    assert done.digest_bytes == 8 * MIB + PAGE
    assert done.seconds >= done.check_seconds + done.digest_seconds > 0
    record = record_of(fs)
    assert (record.number, record.flags) == (1, HANDOVER_FLAG_DIGESTS)
    assert record.list_ino
    fs.unmount()
    assert not verify(mount_filesystem(fs.region, read_only=True)).changes.all()
    fs.thaw()


def test_without_digests(fs: FileSystem, name: str, watching: Watching) -> None:
    done = hand_over(LocalFileSystem(fs), observer=watching)
    assert watching.stages == [f"begin {name}: checking", f"end {name}: checking"]
    assert (done.digest_bytes, done.digest_seconds) == (0, 0.0)
    assert not record_of(fs).flags
    LocalFileSystem(fs).abort()


def test_who_can_change_what_has_a_digest(fs: FileSystem, name: str, watching: Watching) -> None:
    hand_over(Mapped(fs), digests=True, observer=watching)
    assert watching.said == [
        f"{name}: process 7 (other) maps the region itself: what it changes from now on differs "
        "from the digests"
    ]
    fs.thaw()
    watching.said.clear()
    hand_over(Mapped(fs), observer=watching)
    assert watching.said == []  # there are no digests
    fs.thaw()


@pytest.mark.parametrize("digests", [False, True])
def test_without_space_there_is_no_manifest(
    fs: FileSystem, name: str, watching: Watching, digests: bool
) -> None:
    assert hand_over(Full(fs), digests=digests, observer=watching).number == 1
    assert watching.said == [f"{name}: no space for the list: the next mount cannot compare"]
    record = record_of(fs)
    assert (record.list_ino, record.list_bytes, record.list_digest, record.flags) == (0, 0, 0, 0)
    fs.thaw()


def test_damage_is_not_handed_over(fs: FileSystem, name: str) -> None:
    at = RegionOff(fs.inode(ROOT_INO).body * PAGE + 100)
    before = fs.region.read(at, 16)
    fs.region.copy_in(at, b"\xff" * 16)
    with pytest.raises(CorruptionError) as caught:
        hand_over(LocalFileSystem(fs))
    assert str(caught.value).startswith(f"{name}: not handed over: ")
    assert str(caught.value).endswith(": unmount it and run fsck.pkernfs")
    fs.region.copy_in(at, before)
    fs.create(ROOT_INO, b"thawed", REG, 0, 0)


def test_another_region_is_not_looked_at(fs: FileSystem, name: str) -> None:
    class Other(LocalFileSystem):
        @contextmanager
        def frozen(self) -> Iterator[Frozen]:
            with super().frozen() as frozen:
                yield frozen._replace(uuid=bytes(16))

    with pytest.raises(RegionError, match="not the region that is mounted on"):
        hand_over(Other(fs))
    fs.create(ROOT_INO, b"thawed", REG, 0, 0)


def test_a_failure_amid_the_manifest_thaws(fs: FileSystem, name: str) -> None:
    class Failing(LocalFileSystem):
        def write_manifest(self, ino: Ino, data: bytes) -> None:
            super().write_manifest(ino, data[:100])
            raise PkernfsError("the daemon is gone")

    space = fs.statfs()
    with pytest.raises(PkernfsError, match="the daemon is gone"):
        hand_over(Failing(fs))
    assert fs.statfs() == space
    assert hand_over(LocalFileSystem(fs)).number == 1
    fs.thaw()


def test_a_mount_is_written_back_and_checked_first(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    class Daemon:
        class mount:
            source, mount_point = "512M!1G", "/mnt/a"

        def __init__(self, path: str) -> None:
            order.append(f"daemon of {path}")

    def hand_over(mounted: object, *, digests: bool, observer: Observer) -> handover.Handover:
        order.append(f"hand over, digests {digests}")
        return handover.Handover(3, 1, 1, 0, 0.0, 0.0, -1.0)

    monkeypatch.setattr(handover, "Daemon", Daemon)
    monkeypatch.setattr(handover, "hand_over", hand_over)
    monkeypatch.setattr(loaded, "check", lambda *given, **_: order.append(f"check {given}"))
    monkeypatch.setattr(handover, "write_back", lambda point: order.append(f"sync {point}"))
    done = hand_over_mount("/mnt/a/x", command_line="quiet")
    assert order == [
        "daemon of /mnt/a/x", "check ('512M!1G', 'quiet')", "sync /mnt/a",
        "hand over, digests False",
    ]  # fmt: skip
    assert done.number == 3
    assert done.seconds >= 0  # of all of it


_LOADS = """
import sys
from pkernfs.kexec import handover
from pkernfs.kexec.daemon import Daemon
from pkernfs.control.mounts import Mount
heavy = {f"pkernfs.{name}" for name in sys.argv[2:]}
print(sorted(heavy & sys.modules.keys()))
Daemon.mount = Mount(0, "/mnt/a", "fuse.pkernfs", sys.argv[1])
handover.load_for("/mnt/a")
print(sorted(heavy - sys.modules.keys()))
"""


@pytest.mark.parametrize("spec", ["/dev/shm", "512M!1G"])
def test_only_memory_that_can_be_kept_has_its_modules_imported(spec: str) -> None:
    """All of them, before anything is frozen; a file in the kernel's memory waits for none."""
    heavy = sorted(("host.boot", "host.memmap", "kexec.loaded", "region.dax_backing",
                    "region.devmem"))  # fmt: skip
    words = [sys.executable, "-c", _LOADS, spec, *heavy]
    before, missing = subprocess.check_output(words, text=True).splitlines()
    assert before == "[]"
    assert missing == str([f"pkernfs.{name}" for name in heavy] if spec == "/dev/shm" else [])


def test_writing_back(tmp_path: object) -> None:
    handover.write_back(str(tmp_path))
    with pytest.raises(OSError, match="No such file"):
        handover.write_back(f"{tmp_path}/none")
