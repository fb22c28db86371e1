"""Pass 7: a file's data survives the loss of what led to it."""

from __future__ import annotations

import pytest

from pkernfs.dma.mount import mount_filesystem
from pkernfs.fs.fsck import Code, check
from pkernfs.layout import BLOCK, ROOT_INO
from pkernfs.quantities import Ino
from pkernfs.region.region import Region
from support.checking import MemoryFile
from support.damage import REG, Damage, Populated, populate


def fragmented(file: MemoryFile) -> tuple[Populated, dict[int, bytes]]:
    """A file with so many extents that its tree has an inner node, and bytes in each."""
    with file.open() as region:
        populated = populate(region, names=5, attributes=1)
        fs = mount_filesystem(region)
        ino = fs.create(ROOT_INO, b"fragmented", REG, 0, 0).ino
        marks = {}
        for i in range(400):
            marks[2 * i * BLOCK] = b"mark %d" % i
            fs.write(ino, 2 * i * BLOCK, marks[2 * i * BLOCK])
        fs.unmount()
        populated.inos["fragmented"] = ino
    return populated, marks


def marks_left(region: Region, ino: Ino, marks: dict[int, bytes]) -> int:
    fs = mount_filesystem(region)
    left = sum(bytes(fs.read(ino, at, len(mark))) == mark for at, mark in marks.items())
    fs.unmount()
    return left


@pytest.mark.parametrize("what", ["inner node", "inode page", "both", "leaf"])
def test_guest_memory_survives_a_lost_node(what: str) -> None:
    with MemoryFile(1 << 30) as file:
        populated, marks = fragmented(file)
        ino = populated.inos["fragmented"]
        with file.open() as region:
            damage = Damage(Populated(region, populated.inos))
            root = damage.inode(ino).body
            if what == "leaf":
                damage.smash(damage.children(root)[1])
            if what in ("inner node", "both"):
                damage.smash(root)
            if what in ("inode page", "both"):
                damage.smash(damage.inode_page(ino))
            check(region, repair=False)
            report = check(region, repair=True)
            assert report.counts[Code.TREE_LEAF_FOUND] or what == "leaf"
            assert check(region, repair=False).clean
            fs = mount_filesystem(region)
            assert fs.lookup(ROOT_INO, b"fragmented").ino == ino
            fs.unmount()
            left = marks_left(region, ino, marks)
            if what == "leaf":
                assert len(marks) // 2 <= left < len(marks)
            else:
                assert left == len(marks)
