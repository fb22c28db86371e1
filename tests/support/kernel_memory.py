"""The running kernel's memory, made up: a /proc/kcore with symbols."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

from pkernfs.host.sysroot import Host

RUNNING = "root=/dev/sda quiet memmap=512M%1G pkernfs=512M!1G"
VIRTUAL = 0xFFFF_8880_0000_0000  # where the made-up kernel has its memory
TEXT = 0xFFFF_FFFF_8100_0000
SYMBOL = TEXT + 0x1238
IMAGE = 0x5000  # physical address of struct kimage
PAGES = 0x10_0000  # where pages are taken from


class Memory:
    """The physical memory of a machine, and its /proc."""

    def __init__(self, root: Path, running: str = RUNNING) -> None:
        self.root = root
        self.bytes = bytearray(4 << 20)
        self._next = PAGES
        self.host = Host(str(root))
        for name, text in (
            ("proc/cmdline", running),
            ("sys/kernel/kexec_loaded", "1"),
            ("sys/kernel/boot_params/data", "\0" * 4096),  # no initrd
            ("proc/kallsyms", f"{TEXT:016x} T _text\n{SYMBOL:016x} B kexec_image\n"),
        ):
            self.write(name, text)

    def write(self, name: str, text: str) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n" if not text.endswith("\n") else text)

    def page(self, data: bytes = b"") -> int:
        """A page with those bytes; its address."""
        at = self._next
        self._next += 4096
        self.bytes[at : at + len(data)] = data
        return at

    def word(self, at: int, value: int) -> None:
        self.bytes[at : at + 8] = value.to_bytes(8, "little")

    def load(
        self,
        command_line: str,
        *,
        before: int = 300,
        skip: int = 0x800,
        memory_map: Sequence[tuple[int, int, int]] = (),
        initrd: int = 0,
    ) -> None:
        """Load a kernel: so many pages of something, then boot parameters, text behind them.

        ``memory_map`` has start, size and type of each entry, ``initrd`` is its size.
        """
        text = command_line.encode() + b"\0"
        segments = [(0x100_0000, [self.page(b"kernel") for _ in range(before)])]
        place = 0x9_0000
        head = bytearray(0x1000)
        head[0x202:0x206] = b"HdrS"
        head[0x228:0x22C] = (place + skip).to_bytes(4, "little")
        head[0x21C:0x220] = initrd.to_bytes(4, "little")
        head[0x1E8] = len(memory_map)
        for number, entry in enumerate(memory_map):
            struct.pack_into("<QQI", head, 0x2D0 + 20 * number, *entry)
        whole = bytes(head[:skip]) + text
        pages = [self.page(whole[at : at + 4096]) for at in range(0, len(whole), 4096)]
        # In the region the pages are anywhere: not one after the other.
        segments.append((place, pages))
        entries = []
        for destination, sources in segments:
            entries.append(destination | 1)
            entries += [source | 8 for source in sources]
        self.link([*entries, 4])
        self.save()

    def link(self, entries: list[int]) -> None:
        """Entries of struct kimage, in as many pages as they need."""
        at = IMAGE
        limit = 1
        while True:
            if len(entries) <= limit:
                for i, entry in enumerate(entries):
                    self.word(at + 8 * i, entry)
                break
            page = self.page()
            for i, entry in enumerate(entries[: limit - 1]):
                self.word(at + 8 * i, entry)
            self.word(at + 8 * (limit - 1), page | 2)
            entries = entries[limit - 1 :]
            at, limit = page, 512
        self.word(0x1238, VIRTUAL + IMAGE)

    def save(self) -> None:
        """Write /proc/kcore: text, a hole, memory, and something that is not memory."""
        headers = [
            (TEXT, 0, 0x3000),
            (VIRTUAL, 0, len(self.bytes)),
            (0xFFFF_C900_0000_0000, (1 << 64) - 1, 1 << 32),
        ]
        offset = 64 + 56 * len(headers)
        head = struct.pack(
            "<16sHHIQQQIHHHHHH",
            b"\x7fELF\x02\x01\x01", 4, 62, 1, 0, 64, 0, 0, 64, 56, len(headers), 0, 0, 0,
        )  # fmt: skip
        body = b""
        for address, physical, length in headers:
            place = offset if physical != (1 << 64) - 1 else 1 << 50
            head += struct.pack("<IIQQQQQQ", 1, 7, place, address, physical, length, length, 0)
        body = bytes(self.bytes)
        (self.root / "proc/kcore").write_bytes(head + body)
