"""Transfers of edu devices, one after the other, so that one is under way when a kernel ends."""

from __future__ import annotations

import os
import struct
import threading
import time
from pathlib import Path

from pkernfs.quantities import Iova
from support.lab.edu import BUFFER, FROM_MEMORY, TO_MEMORY, Edu
from support.lab.mapped import Mapped

#: Numbers in the device's buffer. One less than there is room for: QEMU 7.2 ends itself at a
#: transfer of the whole buffer.
COUNT = 511
_PAGE = 4096
_PAGES = 16  # of the file; room for a quarter of an hour
BYTES = _PAGES * _PAGE


class Stream:
    """Has a device write 1, 2, 3, ... into words of a file, from its buffer, page after page.

    The file is written through the mount, or where it is mapped.
    """

    def __init__(self, edu: Edu, file: Path | Mapped, place: int, iova: Iova) -> None:
        self._edu = edu
        self._iova = iova
        _write(file, place, struct.pack(f"<{COUNT}Q", *range(1, COUNT + 1)))
        edu.transfer(iova, BUFFER, FROM_MEMORY, 8 * COUNT)
        _write(file, place, bytes(BYTES))

    def start(self) -> None:
        """Begin; it goes on until this kernel ends."""
        threading.Thread(target=self._work, daemon=True).start()

    def _work(self) -> None:
        for number in range(_PAGES * COUNT):
            page, slot = divmod(number, COUNT)
            target = self._iova + page * _PAGE + 8 * slot
            self._edu.start(BUFFER + 8 * slot, target, TO_MEMORY)
            while self._edu.busy():
                time.sleep(0.002)


def _write(file: Path | Mapped, place: int, content: bytes) -> None:
    if isinstance(file, Mapped):
        return file.write(place, content)
    with file.open("r+b", buffering=0) as opened:
        os.pwrite(opened.fileno(), content, place)
        os.fsync(opened.fileno())


def expected(count: int) -> list[int]:
    """The words that so many transfers of a stream write."""
    return [number % COUNT + 1 for number in range(count)]


def _read(file: Path | Mapped, place: int, length: int) -> bytes:
    if isinstance(file, Mapped):
        return file.read(place, length)
    with file.open("rb", buffering=0) as opened:
        return os.pread(opened.fileno(), length, place)


def landed(file: Path | Mapped, place: int) -> list[int]:
    """The words that have been written."""
    data = _read(file, place, BYTES)
    return [number for (number,) in struct.iter_unpack("<Q", data) if number]


def asked_for(edu: Edu, iova: Iova) -> int:
    """Count the transfers of a stream that were asked for: the device still knows the last one."""
    page, offset = divmod(edu.target() - iova, _PAGE)
    return page * COUNT + offset // 8 + 1
