"""Segments that no file has: destroyed, unless a device reaches them or somebody has them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pkernfs.errors import NoSpaceError
from pkernfs.layout import BLOCK, SEGMENT_DEAD
from support.files import ROOT
from support.holding import Pooled, pooled_by
from support.memory_pool import PiecedPool


@pytest.fixture
def pool() -> Iterator[PiecedPool]:
    with PiecedPool(8 * BLOCK, dirty=True) as made:
        yield made


@pytest.fixture
def pooled(pool: PiecedPool) -> Iterator[Pooled]:
    with pooled_by(pool) as made:
        yield made


def test_a_dead_segment_that_is_held_is_not_destroyed(
    pooled: Pooled, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Not here, and not by a mount, and not for want of memory."""
    row = pooled.segment(b"f", 4 * BLOCK)
    other = pooled.segment(b"g", BLOCK)
    pooled.fs.unlink(ROOT, b"f")
    pooled.fs.unlink(ROOT, b"g")
    pooled.pins.memory = {row.pieces[1].start}
    for _ in range(2):
        assert pooled.fs.segments.reap() == {row.number: f"segment {row.number}: busy: somebody"}
        assert other.number not in pooled.pool.memories
        with pytest.raises(NoSpaceError):
            pooled.segment(b"large", 5 * BLOCK)
        pooled.fs.unlink(ROOT, b"large")
        assert row.number in pooled.pool.memories
        pooled.remount(monkeypatch)
        assert pooled.fs.segments.table.rows[row.number].state == SEGMENT_DEAD
    assert f"segment {row.number}: busy: somebody" in caplog.text
    pooled.pins.memory.clear()
    assert pooled.fs.segments.reap() == {}
    assert not pooled.pool.memories
    pooled.segment(b"large", 8 * BLOCK)


def test_who_is_busy_waits_and_others_go(pooled: Pooled) -> None:
    held, used, free = (pooled.segment(name, BLOCK) for name in (b"held", b"used", b"free"))
    for name in (b"held", b"used", b"free"):
        pooled.fs.unlink(ROOT, name)
    pooled.pins.memory = {held.pieces[0].start}
    pooled.pool.busy = {used.number}
    assert pooled.fs.segments.reap() == {
        held.number: f"segment {held.number}: busy: somebody",
        used.number: f"segment {used.number}: busy: a test holds it",
    }
    assert free.number not in pooled.pool.memories
    pooled.pool.busy.clear()
    pooled.pins.memory.clear()
    assert pooled.fs.segments.reap() == {}
