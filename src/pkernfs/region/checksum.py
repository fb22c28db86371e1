"""CRC-32C: of metadata pages, and of any bytes (docs/format.md, section 2). The loops are in C."""

from __future__ import annotations

from pkernfs.layout import PAGE
from pkernfs.native._native import ffi, lib

_PAGE_IMAGE = f"uint8_t[{PAGE}]"  # a shorter one is refused


def page_checksum(page: bytes | bytearray | memoryview) -> int:
    """Return the CRC-32C of a metadata page's image, with its own field as zero."""
    return int(lib.pk_page_crc(ffi.from_buffer(_PAGE_IMAGE, page)))


def crc32c(data: bytes | bytearray | memoryview, crc: int = 0) -> int:
    """Return RFC 3720's CRC-32C of ``data``; ``crc`` is a former result to go on from."""
    return int(lib.pk_crc32c(crc, ffi.from_buffer("uint8_t[]", data), len(data)))
