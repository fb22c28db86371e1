"""The running kernel's memory, through /proc/kcore: by physical address, by address, by symbol.

It is an ELF core file whose segments are pieces of the kernel's address space (fs/proc/kcore.c).
Those that are RAM or the kernel itself say which physical address they have. Nothing is changed.
"""

from __future__ import annotations

import os
import re
import struct
from typing import BinaryIO, NamedTuple

from pkernfs.errors import PkernfsError
from pkernfs.host.sysroot import HOST, Host
from pkernfs.quantities import PhysAddr

_ELF_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_PROGRAM_HEADER = struct.Struct("<IIQQQQQQ")
_PT_LOAD = 1
_NO_PHYSICAL = (1 << 64) - 1
_HEXADECIMAL = re.compile(rb"[0-9a-f]+")


class KcoreError(PkernfsError):
    """Memory or a symbol of the running kernel cannot be read; the message says why."""


class _Segment(NamedTuple):
    """Addresses, the kernel's or physical ones, up to ``end``; where the first is in the file."""

    start: int
    end: int
    offset: int


class Kcore:
    """Memory as it is at each read: what the kernel changes meanwhile may be torn between words.

    :raises OSError: /proc/kcore cannot be opened.
    :raises KcoreError: it is no such file.
    """

    def __init__(self, host: Host = HOST) -> None:
        self._host = host
        self._core: BinaryIO = open(host.path("proc/kcore"), "rb", buffering=0)  # noqa: SIM115
        self._by_address: list[_Segment] = []
        self._by_physical: list[_Segment] = []
        try:
            self._read_headers()
        except BaseException:
            self._core.close()
            raise

    def __enter__(self) -> Kcore:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """End reading. A second call does nothing."""
        self._core.close()

    def find_physical(self, at: PhysAddr, length: int) -> bytes | None:
        """Read ``length`` bytes at a physical address; None: they are not all in there."""
        return self._find(self._by_physical, at, length)

    def read_physical(self, at: PhysAddr, length: int) -> bytes:
        """Read ``length`` bytes at a physical address.

        :raises KcoreError: they are not all in there.
        """
        return self._read(self._by_physical, at, length)

    def read(self, at: int, length: int) -> bytes:
        """Read ``length`` bytes at an address of the kernel's.

        :raises KcoreError: they are not all in there.
        """
        return self._read(self._by_address, at, length)

    def word(self, at: int) -> int:
        """Read the 8 bytes at an address of the kernel's, as a number.

        :raises KcoreError: they are not in there.
        """
        return int.from_bytes(self.read(at, 8), "little")

    def symbol(self, name: str) -> int:
        """Return the address of a variable or function of the kernel, by /proc/kallsyms.

        :raises KcoreError: it is not there, or not told.
        :raises OSError: /proc/kallsyms cannot be read.
        """
        wanted = f" {name}\n".encode()
        with open(self._host.path("proc/kallsyms"), "rb") as symbols:
            text = symbols.read()
        at = text.find(wanted)
        if at >= 0:
            word = text[text.rfind(b"\n", 0, at) + 1 :].split(maxsplit=1)[0]
            address = int(word, 16) if _HEXADECIMAL.fullmatch(word) else 0
            if address:  # zeros are what others than root are told
                return address
        raise KcoreError(f"the kernel does not tell where its {name} is")

    # ------------------------------------------------------------------ the file

    def _read_headers(self) -> None:
        header = self._core.read(_ELF_HEADER.size)
        if len(header) < _ELF_HEADER.size or header[:5] != b"\x7fELF\x02":
            raise KcoreError("/proc/kcore is not what it should be")
        fields = _ELF_HEADER.unpack(header)
        at, size, count = fields[5], fields[9], fields[10]
        if size != _PROGRAM_HEADER.size:
            raise KcoreError("/proc/kcore is not what it should be")
        table = os.pread(self._core.fileno(), size * count, at)
        if len(table) != size * count:
            raise KcoreError("/proc/kcore is not what it should be")
        for kind, _, offset, address, physical, _, length, _ in _PROGRAM_HEADER.iter_unpack(table):
            if kind != _PT_LOAD:
                continue
            self._by_address.append(_Segment(address, address + length, offset))
            if physical != _NO_PHYSICAL:
                self._by_physical.append(_Segment(physical, physical + length, offset))

    def _find(self, segments: list[_Segment], at: int, length: int) -> bytes | None:
        for start, end, offset in segments:
            if start <= at and at + length <= end:
                data = os.pread(self._core.fileno(), length, offset + at - start)
                if len(data) == length:
                    return data
        return None

    def _read(self, segments: list[_Segment], at: int, length: int) -> bytes:
        data = self._find(segments, at, length)
        if data is None:
            raise KcoreError(f"{at:#x} is not in /proc/kcore")
        return data
