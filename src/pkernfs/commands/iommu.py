"""``pkernfs iommu``: change IOMMU tables through the daemon; read them with or without one."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from pkernfs.control.mounts import DEAD, FSTYPE, Mount, beneath, mount_at, mount_of, region_of
from pkernfs.errors import InvalidError, NotFoundError, PkernfsError, UsageError
from pkernfs.options import parse_size
from pkernfs.quantities import Ino, Iova, PhysAddr, SourceId

if TYPE_CHECKING:
    from pkernfs.control.table_protocol import Read
    from pkernfs.dma.output import Output, Question

_MAX_DOMAIN = 65535
_HEXADECIMAL = re.compile(r"0[xX][0-9a-fA-F]+")


class Subcommand(NamedTuple):
    """A row of the table of subcommands."""

    summary: str
    operands: tuple[str, ...]


SUBCOMMANDS = {
    "create": Subcommand(
        "make iommu/root-pgtables, and choose mode and levels of the tables", ("mnt",)
    ),
    "map": Subcommand(
        "map a range of a file, or of a device's BAR, into a domain", ("dom", "iova")
    ),
    "unmap": Subcommand("unmap a range of addresses of a domain", ("dom", "iova", "length")),
    "attach": Subcommand(
        "attach a device to a domain, whose tables then translate its requests", ("dom", "bdf")
    ),
    "detach": Subcommand(
        "detach a device from its domain, so that its requests are blocked", ("bdf",)
    ),
    "snapshot": Subcommand(
        "copy the mappings that the running kernel has for a device into DOM", ("bdf", "dom")
    ),
    "persist": Subcommand("choose whether a handover keeps a device's entries", ("bdf",)),
    "translate": Subcommand(
        "translate an address as the hardware does, and print each step", ("whole", "bdf", "iova")
    ),
    "show": Subcommand("print the tables as the kernel's debugfs prints its own", ("target",)),
    "check": Subcommand("check every entry that a unit can reach", ("whole",)),
    "export": Subcommand("print the records for iommufd and VFIO, as JSON", ("target",)),
    "activate": Subcommand("have IOMMU units of this machine translate by these tables", ("mnt",)),
    "deactivate": Subcommand("have units that walk these tables stop translating", ("mnt",)),
    "units": Subcommand("print the IOMMU units of this machine: state, capabilities, faults", ()),
}


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the subcommands of ``pkernfs iommu``."""
    commands = parser.add_subparsers(dest="subcommand", metavar="COMMAND", required=True)
    made = {
        name: commands.add_parser(
            name,
            help=f"{row.summary}.",
            description=f"{row.summary[:1].upper()}{row.summary[1:]}.",
            allow_abbrev=False,
            add_help=False,
        )
        for name, row in SUBCOMMANDS.items()
    }
    for name, row in SUBCOMMANDS.items():
        for operand in row.operands:
            _OPERANDS[operand](made[name])
        made[name].add_argument("-h", "--help", action="help", help="print this help.")
    _configure_create(made["create"])
    _configure_map(made["map"])
    made["persist"].add_argument(
        "switch",
        metavar="on|off",
        choices=("on", "off"),
        help="on: keep the entries, the default; off: clear them.",
    )
    for name in ("detach", "persist"):
        made[name].add_argument(
            "mnt", metavar="MNT", nargs="?", help="the mount; only needed if there are several."
        )
    for name in ("translate", "show", "check", "export"):
        _configure_reading(made[name], name)
    _configure_units(made["activate"], made["deactivate"])
    made["units"].add_argument("--json", action="store_true", help="print JSON.")
    made["units"].add_argument(
        "--clear",
        action="store_true",
        help="free the fault records after printing them, except on units that the kernel drives.",
    )


def _domain_operand(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dom", metavar="DOM", help="the domain's file, MNT/iommu/dom-N.")


def _iova_operand(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("iova", metavar="IOVA", help="the I/O virtual address.")


def _length_operand(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("length", metavar="LENGTH", help="how many bytes, with K, M, G, T or 0x.")


def _bdf_operand(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "bdf", metavar="BDF", help="the device, as lspci -D prints it: 0000:00:05.0."
    )


def _mount_operand(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("mnt", metavar="MNT", help="the mount point of the file system.")


def _target_operand(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "target",
        metavar="MNT|DOM|REGION",
        help="a mount, a domain's file, or a region that is not mounted.",
    )


def _whole_operand(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "target", metavar="MNT|REGION", help="a mount, or a region that is not mounted."
    )


_OPERANDS = {
    "dom": _domain_operand,
    "iova": _iova_operand,
    "length": _length_operand,
    "bdf": _bdf_operand,
    "mnt": _mount_operand,
    "target": _target_operand,
    "whole": _whole_operand,
}


def _configure_create(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--mode",
        choices=("legacy", "scalable"),
        default="legacy",
        help="the unit's translation table mode; legacy if not given.",
    )
    parser.add_argument(
        "--levels",
        type=int,
        choices=(3, 4, 5),
        default=4,
        help="the levels of page tables, for addresses of 39, 48 or 57 bits; 4 if not given.",
    )
    parser.add_argument(
        "--size",
        metavar="SIZE",
        default="2M",
        help="the size of the file in bytes; 2M if not given.",
    )


def _configure_map(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", nargs="?", help="a file of the same mount as DOM.")
    parser.add_argument(
        "--bar", metavar="BDF:N", help="map memory BAR N of a device instead of a file."
    )
    parser.add_argument(
        "--offset",
        metavar="N",
        default="0",
        help="begin at byte N of the file or BAR; 0 if not given.",
    )
    parser.add_argument("--length", metavar="N", help="map N bytes; to the end if not given.")
    parser.add_argument(
        "--perm",
        metavar="r|w|rw",
        default="rw",
        help="let devices read, write or both; rw if not given.",
    )


def _configure_reading(parser: argparse.ArgumentParser, name: str) -> None:
    if name != "translate":
        parser.add_argument("--json", action="store_true", help="print JSON.")
    if name in ("show", "export"):
        parser.add_argument(
            "--domain", metavar="N", help="print dom-N only; for a region that is not mounted."
        )
    if name == "show":
        parser.add_argument(
            "--merge",
            action="store_true",
            help="print a line for each run of consecutive memory, not for each leaf.",
        )
    if name == "translate":
        parser.add_argument("--pasid", metavar="N", help="translate a request with this PASID.")
        parser.add_argument(
            "--access",
            metavar="r|w|rw",
            help="the access that the request wants; any that is allowed, if not given.",
        )
    parser.add_argument(
        "--phys-base",
        metavar="ADDR",
        help="use ADDR as the physical address of the region's first byte; for a region that has "
        "no physical addresses and is not mounted.",
    )


def _configure_units(
    activate: argparse.ArgumentParser, deactivate: argparse.ArgumentParser
) -> None:
    for parser, default in (
        (activate, "those above attached devices"),
        (deactivate, "all that walk the tables"),
    ):
        parser.add_argument(
            "--unit",
            metavar="dmarN|all",
            action="append",
            default=[],
            help=f"the unit; may be repeated; {default}, if not given.",
        )
    activate.add_argument(
        "--cut-off",
        action="store_true",
        help="go on although this blocks the DMA of devices at work that are not attached.",
    )
    deactivate.add_argument(
        "--force",
        action="store_true",
        help="go on although attached devices are bus masters: their DMA may then go anywhere.",
    )


def run(args: argparse.Namespace) -> int:
    """Run the subcommand; return its exit status."""
    put_in_order(args)
    return _RUN[args.subcommand](args)


def put_in_order(args: argparse.Namespace) -> None:
    """Accept a device and a file or mount in either order: which is which shows in the words."""
    from pkernfs.vtd.entries import is_bdf

    for other in ("dom", "mnt"):
        first, second = getattr(args, "bdf", None), getattr(args, other, None)
        if first and second and is_bdf(second) and not is_bdf(first):
            args.bdf = second
            setattr(args, other, first)


# ---------------------------------------------------------------------- changes


def _create(args: argparse.Namespace) -> int:
    from pkernfs.control import client, table_protocol

    size = parse_size(args.size)
    client.call(args.mnt, table_protocol.CreateTables(args.mode, args.levels, size))
    return 0


def _map(args: argparse.Namespace) -> int:
    from pkernfs.control import client, table_protocol
    from pkernfs.host.bars import parse_bar
    from pkernfs.vtd.entries import parse_perm

    mount, number = _domain(args.dom)
    iova = parse_iova(args.iova)
    offset = parse_size(args.offset, "offset")
    length = None if args.length is None else parse_size(args.length, "length")
    access = parse_perm(args.perm)
    if (args.file is None) == (args.bar is None):
        raise UsageError("map: either a file or --bar is wanted")
    if args.bar is not None:
        device, bar = parse_bar(args.bar)
        client.call(
            args.dom, table_protocol.MapBar(number, iova, device, bar, offset, length, access)
        )
        return 0
    # While it is open here, its inode number cannot become another file's.
    with _alive(args.file), beneath(args.file) as place, _open_file(place) as fd:
        found = os.fstat(fd.fileno)
        if found.st_dev != mount.device:
            raise InvalidError(f"{args.file}: on another mount than {args.dom}")
        ino = Ino(found.st_ino)
        client.call(args.dom, table_protocol.MapFile(number, iova, ino, offset, length, access))
    return 0


class _open_file:
    """An O_PATH descriptor: it needs search permission only, and reads nothing."""

    def __init__(self, path: str) -> None:
        self.fileno = os.open(path, os.O_PATH | os.O_CLOEXEC)

    def __enter__(self) -> _open_file:
        return self

    def __exit__(self, *exc: object) -> None:
        os.close(self.fileno)


def _unmap(args: argparse.Namespace) -> int:
    from pkernfs.control import client, table_protocol

    _mount, number = _domain(args.dom)
    length = parse_size(args.length, "length")
    client.call(args.dom, table_protocol.Unmap(number, parse_iova(args.iova), length))
    return 0


def _attach(args: argparse.Namespace) -> int:
    from pkernfs.control import client, table_protocol
    from pkernfs.host.pci import parse_device

    _mount, number = _domain(args.dom)
    client.call(args.dom, table_protocol.Attach(number, parse_device(args.bdf)))
    return 0


def _snapshot(args: argparse.Namespace) -> int:
    from pkernfs.control import client, table_protocol
    from pkernfs.host.pci import parse_device

    _mount, number = _domain(args.dom)
    client.call(args.dom, table_protocol.Snapshot(number, parse_device(args.bdf)))
    return 0


def _detach(args: argparse.Namespace) -> int:
    from pkernfs.control import client, table_protocol
    from pkernfs.host.pci import parse_device

    device = parse_device(args.bdf)
    client.call(_mount_with(args, device), table_protocol.Detach(device))
    return 0


def _persist(args: argparse.Namespace) -> int:
    from pkernfs.control import client, table_protocol
    from pkernfs.host.pci import parse_device

    device = parse_device(args.bdf)
    client.call(_mount_with(args, device), table_protocol.Persist(device, args.switch == "on"))
    return 0


def _mount_with(args: argparse.Namespace, device: SourceId) -> str:
    """Return the mount that is named, the only one, or the one with the device attached."""
    if args.mnt is not None:
        return str(args.mnt)
    mounts = _all_mounts()
    if not mounts:
        raise NotFoundError(f"{args.bdf}: no pkernfs is mounted")
    if len(mounts) == 1:
        return mounts[0]
    attached = [m for m in mounts if _is_attached(m, device)]
    if not attached:
        raise NotFoundError(f"{args.bdf}: attached in none of {', '.join(mounts)}")
    if len(attached) > 1:
        raise UsageError(f"{args.bdf}: attached in {' and '.join(attached)}: say which one")
    return attached[0]


def _all_mounts() -> list[str]:
    from pkernfs.control.mounts import read_mounts

    return [m.mount_point for m in read_mounts() if m.fstype == FSTYPE]


def _is_attached(mount_point: str, device: SourceId) -> bool:
    """:raises VersionError: its daemon does not understand the question."""
    from pkernfs.control import client, table_protocol
    from pkernfs.control.wire import VersionError

    try:
        return device in client.call(mount_point, table_protocol.ListDevices()).source_ids
    except VersionError:
        raise
    except PkernfsError:
        return False  # its daemon is dead, or serves another user


def _domain(path: str) -> tuple[Mount, int]:
    """Return the mount, and N, of the file ``MNT/iommu/dom-N``.

    :raises InvalidError, NotFoundError: ``path`` is no such file.
    """
    directory, name = os.path.split(os.path.abspath(path))
    number = _domain_number(name)
    mount = _mount_of(directory)
    if mount is None or os.path.realpath(directory) != os.path.join(mount.mount_point, "iommu"):
        raise InvalidError(f"{path}: not a domain: expected MNT/iommu/dom-N on a pkernfs mount")
    if number is None:
        raise InvalidError(f"{path}: not a domain: expected dom-0 to dom-{_MAX_DOMAIN}")
    return mount, number


def _mount_of(path: str) -> Mount | None:
    """Return the mount that has ``path``, if it is a pkernfs."""
    with _alive(path), contextlib.suppress(FileNotFoundError, NotADirectoryError):
        return mount_of(path)
    return None


@contextlib.contextmanager
def _alive(path: str) -> Iterator[None]:
    """Translate the errors of a dead mount.

    :raises NoDaemonError: the daemon of the mount of ``path`` has died.
    """
    try:
        yield
    except OSError as e:
        if e.errno not in DEAD:
            raise
        from pkernfs.control.client import NoDaemonError

        raise NoDaemonError(f"{path}: its daemon has died: mount the region again") from None


def _domain_number(name: str) -> int | None:
    digits = name.removeprefix("dom-")
    if digits == name or not (digits.isascii() and digits.isdigit()):
        return None
    if len(digits) > len(str(_MAX_DOMAIN)) or str(int(digits)) != digits:
        return None
    return int(digits) if int(digits) <= _MAX_DOMAIN else None


def parse_iova(text: str) -> Iova:
    """Parse an address: a byte count, or any 64-bit number in hexadecimal.

    :raises UsageError: ``text`` is something else.
    """
    if not _HEXADECIMAL.fullmatch(text):
        return Iova(parse_size(text, "iova"))
    value = int(text, 16)
    if value >> 64:
        raise UsageError(f"bad iova: got {text!r}, expected less than 2^64")
    return Iova(value)


# ---------------------------------------------------------------------- reading


def _read(args: argparse.Namespace) -> int:
    from pkernfs.dma.output import Record, Status, Text

    status = 0
    records = []
    for item in _answers(args, _request(args)):
        if isinstance(item, Text):
            sys.stdout.write(item.text)
        elif isinstance(item, Status):
            status = item.status
        elif isinstance(item, Record):
            records.append(item.record)
    if records:
        from pkernfs.iommu.export import assemble

        print(json.dumps(assemble(records), indent=2))
    return status


def _request(args: argparse.Namespace) -> Read:
    from pkernfs.control.table_protocol import Read
    from pkernfs.host.pci import parse_device
    from pkernfs.vtd.entries import parse_perm

    request = Read(
        args.subcommand,
        as_json=getattr(args, "json", False),
        merge=getattr(args, "merge", False),
    )
    if getattr(args, "domain", None) is not None:
        domain = _domain_number(f"dom-{args.domain}")
        if domain is None:
            raise InvalidError(f"domain {args.domain}: expected 0 to {_MAX_DOMAIN}")
        request = replace(request, domain=domain)
    if args.subcommand != "translate":
        return request
    return replace(
        request,
        device=parse_device(args.bdf),
        iova=parse_iova(args.iova),
        pasid=None if args.pasid is None else parse_size(args.pasid, "PASID"),
        access=0 if args.access is None else parse_perm(args.access),
    )


def _answers(args: argparse.Namespace, request: Read) -> Output:
    from pkernfs.control.client import stream

    target = args.target
    here = mount_at(target)
    if here is not None and here.fstype == FSTYPE:
        return stream(target, request)
    if _mount_of(target) is not None:
        if args.subcommand not in ("show", "export"):
            raise InvalidError(f"{target}: not a mount point")
        _mount, domain = _domain(target)
        return stream(target, replace(request, domain=domain))
    return _without_daemon(target, args.phys_base, request.question())


def _without_daemon(spec: str, phys_base: str | None, question: Question) -> Output:
    """Read a region that is not mounted; store nothing to it."""
    from pkernfs.dma.mount import mount_filesystem
    from pkernfs.dma.reports import answer
    from pkernfs.region.region import Region

    base = None if phys_base is None else PhysAddr(parse_size(phys_base, "phys-base"))
    with Region.open(region_of(spec), write=False, phys_base=base) as region:
        yield from answer(mount_filesystem(region, read_only=True), question)


# ---------------------------------------------------------------------- units


def _activate(args: argparse.Namespace) -> int:
    from pkernfs.control import client, table_protocol

    units = client.call(args.mnt, table_protocol.Activate(tuple(args.unit), args.cut_off))
    print("\n".join(f"{name}: in force" for name in units.names))
    return 0


def _deactivate(args: argparse.Namespace) -> int:
    from pkernfs.control import client, table_protocol

    units = client.call(args.mnt, table_protocol.Deactivate(tuple(args.unit), args.force))
    print("\n".join(f"{name}: off" for name in units.names))
    return 0


def _units(args: argparse.Namespace) -> int:
    from pkernfs.host.dmar import read_dmar
    from pkernfs.host.sysroot import HOST
    from pkernfs.units.discovery import find_units, unit_lines, unit_record

    roots = {root: mount for mount in _all_mounts() if (root := _root_of(mount)) is not None}
    found = find_units(HOST, read_dmar(HOST), write=args.clear)
    records = [unit_record(HOST, f, roots) for f in found]
    if args.json:
        print(json.dumps({"units": records}, indent=2))
    else:
        for record in records:
            print("\n".join(unit_lines(record)))
    for one in found if args.clear else ():
        if one.unit is not None and not one.driven:
            one.unit.clear_faults()
    return 0


def _root_of(mount_point: str) -> PhysAddr | None:
    """Return the physical address of a mount's root table, if its daemon gives it."""
    from pkernfs.control import client, table_protocol
    from pkernfs.control.wire import VersionError

    try:
        return client.call(mount_point, table_protocol.FindRoot()).address
    except VersionError as e:
        print(f"pkernfs: {e}", file=sys.stderr)
        return None
    except PkernfsError:
        return None


_RUN = {
    "activate": _activate,
    "deactivate": _deactivate,
    "units": _units,
    "create": _create,
    "map": _map,
    "unmap": _unmap,
    "attach": _attach,
    "detach": _detach,
    "snapshot": _snapshot,
    "persist": _persist,
    **dict.fromkeys(("translate", "show", "check", "export"), _read),
}
