"""The lab's own parts that need no machine: its cache, and what a kernel's initramfs loads."""

from __future__ import annotations

import itertools
import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from guestlab import initramfs
from kexeclab import LabError, LostMachine, cache, debian, kernels, qemus
from kexeclab.feed import Feed, frame, number_of
from kexeclab.machine import Clock, Running


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


def test_unknown_qemu_is_told() -> None:
    with pytest.raises(LabError, match=r"QEMU 10: unknown; there are 7\.2"):
        qemus.fetch("10")


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


# ---------------------------------------------------------------------------- the machine watched


def clock(*looks: tuple[float, float]) -> list[float]:
    """What a clock shows that is asked at these times, the machine having waited so long."""
    times, waits = zip((100.0, 5.0), *looks, strict=True)
    one = Clock(iter(waits).__next__, iter(times).__next__)
    return [one.now() for _ in looks]


def test_clock_shows_what_passes() -> None:
    assert clock((101, 5), (101.5, 5), (103, 5)) == [1, 1.5, 3]


def test_clock_stands_while_the_machine_waits_for_a_processor() -> None:
    assert clock((101, 5.5), (102, 6)) == [0.5, 1]


def test_clock_goes_on_however_long_the_machine_waits() -> None:
    starved = clock(*((101.0 + i, 6.0 + i) for i in range(400)))
    assert starved[-1] == 100
    assert all(a < b for a, b in itertools.pairwise(starved))


def test_clock_stands_while_its_watcher_sleeps() -> None:
    assert clock((101, 5), (1000, 5), (1001, 5)) == [1, 3, 4]


@pytest.fixture
def watched() -> Iterator[tuple[Running, socket.socket]]:
    """A machine that is a ``cat``, and its end of the channel."""
    ours, theirs = socket.socketpair()
    process = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin
    machine = Running(process, ours, "tcg", echo=False)
    with theirs, process.stdin:
        yield machine, theirs
    machine.close()


def test_message_that_came_before_anybody_looked(watched: tuple[Running, socket.socket]) -> None:
    machine, channel = watched
    channel.sendall(b'{"beat": 1}\n{"beat"')
    assert machine.receive(machine.clock.now() - 60) == {"beat": 1}
    assert machine.receive(machine.clock.now() + 0.01) is None
    channel.sendall(b": 2}\n")
    assert machine.receive(machine.clock.now() + 20) == {"beat": 2}


def test_answer_to_a_machine_that_is_gone(watched: tuple[Running, socket.socket]) -> None:
    machine, channel = watched
    channel.close()
    machine.process.kill()
    machine.send(go=True)
    with pytest.raises(LostMachine, match=r"ended \(exit status -9\)"):
        machine.receive(machine.clock.now() + 20)


def test_machine_that_waits_for_a_processor_is_known(
    watched: tuple[Running, socket.socket],
) -> None:
    machine, _ = watched
    assert machine.waited_seconds() >= 0
    machine.process.kill()
    machine.process.wait()
    assert machine.waited_seconds() == 0


# ---------------------------------------------------------------------------- packets


def test_feed_sends_consecutive_numbers_and_goes_on_after_a_stop() -> None:
    feed = Feed("wire")
    theirs = socket.socket(fileno=os.dup(feed.descriptor))
    theirs.settimeout(10)
    feed.passed_on()
    got: list[int] = []
    for count in (3, 5):
        feed.start(rate=1000, limit=count)
        while len(got) < count:
            got.append(number_of(theirs.recv(2000)))
        feed.stop()
    assert got == [0, 1, 2, 3, 4]
    assert feed.sent == sorted(feed.sent)
    assert len(feed.sent) == 5
    feed.close()
    theirs.close()


def test_feed_is_started_once_at_a_time() -> None:
    feed = Feed("wire")
    feed.start(rate=1, limit=1)
    with pytest.raises(LabError, match="started twice"):
        feed.start(rate=1, limit=1)
    feed.close()


def test_packets_of_others_have_no_number() -> None:
    assert number_of(frame(7)) == 7
    assert number_of(frame(7)[:-1]) == -1
    assert number_of(b"\0" * 60) == -1
