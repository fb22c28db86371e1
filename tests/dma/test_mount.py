"""Mounts, with tables and without."""

from __future__ import annotations

from pkernfs.dma.mount import mount_filesystem, tables_of
from pkernfs.errors import (
    ReadOnlyError,
)
from pkernfs.layout import PAGE
from pkernfs.quantities import Ino, Iova, SourceId
from support.table_files import DEVICE, GIB, PHYS_BASE, RW, Host, refused

# ---------------------------------------------------------------------- the files


def test_a_mount_without_tables_does_not_load_them(host: Host) -> None:
    host.remount()
    assert not host.fs.pins.active


# ---------------------------------------------------------------------- where tables are good


def test_a_read_only_mount(mapped: Host) -> None:
    mapped.attach(0)
    before = mapped.state()
    mapped.fs.unmount()
    mapped.region.close()
    mapped.region = mapped.file.open(write=False, phys_base=None)
    fs = mapped.fs = mount_filesystem(mapped.region, read_only=True)
    assert mapped.state() == before
    mapped.assert_check_clean()
    for operation in (
        lambda: tables_of(fs).map_file(0, Iova(0), Ino(5), 0, None, RW),
        lambda: tables_of(fs).unmap(0, Iova(GIB), PAGE),
        lambda: tables_of(fs).attach(0, SourceId(5)),
        lambda: tables_of(fs).detach(DEVICE),
        lambda: tables_of(fs).create_root(),
    ):
        refused(mapped, ReadOnlyError, operation, "read-only")
    mapped.region.close()
    mapped.region = mapped.file.open(phys_base=PHYS_BASE)
    mapped.fs = mount_filesystem(mapped.region)
