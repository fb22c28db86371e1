"""Ranges of physical memory: which of them a region may be.

Everything here reads texts of the kernel; nothing is opened, mapped or stored.
"""

from __future__ import annotations

from pkernfs.errors import RegionError
from pkernfs.host import boot, cmdline, memmap, reserved
from pkernfs.host.cmdline import format_number
from pkernfs.host.iomem import Resource, Span, overlap, read_firmware_map, read_iomem
from pkernfs.host.memmap import Kind, Piece, Reservation
from pkernfs.host.sysroot import Host
from pkernfs.quantities import PhysAddr

_FREE = (Kind.REMOVED, Kind.RESERVED)
_MEMORY = ("System RAM", "Soft Reserved")
_USE_DAX = "use /dev/daxX.Y (modprobe dax_hmem; modprobe device_dax)"
_KERNEL = "Kernel "  # its code, its data, its bss: children of System RAM


def memmap_parameter(span: Span) -> str:
    """Return the kernel parameter that reserves a range.

    ``%`` needs no escaping in boot loaders. But the kernel that places itself at random (KASLR)
    takes ``SIZE%START`` for the end of memory at SIZE, so it may put itself into a region that is
    larger than its own start; ``$`` it keeps away from.
    """
    sign = "%" if span.size <= span.start else "$"
    return f"memmap={format_number(span.size)}{sign}{format_number(span.start)}"


def check(spec: str, span: Span, host: Host) -> None:
    """Refuse a range that is not a region's to have, without touching it.

    The firmware must have reported memory there, memmap= must keep all of it from the kernel, and
    nothing in /proc/iomem may have claimed any of it.

    :raises RegionError: with the parameter to add to the kernel command line, where that helps.
    """
    command_line = host.command_line()
    resources = read_iomem(spec, host)
    given = memmap.reservations(command_line)
    firmware = None
    if not cmdline.values(command_line, "elfcorehdr") and not any(
        r.kind is Kind.RAM for r in given
    ):  # the kernel of a crash, and those after it, are told of little memory
        _check_memory(spec, span, sorted(read_firmware_map(host)))
        firmware = reserved.firmware_map(host)
    pieces = memmap.coverage(command_line, span.start, span.end, firmware=firmware)
    _check_reserved(spec, span, pieces, command_line, resources)
    _check_kernel(spec, span, resources, host)
    for resource in resources:
        if overlap(span, resource):
            _check_resource(spec, span, resource)


def _check_memory(spec: str, span: Span, firmware: list[Resource]) -> None:
    """Refuse a range in which the firmware has not reported memory; it may report nothing."""
    if not firmware:
        return
    at = span.start
    for start, end, kind in firmware:
        if start <= at < end and kind in _MEMORY:
            at = end
    if at >= span.end:
        return
    there = next((r.name for r in firmware if r.start <= at < r.end), "nothing")
    ram = ", ".join(f"{r.start:#x}-{r.end - 1:#x}" for r in firmware if r.name in _MEMORY)
    raise RegionError(
        f"{spec}: no memory at {at:#x}: the firmware reports {there} there, and memory at {ram}"
    )


def _check_reserved(
    spec: str, span: Span, pieces: list[Piece], command_line: str, resources: list[Resource]
) -> None:
    """Refuse a range that memmap= does not keep from the kernel, all of it."""
    wrong = next((p for p in pieces if p.reservation is None or p.kind not in _FREE), None)
    if wrong is None:
        return
    remedy = f"boot with {memmap_parameter(span)} on the kernel command line"
    if wrong.reservation is None and wrong.kind is Kind.SOFT:
        raise RegionError(f"{spec}: the firmware keeps {wrong.start:#x} for device-dax: {_USE_DAX}")
    if wrong.reservation is not None:
        raise _reserved_otherwise(spec, wrong.start, wrong.reservation, remedy)
    raise _not_reserved(spec, span, wrong.start, pieces, resources, remedy, command_line)


def _reserved_otherwise(
    spec: str, at: PhysAddr, reservation: Reservation, remedy: str
) -> RegionError:
    parameter, kind = reservation.parameter, reservation.kind
    if kind is Kind.SOFT:
        return RegionError(f"{spec}: {parameter} keeps {at:#x} for device-dax: {_USE_DAX}")
    return RegionError(f"{spec}: {parameter} makes {kind.value} of {at:#x}: {remedy} instead")


def _not_reserved(
    spec: str,
    span: Span,
    at: PhysAddr,
    pieces: list[Piece],
    resources: list[Resource],
    remedy: str,
    command_line: str,
) -> RegionError:
    good = next((p.reservation for p in pieces if p.reservation is not None), None)
    if good is not None:
        ends = f"ends at {good.end:#x}" if good.start <= at else f"begins at {good.start:#x}"
        return RegionError(
            f"{spec}: not all of {span.start:#x}-{span.end - 1:#x} is reserved: "
            f"{good.parameter} {ends}: {remedy} instead"
        )
    owners = (r.name for r in reversed(resources) if r.start <= at < r.end)
    owner = next((name for name in owners if not name.startswith(_KERNEL)), None)
    what = f"it is {owner}" if owner else "no memmap= covers it"
    spoilt = memmap.lost_words(command_line)
    spoilt += [w.text for w in memmap.e820_words(command_line) if w.trouble is not None]
    if spoilt:
        remedy += f" instead of {' '.join(spoilt)}"
    return RegionError(f"{spec}: not reserved: {what} at {at:#x}: {remedy}")


def _check_kernel(spec: str, span: Span, resources: list[Resource], host: Host) -> None:
    """Refuse a range that memmap= covers and that the running kernel was put into."""
    for resource in resources:
        if resource.name.startswith(_KERNEL) and overlap(span, resource):
            raise RegionError(
                f"{spec}: the running kernel was put into it, at {resource.start:#x}: what it held "
                f"there is lost: {_remedy_for_kernel(host)}"
            )


def _remedy_for_kernel(host: Host) -> str:
    """Return how to keep the kernel out of a region, by what has put it there."""
    by_kexec = "load kernels with kexec -s, and choose a START below other memory"
    by_random = "boot with nokaslr"
    if "nokaslr" in cmdline.words(host.command_line()):
        by_random = "choose another START"
    elif boot.by_efi(host) and boot.efi_stub_ignores_memmap(host) is False:
        by_random += (
            ", or choose another START, if the EFI stub has put it there: with memmap= it takes "
            "the lowest memory that is large enough"
        )
    elif boot.by_efi(host):
        by_random += " (the EFI stub of some kernels ignores memmap=: fixed in 6.10)"
    started = boot.loader(host)
    if started is boot.Loader.KEXEC:
        return by_kexec
    return by_random if started is boot.Loader.FIRMWARE else f"{by_random}, or {by_kexec}"


def _check_resource(spec: str, span: Span, resource: Resource) -> None:
    """Refuse a range in a part of which /proc/iomem has something."""
    name = resource.name
    if name in ("Reserved", "RAM buffer"):
        return  # what memmap=SIZE$START becomes; and a gap that the kernel keeps free
    where = f"{max(resource.start, span.start):#x}-{min(resource.end, span.end) - 1:#x}"
    if name.startswith("System RAM"):
        raise RegionError(
            f"{spec}: {where} is System RAM, although memmap= covers it: "
            f"boot with {memmap_parameter(span)} as the last memmap="
        )
    raise RegionError(f"{spec}: {where} is claimed by {name!r} (/proc/iomem): choose another START")
