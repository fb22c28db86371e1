"""The kernel that is loaded for kexec: it must leave a region alone, as the running one does.

A kernel that is not told about a region takes its memory for ordinary RAM and stores into it. It is
told by its command line, which the running kernel keeps in memory only: it is read there
(:class:`LoadedKernel`), as arch/x86/kernel/kexec-bzimage64.c and kexec-tools have put it. Nothing
is changed.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from pkernfs.errors import PkernfsError, RegionError
from pkernfs.host import cmdline, memmap
from pkernfs.host.iomem import Span, overlap
from pkernfs.host.kcore import Kcore, KcoreError
from pkernfs.host.memmap import Kaslr, Kind
from pkernfs.host.sysroot import HOST, Host
from pkernfs.quantities import PhysAddr
from pkernfs.region import dax
from pkernfs.region.spec import looks_physical, parse_span

_PAGE = 4096
# kimage_entry_t, include/linux/kexec.h: a page's address, and in its low bits what it is.
_DESTINATION, _INDIRECTION, _DONE, _SOURCE = 1, 2, 4, 8
_MAX_PAGES = 1 << 22
# struct boot_params, Documentation/arch/x86/boot.rst.
_SIGNATURE, _SIGNATURE_AT = b"HdrS", 0x202
_COMMAND_LINE_AT, _COMMAND_LINE_HIGH_AT = 0x228, 0xC8
_MAX_COMMAND_LINE = 64 << 10


class KexecError(PkernfsError):
    """The next kernel would take the region, or it cannot be seen that it would not."""


def physical_spans(spec: str, host: Host = HOST) -> list[Span]:
    """Return the physical memory that a region spec names; none for a file."""
    if looks_physical(spec):
        return [parse_span(spec)]
    name = dax.device_name(os.path.realpath(spec), host)
    return [] if name is None else list(dax.read_device(name, host).pieces)


def check(spec: str, given: str | None = None, host: Host = HOST) -> None:
    """Refuse a kexec after which the region would be lost.

    The parameters of the running kernel that keep the region apart (memmap=, and what keeps kmem
    from dax devices) and name it (pkernfs=) must be on the next kernel's command line too:
    ``given``, or that of the kernel loaded for kexec.

    Nor may the loaded one be put into the region: ``kexec -c`` chooses places from the firmware's
    memory map, which knows nothing of memmap=.

    :raises KexecError: it is not, no kernel is loaded, or its command line cannot be read.
    """
    spans = physical_spans(spec, host)
    needed = list(_needed(spans, not looks_physical(spec), host))
    if not needed:
        return
    if given is None:
        given = command_line_of_loaded(spec, host, spans)
    missing = [parameter for parameter, is_there in needed if not is_there(given)]
    if missing:
        raise KexecError(
            f"{spec}: the kernel loaded for kexec is not told {' '.join(missing)}: it would take "
            f"the region for ordinary memory: load it again with that on its command line"
        )
    for _, is_there in needed:
        if isinstance(is_there, _Reserves):
            _check_kaslr(spec, given, is_there)


class _Reserves(NamedTuple):
    """Asks of a command line whether it keeps a range apart as another one does."""

    start: PhysAddr
    end: PhysAddr
    kind: Kind

    def __call__(self, command_line: str) -> bool:
        pieces = memmap.coverage(command_line, self.start, self.end)
        return all(p.reservation is not None and p.reservation.kind is self.kind for p in pieces)


def _check_kaslr(spec: str, given: str, reserved: _Reserves) -> None:
    """Refuse a command line by which KASLR may put the next kernel into a range."""
    verdict = memmap.kaslr(given, reserved.start, reserved.end)
    if verdict.kaslr is Kaslr.NOT_AVOIDED:
        raise KexecError(
            f"{spec}: the next kernel may put itself into it, at {verdict.at:#x} (KASLR: "
            f"{verdict.why}): load it again with nokaslr"
        )


class _Names(NamedTuple):
    """Asks of a command line whether it names a region as another one does."""

    named: cmdline.Named
    host: Host

    def __call__(self, command_line: str) -> bool:
        try:
            found = cmdline.named_regions(command_line)
        except RegionError:
            return False
        spans = _spans_of(self.named.spec, self.host)
        return any(
            one.name == self.named.name and _spans_of(one.spec, self.host) == spans for one in found
        )


class _SparesDax(NamedTuple):
    """Asks of a command line whether it keeps dax devices from becoming ordinary memory."""

    def __call__(self, command_line: str) -> bool:
        return bool(cmdline.spares_dax(command_line))


_Needed = _Reserves | _Names | _SparesDax


def _needed(spans: list[Span], is_dax: bool, host: Host) -> Iterator[tuple[str, _Needed]]:
    """Yield the running kernel's parameters that a region needs, and how to look for each."""
    running = host.command_line()
    for span in spans:
        for start, end, reservation in memmap.coverage(running, span.start, span.end):
            if reservation is not None and reservation.kind is not Kind.RAM:
                yield reservation.parameter, _Reserves(start, end, reservation.kind)
    spares = cmdline.spares_dax(running)
    if spans and is_dax and spares:
        yield spares[0], _SparesDax()
    for one in cmdline.named_regions(running):
        named = _spans_of(one.spec, host)
        if any(overlap(a, b) for a in named for b in spans):
            name = "" if one.name is None else f"{one.name}:"
            yield f"pkernfs={name}{one.spec}", _Names(one, host)


def _spans_of(spec: str, host: Host) -> list[Span]:
    """Return the physical memory of a spec on a command line; none if it has none here."""
    try:
        return physical_spans(spec, host)
    except RegionError:
        return []


def command_line_of_loaded(spec: str, host: Host = HOST, spans: Sequence[Span] = ()) -> str:
    """Read the command line of the kernel that is loaded for kexec; ``spec`` is for messages.

    :raises KexecError: there is none, it cannot be read, or kexec would put it into ``spans``.
    """
    if host.find("sys/kernel/kexec_loaded") != "1":
        raise KexecError(
            f"{spec}: no kernel is loaded for kexec: load one first (kexec -l KERNEL "
            "--initrd=INITRD --reuse-cmdline), or say with --cmdline what the next kernel is told"
        )
    try:
        with LoadedKernel(host) as kernel:
            inside = kernel.put_into(spans)
            text = kernel.command_line()
    except (KcoreError, OSError) as e:
        raise KexecError(
            f"{spec}: cannot read the command line of the kernel loaded for kexec ({e}): say it "
            "with --cmdline"
        ) from None
    if inside is not None:
        raise KexecError(
            f"{spec}: kexec would put the next kernel into the region, at {inside:#x}: load it "
            "with kexec -s"
        )
    return text


class LoadedKernel:
    """The image that kexec(8) has loaded, in the running kernel's memory.

    :raises OSError, KcoreError: /proc/kcore cannot be opened, or makes no sense.
    """

    def __init__(self, host: Host = HOST) -> None:
        self._core = Kcore(host)

    def __enter__(self) -> LoadedKernel:
        return self

    def __exit__(self, *exc: object) -> None:
        self._core.close()

    def command_line(self) -> str:
        """Read the command line that the loaded kernel gets.

        :raises KcoreError: it is not where Linux on x86-64 has it.
        """
        pages, firsts = self._pages()
        for first in firsts:
            head = self._core.read_physical(pages[first], 0x300)
            if head[_SIGNATURE_AT : _SIGNATURE_AT + 4] != _SIGNATURE:
                continue
            low, high = (
                int.from_bytes(head[at : at + 4], "little")
                for at in (_COMMAND_LINE_AT, _COMMAND_LINE_HIGH_AT)
            )
            text = self._text(pages, PhysAddr(high << 32 | low))
            if text is not None:
                return text
        raise KcoreError("it has no boot parameters")

    def put_into(self, spans: Sequence[Span]) -> PhysAddr | None:
        """Return the first address in ``spans`` that starting the image stores to, or None.

        :raises KcoreError: it is not where Linux on x86-64 has it.
        """
        pages, _ = self._pages() if spans else ({}, [])
        return min((at for at in pages if any(s.start <= at < s.end for s in spans)), default=None)

    # ------------------------------------------------------------------ the image's pages

    def _pages(self) -> tuple[dict[PhysAddr, PhysAddr], list[PhysAddr]]:
        """Return where each page is now, by its address to be; and the first of each segment."""
        pages: dict[PhysAddr, PhysAddr] = {}
        firsts = []
        destination = PhysAddr(0)
        entries = self._entries()
        for entry in entries:
            address = PhysAddr(entry & ~(_PAGE - 1))
            if entry & _DESTINATION:
                destination = address
                firsts.append(address)
            elif entry & _SOURCE:
                pages[destination] = address
                destination = PhysAddr(destination + _PAGE)
        return pages, [first for first in firsts if first in pages]

    def _entries(self) -> Iterator[int]:
        """Yield the list of struct kimage: its first field, and pages of more of them."""
        image = self._core.word(self._core.symbol("kexec_image"))
        if not image:
            raise KcoreError("there is none")
        entry = self._core.word(image)
        for _ in range(_MAX_PAGES // 512):
            if entry & _DONE or not entry:
                return
            if not entry & _INDIRECTION:
                yield entry
                return
            page = self._core.read_physical(PhysAddr(entry & ~(_PAGE - 1)), _PAGE)
            words = struct.unpack("<512Q", page)
            entry = 0
            for word in words:
                if word & (_INDIRECTION | _DONE) or not word:
                    entry = word
                    break
                yield word
        raise KcoreError("its list of pages has no end")

    def _text(self, pages: dict[PhysAddr, PhysAddr], address: PhysAddr) -> str | None:
        """Return the text at an address to be, up to its zero byte."""
        found = bytearray()
        while len(found) < _MAX_COMMAND_LINE:
            page, skip = PhysAddr(address & ~(_PAGE - 1)), address % _PAGE
            if page not in pages:
                return None
            found += self._core.read_physical(PhysAddr(pages[page] + skip), _PAGE - skip)
            end = found.find(0)
            if end >= 0:
                text = found[:end].decode("utf-8", "replace")
                return text if text.isprintable() else None
            address = PhysAddr(page + _PAGE)
        return None
