"""The lab's own parts that need no machine: its cache, and what a kernel's initramfs loads."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from guestlab import initramfs
from kexeclab import LabError, cache, debian, kernels


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return cache.directory()


class Builder:
    """Builds an entry with one file, and counts how often."""

    def __init__(self, content: str = "content") -> None:
        self.times = 0
        self._content = content

    def __call__(self, place: Path) -> None:
        """Build it."""
        self.times += 1
        (place / "file").write_text(self._content)


def test_entry_is_built_once() -> None:
    build = Builder()
    with cache.locked():
        first = cache.entry("kind", "name", build)
        assert cache.entry("kind", "name", build) == first
    assert build.times == 1
    assert (first / "file").read_text() == "content"


def test_damaged_entry_is_built_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    build = Builder()
    place = cache.entry("kind", "name", build)
    (place / "file").write_text("damaged")
    monkeypatch.setattr(cache, "_checked", set())  # as in another process
    assert cache.entry("kind", "name", build) == place
    assert build.times == 2
    assert (place / "file").read_text() == "content"


def test_failed_build_leaves_nothing(own_cache: Path) -> None:
    def build(place: Path) -> None:
        (place / "half").write_text("half")
        raise LabError("no more")

    with pytest.raises(LabError, match="no more"):
        cache.entry("kind", "name", build)
    assert list((own_cache / "kind").iterdir()) == []


def test_remnant_of_a_killed_builder_goes(own_cache: Path) -> None:
    (own_cache / "kind" / ".name.killed").mkdir(parents=True)
    place = cache.entry("kind", "name", Builder())
    assert list((own_cache / "kind").iterdir()) == [place]


def test_entries_used_last_are_kept() -> None:
    places = [cache.entry("kind", f"{number}", Builder(), keep=2) for number in range(4)]
    assert [place.exists() for place in places] == [False, False, True, True]


def test_image_holds_the_tree(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "directory").mkdir(parents=True)
    for number in range(300):
        (tree / "directory" / f"{number}").write_bytes(b"x" * number * 40)
    image = tmp_path / "image"
    cache.make_image(tree, image, "label")
    subprocess.run(["e2fsck", "-fn", str(image)], check=True, capture_output=True)
    shown = subprocess.run(
        ["debugfs", "-R", "stat /directory/299", str(image)], check=True, capture_output=True
    )
    assert b"Size: 11960" in shown.stdout


def test_mirror_is_taken_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(debian.MIRROR_VARIABLE, "http://mirror.example/debian")
    assert "http://mirror.example/debian trixie main" in debian.source_line("trixie")


def modules_directory(place: Path, built_in: str = "") -> Path:
    """What depmod leaves of a kernel, with the modules that the initramfs wants."""
    place.mkdir()
    (place / "modules.dep").write_text(
        "a/virtio-pci.ko.xz: a/ring.ko.xz a/virtio.ko.xz\n"
        "a/ring.ko.xz: a/virtio.ko.xz\n"
        "a/virtio.ko.xz:\n"
        "a/virtio_blk.ko.xz: a/ring.ko.xz\n"
        "a/overlay.ko.xz:\n"
    )
    (place / "modules.builtin").write_text(built_in)
    return place


def test_modules_are_loaded_after_what_they_need(tmp_path: Path) -> None:
    place = modules_directory(tmp_path / "1", "kernel/drivers/char/virtio_console.ko\n")
    names = [path.name for path in kernels._load_order(place)]
    assert names == [
        "virtio.ko.xz", "ring.ko.xz", "virtio-pci.ko.xz", "virtio_blk.ko.xz", "overlay.ko.xz",
    ]  # fmt: skip


def test_missing_module_is_told(tmp_path: Path) -> None:
    with pytest.raises(LabError, match="kernel 1: has no module virtio_console"):
        kernels._load_order(modules_directory(tmp_path / "1"))


def test_unknown_kernel_is_told() -> None:
    with pytest.raises(LabError, match=r"kernel 5\.10: unknown; there are 6\.1, 6\.12, 7"):
        kernels.fetch("5.10")


def test_archive_is_cpio(tmp_path: Path) -> None:
    archive = initramfs.pack(
        [
            initramfs.Member("bin", initramfs.DIRECTORY, b""),
            initramfs.Member("bin/tool", initramfs.EXECUTABLE, b"#!/bin/true\n"),
        ]
    )
    assert archive.startswith(b"070701")
    assert archive.endswith(b"TRAILER!!!\0\0\0\0")
    assert len(archive) % 4 == 0
