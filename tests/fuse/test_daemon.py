"""The daemon's start and end around a service that is made up: nothing is mounted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pkernfs.dma.mount import mount_filesystem
from pkernfs.errors import FormatError, RegionError
from pkernfs.fs import mkfs
from pkernfs.fs.filesystem import FileSystem
from pkernfs.fuse import daemon
from pkernfs.layout import ROOT_INO
from pkernfs.region.region import Region
from support.handover import hand_over

MIB = 1 << 20


class Service:
    """Stands for :func:`pkernfs.fuse.daemon.serve`: does something with the file system."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.work: Callable[[FileSystem], object] = lambda fs: None
        self.told: list[str] = []
        self.ready = 0
        monkeypatch.setattr(daemon, "serve", self._serve)

    def _serve(
        self, fs: FileSystem, region: Region, mountpoint: str, options: Any, ready: Any
    ) -> None:
        assert mountpoint == "/mnt/a"
        ready()
        self.work(fs)

    def run(self, region: Path, **options: Any) -> None:
        """Run the daemon of a region."""
        daemon.run_mount(str(region), "/mnt/a", options, ready=self._count, tell=self.told.append)

    def _count(self) -> None:
        self.ready += 1


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Service:
    return Service(monkeypatch)


@pytest.fixture
def region(tmp_path: Path) -> Path:
    path = tmp_path / "region"
    Region.create(str(path), 16 * MIB)
    return path


def state(path: Path) -> object:
    """The state that the superblock records."""
    from pkernfs.fs import superblock

    with Region.open(str(path), write=False, lock=False) as region:
        return superblock.describe(region)["state"]


def test_a_region_is_made_served_and_left_clean(service: Service, region: Path) -> None:
    seen: list[object] = []

    def work(fs: FileSystem) -> None:
        fs.mkdir(ROOT_INO, b"d", 0o755, 0, 0)
        seen.append(state(region))

    service.work = work
    service.run(region, mkfs=True)
    assert (seen, state(region), service.ready, service.told) == (["mounted"], "clean", 1, [])
    service.work = lambda fs: seen.append(fs.find(ROOT_INO, b"d"))
    service.run(region, mkfs=True)
    assert seen[1], "what is there is not made again"


@pytest.mark.parametrize("value", ["yes", "no", None])
def test_the_option_segments_decides(service: Service, region: Path, value: str | None) -> None:
    wanted: list[bool] = []
    service.work = lambda fs: wanted.append(fs.segments.wanted)
    service.run(region, mkfs=True, **({} if value is None else {"segments": value}))
    assert wanted == [value != "no"]


def test_a_service_that_fails_leaves_it_clean(service: Service, region: Path) -> None:
    def work(fs: FileSystem) -> None:
        raise RegionError("/mnt/a: cannot mount: says the test")

    service.work = work
    with pytest.raises(RegionError, match="says the test"):
        service.run(region, mkfs=True)
    assert state(region) == "clean"


def test_other_data_is_not_formatted(service: Service, region: Path) -> None:
    with region.open("r+b") as file:
        file.write(b"data" * 4096)
    with pytest.raises(FormatError, match="not formatted: it holds"):
        service.run(region, mkfs=True)
    assert service.ready == 0


def test_without_mkfs_nothing_is_made(service: Service, region: Path) -> None:
    with pytest.raises(FormatError):
        service.run(region)
    assert not any(region.read_bytes()[:MIB])


def test_read_only_stores_nothing(service: Service, region: Path) -> None:
    with Region.open(str(region), write=True) as opened:
        mkfs.make_filesystem(opened)
    before = region.read_bytes()
    service.work = lambda fs: fs.find(ROOT_INO, b"d")
    service.run(region, ro=True)
    assert region.read_bytes() == before


@pytest.mark.parametrize("verify", [False, True])
def test_a_handover_before_is_told(service: Service, region: Path, verify: bool) -> None:
    with Region.open(str(region), write=True) as opened:
        mkfs.make_filesystem(opened)
        fs = mount_filesystem(opened)
        ino = fs.create(ROOT_INO, b"f", 0o100600, 0, 0).ino
        fs.run(lambda: fs.write(ino, 0, b"as it was"))
        at = fs.extents(ino)[0].region_offset
        hand_over(fs)
        fs.unmount()
        opened.copy_in(at, b"A")
    service.run(region, **({"verify": True} if verify else {}))
    assert "s after handover 1" in service.told[0]
    changed = [line for line in service.told if "changed since the handover: /f" in line]
    assert len(changed) == verify, "else it is compared while others are served"


def test_a_mount_that_is_not_seen_has_no_socket(caplog: pytest.LogCaptureFixture) -> None:
    assert daemon._listen("/mnt/a", None) is None
    assert "/mnt/a: no control socket, so no commands but reading: " in caplog.text
