"""Requests about tables over a file system in memory: what is changed, told and invalidated."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import trio

from pkernfs.control import protocol, table_protocol
from pkernfs.control.protocol import Nothing
from pkernfs.control.table_protocol import Attached, ByteCount
from pkernfs.control.table_requests import TableRequests
from pkernfs.control.wire import Call
from pkernfs.dma.mount import mount_filesystem
from pkernfs.dma.output import Record, Status, Text
from pkernfs.errors import BusyError, InvalidError, NotFoundError, TableDamageError
from pkernfs.fs.names import ROOT_PGTABLES
from pkernfs.layout import IOMMU_INO, PAGE, ROOT_INO
from pkernfs.quantities import Iova
from support.made_up_session import A, MadeUpSession, items_of, reply_of
from support.memory_pool import PiecedPool
from support.table_files import DEVICE, MIB, RW, Host, table_ino

GIB = 1 << 30
AT = Iova(GIB)  # where the file is mapped


class Rig:
    """A file system with dom-0 and a file of 1 MiB, and the handlers of its tables."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.session = MadeUpSession(host.fs)
        self.handlers = TableRequests(host.fs, self.session).handlers()
        self.domain = host.dom(0)
        self.file = host.file_of("guest", MIB)

    def call(self, request: Call[A]) -> A:
        """Have the handler do it."""
        return trio.run(reply_of, self.handlers, request)

    def read(self, request: table_protocol.Read) -> list[Text | Record | Status]:
        """All that the answer is made of."""
        return trio.run(items_of, self.handlers, request)

    def map_file(self, iova: Iova = AT) -> ByteCount:
        """Map the whole file."""
        return self.call(table_protocol.MapFile(0, iova, self.file, 0, None, RW))


@pytest.fixture
def rig() -> Iterator[Rig]:
    host = Host(16 * MIB)
    yield Rig(host)
    host.close()


def test_a_change_invalidates_what_the_kernel_knows(rig: Rig) -> None:
    assert rig.map_file() == ByteCount(MIB)
    root = table_ino(rig.host, ROOT_PGTABLES)
    assert rig.session.asked == [
        f"invalidate root-pgtables in {IOMMU_INO}",  # it was known to be missing
        f"invalidate data of {root}",
        f"invalidate data of {rig.domain}",
        f"invalidate attributes of {rig.file}",
    ]
    rig.session.asked.clear()
    assert rig.call(table_protocol.Unmap(0, AT, 2 * PAGE)) == ByteCount(2 * PAGE)
    assert rig.session.asked == [f"invalidate data of {root}", f"invalidate data of {rig.domain}"]
    assert rig.host.mappings(0)[0][0] == GIB + 2 * PAGE


def test_devices_come_and_go(rig: Rig) -> None:
    rig.map_file()
    assert rig.call(table_protocol.FindRoot()).address is not None
    assert isinstance(rig.call(table_protocol.Attach(0, DEVICE)), Attached)
    assert rig.call(table_protocol.ListDevices()).source_ids == (DEVICE,)
    assert rig.call(table_protocol.Persist(DEVICE, False)) == Nothing()
    assert rig.call(protocol.FindKexecNeeds()) == protocol.KexecNeeds(
        (), ("0000:00:05.0",), False, ()
    )
    assert rig.call(table_protocol.Detach(DEVICE)) == Nothing()
    assert rig.call(table_protocol.ListDevices()).source_ids == ()
    with pytest.raises(NotFoundError):
        rig.call(table_protocol.Detach(DEVICE))


def test_tables_are_made_as_asked(rig: Rig) -> None:
    assert rig.call(table_protocol.FindRoot()).address is None
    assert rig.call(table_protocol.CreateTables("scalable", 5, 2 * MIB)) == Nothing()
    config = rig.host.tables.config
    assert (config.mode.name, config.levels) == ("SCALABLE", 5)
    with pytest.raises(InvalidError):
        rig.call(table_protocol.CreateTables("legacy", 7, 2 * MIB))


def test_questions(rig: Rig) -> None:
    rig.map_file()
    rig.call(table_protocol.Attach(0, DEVICE))
    shown = [i for i in rig.read(table_protocol.Read("show", 0)) if isinstance(i, Text)]
    assert "0x0000000040000" in "".join(item.text for item in shown)
    kinds = {type(item) for item in rig.read(table_protocol.Read("export"))}
    assert kinds == {Record}
    assert Status(0) in rig.read(table_protocol.Read("check"))
    found = rig.read(table_protocol.Read("translate", device=DEVICE, iova=AT))
    assert Status(0) in found
    assert "/guest + 0x0" in "".join(item.text for item in found if isinstance(item, Text))
    with pytest.raises(InvalidError, match="cannot read 'translate'"):
        rig.read(table_protocol.Read("translate"))


def test_a_check_keeps_changes_of_the_tables_out(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing takes the tables' pages while a thread reads them."""
    rig.map_file()
    seen: list[bool] = []
    run_sync = trio.to_thread.run_sync

    async def spy(work: object, *args: object) -> object:
        seen.append(rig.host.tables._tables.being_read)
        return await run_sync(work, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(trio.to_thread, "run_sync", spy)
    rig.read(table_protocol.Read("check"))
    assert seen == [True]
    assert not rig.host.tables._tables.being_read


def test_tables_that_are_not_sound_are_not_activated(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.map_file()
    ino = rig.host.file_of("other", MIB)
    rig.call(table_protocol.MapFile(0, Iova(2 * GIB), ino, 0, None, RW))
    table = rig.host.tables.domain(0)
    at = table.memory.offset(table.root, 8)
    assert at is not None
    rig.host.region.copy_in(at, b"\xff" * 8)
    with pytest.raises(TableDamageError, match="activate: the tables are not sound: "):
        rig.call(table_protocol.Activate((), False))


def test_the_jump_wants_a_handover(rig: Rig) -> None:
    with pytest.raises(InvalidError, match="not handed over"):
        rig.call(protocol.CrashJump(panic=False))
    assert rig.call(protocol.UndoCrashJump()) == Nothing()


def test_mapped_files_stay(rig: Rig) -> None:
    rig.map_file()
    with pytest.raises(BusyError):
        rig.host.fs.unlink(ROOT_INO, b"guest")


def test_segments_that_a_domain_maps_are_there_in_an_export() -> None:
    """A VMM opens them by the path in it; others may be restored later."""
    pool = PiecedPool(parks=True)
    host = Host(32 * MIB, pool=pool)
    mapped, other = host.file_of("mapped", 2 * MIB), host.file_of("other", 2 * MIB)
    host.dom(0)
    host.map(0, AT, mapped)
    numbers = [host.fs.segments.of(host.fs.inode(ino)).number for ino in (mapped, other)]
    host.fs.segments.close()
    host.fs = mount_filesystem(host.region, open_pool=pool.opener(), park=True)
    assert set(host.fs.segments.absent) == set(numbers)
    handlers = TableRequests(host.fs, MadeUpSession(host.fs)).handlers()
    for what in ("show", "export"):
        found = trio.run(items_of, handlers, table_protocol.Read(what, as_json=True))
    assert list(host.fs.segments.absent) == numbers[1:]
    records = [
        item.record["record"] for item in found if isinstance(item, Record) and "in" in item.record
    ]
    [segment] = [record["segment"] for record in records if "segment" in record]
    assert segment["path"] == pool.native_path(host.fs.segments.of(host.fs.inode(mapped)))
    host.close()
