"""root-pgtables made and changed: mode and levels, devices and domain ids."""

from __future__ import annotations

from functools import partial

import pytest

from pkernfs.errors import (
    BusyError,
    ExistsError,
    InvalidError,
    NoTablePagesError,
    NotFoundError,
    PkernfsError,
)
from pkernfs.fs.names import ROOT_PGTABLES
from pkernfs.host.bars import Bar
from pkernfs.iommu.config import Config
from pkernfs.iommu.context_walk import Mode
from pkernfs.layout import IOMMU_INO, PAGE
from pkernfs.quantities import Iova, PhysAddr, SourceId
from support.table_files import (
    DEVICE,
    MIB,
    RW,
    Host,
    grow,
    ino_of,
    refused,
    table_ino,
    until_refused,
)

# ---------------------------------------------------------------------- the files


def test_the_first_map_makes_root_pgtables(host: Host) -> None:
    ino = host.file_of("guest", 4 * MIB)
    host.dom(0)
    assert host.map(0, Iova(0), ino) == 4 * MIB
    root = host.fs.inode(table_ino(host, ROOT_PGTABLES))
    assert (root.size, root.mode) == (2 * MIB, 0o100400)
    assert host.tables.config == Config(Mode.LEGACY, 4, host.physical(root.ino, PAGE))
    assert host.mappings(0) == [(0, host.physical(ino), 4 * MIB, RW)]
    assert host.at(0, Iova(0x1234)) == host.physical(ino) + 0x1234


def test_growth_of_root_pgtables_keeps_devices(mapped: Host) -> None:
    mapped.attach(0)
    ino = table_ino(mapped, ROOT_PGTABLES)
    before = mapped.state()
    mapped.run(lambda: mapped.fs.setattr(ino, size=4 * MIB))
    assert mapped.state() == before
    mapped.attach(0, SourceId(0x100))
    mapped.assert_check_clean()


# ---------------------------------------------------------------------- attach


def test_domain_ids(mapped: Host) -> None:
    """N + 2 if that is free; one for each domain."""
    for number in (1, 65533, 65534):
        mapped.dom(number)
    assert mapped.attach(0, SourceId(0x28)) == 2
    assert mapped.attach(1, SourceId(0x30)) == 3
    assert mapped.attach(0, SourceId(0x31)) == 2
    assert mapped.attach(65533, SourceId(0x32)) == 65535
    assert mapped.attach(65534, SourceId(0x33)) == 4  # 65536 is none; the lowest that is free
    mapped.dom(2)
    assert mapped.attach(2, SourceId(0x34)) == 5  # 4 is taken
    mapped.tables.detach(SourceId(0x33))
    mapped.dom(3)
    assert mapped.attach(3, SourceId(0x35)) == 4
    assert [d.source_id for d in mapped.tables.devices()] == [0x28, 0x30, 0x31, 0x32, 0x34, 0x35]
    mapped.assert_check_clean()


def test_attach_makes_root_pgtables(host: Host) -> None:
    host.dom(7)
    assert host.attach(7) == 9
    assert host.fs.find(IOMMU_INO, ROOT_PGTABLES)
    refused(host, ExistsError, lambda: host.tables.attach(7, DEVICE), "attached already")
    host.tables.detach(DEVICE)
    refused(host, NotFoundError, lambda: host.tables.detach(DEVICE), "not attached")
    host.assert_check_clean()


def test_detach_without_root_pgtables(host: Host) -> None:
    refused(host, NotFoundError, lambda: host.tables.detach(DEVICE), "no device is attached")


@pytest.mark.slow("root-pgtables takes 250 devices")
def test_root_pgtables_is_used_up(host: Host) -> None:
    """In scalable mode each device takes two pages."""
    host.tables.create_root(Config(Mode.SCALABLE, 4))
    host.dom(0)
    for source_id in range(250):
        host.attach(0, SourceId(source_id))
    attach = [partial(host.attach, 0, SourceId(source_id)) for source_id in range(250, 260)]
    says, number = until_refused(NoTablePagesError, host, attach)
    assert "root-pgtables: no free page for tables: it must grow by 2 MiB" in says
    grow(host, 2, ROOT_PGTABLES)
    attach[number]()
    host.assert_check_clean()


# ---------------------------------------------------------------------- create


@pytest.mark.parametrize("levels", [3, 4, 5])
@pytest.mark.parametrize("mode", list(Mode))
def test_create_decides_mode_and_levels(host: Host, mode: Mode, levels: int) -> None:
    host.tables.create_root(Config(mode, levels), 4 * MIB)
    host.dom(0)
    last = Iova((1 << 9 * levels + 12) - 4 * MIB)
    host.map(0, last, host.file_of("guest", 4 * MIB))
    host.attach(0)
    assert host.fs.inode(table_ino(host, ROOT_PGTABLES)).size == 4 * MIB
    before = host.state()
    assert (before["config"].mode, before["config"].levels) == (mode, levels)
    host.remount()
    assert host.state() == before
    host.assert_check_clean()
    text, _records, status = host.answer(
        "translate", device=DEVICE, iova=(1 << 9 * levels + 12) - PAGE
    )
    assert status == 0, text


def test_create_in_use(mapped: Host) -> None:
    refused(mapped, BusyError, lambda: mapped.tables.create_root(Config(Mode.LEGACY, 5)), "levels")
    mapped.tables.create_root(Config(Mode.SCALABLE, 4))  # the mode is no business of the domains
    mapped.attach(0)
    refused(mapped, BusyError, lambda: mapped.tables.create_root(Config(Mode.LEGACY, 4)), "in use")
    assert mapped.tables.config.mode is Mode.SCALABLE


@pytest.mark.parametrize(
    ("levels", "size"), [(2, 2 * MIB), (6, 2 * MIB), (4, 0), (4, 3 * MIB), (4, -2 * MIB)]
)
def test_bad_create(host: Host, levels: int, size: int) -> None:
    refused(host, InvalidError, lambda: host.tables.create_root(Config(Mode.LEGACY, levels), size))


@pytest.mark.parametrize("size", [1 << 30, 1 << 50, 1 << 63])
def test_create_too_large_leaves_no_file(host: Host, size: int) -> None:
    with pytest.raises(PkernfsError):
        host.run(lambda: host.tables.create_root(Config(), size))
    assert host.tables.names == []
    assert host.fs.find(IOMMU_INO, ROOT_PGTABLES) == 0


# ---------------------------------------------------------------------- pins


def test_root_pgtables_stays_while_nothing_else_tells_of_the_tables(mapped: Host) -> None:
    bar = Bar(SourceId(0x28), 0, PhysAddr(1 << 41), MIB)
    mapped.tables.map_bar(0, Iova(1 << 40), bar, 0, None, RW)
    refused(
        mapped, BusyError, lambda: mapped.fs.unlink(IOMMU_INO, ROOT_PGTABLES), "dom-0 has mappings"
    )
    mapped.tables.unmap(0, Iova(0), 1 << 48)
    mapped.tables.create_root(Config(levels=5))
    mapped.map(0, Iova(0), ino_of(mapped, "guest"))
    refused(
        mapped, BusyError, lambda: mapped.fs.unlink(IOMMU_INO, ROOT_PGTABLES), "dom-0 has mappings"
    )
    mapped.tables.unmap(0, Iova(0), 1 << 57)
    mapped.fs.unlink(IOMMU_INO, ROOT_PGTABLES)
