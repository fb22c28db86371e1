"""The content of a guest's memory, looked for in the file that was its RAM."""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

PAGE_BYTES = 4096
_RECORD_BYTES = 64  # as in init.c


@dataclass(frozen=True)
class Findings:
    """The digest of a memory file, and where in it the guest's own data was found.

    :ivar marked: page number to file offset, for whole pages as the guest's init wrote them
    :ivar torn: pages that begin as the guest wrote them and go on otherwise
    :ivar markers: offsets of the marker anywhere, as in the kernel's command line too
    :ivar banners: offsets of the kernel's banner
    """

    sha256: str
    size: int
    marked: dict[int, int]
    torn: list[int]
    markers: list[int]
    banners: list[int]


def expected_page(marker: str, number: int) -> bytes:
    """Page ``number`` as init.c fills it."""
    return b"".join(_record(marker, number, i) for i in range(PAGE_BYTES // _RECORD_BYTES))


def search(path: Path, marker: str, banner: str) -> Findings:
    """Read the whole file once and look for the marker and the banner."""
    data = path.read_bytes()
    marked, torn = _marked_pages(data, marker)
    return Findings(
        sha256=hashlib.sha256(data).hexdigest(),
        size=len(data),
        marked=marked,
        torn=torn,
        markers=_offsets(data, marker.encode()),
        banners=_offsets(data, banner.encode()),
    )


def _record(marker: str, number: int, index: int) -> bytes:
    return f"{marker}:{number:08x}:{index:02x}:".encode().ljust(_RECORD_BYTES - 1, b".") + b"\n"


def _marked_pages(data: bytes, marker: str) -> tuple[dict[int, int], list[int]]:
    marked: dict[int, int] = {}
    torn: list[int] = []
    first_record = re.compile(re.escape(marker.encode()) + rb":([0-9a-f]{8}):00:")
    for found in first_record.finditer(data):
        start = found.start()
        if start % PAGE_BYTES:
            continue
        number = int(found.group(1), 16)
        if data[start : start + PAGE_BYTES] == expected_page(marker, number):
            marked[number] = start
        else:
            torn.append(start)
    return marked, torn


def _offsets(data: bytes, pattern: bytes) -> list[int]:
    return [found.start() for found in re.finditer(re.escape(pattern), data)]
