"""Questions about tables, while they change."""

from __future__ import annotations

import itertools
import stat
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest

from pkernfs.dma import reports
from pkernfs.dma.output import Pause, Text
from pkernfs.dma.table_files import TableFiles
from pkernfs.errors import (
    CorruptionError,
    InvalidError,
)
from pkernfs.fs.names import DirectoryEntry
from pkernfs.layout import PAGE, ROOT_INO
from pkernfs.quantities import Ino, Iova
from support.table_files import (
    BAR,
    DEVICE,
    GIB,
    MIB,
    READ,
    Host,
    drain,
    grow,
    ino_of,
    refused,
)


@pytest.fixture
def mapped(mapped_either: Host) -> Host:
    """guest is in the region, or a segment."""
    return mapped_either


def test_show_goes_on_while_tables_change(mapped: Host) -> None:
    """Each step walks from the top: what it prints was right when it was printed."""
    ino = mapped.file_of("pages")
    for at in range(0, 600 * PAGE, 2 * PAGE):
        mapped.run(partial(mapped.fs.write, ino, at, b"x"))
    mapped.run(lambda: mapped.fs.setattr(ino, size=600 * PAGE))
    mapped.map(0, Iova(PAGE), ino)
    lines: list[str] = []
    for steps, item in enumerate(reports.show_text(mapped.fs, 0), 1):
        assert isinstance(item, Text)
        lines += item.text.splitlines()
        if steps == 3:  # the tables that are being shown go, and others take their pages
            mapped.tables.unmap(0, Iova(0), GIB)
            mapped.map(0, Iova(100 * GIB), ino)
            mapped.map(0, Iova(300 * PAGE), ino, 0, 2 * PAGE)
        if steps == 5:
            grow(mapped, 2)
    shown = [int(line.split()[0], 16) for line in lines if line.startswith("0x")]
    assert shown == sorted(set(shown))
    assert shown[0] == 1
    assert shown[-1] == (100 * GIB) // PAGE + 599
    assert not mapped.fs.read_only


def test_walk_leaves_out_what_is_damaged(mapped: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory that cannot be read: what it has up to there, and all others, are found."""
    readdir = mapped.fs.readdir
    d = mapped.fs.mkdir(ROOT_INO, b"d", 0o755, 0, 0).ino
    for name in (b"first", b"second"):
        mapped.fs.create(d, name, stat.S_IFREG | 0o600, 0, 0)

    def read(ino: Ino, cookie: int) -> Iterator[DirectoryEntry]:
        for number, entry in enumerate(readdir(ino, cookie)):
            if (ino, number) == (d, 1):
                raise CorruptionError("a test")
            yield entry

    with monkeypatch.context() as patch:
        patch.setattr(mapped.fs, "readdir", read)
        found = [item for item in reports.walk_files(mapped.fs) if not isinstance(item, Pause)]
    first = next(iter(readdir(d, 0)))[0].decode()
    assert sorted(path for path, _ino in found) == [
        f"/d/{first}", "/guest", "/iommu/dom-0", "/iommu/root-pgtables", "/other"
    ]  # fmt: skip
    for name in (b"first", b"second"):
        mapped.fs.unlink(d, name)
    mapped.fs.rmdir(ROOT_INO, b"d")


def test_walk_ends_where_directories_are_a_loop(mapped: Host) -> None:
    d = mapped.fs.mkdir(ROOT_INO, b"d", 0o755, 0, 0).ino
    e = mapped.fs.mkdir(d, b"e", 0o755, 0, 0).ino
    directory = mapped.fs.inode(e)
    with mapped.fs.store:  # as a scribbled region has it
        mapped.fs.super.inodes.touch(directory)
        mapped.fs._namei._names.add(directory, b"back", d, 4)
        mapped.fs.super.inodes.save(directory)
    found = [item for item in reports.walk_files(mapped.fs) if not isinstance(item, Pause)]
    assert sorted(path for path, _ino in found) == [
        "/guest", "/iommu/dom-0", "/iommu/root-pgtables", "/other"
    ]  # fmt: skip
    with mapped.fs.store:
        mapped.fs.super.inodes.touch(directory)
        found_name = mapped.fs._namei._names.locate(directory, b"back")
        assert found_name is not None
        mapped.fs._namei._names.remove(directory, b"back", found_name[0])
        mapped.fs.super.inodes.save(directory)


def test_two_names_are_one_file(mapped: Host) -> None:
    mapped.fs.link(ino_of(mapped, "guest"), ROOT_INO, b"second")
    mapped.assert_check_clean()
    _text, whole, _status = mapped.answer("export")
    (mapping,) = whole["ioas"][0]["mappings"]
    assert mapping["file"] in ("/guest", "/second")


def test_a_rename_does_not_hide_a_file(mapped: Host) -> None:
    """A check goes by inodes: a name that moves from where it has not looked to where it has."""
    for at in range(100):
        mapped.fs.mkdir(ROOT_INO, b"%d" % at, 0o755, 0, 0)
    first, last = mapped.fs.find(ROOT_INO, b"0"), mapped.fs.find(ROOT_INO, b"99")
    homes = itertools.cycle([ROOT_INO, first, last])
    moves = itertools.pairwise(homes)

    def move() -> None:
        source, target = next(moves)
        mapped.fs.rename(source, b"guest", target, b"guest", 0)

    assert drain(reports.prepare_check(mapped.fs), move).run().clean
    assert next(moves)[0] != ROOT_INO  # it has moved


@pytest.mark.parametrize(
    "bad",
    [
        {"device": -1, "iova": 0},
        {"device": 0x10000, "iova": 0},
        {"device": 5, "iova": -1},
        {"device": 5, "iova": 1 << 64},
        {"device": 5, "iova": 0, "pasid": -1},
        {"device": 5, "iova": 0, "pasid": 1 << 20},
        {"device": 5, "iova": 0, "access": 4},
        {"device": 5, "iova": 0, "access": -1},
        {"device": None, "iova": 0},
        {"device": 5, "iova": None},
    ],
)
def test_no_request_is_like_that(mapped: Host, bad: dict[str, Any]) -> None:
    refused(mapped, InvalidError, lambda: mapped.answer("translate", **bad))


def test_translate_says_whose_memory_it_is(mapped: Host) -> None:
    mapped.attach(0)
    mapped.tables.map_bar(0, Iova(0), BAR, 0, None, READ)
    assert isinstance(mapped.tables, TableFiles)
    text, _, status = mapped.answer("translate", device=DEVICE, iova=GIB + 0x1234)
    assert status == 0
    at = mapped.physical(ino_of(mapped, "guest"), 0x1000) + 0x234
    assert text.splitlines()[-1] == (
        f"physical {at:#x} rw, 2 MiB page, domain id 2, /guest + 0x1234"
    )
    text, _, status = mapped.answer("translate", device=DEVICE, iova=0x5678)
    assert text.splitlines()[-1].endswith(
        "r, 2 MiB page, domain id 2, BAR 0 of 0000:00:06.0 + 0x5678"
    )
    text, _, status = mapped.answer("translate", device=DEVICE, iova=0x5678, access=2)
    assert status == 1
    assert text.splitlines()[-1].startswith("fault 0x05 WRITE")
    text, _, status = mapped.answer("translate", device=DEVICE, iova=0xFEE0_0000)
    assert status == 0
    assert text.splitlines()[-1].startswith("interrupt")


def test_export_says_which_segment_it_is(pooled: Host) -> None:
    """A VMM maps the segment, whose offsets are the file's."""
    guest, other = pooled.file_of("guest", 6 * MIB), pooled.file_of("other", 2 * MIB)
    small = pooled.file_of("small", MIB)
    pooled.dom(0)
    for at, ino in enumerate((small, guest, other)):
        pooled.map(0, Iova(at * GIB), ino)
    pooled.tables.unmap(0, Iova(GIB), 3 * MIB)
    row = pooled.fs.segments.of(pooled.fs.inode(guest))
    flat, part, whole = pooled.answer("export")[1]["ioas"][0]["mappings"]
    assert "segment" not in flat
    assert (part["file"], part["offset"], part["length"]) == ("/guest", 3 * MIB, 3 * MIB)
    assert pooled.pool is not None
    assert part["segment"] == {"number": row.number, "path": pooled.pool.native_path(row)}
    assert [p["region_offset"] for p in part["pieces"]] == [None] * len(part["pieces"])
    assert part["physical"] == row.pieces[1].start + MIB
    assert whole["segment"]["number"] == row.number + 1
    pooled.fs.segments.lost[row.number] = "lost"
    _flat, part, _whole = pooled.answer("export")[1]["ioas"][0]["mappings"]
    assert part["segment"]["path"] is None


def test_segments_that_nothing_maps_need_no_name(pooled: Host) -> None:
    """Who is asked for one address need not walk all names for each segment that there is."""
    guest = pooled.file_of("guest", 4 * MIB)
    pooled.file_of("other", 4 * MIB)
    pooled.dom(0)
    pooled.map(0, Iova(0), guest, 2 * MIB, PAGE)
    [piece] = drain(reports.mapped_pieces(pooled.fs))
    assert (piece.ino, piece.offset, piece.end - piece.start) == (guest, 2 * MIB, 2 * MIB)
