"""Processes that have a file's memory mapped, as VMMs do, and watch it: nobody else may change it.

Each page holds one number, over and over; the process counts, stores the next number into a random
page, and looks whether other pages are as it left them. Its tester knows what it has stored from
memory that the two share, and stops it while that is compared with the file.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import random
import signal
import struct
import time
from collections.abc import Iterator
from pathlib import Path

from support.mounting import MIB

PAGE = 4096
SIZE = 2 * MIB
PAGES = SIZE // PAGE
_WORD = struct.Struct("<Q")
#: In the shared memory, behind the number of each page: the page that is being stored.
_AT = PAGES * _WORD.size
_NOTHING = PAGES
_FOUND_OTHERS_BYTES = 3


def page_of(number: int) -> bytes:
    """The bytes of a page that holds a number; 0: of one that nobody has stored to."""
    return _WORD.pack(number) * (PAGE // _WORD.size)


class Stamper:
    """A process that maps ``path``, and what it has stored there.

    :param path: as the process opens it: 2 MiB, all zero
    """

    def __init__(self, path: Path, seed: str) -> None:
        self._shared = mmap.mmap(-1, _AT + _WORD.size)
        self._pid = 0
        self.run(path, seed)

    def run(self, path: Path, seed: str) -> None:
        """Start the process, for the first time or again; return when it has stored something."""
        before = self._last()
        self._pid = os.fork()
        if not self._pid:
            try:
                os.closerange(3, os.sysconf("SC_OPEN_MAX"))
                self._stamp(path, random.Random(seed))
            finally:
                os._exit(1)
        while self.is_alive() and self._last() <= before:
            time.sleep(0.001)

    def is_alive(self) -> bool:
        """Tell whether the process is there.

        :raises AssertionError: it has ended by itself.
        """
        if self._pid:
            pid, status = os.waitpid(self._pid, os.WNOHANG)
            if pid:
                self._pid = 0
                code = os.waitstatus_to_exitcode(status)
                assert code != _FOUND_OTHERS_BYTES, "what a process has mapped was changed"
                raise AssertionError(f"a process that maps a segment has ended: {code}")
        return self._pid > 0

    def kill(self) -> None:
        """SIGKILL, if it is there."""
        if self._pid:
            os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)
            self._pid = 0

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """It stores nothing meanwhile."""
        if not self.is_alive():
            yield
            return
        os.kill(self._pid, signal.SIGSTOP)
        os.waitpid(self._pid, os.WUNTRACED)
        try:
            yield
        finally:
            os.kill(self._pid, signal.SIGCONT)

    def check(self, found: bytes) -> None:
        """Compare a file with what was stored. The process is stopped, or has ended.

        :raises AssertionError: a page is not as it was left; the one that was being stored may be.
        """
        assert len(found) == SIZE
        (storing,) = _WORD.unpack_from(self._shared, _AT)
        for page in range(PAGES):
            number, got = self._number(page), found[page * PAGE : (page + 1) * PAGE]
            if page != storing:
                assert got == page_of(number), f"page {page}: {got[:16].hex()}, not {number}"

    def _number(self, page: int) -> int:
        number: int = _WORD.unpack_from(self._shared, page * _WORD.size)[0]
        return number

    def _last(self) -> int:
        return max(map(self._number, range(PAGES)))

    # ------------------------------------------------------------------ in the process

    def _stamp(self, path: Path, rng: random.Random) -> None:
        fd = os.open(path, os.O_RDWR)
        memory = mmap.mmap(fd, SIZE)
        os.close(fd)
        number = self._last()
        self._store(memory, *self._torn(number))
        while True:
            number += 1
            self._store(memory, rng.randrange(PAGES), number)
            for page in rng.sample(range(PAGES), 40):
                if memory[page * PAGE : (page + 1) * PAGE] != page_of(self._number(page)):
                    os._exit(_FOUND_OTHERS_BYTES)
            time.sleep(0.001)

    def _torn(self, last: int) -> tuple[int, int]:
        """The page that was being stored when the process was killed, or any; and a new number."""
        (storing,) = _WORD.unpack_from(self._shared, _AT)
        return (storing if storing < PAGES else 0), last + 1

    def _store(self, memory: mmap.mmap, page: int, number: int) -> None:
        _WORD.pack_into(self._shared, _AT, page)
        memory[page * PAGE : (page + 1) * PAGE] = page_of(number)
        _WORD.pack_into(self._shared, page * _WORD.size, number)
        _WORD.pack_into(self._shared, _AT, _NOTHING)
