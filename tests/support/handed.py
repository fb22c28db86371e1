"""A region that was handed over, and what was in it."""

from __future__ import annotations

import random
import stat
from dataclasses import dataclass
from unittest import mock

from pkernfs.dma.mount import mount_filesystem
from pkernfs.fs import comparison, state_page
from pkernfs.fs.filesystem import FileSystem
from pkernfs.layout import PAGE, ROOT_INO, STATE_PAGE, page_offset
from pkernfs.quantities import Ino, RegionOff
from pkernfs.region.checksum import page_checksum
from pkernfs.region.region import Region
from support.checking import MemoryFile
from support.handover import verify

MIB = 1 << 20
SIZE = 64 * MIB
REG = stat.S_IFREG | 0o644


def boot(number: int) -> mock._patch[mock.Mock]:
    """As if the kernel had been booted anew."""
    return mock.patch("pkernfs.fs.super.Super.boot_id", return_value=bytes([number]) * 16)


def file_of(fs: FileSystem, name: str, data: bytes, parent: Ino = ROOT_INO) -> Ino:
    ino = fs.create(parent, name.encode(), REG, 0, 0).ino
    if data:
        fs.run(lambda: fs.write(ino, 0, data))
    return ino


@dataclass
class Handed:
    """A region that was handed over and unmounted, and what was in it."""

    memory: MemoryFile
    inos: dict[str, Ino]
    places: dict[str, RegionOff]  # of the first byte

    def mount(self, *, read_only: bool = False) -> FileSystem:
        return mount_filesystem(self.region, read_only=read_only)

    region: Region = None  # type: ignore[assignment]


def populated(fs: FileSystem) -> dict[str, Ino]:
    rng = random.Random(7)
    inos = {}
    for i in range(40):
        inos[f"f{i}"] = file_of(fs, f"f{i}", rng.randbytes(rng.randrange(1, 40_000)))
    inos["ram"] = file_of(fs, "ram", rng.randbytes(9 * MIB + 5))
    inos["sparse"] = file_of(fs, "sparse", b"start")
    fs.run(lambda: fs.write(inos["sparse"], 11 * MIB, b"end"))
    inos["empty"] = file_of(fs, "empty", b"")
    inos["dir"] = fs.mkdir(ROOT_INO, b"dir", 0o755, 0, 0).ino
    inos["below"] = file_of(fs, "below", b"below", inos["dir"])
    inos["link"] = fs.symlink(ROOT_INO, b"link", b"t" * 3000, 0, 0).ino
    fs.setxattr(inos["f1"], b"user.large", rng.randbytes(6000))
    return inos


def changes_of(fs: FileSystem) -> dict[str, str]:
    mount_report = verify(fs)
    assert not mount_report.trouble
    return {
        change["path"]: change["what"]
        for change in comparison.tell(mount_report.changes, fs.readdir, fs.holder)
    }


def has_digests(handed: Handed) -> bool:
    page = handed.region.read(page_offset(STATE_PAGE), PAGE)
    return bool(state_page.read_record(page).flags)


def reseal(region: Region, at: RegionOff) -> None:
    region.copy_in(RegionOff(at + 4), page_checksum(region.read(at, PAGE)).to_bytes(4, "little"))
