"""A populated region, and ways to damage it that look intact: pages are sealed again.

Damage is built here in code, from the format alone (docs/format.md and layout.py).
"""

from __future__ import annotations

import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from pkernfs.dma.mount import mount_filesystem
from pkernfs.fs.mkfs import make_filesystem
from pkernfs.layout import (
    BLOCK,
    EXTENT,
    EXTENT_BYTES,
    FIRST_MAP_PAGE,
    HEADER,
    INODE,
    INODE_BYTES,
    INODE_FLAG_BODY,
    INODE_INLINE_BYTES,
    INODE_INLINE_OFFSET,
    INODE_INLINE_SHIFT,
    INODE_PAGE,
    INODE_PAGE_OFFSET,
    ITEM_SLOT,
    MAP_BLOCKS,
    MAP_CARVED_OFFSET,
    MAP_USED_OFFSET,
    MAP_ZERO_OFFSET,
    NAME_ITEM,
    PAGE,
    PAGE_MAP_USED_OFFSET,
    PAGES_PER_BLOCK,
    ROOT_INO,
    STATE,
    STATE_OFFSET,
    STATE_PAGE,
    SUPERBLOCK_PAGE,
    TREE,
    TREE_OFFSET,
    TREE_SLOTS_OFFSET,
    Extent,
    InodeFields,
    StateFields,
    block_of,
    first_page,
    page_offset,
)
from pkernfs.quantities import BlockNo, Ino, PageNo
from pkernfs.region.checksum import page_checksum
from pkernfs.region.region import Region

REGION_BYTES = 24 << 20
REG = stat.S_IFREG | 0o644
DIR = stat.S_IFDIR | 0o755
BIG_VALUE = b"value" * 2000


@dataclass
class Populated:
    """A region with one of everything, unmounted; numbers of its inodes by path."""

    region: Region
    inos: dict[str, Ino] = field(default_factory=dict)


def populate(region: Region, names: int = 150, attributes: int = 40) -> Populated:
    """Format a region and fill it."""
    make_filesystem(region, label="damage")
    fs = mount_filesystem(region)
    inos: dict[str, Ino] = {}

    def new(path: str, mode: int = REG) -> Ino:
        above, _, name = path.rpartition("/")
        parent = inos[above] if above else ROOT_INO
        if stat.S_ISDIR(mode):
            ino = fs.mkdir(parent, name.encode(), mode, 0, 0).ino
        else:
            ino = fs.create(parent, name.encode(), mode, 0, 0).ino
        inos[path] = ino
        return ino

    new("dir", DIR)
    new("dir/sub", DIR)
    new("dir/sub/deep", DIR)
    fs.write(new("dir/sub/deep/file"), 0, b"at the bottom")
    new("empty", DIR)
    new("many", DIR)
    for i in range(names):
        new(f"many/a-name-that-takes-some-room-{i:04}")
    fs.write(new("small"), 0, b"small " * 700)
    fs.write(new("other"), 0, b"other " * 1000)
    pages = new("pages")
    for i in range(20):
        fs.write(pages, 2 * i * PAGE, b"page %d" % i)
    guest = new("guest")
    fs.fallocate(guest, 0, 0, 8 << 20)
    fs.write(guest, 4 << 20, b"guest " * 1000)
    fs.fallocate(guest, 3, 2 << 20, 2 << 20)
    fs.link(inos["small"], inos["dir"], b"linked")
    inos["link"] = fs.symlink(ROOT_INO, b"link", b"target", 0, 0).ino
    inos["long-link"] = fs.symlink(ROOT_INO, b"long-link", b"t" * 4095, 0, 0).ino
    new("fifo", stat.S_IFIFO | 0o600)
    xattr = new("xattr")
    fs.setxattr(xattr, b"user.big", BIG_VALUE)
    for i in range(attributes):
        fs.setxattr(xattr, b"user.%d" % i, b"v" * 200)
    fs.setxattr(inos["other"], b"user.one", b"1")
    fs.setxattr(inos["other"], b"user.two", BIG_VALUE)
    fs.unmount()
    return Populated(region, inos)


class Damage:
    """Reads and changes the structures of a region that is not mounted."""

    def __init__(self, populated: Populated) -> None:
        self.region = populated.region
        self.inos = populated.inos

    # ------------------------------------------------------------------ pages

    def page(self, number: PageNo) -> bytes:
        """A copy of a page."""
        return self.region.read(page_offset(number), PAGE)

    @contextmanager
    def edit(self, number: PageNo, *, seal: bool = True) -> Iterator[bytearray]:
        """Change a page; it gets the checksum that goes with the change."""
        page = bytearray(self.page(number))
        yield page
        if seal:
            page[4:8] = page_checksum(page).to_bytes(4, "little")
        self.region.copy_in(page_offset(number), page)

    def flip(self, number: PageNo, bit: int) -> None:
        """Flip one bit of a page."""
        with self.edit(number, seal=False) as page:
            page[bit >> 3] ^= 1 << (bit & 7)

    def smash(self, number: PageNo, offset: int = 0, length: int = PAGE) -> None:
        """Invert bytes of a page: never a no-op, and more than one bit."""
        with self.edit(number, seal=False) as page:
            for i in range(offset, offset + length):
                page[i] ^= 0xFF

    # ------------------------------------------------------------------ state and inodes

    def state(self) -> StateFields:
        return StateFields._make(STATE.unpack_from(self.page(STATE_PAGE), STATE_OFFSET))

    def set_state(self, **values: int) -> None:
        with self.edit(STATE_PAGE) as page:
            STATE.pack_into(page, STATE_OFFSET, *self.state()._replace(**values))  # type: ignore[arg-type]

    def table(self) -> list[Extent]:
        """Extents of the inode table, whose tree is one leaf."""
        return self.leaf_extents(self.state().inode_root)

    def inode_page(self, ino: Ino) -> PageNo:
        """Number of the page that holds an inode."""
        index = ino >> 4
        return next(PageNo(p + index - i) for i, p, n in self.table() if i <= index < i + n)

    def inode(self, ino: Ino) -> InodeFields:
        page = self.page(self.inode_page(ino))
        return InodeFields._make(INODE.unpack_from(page, (ino & 15) * INODE_BYTES))

    def set_inode(self, ino: Ino, /, **values: int) -> None:
        new = InodeFields(**self.inode(ino)._asdict() | values)
        with self.edit(self.inode_page(ino)) as page:
            INODE.pack_into(page, (ino & 15) * INODE_BYTES, *new)

    def set_inode_page(self, ino: Ino, field: int, value: int) -> None:
        """Change a field of the header of the page that holds an inode."""
        with self.edit(self.inode_page(ino)) as page:
            fields = list(INODE_PAGE.unpack_from(page, INODE_PAGE_OFFSET))
            fields[field] = value
            INODE_PAGE.pack_into(page, INODE_PAGE_OFFSET, *fields)

    def extents(self, ino: Ino) -> list[Extent]:
        """The inline extents of a file."""
        start = (ino & 15) * INODE_BYTES + INODE_INLINE_OFFSET
        count = self.inode(ino).flags >> INODE_INLINE_SHIFT & 0xFF
        page = self.page(self.inode_page(ino))
        body = page[start : start + count * EXTENT_BYTES]
        return list(map(Extent._make, EXTENT.iter_unpack(body)))

    def set_extents(self, ino: Ino, extents: Sequence[tuple[int, int, int]]) -> None:
        """Give a file other inline extents; nothing else follows."""
        flags = self.inode(ino).flags & ~(0xFF << INODE_INLINE_SHIFT)
        self.set_inode(ino, flags=flags | len(extents) << INODE_INLINE_SHIFT)
        body = b"".join(EXTENT.pack(*e) for e in extents).ljust(INODE_INLINE_BYTES, b"\0")
        start = (ino & 15) * INODE_BYTES + INODE_INLINE_OFFSET
        with self.edit(self.inode_page(ino)) as page:
            page[start : start + INODE_INLINE_BYTES] = body

    # ------------------------------------------------------------------ trees

    def leaf_extents(self, number: PageNo) -> list[Extent]:
        page = self.page(number)
        _, level, count, _, _ = TREE.unpack_from(page, TREE_OFFSET)
        assert level == 0
        end = TREE_SLOTS_OFFSET + count * EXTENT_BYTES
        words = EXTENT.iter_unpack(page[TREE_SLOTS_OFFSET:end])
        return list(map(Extent._make, words))

    def set_leaf_extents(self, number: PageNo, extents: Sequence[tuple[int, int, int]]) -> None:
        with self.edit(number) as page:
            body = b"".join(EXTENT.pack(*e) for e in extents)
            page[TREE_SLOTS_OFFSET : TREE_SLOTS_OFFSET + len(body)] = body
            page[TREE_OFFSET + 2 : TREE_OFFSET + 4] = len(extents).to_bytes(2, "little")

    def children(self, number: PageNo) -> list[PageNo]:
        """The pages below an inner node."""
        page = self.page(number)
        _, level, count, _, _ = TREE.unpack_from(page, TREE_OFFSET)
        assert level > 0
        return [
            PageNo(int.from_bytes(page[at + 8 : at + 16], "little"))
            for at in range(TREE_SLOTS_OFFSET, TREE_SLOTS_OFFSET + 16 * count, 16)
        ]

    def leaf_of(self, root: PageNo) -> PageNo:
        """The first leaf of a tree."""
        while self.page(root)[TREE_OFFSET + 1]:
            root = self.children(root)[0]
        return root

    def names(self, ino: Ino) -> PageNo:
        """The first leaf of a directory."""
        assert self.inode(ino).flags & INODE_FLAG_BODY
        return self.leaf_of(self.inode(ino).body)

    def items(self, number: PageNo) -> list[tuple[int, bytes]]:
        """``(key, item)`` of a leaf of names or attributes."""
        page = self.page(number)
        count = TREE.unpack_from(page, TREE_OFFSET)[2]
        found = []
        for i in range(count):
            key, offset, length, _ = ITEM_SLOT.unpack_from(page, TREE_SLOTS_OFFSET + 16 * i)
            found.append((key, page[offset : offset + length]))
        return found

    def set_items(self, number: PageNo, items: list[tuple[int, bytes]]) -> None:
        """Fill a leaf anew, in the order given."""
        with self.edit(number) as page:
            heap = PAGE
            for i, (key, item) in enumerate(items):
                heap -= len(item)
                page[heap : heap + len(item)] = item
                ITEM_SLOT.pack_into(page, TREE_SLOTS_OFFSET + 16 * i, key, heap, len(item), 0)
            kind = page[TREE_OFFSET]
            TREE.pack_into(page, TREE_OFFSET, kind, 0, len(items), heap, 0)

    def rename(self, ino: Ino, old: bytes, item: bytes | None, key: int | None = None) -> None:
        """Replace the item of a name in a directory of one leaf; None takes it out."""
        leaf = self.names(ino)
        items = self.items(leaf)
        at = next(i for i, (_, data) in enumerate(items) if data[NAME_ITEM.size :] == old)
        if item is None:
            del items[at]
        else:
            items[at] = (items[at][0] if key is None else key, item)
        self.set_items(leaf, sorted(items))

    def item(self, ino: Ino, name: bytes) -> tuple[int, bytes]:
        """Key and item of a name."""
        items = self.items(self.names(ino))
        return next(found for found in items if found[1][NAME_ITEM.size :] == name)

    # ------------------------------------------------------------------ maps

    def set_map(
        self, block: BlockNo, *, used: int | None = None, carved: int | None = None,
        zero: int | None = None,
    ) -> None:  # fmt: skip
        """Change the bits of a block in its block map."""
        assert block < MAP_BLOCKS
        with self.edit(FIRST_MAP_PAGE) as page:
            for offset, value in (
                (MAP_USED_OFFSET, used),
                (MAP_CARVED_OFFSET, carved),
                (MAP_ZERO_OFFSET, zero),
            ):
                if value is not None:
                    _set_bit(page, offset, block, value)

    def block_bits(self, block: BlockNo) -> tuple[int, int, int]:
        """Used, carved and zero bit of a block."""
        page = self.page(FIRST_MAP_PAGE)
        return tuple(  # type: ignore[return-value]
            page[offset + block // 8] >> block % 8 & 1
            for offset in (MAP_USED_OFFSET, MAP_CARVED_OFFSET, MAP_ZERO_OFFSET)
        )

    def free_block(self) -> BlockNo:
        """The last block that is not in use."""
        blocks = self.region.size // BLOCK
        return next(b for b in map(BlockNo, range(blocks - 1, 0, -1)) if not self.block_bits(b)[0])

    def set_page_used(self, number: PageNo, value: int) -> None:
        """Change the bit of a page in its page map."""
        with self.edit(first_page(block_of(number))) as page:
            _set_bit(page, PAGE_MAP_USED_OFFSET, number % PAGES_PER_BLOCK, value)

    def free_page(self) -> PageNo:
        """A page of a carved block that is not in use."""
        first = first_page(block_of(self.inode_page(ROOT_INO)))
        page = self.page(first)
        for bit in range(PAGES_PER_BLOCK - 1, 0, -1):
            if not page[PAGE_MAP_USED_OFFSET + bit // 8] >> bit % 8 & 1:
                return PageNo(first + bit)
        raise AssertionError("no free page")

    def new_page(self, magic: int, owner: Ino) -> PageNo:
        """A free page with a header, marked as in use."""
        number = self.free_page()
        self.set_page_used(number, 1)
        uuid = HEADER.unpack_from(self.page(SUPERBLOCK_PAGE))[4]
        page = bytearray(PAGE)
        HEADER.pack_into(page, 0, magic, 0, number, owner, uuid)
        self.region.copy_in(page_offset(number), page)
        with self.edit(number):
            pass
        return number


def name_item(ino: Ino, kind: int, name: bytes) -> bytes:
    return NAME_ITEM.pack(ino, kind) + name


def make_orphan(d: Damage, path: str) -> None:
    ino = d.inos[path]
    d.rename(ROOT_INO, path.encode(), None)
    d.set_inode(ROOT_INO, size=d.inode(ROOT_INO).size - 1)
    d.set_inode(ino, nlink=0)
    d.set_inode_page(ino, 3, 1 << (ino & 15))


def _set_bit(page: bytearray, offset: int, bit: int, value: int) -> None:
    if value:
        page[offset + bit // 8] |= 1 << bit % 8
    else:
        page[offset + bit // 8] &= ~(1 << bit % 8)
