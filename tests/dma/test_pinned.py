"""What tables pin: memory that they map, and table files that something refers to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import pytest

from pkernfs.dma import pinned
from pkernfs.errors import (
    BusyError,
    NoSpaceError,
    PermissionDeniedError,
)
from pkernfs.fs.file import FALLOC_ZERO_RANGE
from pkernfs.fs.namei import RENAME_EXCHANGE
from pkernfs.fs.names import ROOT_PGTABLES
from pkernfs.host.iomem import overlap
from pkernfs.iommu.page_pool import BlockMap
from pkernfs.iommu.page_walk import Code, Tree
from pkernfs.layout import BLOCK, INODE_FLAG_PENDING, IOMMU_INO, PAGE, ROOT_INO
from pkernfs.quantities import Iova, PhysRange
from pkernfs.ratelimit import BURST
from support.table_files import (
    DEVICE,
    GIB,
    MIB,
    PUNCH,
    Host,
    grow,
    ino_of,
    refused,
)

PINNED: dict[str, Callable[[Host], object]] = {
    "unlink": lambda h: h.fs.unlink(ROOT_INO, b"guest"),
    "rename over it": lambda h: h.fs.rename(ROOT_INO, b"other", ROOT_INO, b"guest", 0),
    "shrink": lambda h: h.fs.setattr(ino_of(h, "guest"), size=MIB),
    "shrink by a byte": lambda h: h.fs.setattr(ino_of(h, "guest"), size=4 * MIB - 1),
    "to nothing": lambda h: h.fs.setattr(ino_of(h, "guest"), size=0),
    "punch": lambda h: h.fs.fallocate(ino_of(h, "guest"), PUNCH, MIB, PAGE),
    "punch part of a page": lambda h: h.fs.fallocate(ino_of(h, "guest"), PUNCH, 5, 10),
    "punch beyond": lambda h: h.fs.fallocate(ino_of(h, "guest"), PUNCH, 4 * MIB - 1, 9 * MIB),
    "unlink dom-0, attached": lambda h: h.fs.unlink(IOMMU_INO, b"dom-0"),
    "rename dom-0, attached": lambda h: h.fs.rename(IOMMU_INO, b"dom-0", IOMMU_INO, b"dom-1", 0),
    "exchange dom-0, attached": lambda h: h.fs.rename(
        IOMMU_INO, b"dom-5", IOMMU_INO, b"dom-0", RENAME_EXCHANGE
    ),
    "rename over dom-0, attached": lambda h: h.fs.rename(
        IOMMU_INO, b"dom-5", IOMMU_INO, b"dom-0", 0
    ),
    "unlink root-pgtables": lambda h: h.fs.unlink(IOMMU_INO, ROOT_PGTABLES),
}  # fmt: skip


@pytest.fixture
def mapped(mapped_either: Host) -> Host:
    """guest is in the region, or a segment."""
    return mapped_either


@pytest.mark.parametrize("again", [False, True], ids=["", "remounted"])
@pytest.mark.parametrize("what", PINNED)
def test_pinned(mapped: Host, what: str, again: bool, caplog: pytest.LogCaptureFixture) -> None:
    """EBUSY, and the holder is named in the log."""
    mapped.dom(5)
    mapped.attach(0)
    if again:
        mapped.remount(clean=False)
    caplog.clear()
    refused(mapped, BusyError, lambda: PINNED[what](mapped))
    said = "\n".join(r.getMessage() for r in caplog.records)
    if "attached" in what or "root" in what:
        assert "in use: device 0000:00:05.0 is attached" in said
    else:
        assert f"inode {ino_of(mapped, 'guest')}: busy: dom-0 maps it at iova 0x40" in said
    mapped.assert_check_clean()
    mapped.tables.detach(DEVICE)
    mapped.tables.unmap(0, Iova(0), 1 << 48)
    mapped.run(lambda: PINNED[what](mapped))


def test_a_mapped_segment_stays_one(pooled: Host) -> None:
    guest = pooled.file_of("guest", 4 * MIB)
    pooled.dom(0)
    pooled.map(0, Iova(0), guest, 2 * MIB, PAGE)
    off = partial(pooled.fs.conversions.off, guest)
    refused(pooled, BusyError, off, "mapped for DMA")
    pooled.tables.unmap(0, Iova(0), PAGE)
    pooled.run(off)
    assert pooled.fs.segments.find(guest) is None


def test_a_segment_that_a_domain_maps_outlives_its_row(pooled: Host) -> None:
    """As damage would have it: no file has it, and then no row; a domain still leads there."""
    guest = pooled.file_of("guest", 4 * MIB)
    pooled.dom(0)
    pooled.map(0, Iova(GIB), guest)
    fs, row = pooled.fs, pooled.fs.segments.of(pooled.fs.inode(guest))
    with fs.store:
        fs.super.inodes.touch(fs.inode(guest))
        fs.segments.drop(fs.inode(guest))
        fs.inode(guest).size = 0
        fs.super.inodes.save(fs.inode(guest))
    busy = f"segment {row.number}: busy: dom-0 maps it at iova 0x40000000"
    assert fs.segments.reap() == {row.number: busy}
    pooled.remount(clean=False)
    segments = pooled.fs.segments
    assert segments.reap() == {row.number: busy}
    assert {f.code for f in pooled.check().findings} == {Code.LEAF_OUTSIDE}
    with pooled.fs.store:
        segments.table.remove(row.number)
    pool = pooled.pool
    assert pool is not None
    with pytest.raises(NoSpaceError):
        pooled.file_of("large", pool.total - 2 * MIB)
    other = pooled.file_of("other", pool.total - 4 * MIB)
    theirs = segments.of(pooled.fs.inode(other)).pieces
    assert not any(overlap(one, mine) for one in theirs for mine in row.pieces)
    pooled.tables.unmap(0, Iova(0), 1 << 48)
    pool.destroy(row)
    pooled.run(lambda: pooled.fs.setattr(other, size=pool.total))


def test_tables_are_walked_once_for_each_state(
    pooled: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who asks again about a segment gets the same answer, until what is mapped changes."""
    walks: list[str] = []
    find, mark = Tree.find, Tree.mark

    def finds(tree: Tree, ranges: Sequence[PhysRange]) -> Iova | None:
        walks.append("find")
        return find(tree, ranges)

    def marks(tree: Tree, blocks: BlockMap) -> bool:
        walks.append("mark")
        return mark(tree, blocks)

    monkeypatch.setattr(Tree, "find", finds)
    monkeypatch.setattr(Tree, "mark", marks)
    guest = pooled.file_of("guest", 4 * MIB)
    memory = pooled.fs.segments.of(pooled.fs.inode(guest)).pieces
    tables, at = pooled.tables, Iova(GIB)

    def asked(times: int = 3) -> tuple[str | None, int]:
        walks.clear()
        for _ in range(times):
            holder, held = tables.holder_of_memory(memory), tables.held_memory(memory)
            held.clear()  # the answer is the caller's own
        assert walks == ["find", "mark"]
        return holder, sum(piece.size for piece in tables.held_memory(memory))

    pooled.dom(0)
    assert asked() == (None, 0)
    pooled.map(0, at, guest)
    assert asked() == ("dom-0 maps it at iova 0x40000000", 4 * MIB)
    tables.unmap(0, at, 2 * MIB)
    assert asked() == ("dom-0 maps it at iova 0x40200000", 2 * MIB)
    monkeypatch.setattr(pinned, "_MOST_ANSWERS", 2)
    walks.clear()
    tables.holder_of_memory(memory[:1])
    assert walks == ["find"]
    assert asked(1) == ("dom-0 maps it at iova 0x40200000", 2 * MIB)


def test_an_append_that_was_cut_does_not_wait_for_what_is_mapped(pooled: Host) -> None:
    """Only what is to be freed or zeroed must not be mapped."""
    pooled.dom(0)
    for name, size in (("guest", 4 * MIB), ("small", 3 * PAGE)):
        ino = pooled.file_of(name, size)
        pooled.map(0, Iova(ino << 30), ino)
        inode = pooled.fs.inode(ino)
        with pooled.fs.store:
            pooled.fs.super.inodes.touch(inode)
            pooled.fs._files._set_pending(inode, size, size + PAGE)
            pooled.fs.super.inodes.save(inode)
    pooled.remount(clean=False)
    for name in ("guest", "small"):
        inode = pooled.fs.inode(ino_of(pooled, name))
        assert not inode.flags & INODE_FLAG_PENDING


def test_refusals_do_not_fill_the_log(mapped: Host, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(300):
        with pytest.raises(BusyError):
            mapped.fs.unlink(ROOT_INO, b"guest")
    assert len(caplog.records) == BURST + 1
    assert caplog.records[-1].getMessage() == "more of these: not logged for up to 10 seconds"


def test_the_last_of_two_names_is_pinned(mapped: Host) -> None:
    guest = ino_of(mapped, "guest")
    mapped.fs.link(guest, ROOT_INO, b"second")
    mapped.fs.unlink(ROOT_INO, b"guest")
    refused(mapped, BusyError, lambda: mapped.fs.unlink(ROOT_INO, b"second"), "mapped for DMA")
    mapped.fs.link(guest, ROOT_INO, b"third")
    mapped.fs.rename(ROOT_INO, b"other", ROOT_INO, b"second", 0)  # over one of two
    refused(mapped, BusyError, lambda: mapped.fs.rename(ROOT_INO, b"second", ROOT_INO, b"third", 0))


ALLOWED: dict[str, Callable[[Host], object]] = {
    "write": lambda h: h.fs.write(ino_of(h, "guest"), 100, b"x" * 9000),
    "append": lambda h: h.fs.write(ino_of(h, "guest"), 4 * MIB, b"x" * 9000),
    "grow": lambda h: h.fs.setattr(ino_of(h, "guest"), size=9 * MIB),
    "allocate": lambda h: h.fs.fallocate(ino_of(h, "guest"), 0, 0, 9 * MIB),
    "zero": lambda h: h.fs.fallocate(ino_of(h, "guest"), FALLOC_ZERO_RANGE, 0, 4 * MIB),
    "rename": lambda h: h.fs.rename(ROOT_INO, b"guest", ROOT_INO, b"new", 0),
    "rename over another": lambda h: h.fs.rename(ROOT_INO, b"guest", ROOT_INO, b"other", 0),
    "exchange": lambda h: h.fs.rename(ROOT_INO, b"guest", ROOT_INO, b"other", RENAME_EXCHANGE),
    "chmod": lambda h: h.fs.setattr(ino_of(h, "guest"), mode=0o644, uid=5, gid=6),
    "the same size": lambda h: h.fs.setattr(ino_of(h, "guest"), size=4 * MIB),
    "punch another": lambda h: h.fs.fallocate(ino_of(h, "other"), PUNCH, 0, MIB),
    "remove another": lambda h: h.fs.unlink(ROOT_INO, b"other"),
    "shrink another": lambda h: h.fs.setattr(ino_of(h, "other"), size=1),
    "rename an unattached domain": lambda h: h.fs.rename(
        IOMMU_INO, b"dom-0", IOMMU_INO, b"dom-9", 0
    ),
    "grow the domain": lambda h: grow(h, 2),
}


@pytest.mark.parametrize("what", ALLOWED)
def test_not_pinned(mapped: Host, what: str) -> None:
    before = [m[:4] for m in mapped.mappings(0)]
    mapped.run(lambda: ALLOWED[what](mapped))
    (number,) = mapped.tables.domains
    assert mapped.mappings(number) == before
    mapped.assert_check_clean()


def test_only_the_mapped_part_is_pinned(host: Host) -> None:
    host.dom(0)
    ino = host.file_of("guest", 8 * MIB)
    host.map(0, Iova(0), ino, 2 * MIB, PAGE)
    host.run(lambda: host.fs.fallocate(ino, PUNCH, 0, 2 * MIB))
    host.run(lambda: host.fs.fallocate(ino, PUNCH, 2 * MIB + PAGE, MIB))
    refused(host, BusyError, lambda: host.fs.fallocate(ino, PUNCH, 2 * MIB + PAGE - 1, MIB))
    refused(host, BusyError, lambda: host.fs.setattr(ino, size=2 * MIB + PAGE - 1))
    host.run(lambda: host.fs.setattr(ino, size=2 * MIB + PAGE))
    host.assert_check_clean()
    host.tables.unmap(0, Iova(0), PAGE)
    host.run(lambda: host.fs.setattr(ino, size=0))


def test_small_files_beside_a_mapped_one_are_not_pinned(host: Host) -> None:
    """They share its 2 MiB block."""
    host.dom(0)
    one, two = host.file_of("one", 3 * PAGE), host.file_of("two", 3 * PAGE)
    assert host.physical(one) // BLOCK == host.physical(two) // BLOCK
    host.map(0, Iova(0), one)
    host.fs.unlink(ROOT_INO, b"two")
    refused(host, BusyError, lambda: host.fs.unlink(ROOT_INO, b"one"))


def test_a_mapped_small_file_stays_where_it_is(
    host: Host, caplog: pytest.LogCaptureFixture
) -> None:
    """A file that outgrows 4 KiB pages moves into a block, unless a device may reach it."""
    host.dom(0)
    for name, is_mapped in (("free", False), ("guest", True)):
        ino = host.file_of(name, data=b"x" * 3 * PAGE)
        at = host.physical(ino)
        if is_mapped:
            host.map(0, Iova(0), ino)
        host.run(partial(host.fs.setattr, ino, size=5 * MIB))
        host.run(partial(host.fs.write, ino, 5 * MIB, b"end"))
        assert (host.physical(ino) == at) == is_mapped
        assert bytes(host.fs.read(ino, 0, 4 * PAGE)) == b"x" * 3 * PAGE + bytes(PAGE)
    assert not caplog.records  # nobody was refused anything
    host.assert_check_clean()
    host.tables.unmap(0, Iova(0), 1 << 48)
    host.fs.unlink(ROOT_INO, b"guest")


def test_two_domains_pin(mapped: Host) -> None:
    mapped.dom(1)
    guest = ino_of(mapped, "guest")
    mapped.map(1, Iova(0), guest, 3 * MIB, MIB)
    mapped.tables.unmap(0, Iova(0), 1 << 48)
    refused(mapped, BusyError, lambda: mapped.fs.unlink(ROOT_INO, b"guest"))
    mapped.run(lambda: mapped.fs.setattr(guest, size=4 * MIB))
    mapped.run(lambda: mapped.fs.fallocate(guest, PUNCH, 0, 3 * MIB))
    mapped.tables.unmap(1, Iova(0), MIB)
    mapped.fs.unlink(ROOT_INO, b"guest")


def test_an_unused_domain_goes_with_its_pins(mapped: Host) -> None:
    mapped.fs.unlink(IOMMU_INO, b"dom-0")
    mapped.fs.unlink(ROOT_INO, b"guest")
    mapped.fs.unlink(IOMMU_INO, ROOT_PGTABLES)
    assert mapped.state() == Host.state(mapped)
    assert (mapped.tables.domains, mapped.tables.root) == ({}, None)


def test_a_domain_that_replaces_another(mapped: Host) -> None:
    mapped.dom(1)
    mapped.map(1, Iova(0), ino_of(mapped, "other"))
    mapped.fs.rename(IOMMU_INO, b"dom-1", IOMMU_INO, b"dom-0", 0)
    assert list(mapped.tables.domains) == [0]
    assert mapped.mappings(0)[0][0] == 0
    mapped.fs.unlink(ROOT_INO, b"guest")
    refused(mapped, BusyError, lambda: mapped.fs.unlink(ROOT_INO, b"other"))


def test_domains_change_places(mapped: Host) -> None:
    mapped.dom(1)
    mapped.map(1, Iova(0), ino_of(mapped, "other"))
    one, other = mapped.mappings(0), mapped.mappings(1)
    mapped.fs.rename(IOMMU_INO, b"dom-1", IOMMU_INO, b"dom-0", RENAME_EXCHANGE)
    assert (mapped.mappings(1), mapped.mappings(0)) == (one, other)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"dom-0", ROOT_PGTABLES),
        (ROOT_PGTABLES, b"dom-1"),
        (b"dom-0", b"dom-65536"),
        (b"dom-0", b"dom-01"),
    ],
)
def test_names_that_table_files_cannot_have(mapped: Host, old: bytes, new: bytes) -> None:
    for flags in (0, RENAME_EXCHANGE) if mapped.fs.find(IOMMU_INO, new) else (0,):
        refused(
            mapped,
            PermissionDeniedError,
            partial(mapped.fs.rename, IOMMU_INO, old, IOMMU_INO, new, flags),
        )


def test_open_files_are_pinned_as_well(mapped: Host) -> None:
    guest = ino_of(mapped, "guest")
    mapped.fs.open(guest)
    refused(mapped, BusyError, lambda: mapped.fs.unlink(ROOT_INO, b"guest"))
    mapped.fs.release(guest)
    mapped.assert_check_clean()
