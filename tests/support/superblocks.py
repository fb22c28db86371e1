"""Damage to a region's file, for tests: changed superblocks, inverted bytes."""

from __future__ import annotations

from pathlib import Path

from pkernfs import layout
from pkernfs.region.checksum import page_checksum


def edit_superblocks(path: Path, **fields: object) -> None:
    """Change fields of both superblocks and make their checksums right again."""
    data = bytearray(path.read_bytes())
    for page in (layout.SUPERBLOCK_PAGE, layout.BACKUP_PAGE):
        image = memoryview(data)[page * layout.PAGE : (page + 1) * layout.PAGE]
        at = layout.SUPERBLOCK_OFFSET
        old = layout.SuperblockFields._make(layout.SUPERBLOCK.unpack_from(image, at))
        layout.SUPERBLOCK.pack_into(image, at, *old._replace(**fields))  # type: ignore[arg-type]
        image[4:8] = page_checksum(image).to_bytes(4, "little")
        image.release()
    path.write_bytes(data)


def damage(path: Path, offset: int, length: int = 4096) -> None:
    """Invert bytes, so that damage is never a no-op."""
    with path.open("r+b") as file:
        file.seek(offset)
        data = file.read(length)
        file.seek(offset)
        file.write(bytes(b ^ 0xFF for b in data))
