"""``pkernfs iommu`` on real mounts and on regions that are not mounted."""

from __future__ import annotations

import contextlib
import ctypes
import io
import json
import mmap
import os
import random
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, Self

import jsonschema
import pytest

from pkernfs.cli import build_parser, main
from pkernfs.commands.iommu import put_in_order
from pkernfs.control import client
from pkernfs.control.protocol import Ping
from pkernfs.control.server import MAX_CLIENTS
from pkernfs.control.sockets import socket_name
from pkernfs.control.table_protocol import (
    Attach,
    CreateTables,
    Detach,
    FindRoot,
    ListDevices,
    MapBar,
    MapFile,
    Persist,
    Read,
    Unmap,
)
from pkernfs.control.wire import VERSION
from pkernfs.dma.output import Record, Status, Text
from pkernfs.errors import PkernfsError
from pkernfs.layout import PAGE
from pkernfs.quantities import Ino, Iova, RegionOff, SourceId
from pkernfs.region.region import Region
from pkernfs.vtd.entries import bdf_text
from support.crash import say
from support.mounting import MIB, Mounted, child, is_mounted, libc, run_as, run_pkernfs, wait_until

pytestmark = pytest.mark.fuse

BASE = 1 << 32
OPTIONS = f"phys_base={BASE:#x},allow_other"
BDF = "0000:00:05.0"
SEED = int(os.environ.get("PKERNFS_SEED") or random.randrange(1 << 32))
SCHEMA = json.loads((Path(__file__).parents[2] / "docs/iommu-export.schema.json").read_text())
EPERM, EBUSY = 1, 16


class Result:
    """What a command printed, and its exit status."""

    def __init__(self, status: int, out: str, err: str) -> None:
        self.status, self.out, self.err = status, out, err

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def iommu(*words: object) -> Result:
    """``pkernfs iommu WORDS``, run here."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(["iommu", *map(str, words)])
    return Result(status, out.getvalue(), err.getvalue())


def done(*words: object) -> str:
    """What a command printed that succeeded and had nothing to complain about."""
    result = iommu(*words)
    assert (result.status, result.err) == (0, ""), (words, result.err)
    return result.out


def fails(*words: object, says: str = "") -> str:
    """The line that a command failed with."""
    result = iommu(*words)
    assert result.status == 1, (words, result.out)
    assert result.out == ""
    assert result.err.startswith("pkernfs: ")
    assert result.err.count("\n") == 1
    assert result.err.endswith("\n")
    assert says in result.err, result.err
    return result.err


class Guest(Mounted):
    """A mount with ``guest-ram`` (8 MiB), ``small`` (6 pages) and a sized dom-0."""

    def __init__(self, options: str = OPTIONS) -> None:
        super().__init__(64 * MIB, options)

    def __enter__(self) -> Self:
        super().__enter__()
        return self

    def start(self, given: Sequence[int] = ()) -> None:
        first = self.daemon is None
        super().start(given)
        if first:
            self.size(self.path / "guest-ram", 8 * MIB)
            self.size(self.path / "small", 6 * PAGE)
            self.size(self.dom(0), 2 * MIB)

    @staticmethod
    def size(path: Path, size: int) -> None:
        """touch and truncate, as users do it."""
        path.touch()
        os.truncate(path, size)

    def dom(self, number: int) -> Path:
        return self.path / "iommu" / f"dom-{number}"

    @property
    def ram(self) -> Path:
        return self.path / "guest-ram"

    @property
    def root(self) -> Path:
        return self.path / "iommu" / "root-pgtables"

    def raw(self) -> dict[str, bytes]:
        """Every byte of the table files, by name."""
        return {p.name: p.read_bytes() for p in sorted((self.path / "iommu").iterdir())}

    def extents(self, path: Path) -> list[tuple[int, int, RegionOff]]:
        """``(offset, length, region offset)``."""
        found = subprocess.run(["true"], check=True) and run_pkernfs("extents", str(path), "--json")
        return [
            (e["offset"], e["length"], RegionOff(e["region_offset"]))
            for e in json.loads(found.stdout)["extents"]
        ]


@pytest.fixture
def guest() -> Iterator[Guest]:
    with Guest() as made:
        yield made


@pytest.fixture
def mapped(guest: Guest) -> Guest:
    """guest-ram is at 0, small at 1 GiB, for reading; a device is attached."""
    done("map", guest.dom(0), 0, guest.ram)
    done("map", guest.dom(0), "1G", guest.path / "small", "--perm", "r")
    done("attach", guest.dom(0), BDF)
    return guest


def error_of(operation: Callable[[], object]) -> int:
    """The errno that it fails with."""
    try:
        operation()
    except OSError as e:
        return e.errno or -1
    return 0


def refused(number: int, operation: Callable[[], object]) -> None:
    assert error_of(operation) == number


# ---------------------------------------------------------------------- a user's day


def test_a_users_day(guest: Guest) -> None:
    at = BASE + guest.extents(guest.ram)[0][2]
    assert done("map", guest.dom(0), "0x0", guest.ram) == ""
    assert done("attach", guest.dom(0), BDF) == ""
    assert sorted(os.listdir(guest.path / "iommu")) == ["dom-0", "root-pgtables"]
    found = iommu("translate", guest.path, BDF, "0x123456")
    assert found.status == 0
    lines = found.out.splitlines()
    assert lines[0] == f"device {BDF} iova 0x123456"
    assert [line.split(" at ")[0].strip() for line in lines[1:-1]] == [
        "root entry", "context entry", "PML4E", "PDPE", "PDE"
    ]  # fmt: skip
    assert lines[-1] == (
        f"physical {at + 0x123456:#x} rw, 2 MiB page, domain id 2, /guest-ram + 0x123456"
    )
    for path in (guest.ram, guest.dom(0), guest.root):
        refused(EBUSY, path.unlink)
    refused(EBUSY, lambda: os.truncate(guest.ram, MIB))
    done("unmap", guest.dom(0), 0, "8M")
    done("detach", BDF, guest.path)
    for path in (guest.ram, guest.dom(0), guest.root):
        path.unlink()
    assert done("check", guest.path) == "0 devices, 0 tables, 0 leaves, 0 bytes mapped: clean\n"


def test_run_as_a_program(guest: Guest) -> None:
    """In a process of its own: standard streams, exit status, nothing else."""
    found = run_pkernfs("iommu", "map", str(guest.dom(0)), "0", str(guest.ram))
    assert (found.returncode, found.stdout, found.stderr) == (0, "", "")
    found = run_pkernfs("iommu", "map", str(guest.dom(0)), "4K", str(guest.ram))
    assert (found.returncode, found.stdout) == (1, "")
    assert found.stderr == (
        f"pkernfs: {guest.ram}: iova 0x1000: already mapped to something else\n"
    )
    program = "import sys; from pkernfs.cli import main; sys.exit(main())"
    command = f"{sys.executable} -c '{program}' iommu show {guest.path} | head -1"
    shown = subprocess.run(
        command, shell=True, check=True, capture_output=True, text=True, timeout=20
    )
    assert shown.stdout.startswith("IOMMU pkernfs: Root Table Address: 0x1")
    assert shown.stderr == ""


def test_fault(mapped: Guest) -> None:
    for words, says in (
        ((BDF, "0x10000000"), "fault 0x06 READ: "),
        ((BDF, "1G", "--access", "w"), "fault 0x05 WRITE: "),
        (("0000:00:06.0", "0"), "fault 0x02 CONTEXT_ENTRY_P: "),
        (("0000:01:00.0", "0"), "fault 0x01 ROOT_ENTRY_P: "),
        ((BDF, hex(1 << 48)), "fault 0x04 ADDR_BEYOND_MGAW: "),
    ):
        result = iommu("translate", mapped.path, *words)
        assert (result.status, result.err) == (1, "")
        assert result.out.splitlines()[-1].startswith(says)


def test_show(mapped: Guest) -> None:
    text = done("show", mapped.path)
    lines = text.splitlines()
    assert lines[0].startswith("IOMMU pkernfs: Root Table Address: 0x1")
    assert lines[1].startswith("B.D.F\tRoot_entry")
    assert lines[2].startswith("00:05.0\t0x")
    assert f"Device {BDF} @0x" in text
    assert len([line for line in lines if line.startswith("0x0")]) == 4 + 6
    one = done("show", mapped.dom(0))
    assert one in text
    assert one.startswith(f"Device {BDF} @0x")
    assert done("show", mapped.path, "--domain", 0) == one
    merged = done("show", mapped.dom(0), "--merge").splitlines()
    assert len([line for line in merged if line.startswith("0x0")]) == 2


def test_show_json(mapped: Guest) -> None:
    ram, small = (BASE + mapped.extents(mapped.path / n)[0][2] for n in ("guest-ram", "small"))
    whole = iommu("show", mapped.path, "--json").json
    assert whole["unit"] == {
        "mode": "legacy",
        "levels": 4,
        "address_width": 48,
        "root_table": BASE + mapped.extents(mapped.root)[0][2],
    }
    assert whole["damaged"] == {}
    (device,) = whole["devices"]
    assert (device["device"], device["domain_id"], device["levels"]) == (BDF, 2, 4)
    assert len(device["root_entry"]) == len(device["context_entry"]) == 2
    (domain,) = whole["domains"]
    assert domain["table"] == device["table"] == BASE + mapped.extents(mapped.dom(0))[0][2]
    assert domain["mappings"] == [
        {"iova": 0, "length": 8 * MIB, "physical": ram, "perm": "rw"},
        {"iova": 1 << 30, "length": 6 * PAGE, "physical": small, "perm": "r"},
    ]
    one = iommu("show", mapped.dom(0), "--json").json
    assert (one["devices"], one["domains"]) == (whole["devices"], whole["domains"])
    mapped.size(mapped.dom(7), 2 * MIB)
    other = iommu("show", mapped.dom(7), "--json").json
    assert (other["devices"], [d["id"] for d in other["domains"]]) == ([], ["dom-7"])


def test_check(mapped: Guest) -> None:
    assert done("check", mapped.path).endswith("clean\n")
    assert iommu("check", mapped.path, "--json").json == {
        "clean": True,
        "found": 0,
        "findings": [],
        "devices": [BDF],
        "tables": 7,
        "leaves": 10,
        "mapped_bytes": 8 * MIB + 6 * PAGE,
    }


def test_create(guest: Guest) -> None:
    done("create", guest.path, "--mode", "scalable", "--levels", "5", "--size", "4M")
    assert guest.root.stat().st_size == 4 * MIB
    assert stat.S_IMODE(guest.root.stat().st_mode) == 0o400
    done("map", guest.dom(0), hex((1 << 57) - 8 * MIB), guest.ram)
    done("attach", guest.dom(0), BDF)
    found = done("translate", guest.path, BDF, hex((1 << 57) - 1))
    assert "PML5E" in found
    assert "PASID table entry" in found
    fails("create", guest.path, says="dom-0 has mappings: its levels cannot change")


def test_the_first_map_makes_root_pgtables_visible(guest: Guest) -> None:
    """The kernel knew that it was missing."""
    assert not guest.root.exists()
    assert os.listdir(guest.path / "iommu") == ["dom-0"]
    done("map", guest.dom(0), 0, guest.ram)
    assert guest.root.stat().st_size == 2 * MIB
    assert len(os.listdir(guest.path / "iommu")) == 2


def test_a_mapped_hole_is_seen_in_st_blocks(guest: Guest) -> None:
    sparse = guest.path / "sparse"
    sparse.touch()
    with sparse.open("r+b") as file:
        file.seek(4 * MIB - 1)
        file.write(b"x")
    before = sparse.stat().st_blocks
    done("map", guest.dom(0), 0, sparse)
    assert sparse.stat().st_blocks > before
    assert sparse.stat().st_blocks == 4 * MIB // 512


def test_detach_finds_the_mount(mapped: Guest) -> None:
    """One of several mounts has the device attached: that one is meant."""
    with Guest() as other:
        done("attach", other.dom(0), "0000:77:1f.3")
        done("detach", "0000:77:1f.3")
        assert iommu("show", other.path, "--json").json["devices"] == []
        assert len(iommu("show", mapped.path, "--json").json["devices"]) == 1


# ---------------------------------------------------------------------- table files


def test_reading_gives_the_tables(mapped: Guest) -> None:
    """read and a read-only mapping show the region's own bytes, before and after a change."""
    path = mapped.dom(0)
    offset = mapped.extents(path)[0][2]

    def region() -> bytes:
        with mapped.region.open("rb") as file:
            file.seek(offset)
            return file.read(2 * MIB)

    with path.open("rb") as file:
        memory = mmap.mmap(file.fileno(), 2 * MIB, prot=mmap.PROT_READ)
        assert file.read() == memory[:] == region() != bytes(2 * MIB)
        for change in (
            ("map", path, "2G", mapped.ram, "--offset", "4K"),
            ("unmap", path, "2G", "1M"),
            ("unmap", path, 0, "4K"),
        ):
            before = region()
            done(*change)
            assert region() != before
            assert path.read_bytes() == region()
            assert memory[:] == region()
        memory.close()
        with pytest.raises(PermissionError):
            mmap.mmap(file.fileno(), 2 * MIB)
    assert stat.S_IMODE(path.stat().st_mode) == 0o400


_PUNCH, _ZERO, _KEEP = 2, 16, 1


def fallocate(path: Path, mode: int, offset: int, length: int) -> None:
    fd = os.open(path, os.O_RDWR)
    try:
        if libc.fallocate(fd, mode, ctypes.c_long(offset), ctypes.c_long(length)):
            raise OSError(ctypes.get_errno(), "fallocate")
    finally:
        os.close(fd)


def store(path: Path, flags: int) -> None:
    fd = os.open(path, flags)
    try:
        os.writev(fd, [mmap.mmap(-1, PAGE)])  # aligned, for O_DIRECT
    finally:
        os.close(fd)


def test_no_garbage_into_tables(mapped: Guest) -> None:
    before = mapped.raw()
    for path in (mapped.dom(0), mapped.root):
        for operation in (
            lambda p=path: p.write_bytes(b"x"),
            lambda p=path: store(p, os.O_RDWR),
            lambda p=path: store(p, os.O_WRONLY | os.O_APPEND),
            lambda p=path: store(p, os.O_WRONLY | os.O_DIRECT),
            lambda p=path: os.close(os.open(p, os.O_WRONLY | os.O_TRUNC)),
            lambda p=path: os.truncate(p, 0),
            lambda p=path: os.truncate(p, 2 * MIB - 1),
            lambda p=path: os.truncate(p, 2 * MIB + 1),
            lambda p=path: fallocate(p, _PUNCH | _KEEP, 0, PAGE),
            lambda p=path: fallocate(p, _ZERO | _KEEP, 0, PAGE),
            lambda p=path: fallocate(p, 0, 0, 4 * MIB),
            lambda p=path: os.link(p, mapped.path / "iommu" / "dom-9"),
            lambda p=path: os.link(p, mapped.path / "link"),
            lambda p=path: p.rename(mapped.path / "moved"),
            lambda: (mapped.path / "small").rename(mapped.dom(9)),
            lambda: (mapped.path / "iommu" / "else").touch(),
            lambda: (mapped.path / "iommu" / "dom-65536").touch(),
            lambda: (mapped.path / "iommu" / "dom-00").touch(),
            lambda: (mapped.path / "iommu" / "dom-1").mkdir(),
            lambda: mapped.dom(1).symlink_to("/etc/passwd"),
            lambda: os.mkfifo(mapped.dom(1)),
        ):
            refused(EPERM, operation)
        with path.open("r+b", buffering=0) as file, path.open("rb") as source:
            assert error_of(partial(os.copy_file_range, source.fileno(), file.fileno(), PAGE))
            memory = mmap.mmap(file.fileno(), PAGE)  # copies that nobody asks for are dropped
            memory[:4] = b"\xff" * 4
            with contextlib.suppress(OSError):
                memory.flush()
            memory.close()
    with Region.open(str(mapped.region), write=False, lock=False) as region:
        for path in (mapped.dom(0), mapped.root):
            (_offset, length, at), *_rest = mapped.extents(path)
            assert region.read(at, length) == before[path.name]


def test_growth_of_a_domain_in_use(mapped: Guest) -> None:
    before = iommu("show", mapped.dom(0), "--json").json["domains"]
    os.truncate(mapped.dom(0), 4 * MIB)
    assert iommu("show", mapped.dom(0), "--json").json["domains"] == before
    done("map", mapped.dom(0), "4G", mapped.ram)
    done("check", mapped.path)


def test_out_of_table_pages(guest: Guest) -> None:
    """The message is a command that helps."""
    done("map", guest.dom(0), 0, guest.path / "small", "--length", "4K")
    dom = str(guest.dom(0))
    ino = Ino((guest.path / "small").stat().st_ino)
    with pytest.raises(PkernfsError, match="no free page for tables") as caught:  # noqa: PT012
        for at in range(1, 600):
            client.call(dom, MapFile(0, Iova(at << 30), ino, 0, PAGE, 3))
    assert caught.value.errno == 28
    said = str(caught.value)
    assert said.endswith("it must grow by 2 MiB: truncate -s +2M")
    before = iommu("show", guest.dom(0), "--json").out
    fails("map", guest.dom(0), hex(at << 30), guest.path / "small", "--length", "4K",
          says="truncate -s +2M")  # fmt: skip
    assert iommu("show", guest.dom(0), "--json").out == before
    subprocess.run(["truncate", "-s", "+2M", str(guest.dom(0))], check=True)
    done("map", guest.dom(0), hex(at << 30), guest.path / "small", "--length", "4K")
    done("check", guest.path)


# ---------------------------------------------------------------------- bad input


@pytest.fixture(scope="module")
def one() -> Iterator[Guest]:
    """One mount for all that is refused; nothing of it may change."""
    with Guest() as made:
        made.size(made.path / "odd", 5000)
        (made.path / "dir").mkdir()
        os.mkfifo(made.path / "fifo")
        made.dom(1).touch()
        done("map", made.dom(0), 0, made.ram)
        done("attach", made.dom(0), BDF)
        yield made


BAD = {
    "unaligned iova": ("map D0 0x123 RAM", "iova 0x123: unaligned"),
    "an iova for a file of whole pages": ("map D0 0x1 RAM", "iova 0x1: unaligned: expected a "),
    "addresses of interrupts": ("map D0 0xfec00000 RAM", "0xfee00000-0xfeefffff for interrupts"),
    "unaligned length": ("map D0 1G RAM --length 100", "bad length: got 0x64 bytes"),
    "unaligned offset": ("map D0 1G RAM --offset 12", "offset 0xc: unaligned"),
    "an odd size": ("map D0 1G MNT/odd", "bad length: got 0x1388 bytes"),
    "beyond the width": ("map D0 0xfffffffff000 RAM", "beyond 48 bits"),
    "not canonical": ("map D0 0x1000000000000 RAM", "not canonical for 48 bits"),
    "the upper half": ("map D0 0xfffffffffffff000 RAM --length 4K", "beyond 48 bits"),
    "length 0": ("map D0 1G RAM --length 0", "bad length: got 0"),
    "beyond the file": ("map D0 1G RAM --length 9M", "beyond the end of the file"),
    "behind the file": ("map D0 1G RAM --offset 9M", "beyond the end of the file"),
    "overlap": ("map D0 4K RAM", "iova 0x1000: already mapped to something else"),
    "other permissions": ("map D0 0 RAM --perm r", "iova 0x0: already mapped"),
    "no permission": ("map D0 1G RAM --perm x", "'x'"),
    "no number": ("map D0 abc RAM", "bad iova: got 'abc'"),
    "beyond 64 bits": ("map D0 0x10000000000000000 RAM", "expected less than 2^64"),
    "a number with underscores": ("map D0 0x4000_0000 RAM", "bad iova: got '0x4000_0000'"),
    "thousands of digits": (f"map D0 {'9' * 5000} RAM", "bad iova"),
    "a length of thousands of digits": (f"unmap D0 0 {'9' * 5000}", "bad length"),
    "a domain of thousands of digits": (f"map MNT/iommu/dom-{'9' * 5000} 1G RAM", "dom-65535"),
    "no such file": ("map D0 1G MNT/nothing", "nothing: No such file"),
    "a directory": ("map D0 1G MNT/dir", "not a regular file"),
    "a fifo": ("map D0 1G MNT/fifo", "not a regular file"),
    "a table": ("map D0 1G D0", "a table file cannot be mapped"),
    "a file on another mount": ("map D0 1G /etc/passwd", "/etc/passwd: on another mount than"),
    "a file of /dev": ("map D0 1G /dev/zero", "/dev/zero: on another mount than"),
    "no file at all": ("map D0 1G", "either a file or --bar"),
    "a file and a BAR": ("map D0 1G RAM --bar 0000:00:06.0:0", "either a file or --bar"),
    "a domain never sized": ("map D1 1G RAM", "dom-1: it was never sized: truncate -s 2M"),
    "no such domain": ("map MNT/iommu/dom-5 1G RAM", "dom-5: No such file"),
    "an id above 65535": ("map MNT/iommu/dom-65536 1G RAM", "expected dom-0 to dom-65535"),
    "a number with zeros": ("map MNT/iommu/dom-00 1G RAM", "expected dom-0 to dom-65535"),
    "no domain": ("map MNT/odd 1G RAM", "odd: not a domain"),
    "root-pgtables": ("map MNT/iommu/root-pgtables 1G RAM", "root-pgtables: not a domain"),
    "a mount": ("map MNT 1G RAM", "not a domain"),
    "a name elsewhere": ("map /tmp/iommu/dom-0 1G RAM", "not a domain"),
    "no BAR": ("map D0 1G --bar 0000:00:06.0", "expected DDDD:BB:DD.F:N"),
    "BAR 6": ("map D0 1G --bar 0000:00:06.0:6", "expected DDDD:BB:DD.F:N"),
    "a BAR of nothing": ("map D0 1G --bar 0000:fe:1f.7:0", "0000:fe:1f.7: no such device"),
    "unmap nothing": ("unmap D0 1G 4K", "iova 0x40000000: nothing is mapped there"),
    "unmap unaligned": ("unmap D0 12 4K", "iova 0xc: unaligned"),
    "unmap an unaligned length": ("unmap D0 0 12", "bad length: got 0xc bytes"),
    "unmap length 0": ("unmap D0 0 0", "bad length: got 0"),
    "unmap beyond": ("unmap D0 0xfffffffff000 8K", "beyond 48 bits"),
    "attach no BDF": ("attach D0 00:05", "'00:05': not a device's address"),
    "attach function 8": ("attach D0 0000:00:05.8", "not a device's address"),
    "attach slot 20": ("attach D0 0000:00:20.0", "no such device"),
    "attach another segment": ("attach D0 0001:00:05.0", "only PCI segment 0000"),
    "attach again": ("attach D0 0000:00:05.0", "attached already: detach it first"),
    "attach to a domain never sized": ("attach D1 0000:00:06.0", "never sized"),
    "attach to nothing": ("attach MNT/iommu/dom-5 0000:00:06.0", "dom-5: No such file"),
    "detach what is not attached": ("detach 0000:00:06.0 MNT", "0000:00:06.0: not attached"),
    "detach no BDF": ("detach x MNT", "'x': not a device's address"),
    "detach elsewhere": ("detach 0000:00:05.0 /tmp", "/tmp: not on a pkernfs mount"),
    "translate no BDF": ("translate MNT 05.0 0", "not a device's address"),
    "translate no address": ("translate MNT 0000:00:05.0 -1", ""),
    "translate a large PASID": ("translate MNT 0000:00:05.0 0 --pasid 0x100000", "PASID 0x100000"),
    "translate a domain": ("translate D0 0000:00:05.0 0", "not a mount point"),
    "show nothing": ("show MNT/nothing", "No such file"),
    "show no domain": ("show MNT/odd", "not a domain"),
    "show a missing domain": ("show MNT --domain 5", "dom-5: no such domain"),
    "show a bad domain": ("show MNT --domain x", "domain x: expected 0 to 65535"),
    "export a missing domain": ("export MNT --domain 5", "dom-5: no such domain"),
    "check a file": ("check MNT/odd", "not a mount point"),
    "check a mounted region": ("check REGION", "in use"),
    "create in use": ("create MNT", "in use: mode and levels cannot change"),
    "create other levels": ("create MNT --levels 5", "dom-0 has mappings"),
    "create of six levels": ("create MNT --levels 6", "6"),
    "create of half a block": ("create MNT --size 1M", "steps of 2 MiB"),
    "no command": ("", "COMMAND"),
    "no such command": ("frobnicate", "frobnicate"),
    "an empty name": ("map '' 0 RAM", "empty"),
    "too little": ("map D0", "required"),
    "too much": ("unmap D0 0 4K 4K", "unrecognized"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input(one: Guest, case: str) -> None:
    """One line that says what and why; nothing has changed."""
    line, says = BAD[case]
    names = {
        "D0": str(one.dom(0)), "D1": str(one.dom(1)), "RAM": str(one.ram), "REGION": str(one.region)
    }  # fmt: skip
    words = [names.get(w, w.replace("MNT", str(one.path)).strip("'")) for w in line.split(" ") if w]
    before = one.raw(), {p.name: p.stat().st_blocks for p in one.path.iterdir()}
    said = fails(*words, says=says)
    if case == "check a mounted region":
        assert str(one.region) in said
    assert (one.raw(), {p.name: p.stat().st_blocks for p in one.path.iterdir()}) == before
    assert iommu("check", one.path).status == 0


def test_a_region_without_addresses() -> None:
    with Guest("") as guest:
        before = guest.raw()
        for words in (
            ("map", guest.dom(0), 0, guest.ram),
            ("unmap", guest.dom(0), 0, "4K"),
            ("attach", guest.dom(0), BDF),
            ("create", guest.path),
            ("show", guest.path),
            ("export", guest.dom(0)),
            ("check", guest.path),
            ("translate", guest.path, BDF, 0),
        ):
            fails(*words, says="no physical addresses: ")
        assert guest.raw() == before


def test_a_dead_daemon(mapped: Guest) -> None:
    assert mapped.daemon is not None
    mapped.daemon.kill()
    mapped.daemon.wait()
    for words in (
        ("map", mapped.dom(0), 0, mapped.ram),
        ("attach", mapped.dom(0), BDF),
        ("show", mapped.path),
        ("show", mapped.dom(0)),
        ("detach", BDF, mapped.path),
    ):
        fails(*words, says="daemon has died")
    subprocess.run(["umount", "-l", str(mapped.path)], check=True)
    mapped.start()
    done("check", mapped.path)


# ---------------------------------------------------------------------- who may ask


def test_other_users_are_refused(mapped: Guest) -> None:
    before = mapped.raw()
    commands = (
        ("map", mapped.dom(0), "2G", mapped.ram),
        ("unmap", mapped.dom(0), 0, "4K"),
        ("attach", mapped.dom(0), "0000:00:07.0"),
        ("detach", BDF, mapped.path),
        ("create", mapped.path),
        ("translate", mapped.path, BDF, 0),
        ("show", mapped.path),
        ("show", mapped.dom(0)),
        ("check", mapped.path),
        ("export", mapped.path),
    )

    def work() -> None:
        for words in commands:
            fails(*words, says="only root and the owner of the mount may ask its daemon")
        with pytest.raises(PermissionError):
            mapped.dom(0).open("rb")
        with pytest.raises(PermissionError):
            mapped.dom(3).touch()

    run_as(1000, work)
    assert mapped.raw() == before


# ---------------------------------------------------------------------- not mounted


def test_a_region_that_is_not_mounted(mapped: Guest) -> None:
    """Its own record says where the tables were made for; nothing is stored."""
    live = {
        words: iommu(*words[:1], mapped.path, *words[1:])
        for words in (
            ("show",),
            ("show", "--json"),
            ("show", "--domain", "0"),
            ("show", "--merge"),
            ("check",),
            ("check", "--json"),
            ("translate", BDF, "0x123456"),
            ("translate", BDF, "0x123456000"),
        )
    }
    export = iommu("export", mapped.path).json
    mapped.unmount()
    before = mapped.region.read_bytes()
    for words, expected in live.items():
        for more in ((), ("--phys-base", hex(BASE))):
            got = iommu(words[0], mapped.region, *words[1:], *more)
            assert (got.status, got.out, got.err) == (expected.status, expected.out, "")
    got = iommu("export", mapped.region).json
    assert got == {**export, "region": {**export["region"], "name": str(mapped.region)}}
    for words in (("show",), ("check",), ("export",), ("translate", BDF, "0")):
        fails(words[0], mapped.region, *words[1:], "--phys-base", hex(2 * BASE), says="made for")
    for bad in ("x", "-5", "12", hex(1 << 60)):
        said = iommu("show", mapped.region, "--phys-base", bad)
        assert said.status == 1
        assert said.err.count("\n") == 1
    assert mapped.region.read_bytes() == before
    mapped.start()


def test_a_region_of_a_killed_daemon(mapped: Guest) -> None:
    mapped.kill()
    before = mapped.region.read_bytes()
    assert done("check", mapped.region).endswith("clean\n")
    assert "/guest-ram + 0x1000" in done("translate", mapped.region, BDF, "0x1000")
    assert mapped.region.read_bytes() == before
    mapped.start()


def test_no_region_at_all(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.write_bytes(bytes(4 * MIB))
    for words in (("show",), ("check",), ("export",), ("translate", BDF, "0")):
        fails(words[0], empty, *words[1:])
        fails(words[0], tmp_path / "nothing", *words[1:])


# ---------------------------------------------------------------------- export


def check_export(text: str) -> Any:
    whole = json.loads(text)
    jsonschema.Draft202012Validator(SCHEMA).validate(whole)
    return whole


def test_the_schema_is_one() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


def test_export(mapped: Guest) -> None:
    ram, small = (BASE + mapped.extents(mapped.path / n)[0][2] for n in ("guest-ram", "small"))
    whole = check_export(done("export", mapped.path))
    assert whole == check_export(done("export", mapped.path, "--json"))
    table = BASE + mapped.extents(mapped.dom(0))[0][2]
    assert whole["hwpt"] == [
        {"id": "dom-0", "ioas": "dom-0", "file": "/iommu/dom-0", "table": table, "levels": 4,
         "domain_id": 2}
    ]  # fmt: skip
    assert whole["devices"] == [
        {"device": BDF, "pasid": None, "hwpt": "dom-0", "domain_id": 2, "adopted_by": None}
    ]
    assert whole["vfio_containers"] == [
        {"id": "dom-0", "type": 3, "ioas": "dom-0", "devices": [BDF]}
    ]
    assert whole["ioas"] == [
        {"id": "dom-0", "mappings": [
            {"iova": 0, "length": 8 * MIB, "readable": True, "writeable": True,
             "iommufd_flags": 7, "vfio_flags": 3, "file": "/guest-ram", "offset": 0,
             "physical": ram,
             "pieces": [{"length": 8 * MIB, "physical": ram, "region_offset": ram - BASE}]},
            {"iova": 1 << 30, "length": 6 * PAGE, "readable": True, "writeable": False,
             "iommufd_flags": 5, "vfio_flags": 1, "file": "/small", "offset": 0,
             "physical": small,
             "pieces": [{"length": 6 * PAGE, "physical": small, "region_offset": small - BASE}]},
        ]}
    ]  # fmt: skip
    size = mapped.region.stat().st_size
    assert whole["region"]["mmap"] == {"path": str(mapped.region), "offset": 0, "length": size}


def test_export_of_everything_fits_the_schema(guest: Guest) -> None:
    """No tables, an empty domain, scalable mode, pieces of files in directories, odd names."""
    check_export(done("export", guest.path))
    done("create", guest.path, "--mode", "scalable", "--levels", "3")
    check_export(done("export", guest.path))
    directory = guest.path / "a b"
    directory.mkdir()
    odd = directory / os.fsdecode(b"\xff\n")
    guest.size(odd, 4 * MIB)
    guest.size(guest.dom(65535), 2 * MIB)
    done("map", guest.dom(0), 0, odd, "--length", "1M", "--offset", "1M", "--perm", "w")
    done("map", guest.dom(0), "1M", odd, "--length", "1M", "--offset", "2M", "--perm", "w")
    done("attach", guest.dom(65535), BDF)
    done("attach", guest.dom(65535), "0000:ff:1f.7")
    whole = check_export(done("export", guest.path))
    (mapping,) = whole["ioas"][0]["mappings"]  # one call is enough
    assert (mapping["offset"], mapping["length"]) == (MIB, 2 * MIB)
    assert os.fsencode(mapping["file"]) == b"/a b/\xff\n"
    assert [d["pasid"] for d in whole["devices"]] == [0, 0]
    assert [c["devices"] for c in whole["vfio_containers"]] == [[], [BDF, "0000:ff:1f.7"]]
    only = check_export(done("export", guest.dom(0)))
    assert [i["id"] for i in only["ioas"]] == ["dom-0"]
    assert only["devices"] == []


def test_pieces_are_the_file(guest: Guest) -> None:
    """What is read at the pieces' places in the region is what is in the file."""
    a, b = guest.path / "a", guest.path / "b"
    for _ in range(3):  # by turns, so that neither is one piece
        for path in (a, b):
            with path.open("ab") as file:
                file.write(os.urandom(3 * PAGE))
                os.fsync(file.fileno())
    guest.size(guest.dom(0), 2 * MIB)
    done("map", guest.dom(0), 0, a)
    whole = check_export(done("export", guest.path))
    (mapping,) = whole["ioas"][0]["mappings"]
    place = whole["region"]["mmap"]
    with open(place["path"], "rb") as region:
        found = b"".join(
            os.pread(region.fileno(), p["length"], place["offset"] + p["region_offset"])
            for p in mapping["pieces"]
        )
    assert found == a.read_bytes()
    assert len(mapping["pieces"]) > 1


def test_the_same_tables_from_an_export(mapped: Guest) -> None:
    """What a VMM would do: the mappings of the export, made again elsewhere, are the same."""
    whole = check_export(done("export", mapped.path))
    mapped.size(mapped.dom(1), 2 * MIB)
    for m in whole["ioas"][0]["mappings"]:
        perm = ("r" if m["readable"] else "") + ("w" if m["writeable"] else "")
        done("map", mapped.dom(1), m["iova"], f"{mapped.path}{m['file']}",
             "--offset", m["offset"], "--length", m["length"], "--perm", perm)  # fmt: skip
    again = check_export(done("export", mapped.dom(1)))
    assert again["ioas"][0]["mappings"] == whole["ioas"][0]["mappings"]


# ---------------------------------------------------------------------- at the same time


class Workers:
    """Threads that run until they are told to end; the first failure is the test's."""

    def __init__(self) -> None:
        self.end = threading.Event()
        self.failures: list[BaseException] = []
        self.counts: dict[str, int] = {}
        self._threads: list[threading.Thread] = []

    def add(self, name: str, work: Callable[[int], object]) -> None:
        """Run ``work(0)``, ``work(1)``, ... again and again."""
        self.counts[name] = 0

        def run() -> None:
            try:
                while not self.end.is_set():
                    work(self.counts[name])
                    self.counts[name] += 1
            except BaseException as e:
                self.failures.append(e)
                self.end.set()

        self._threads.append(threading.Thread(target=run, name=name))

    def run(self, least: int) -> None:
        """Until each has done ``least`` rounds."""
        for thread in self._threads:
            thread.start()
        deadline = time.monotonic() + 60
        while not self.end.is_set() and min(self.counts.values()) < least:
            assert time.monotonic() < deadline, self.counts
            time.sleep(0.01)
        self.end.set()
        for thread in self._threads:
            thread.join()
        if self.failures:
            raise self.failures[0]


def read(path: Path, what: Any, **question: Any) -> list[Text | Record | Status]:
    return list(client.stream(str(path), Read(what, **question)))


def test_everything_at_once(mapped: Guest) -> None:
    """Maps and unmaps, questions and checks, beside files that come, go and move."""
    dom = str(mapped.dom(0))
    ram, small = (Ino(p.stat().st_ino) for p in (mapped.ram, mapped.path / "small"))
    for name in ("a", "b"):
        (mapped.path / name).mkdir()

    def change(number: int) -> None:
        iova = Iova((2 + number % 7) << 30)
        offset = PAGE * (number % 3)
        client.call(dom, MapFile(0, iova, ram, offset, 4 * MIB, 3))
        client.call(dom, MapFile(0, Iova(iova + 8 * MIB), small, offset, PAGE, 3))
        client.call(dom, Unmap(0, Iova(iova + MIB), PAGE))
        client.call(dom, Unmap(0, iova, 1 << 30))

    def attach(number: int) -> None:
        device = SourceId(0x100 * (1 + number % 5) + number % 256)
        client.call(dom, Attach(0, device))
        client.call(dom, Detach(device))

    def check(number: int) -> None:
        texts = read(mapped.path, what="check")
        assert Status(0) in texts, texts

    def ask(number: int) -> None:
        for question in ("show", "export"):
            read(mapped.path, what=question)
            read(mapped.path, what=question, as_json=True, domain=0)
        answer = read(mapped.path, what="translate", device=0x28, iova=0x1000)
        text = "".join(item.text for item in answer if isinstance(item, Text))
        assert "/guest-ram + 0x1000" in text or "no live file" not in text, text

    def files(number: int) -> None:
        path = mapped.path / f"file{number % 10}"
        path.write_bytes(b"x" * (number % 3 * 100_000 + 1))
        path.rename(mapped.path / "a" / "moved")
        (mapped.path / "a" / "moved").unlink()

    def moves(number: int) -> None:
        """A mapped file goes from directory to directory."""
        for source, target in (("", "a"), ("a", "b"), ("b", "")):
            (mapped.path / source / "small").rename(mapped.path / target / "small")

    workers = Workers()
    for work in (change, attach, check, ask, files, moves):
        workers.add(work.__name__, work)
    workers.run(25)
    done("check", mapped.path)
    assert client.call(str(mapped.path), Ping()).read_only is False
    refused(EBUSY, (mapped.path / "small").unlink)


def test_pins_hold_under_load(mapped: Guest) -> None:
    """A file that is mapped all the time is never let go, whatever goes on."""
    dom = str(mapped.dom(0))
    ram = Ino(mapped.ram.stat().st_ino)

    def change(number: int) -> None:
        client.call(dom, MapFile(0, Iova(4 << 30), ram, 0, 2 * MIB, 3))
        client.call(dom, Unmap(0, Iova(4 << 30), 2 * MIB))

    def attack(number: int) -> None:
        refused(EBUSY, mapped.ram.unlink)
        refused(EBUSY, lambda: os.truncate(mapped.ram, number % 8 * MIB))
        refused(EBUSY, lambda: fallocate(mapped.ram, _PUNCH | _KEEP, number % 8 * MIB, PAGE))
        refused(EBUSY, lambda: os.rename(mapped.path / "victim", mapped.ram))

    (mapped.path / "victim").touch()
    workers = Workers()
    workers.add("change", change)
    workers.add("attack", attack)
    workers.run(50)
    done("check", mapped.path)


@pytest.mark.crash
@pytest.mark.parametrize("number", range(4))
def test_sigkill_amid_maps_and_unmaps(number: int, request: pytest.FixtureRequest) -> None:
    """What was answered is there; the one that was not is whole or not at all."""
    seed = SEED + number
    say(request.config, f"sigkill amid maps: PKERNFS_SEED={seed}, number 0")
    rng = random.Random(seed)
    with Guest() as guest:
        dom, ino = str(guest.dom(0)), Ino(guest.ram.stat().st_ino)
        guest.size(guest.path / "free", 4 * MIB)
        done("attach", guest.dom(0), BDF)
        known: dict[int, int] = {}  # page of the address space: page of the file
        states: list[dict[int, int]] = []
        killed_at = rng.randrange(5, 60)
        answered = threading.Event()

        def kill() -> None:
            answered.wait(20)
            time.sleep(rng.random() * 0.004)
            assert guest.daemon is not None
            guest.daemon.kill()

        killer = threading.Thread(target=kill)
        killer.start()
        with contextlib.suppress(PkernfsError, OSError):
            for step in range(10_000):
                if step == killed_at:
                    answered.set()
                page = min(rng.choice((0, 3, 511, 512)) + rng.randrange(4) * 512, 2047)
                count = rng.choice((1, 5, 512, 1024))
                count = min(count, 2048 - page)
                span = range(page, page + count)
                after = dict(known)
                if rng.random() < 0.6:
                    shift = rng.choice((0, 0, 1 << 18))
                    wanted = {shift + p: p for p in span}
                    after.update(wanted)
                    states[:] = [known, after]
                    at, length = Iova((shift + page) * PAGE), count * PAGE
                    client.call(dom, MapFile(0, at, ino, page * PAGE, length, 3))
                elif any(p in known for p in span):
                    for p in span:
                        after.pop(p, None)
                    states[:] = [known, after]
                    client.call(dom, Unmap(0, Iova(page * PAGE), count * PAGE))
                known = after
        killer.join()
        guest.daemon.wait()  # type: ignore[union-attr]
        subprocess.run(["umount", "-l", str(guest.path)], check=True)
        guest.start()
        first = guest.extents(guest.ram)[0][2] + BASE
        (domain,) = iommu("show", guest.path, "--json").json["domains"]
        found = {
            m["iova"] // PAGE + i: (m["physical"] - first) // PAGE + i
            for m in domain["mappings"]
            for i in range(m["length"] // PAGE)
        }
        assert found in states
        done("check", guest.path)
        if found:
            refused(EBUSY, guest.ram.unlink)
            done("unmap", guest.dom(0), 0, hex(1 << 48))
        guest.ram.unlink()
        (guest.path / "free").unlink()


# ---------------------------------------------------------------------- hostile clients


def ask_raw(path: Path, request: bytes) -> dict[str, Any]:
    """The last line of what the daemon answers to these bytes."""
    address = Path("/run/pkernfs", socket_name(os.stat(path).st_dev))
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(20)
        connection.connect(str(address))
        connection.sendall(request + b"\n")
        lines = connection.makefile("rb").readlines()
    last: dict[str, Any] = json.loads(lines[-1])
    return last


def test_random_requests(mapped: Guest, request: pytest.FixtureRequest) -> None:
    """Whatever is asked, the answer is one line, and the file system is none the worse."""
    say(request.config, f"random requests: PKERNFS_SEED={SEED}")
    rng = random.Random(SEED)
    inodes = [p.stat().st_ino for p in (mapped.ram, mapped.path / "small", mapped.dom(0))]
    numbers = [0, 1, 2, -1, 3, 7, 0x28, 4096, 1 << 12, 1 << 30, 1 << 48, (1 << 48) - 4096, 1 << 63,
               (1 << 64) - 1, 1 << 64, 1 << 65, -(1 << 63), 65535, 65536, *inodes]  # fmt: skip
    others = [None, True, False, "", "0", "x" * 300, 1.5, 1e308, [], {}, [1, 2], [0x30, 0], [0, 9],
              {"a": 1}, "legacy", "SCALABLE", "check", "show", "\u2028\n", ["dmar0"]]  # fmt: skip
    good = {"domain": 0, "iova": 1 << 31, "ino": inodes[0], "offset": 0, "length": 4096,
            "access": 3, "device": 0x30, "what": "translate", "mode": "legacy", "levels": 4,
            "size": 2 * MIB, "on": True, "bar": 0}  # fmt: skip
    operations = (CreateTables, MapFile, MapBar, Unmap, Attach, Detach, Persist, ListDevices,
                  FindRoot, Read)  # fmt: skip
    for _ in range(600):
        kind = rng.choice(operations)
        names = [field.name for field in fields(kind)]
        args = {name: good[name] for name in names if name in good}
        for name in rng.sample(names, rng.randrange(0, min(4, len(names) + 1))):
            args[name] = rng.choice(numbers if rng.random() < 0.7 else others)
        if rng.random() < 0.1:
            args[rng.choice(("x", "json", "domain", "\u2028\n"))] = rng.choice(others)
        if kind is Read and rng.random() < 0.6:
            args["what"] = rng.choice(("show", "export", "check", "translate", "else"))
        asked = json.dumps({"protocol": VERSION, "request": kind.op, "arguments": args})
        answer = ask_raw(mapped.path, asked.encode())
        assert answer.pop("protocol") == VERSION
        assert answer.keys() in ({"done"}, {"error", "errno"}), (asked, answer)
        if "error" in answer:
            assert "\n" not in answer["error"]
            assert "the daemon failed" not in answer["error"], (asked, answer)
    assert client.call(str(mapped.path), Ping()).read_only is False
    assert iommu("check", mapped.path).status == 0
    refused(EBUSY, mapped.ram.unlink)


def test_clients_that_go_away(mapped: Guest) -> None:
    """In the middle of a long listing or of a check: the others are served as ever."""
    done("unmap", mapped.dom(0), 0, "8M")
    done("map", mapped.dom(0), "4K", mapped.ram)  # 2048 leaves
    for request in (Read("show"), Read("export"), Read("check")) * 10:
        items = client.stream(str(mapped.path), request)
        next(items)
        items.close()
    wait_until(lambda: iommu("check", mapped.path).status == 0, "a check")
    done("map", mapped.dom(0), "4G", mapped.ram)
    assert MAX_CLIENTS >= 30
    with child(lambda: [read(mapped.path, what="show") for _ in range(1000)]):
        done("unmap", mapped.dom(0), "4G", "8M")
    done("check", mapped.path)


def test_bdf_text_and_parser_agree(guest: Guest) -> None:
    for source_id in (0, 0x28, 0xFFFF, 0x1F7):
        done("attach", guest.dom(0), bdf_text(SourceId(source_id)))
    whole = iommu("show", guest.path, "--json").json
    assert [d["device"] for d in whole["devices"]] == [
        bdf_text(SourceId(s)) for s in (0, 0x28, 0x1F7, 0xFFFF)
    ]
    assert is_mounted(guest.path)


@pytest.mark.parametrize(
    ("words", "device", "other"),
    [
        (["attach", "/m/iommu/dom-0", "0000:00:05.0"], "0000:00:05.0", "/m/iommu/dom-0"),
        (["attach", "00:05.0", "/m/iommu/dom-0"], "00:05.0", "/m/iommu/dom-0"),
        (["snapshot", "/m/iommu/dom-0", "00:05.0"], "00:05.0", "/m/iommu/dom-0"),
        (["detach", "/m", "00:05.0"], "00:05.0", "/m"),
        (["detach", "00:05.0", "/m"], "00:05.0", "/m"),
        (["persist", "/m", "off", "00:05.0"], "00:05.0", "/m"),
        (["attach", "nothing", "else"], "else", "nothing"),
        (["attach", "00:05.0", "00:06.0"], "00:06.0", "00:05.0"),
    ],
)
def test_a_device_may_stand_first_or_last(words: list[str], device: str, other: str) -> None:
    args = build_parser("iommu", "pkernfs iommu").parse_args(words)
    put_in_order(args)
    assert (args.bdf, getattr(args, "dom", None) or args.mnt) == (device, other)
