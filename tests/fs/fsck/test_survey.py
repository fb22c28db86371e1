"""A survey lists every metadata page and every file with a name, and nothing else."""

from __future__ import annotations

from pkernfs.fs.fsck import survey
from pkernfs.layout import (
    BACKUP_PAGE,
    FIRST_MAP_PAGE,
    INODE_FLAG_TABLE,
    JOURNAL_PAGE,
    MAGIC_NAMES,
    PAGE,
    PAGES_PER_BLOCK,
    STATE_PAGE,
    SUPERBLOCK_PAGE,
)
from pkernfs.quantities import pages_from
from support.damage import Damage, make_orphan


def test_every_page_with_a_magic_is_listed(damage: Damage) -> None:
    found = survey(damage.region)
    assert found.report.clean
    pages = found.metadata_pages()
    assert pages == sorted(set(pages))
    assert {SUPERBLOCK_PAGE, BACKUP_PAGE, FIRST_MAP_PAGE} <= set(pages)
    with_magic = {
        number
        for number in pages_from(SUPERBLOCK_PAGE, damage.region.size // PAGE)
        if int.from_bytes(damage.page(number)[:4], "little") in MAGIC_NAMES
    }
    journal = set(range(JOURNAL_PAGE, 2 * PAGES_PER_BLOCK))
    # What was freed keeps its bytes.
    assert set(pages) <= with_magic - {STATE_PAGE} - journal


def test_files_that_have_a_name_and_are_no_tables(damage: Damage) -> None:
    make_orphan(damage, "other")
    table = damage.inos["pages"]
    damage.set_inode(table, flags=damage.inode(table).flags | INODE_FLAG_TABLE)
    files = dict(survey(damage.region).files())
    assert damage.inos["other"] not in files
    assert table not in files
    small, guest = damage.inos["small"], damage.inos["guest"]
    (span,) = files[small]
    (_, page, _) = damage.extents(small)[0]
    assert span == (0, 2 * PAGE, page * PAGE)
    assert files[guest] == [
        (first * PAGE, count * PAGE, page * PAGE) for first, page, count in damage.extents(guest)
    ]
    assert files[damage.inos["many/a-name-that-takes-some-room-0001"]] == []
