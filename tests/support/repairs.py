"""Repairs of damaged regions: what must be so after each, and the tree that is left."""

from __future__ import annotations

import contextlib
import stat
from functools import partial

from pkernfs.dma.mount import mount_filesystem
from pkernfs.errors import NoSpaceError
from pkernfs.fs.filesystem import FileSystem
from pkernfs.fs.fsck import Code, Report, check
from pkernfs.layout import BLOCK, PAGE, ROOT_INO
from pkernfs.quantities import Ino, RegionOff
from pkernfs.region.region import Region
from support.damage import REG, REGION_BYTES, Damage

#: The bytes of a populated region, and the numbers of its inodes by path.
Pristine = tuple[bytes, dict[str, Ino]]


def read_all(fs: FileSystem, ino: Ino = ROOT_INO) -> dict[bytes, object]:
    """Every name, byte and attribute below a directory."""
    found: dict[bytes, object] = {}
    for name, child, _, _ in list(fs.readdir(ino, 0)):
        inode = fs.inode(child)
        if inode.is_dir:
            found[name] = read_all(fs, child)
        elif stat.S_ISLNK(inode.mode):
            found[name] = fs.readlink(child)
        elif inode.is_reg:
            found[name] = bytes(fs.read(child, 0, inode.size)) if inode.size < 1 << 24 else None
        for attribute in fs.listxattr(child):
            fs.getxattr(child, attribute)
    return found


def assert_mounts(region: Region) -> dict[bytes, object]:
    """The file system mounts, reads, takes new files, and is clean after all."""
    fs = mount_filesystem(region)
    tree = read_all(fs)
    ino = fs.create(ROOT_INO, b"new file", REG, 0, 0).ino
    fs.write(ino, 0, b"new data" * 3000)
    fs.setattr(ino, size=100)
    fs.unlink(ROOT_INO, b"new file")
    fs.unmount()
    after = check(region, repair=False, verify_zero=True)
    assert not after.problems, [str(p) for p in after.problems]
    assert not after.notes, [str(p) for p in after.notes]
    return tree


def repair_and_check(region: Region, *codes: Code) -> tuple[Report, dict[bytes, object]]:
    """Check, repair, check, mount; the report of the repair and the tree as it then is."""
    report = repaired(region, *codes)
    return report, assert_mounts(region)


def repaired(region: Region, *codes: Code) -> Report:
    """Check, which finds these codes, repair, and check again, which finds nothing."""
    before = region.read(RegionOff(0), region.size)
    found = check(region, repair=False, verify_zero=True)
    assert region.read(RegionOff(0), region.size) == before, "a check stored into the region"
    for code in codes:
        assert found.counts[code], (code, [str(p) for p in found.problems])
    report = check(region, repair=True, verify_zero=True)
    assert report.counts == found.counts
    assert all(p.fixed for p in report.problems + report.notes)
    again = check(region, repair=False, verify_zero=True)
    assert not again.problems, [str(p) for p in again.problems]
    assert not again.notes, [str(p) for p in again.notes]
    return report


def tree_of(pristine: Pristine) -> dict[bytes, object]:
    with Region.anonymous(REGION_BYTES) as region:
        region.copy_in(RegionOff(0), pristine[0])
        fs = mount_filesystem(region)
        tree = read_all(fs)
        fs.unmount()
        return tree


def fill_up(d: Damage) -> None:
    """Use up every block and page that a mount gives away."""
    fs = mount_filesystem(d.region)
    ino = fs.create(ROOT_INO, b"filler", REG, 0, 0).ino
    for step in (BLOCK, PAGE):
        at = 0
        with contextlib.suppress(NoSpaceError):
            while True:
                fs.run(partial(fs.fallocate, ino, 0, at, step))
                at += step
    fs.unmount()
