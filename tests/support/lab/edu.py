"""QEMU's edu device, driven from inside the machine.

A transfer begins 100 ms after it is asked for, in the machine's time.
"""

from __future__ import annotations

import ctypes
import mmap
from pathlib import Path
from typing import Any

from pkernfs.quantities import Iova
from support.lab.pci import enable, map_bar, set_master
from support.lab.words import read_word, write_word
from support.waiting import until

BUFFER = 0x40000  # of the device
SCRATCH = 1 << 38  # where a domain maps the file for what the device hands on
FROM_MEMORY, TO_MEMORY = 1, 3  # commands


class Transfers:
    """The device by its registers, however they are mapped.

    :cvar SECONDS: how long a transfer may take, on a busy machine
    """

    SECONDS = 20.0

    def __init__(self, registers: mmap.mmap) -> None:
        self._registers = registers

    def _word(self, at: int) -> Any:
        return ctypes.c_uint64.from_buffer(self._registers, at)

    def start(self, source: int, target: int, command: int, count: int = 8) -> None:
        """Ask for a transfer between memory and the device's buffer."""
        for at, value in ((0x80, source), (0x88, target), (0x90, count), (0x98, command)):
            self._word(at).value = value

    def target(self) -> int:
        """Return the address that the last transfer went to, or goes to."""
        return int(self._word(0x88).value)

    def busy(self) -> bool:
        """Tell whether a transfer is under way."""
        return bool(self._word(0x98).value & 1)

    def wait(self) -> None:
        """Wait until there is none."""
        until("the end of a transfer", lambda: not self.busy(), self.SECONDS, every=0.005)

    def copy(self, source: int, target: int) -> None:
        """Copy a word by way of the device."""
        self.start(source, BUFFER, FROM_MEMORY)
        self.wait()
        self.start(BUFFER, target, TO_MEMORY)
        self.wait()


class Edu(Transfers):
    """The device at ``bdf``, through sysfs, whose domain maps the file ``scratch`` at SCRATCH."""

    def __init__(self, bdf: str, scratch: Path, *, set_up: bool = True) -> None:
        self._bdf = bdf
        self._scratch = scratch
        if set_up:
            enable(bdf)
        super().__init__(map_bar(bdf))

    def master(self, on: bool) -> None:
        """Let the device do DMA, or not."""
        set_master(self._bdf, on)

    def transfer(self, source: int, target: int, command: int, count: int = 8) -> None:
        """A transfer, and wait for its end."""
        self.start(source, target, command, count)
        self.wait()

    def load(self, iova: Iova) -> int:
        """The word that the device reads, or what it had before if it cannot."""
        self.transfer(iova, BUFFER, FROM_MEMORY)
        self.transfer(BUFFER, SCRATCH, TO_MEMORY)
        return read_word(self._scratch, 0)

    def keep(self, word: int) -> None:
        """Have the device read a word into its buffer."""
        write_word(self._scratch, 0, word)
        self.transfer(SCRATCH, BUFFER, FROM_MEMORY)

    def store(self, iova: Iova, word: int) -> None:
        """Have the device write a word."""
        self.keep(word)
        self.transfer(BUFFER, iova, TO_MEMORY)
