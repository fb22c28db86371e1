"""The kernel that is loaded for kexec: it must leave a region alone, as the running one does.

A kernel that is not told about a region takes its memory for ordinary RAM and stores into it. It is
told by its command line, which the running kernel keeps in memory only: it is read there
(:class:`LoadedKernel`), as arch/x86/kernel/kexec-bzimage64.c and kexec-tools have put it. Nothing
is changed.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from pkernfs.errors import RegionError
from pkernfs.host import boot, cmdline, kmem, memmap, reserved
from pkernfs.host.iomem import Span, overlap
from pkernfs.host.kcore import Kcore, KcoreError
from pkernfs.host.memmap import Entry, Kaslr, Kind
from pkernfs.host.reserved import Kept
from pkernfs.host.sysroot import HOST, Host
from pkernfs.kexec.spans import (
    KexecError,
    kept_spans,
    physical_spans,
    refuse_if_it_ends,
    spans_of,
)
from pkernfs.quantities import PhysAddr

_PAGE = 4096
# kimage_entry_t, include/linux/kexec.h: a page's address, and in its low bits what it is.
_DESTINATION, _INDIRECTION, _DONE, _SOURCE = 1, 2, 4, 8
_MAX_PAGES = 1 << 22
# struct boot_params, Documentation/arch/x86/boot.rst.
_SIGNATURE, _SIGNATURE_AT = b"HdrS", 0x202
_COMMAND_LINE_AT, _COMMAND_LINE_HIGH_AT = 0x228, 0xC8
# e820_entries, e820_table: zero-page.rst.
_MAP_ENTRIES_AT, _MAP_AT, _MAX_MAP_ENTRIES = 0x1E8, 0x2D0, 128
_MAX_COMMAND_LINE = 64 << 10


def check(
    spec: str, given: str | None = None, host: Host = HOST, *, needs_initrd: bool = True
) -> None:
    """Refuse a kexec after which the region would be lost.

    What keeps the region from the running kernel (:mod:`pkernfs.host.reserved`), what keeps kmem
    from dax devices, and what names it (pkernfs=) must be there for the next kernel too: on the
    command line ``given``, or on that of the kernel loaded for kexec, and in its memory map.

    Nor may the loaded one be put into the region: ``kexec -c`` chooses places from the firmware's
    memory map, which knows nothing of memmap=.

    :param needs_initrd: the loaded kernel must have an initrd if this one had one.
    :raises KexecError: it is not, no kernel is loaded, or its command line cannot be read.
    """
    refuse_if_it_ends(spec, host)
    spans = kept_spans(spec, host)
    needed = _needed(spans, physical_spans(spec, host), host)
    if not needed.any():
        return
    if given is None:
        told = loaded_kernel(spec, host, spans)
    else:
        told = Told(given, has_initrd=None, firmware=None)
    firmware = told.firmware or reserved.firmware_map(host)
    _check_boot(spec, told.command_line)
    lost = reserved.lost_by(told.command_line, needed.kept, firmware, memmap.KNOWN)
    missing = [one.word for one in lost]
    missing += [word for word, is_there in needed.asked if not is_there(told.command_line)]
    if "" in missing:
        one = next(one for one in lost if not one.word)
        raise KexecError(
            f"{spec}: the firmware keeps {one.start:#x}-{one.end - 1:#x} apart, and the kernel "
            f"loaded for kexec would not: {_why_not_firmware(told)}"
        )
    told_of = {word.text for word in memmap.e820_words(told.command_line)}
    undone = next((one.word for one in lost if one.word in told_of), None)
    if undone is not None:
        raise KexecError(
            f"{spec}: the kernel loaded for kexec is told {undone}, but another word undoes that, "
            "or the memory map that kexec gives it: it would take the region for ordinary memory: "
            "load it again with kexec -s, and without such a word"
        )
    if missing:
        what = "it would take the region for ordinary memory"
        if all(word.startswith("pkernfs=") for word in missing):
            what = "`none` would not be this region there"
        raise KexecError(
            f"{spec}: the kernel loaded for kexec is not told {' '.join(dict.fromkeys(missing))}: "
            f"{what}: load it again with that on its command line{_why_another_word(lost)}"
        )
    for one in needed.kept:
        if one.by is not reserved.By.FIRMWARE:
            _check_kaslr(spec, told.command_line, one)
    if needs_initrd and told.has_initrd is False:
        _check_initrd(spec, host)


def _check_boot(spec: str, given: str) -> None:
    """Refuse a command line at which a kernel stops; which release is loaded is not known."""
    for rules in memmap.KNOWN:
        why = memmap.stops_boot(given, rules)
        if why is not None:
            raise KexecError(f"{spec}: the kernel loaded for kexec would stop at boot: {why}")


def _check_initrd(spec: str, host: Host) -> None:
    """Refuse a loaded kernel without an initrd, unless this one was started without one too."""
    had_one = boot.had_initrd(host)
    if had_one is False:
        return
    start = "this one was" if had_one else "it cannot be seen whether this one was"
    raise KexecError(
        f"{spec}: the kernel loaded for kexec has no initrd, and {start} started with one: load it "
        "again with --initrd=INITRD, or hand over with --force"
    )


def _why_not_firmware(told: Told) -> str:
    if told.firmware is None:
        return "its command line changes that"
    return "its command line, or the map that kexec gives it, changes that: load it with kexec -s"


def _why_another_word(lost: list[Kept]) -> str:
    """Say why words of the running kernel's own command line would not do."""
    if any(one.by is reserved.By.FAKE_MEM for one in lost):
        return " (no kernel that kexec starts follows efi_fake_mem=)"
    if any(one.by is reserved.By.UNKNOWN for one in lost):
        return " (it cannot be seen what keeps it from this one)"
    return ""


def _check_kaslr(spec: str, given: str, kept: Kept) -> None:
    """Refuse a command line by which KASLR may put the next kernel into a range."""
    verdict = memmap.kaslr(given, kept.start, kept.end)
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
        spans = spans_of(self.named.spec, self.host)
        return any(
            one.name == self.named.name and spans_of(one.spec, self.host) == spans for one in found
        )


class _SparesDax(NamedTuple):
    """Asks of a command line whether it keeps dax devices from becoming ordinary memory."""

    def __call__(self, command_line: str) -> bool:
        return bool(cmdline.spares_dax(command_line))


class _Needed(NamedTuple):
    """The ranges to leave alone, and other parameters with how to look for each."""

    kept: list[Kept]
    asked: list[tuple[str, _Names | _SparesDax]]

    def any(self) -> bool:
        """Tell whether anything is needed."""
        return bool(self.kept or self.asked)


def _needed(spans: list[Span], own: list[Span], host: Host) -> _Needed:
    """Return what a region needs of the next kernel, as this one has it.

    :param spans: all memory that is to be kept; ``own`` is that of the region itself.
    """
    kept = reserved.find_kept(spans, host)
    asked: list[tuple[str, _Names | _SparesDax]] = []
    if any(one.kind is Kind.SOFT for one in kept):
        barrier = kmem.barrier(host)
        if barrier is not None:
            # What is in modprobe.d here need not be in the next kernel's initrd.
            asked.append((barrier.text if barrier.is_word else kmem.WORD, _SparesDax()))
    for one in cmdline.named_regions(host.command_line()):
        named = spans_of(one.spec, host)
        if any(overlap(a, b) for a in named for b in own):
            name = "" if one.name is None else f"{one.name}:"
            asked.append((f"pkernfs={name}{one.spec}", _Names(one, host)))
    return _Needed(kept, asked)


class Told(NamedTuple):
    """What a loaded kernel is given.

    :ivar has_initrd: None: not known
    :ivar firmware: the memory map; None: not known
    """

    command_line: str
    has_initrd: bool | None
    firmware: list[Entry] | None


def loaded_kernel(spec: str, host: Host = HOST, spans: Sequence[Span] = ()) -> Told:
    """Read what the kernel that is loaded for kexec is given; ``spec`` is for messages.

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
            told = kernel.told()
    except (KcoreError, OSError) as e:
        root = "as root, or " if isinstance(e, PermissionError) and host.lockdown() is None else ""
        raise KexecError(
            f"{spec}: cannot read the command line of the kernel loaded for kexec ({e}): {root}say "
            "it with --cmdline"
        ) from None
    if inside is not None:
        raise KexecError(
            f"{spec}: kexec would put the next kernel into the region, at {inside:#x}: load it "
            "with kexec -s"
        )
    return told


def command_line_of_loaded(spec: str, host: Host = HOST, spans: Sequence[Span] = ()) -> str:
    """Read the command line of the kernel that is loaded for kexec.

    :raises KexecError: as :func:`loaded_kernel`.
    """
    return loaded_kernel(spec, host, spans).command_line


def _memory_map(head: bytes) -> list[Entry] | None:
    """Return the memory map in struct boot_params; None: it has none, or more than fit there."""
    number = head[_MAP_ENTRIES_AT]
    if not 0 < number < _MAX_MAP_ENTRIES:
        return None
    found = struct.iter_unpack("<QQI", head[_MAP_AT : _MAP_AT + 20 * number])
    return [Entry(start, start + size, kind) for start, size, kind in found]


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

    def told(self) -> Told:
        """Read the command line, the memory map and the initrd that the loaded kernel gets.

        :raises KcoreError: it is not where Linux on x86-64 has it.
        """
        pages, firsts = self._pages()
        for first in firsts:
            head = self._core.read_physical(pages[first], _PAGE)
            if head[_SIGNATURE_AT : _SIGNATURE_AT + 4] != _SIGNATURE:
                continue
            low, high = (
                int.from_bytes(head[at : at + 4], "little")
                for at in (_COMMAND_LINE_AT, _COMMAND_LINE_HIGH_AT)
            )
            text = self._text(pages, PhysAddr(high << 32 | low))
            if text is not None:
                return Told(text, boot.boot_params_have_initrd(head), _memory_map(head))
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
