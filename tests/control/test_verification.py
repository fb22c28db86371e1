"""The outcome of a handover: compared beside requests or before them, and told in lines."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from pkernfs.control import verification
from pkernfs.control.protocol import ChangedFile
from pkernfs.dma.mount import mount_filesystem
from pkernfs.errors import CorruptionError
from pkernfs.fs.filesystem import FileSystem
from pkernfs.fs.mkfs import make_filesystem
from support.checking import MemoryFile
from support.handed import MIB, file_of
from support.handover import hand_over
from support.pooled_handover import PooledFiles, make_guest


@pytest.fixture
def fs() -> Iterator[FileSystem]:
    """Mounted after a handover with digests; a byte of the file ``f`` has changed since."""
    with MemoryFile(16 * MIB) as memory, memory.open() as region:
        make_filesystem(region)
        before = mount_filesystem(region)
        ino = file_of(before, "f", b"as it was")
        at = before.extents(ino)[0].region_offset
        hand_over(before)
        before.unmount()
        region.copy_in(at, b"A")
        yield mount_filesystem(region)


def test_beside_the_requests(fs: FileSystem, caplog: pytest.LogCaptureFixture) -> None:
    assert verification.describe(fs).state == "running"
    trio.run(verification.verify, fs)
    found = verification.describe(fs)
    assert (found.state, found.trouble, found.not_verified) == ("done", "", 0)
    assert 0 < found.done_bytes <= found.total_bytes
    (change,) = found.changes
    assert change.path == "/f"
    assert "changed since the handover: /f: " in caplog.text
    caplog.clear()
    trio.run(verification.verify, fs)
    assert caplog.text == "", "once is enough"


def test_before_anybody_is_served(fs: FileSystem) -> None:
    (said,) = verification.lines(fs)
    assert "s after handover 1" in said
    verification.verify_now(fs)
    assert verification.describe(fs).state == "done"
    first, second = verification.lines(fs)
    assert first == said
    assert second.startswith(f"{fs.region.name}: changed since the handover: /f: ")


def test_what_cannot_be_compared_is_said(
    fs: FileSystem, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert fs.mount_report is not None

    def fail(_: object) -> None:
        raise CorruptionError("manifest: says the test")

    monkeypatch.setattr(fs.mount_report.verifier, "run", fail)
    with caplog.at_level(logging.ERROR):
        trio.run(verification.verify, fs)
    assert verification.describe(fs).trouble == "manifest: says the test"
    assert "cannot compare with the handover: manifest: says the test" in caplog.text
    assert "manifest: says the test" in verification.lines(fs)[1]


def test_a_change_has_a_path_and_words(fs: FileSystem) -> None:
    verification.verify_now(fs)
    assert [type(change) for change in verification.describe(fs).changes] == [ChangedFile]


def test_without_a_handover_nothing_is_said() -> None:
    with MemoryFile(16 * MIB) as memory, memory.open() as region:
        make_filesystem(region)
        fs = mount_filesystem(region)
        trio.run(verification.verify, fs)
        verification.verify_now(fs)
        assert verification.lines(fs) == []
        assert verification.describe(fs).state == "none"


@pytest.fixture
def pooled() -> Iterator[PooledFiles]:
    """Handed over with digests; since then one segment was changed, and another one lost."""
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="pkernfs-pool.") as name:
        Path(name).chmod(0o711)
        made = PooledFiles(Path(name))
        before = made.mount()
        for number in range(4):
            make_guest(before, f"guest{number}", 3 * MIB, {0: b"guest"})
        hand_over(before)
        before.unmount()
        made.flip(1, 0)
        made.segment(3).unlink()
        yield made
        made.close()


def test_segments_are_read_inside_turns_at_the_pool(
    pooled: PooledFiles, caplog: pytest.LogCaptureFixture
) -> None:
    turns = 0

    @asynccontextmanager
    async def turn() -> AsyncIterator[None]:
        nonlocal turns
        turns += 1
        yield

    fs = pooled.mount()
    caplog.clear()
    trio.run(verification.verify, fs, turn)
    assert turns == 3, "one for each that is there"
    found = verification.describe(fs)
    assert [(change.path, change.what) for change in found.changes] == [
        ("/guest0", "bytes 0x0..0x200000")
    ]
    assert [(file.path, file.why) for file in found.lost] == [
        ("/guest2", "segment-3: lost: there is no file of that name")
    ]
    name = fs.region.name
    assert f"{name}: lost: /guest2: segment-3: lost: there is no file" in caplog.text
    assert f"{name}: changed since the handover: /guest0: " in caplog.text
    assert len(verification.lines(fs)) == 3
    fs.unmount()


def test_segments_are_compared_before_anybody_is_served(pooled: PooledFiles) -> None:
    fs = pooled.mount()
    verification.verify_now(fs)
    found = verification.describe(fs)
    assert (found.state, len(found.changes), len(found.lost)) == ("done", 1, 1)
    assert [line.split(": ")[1] for line in verification.lines(fs)[1:]] == [
        "changed since the handover",
        "lost",
    ]
    fs.unmount()
