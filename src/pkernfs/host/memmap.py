"""memmap= and the words like it, as Linux on x86-64 reads them: what becomes of memory.

Two programs read the command line of a kernel, one after the other, and not by the same rules:

- The **decompressor** (arch/x86/boot/compressed/kaslr.c) chooses the place of the kernel's image
  before the kernel exists (KASLR). It knows the firmware's memory map, and keeps clear of a few
  ranges of memmap=: :func:`handle_mem_options`, and :func:`kaslr` for one region.
- The **kernel** (arch/x86/kernel/e820.c) changes the firmware's map by every word:
  :func:`parse_memmap_one` for one word, :func:`coverage` for a region.

Functions have the kernel's names where they do what the kernel's function does. Known are the
kernels 6.1, 6.12 and 7.3 (:data:`KNOWN`). tests/host/test_memmap_oracle.py compares this module
with the code of these kernels. A command line given in the kernel's configuration (CONFIG_CMDLINE)
is not known here.
"""

from __future__ import annotations

import enum
import itertools
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from pkernfs.host.cmdline import format_number
from pkernfs.quantities import PhysAddr

#: MAX_MEMMAP_REGIONS of kaslr.c: so many ranges are avoided at most.
MAX_MEMMAP_REGIONS = 4
#: MAXMEM with five levels of page tables: no image is put above that. With four levels it is
#: 64 TiB, but the decompressor's choice is not known here.
MAXMEM = 1 << 52

_COMMAND_LINE_SIZE = 2048
_ULLONG_MAX = (1 << 64) - 1
_GIB = 1 << 30
_EFI_MEMORY_SP = 0x40000
_SPACE = "\t\n\v\f\r \xa0"  # isspace() by lib/ctype.c, bytes as Latin-1
_HEX = "0123456789abcdefABCDEF"
_SHIFT = {"k": 10, "m": 20, "g": 30, "t": 40, "p": 50, "e": 60}

# enum e820_type, asm/e820/types.h.
RAM, RESERVED, ACPI, PMEM, PRAM = 1, 2, 3, 7, 12
SOFT_RESERVED = 0xEFFFFFFF
_OPERATORS = {"@": RAM, "#": ACPI, "$": RESERVED, "!": PRAM}


class Release(NamedTuple):
    """The numbers of a release."""

    major: int
    minor: int


class Rules(NamedTuple):
    """In what the kernels of one release differ from others.

    :ivar avoids_fake_mem: the decompressor takes efi_fake_mem= for memmap= (PARSE_EFI)
    :ivar saturates: a number too large is 2**64 - 1, and a suffix needs a digit before it;
        elsewhere the number loses its upper bits, and a lone suffix is the number 0
    :ivar whole_hugepages: hugepages= counts only if nothing is behind its number
    """

    release: Release
    avoids_fake_mem: bool
    saturates: bool
    whole_hugepages: bool


KNOWN = (
    Rules(Release(6, 1), avoids_fake_mem=True, saturates=False, whole_hugepages=False),
    Rules(Release(6, 12), avoids_fake_mem=False, saturates=False, whole_hugepages=False),
    Rules(Release(7, 3), avoids_fake_mem=False, saturates=True, whole_hugepages=True),
)
NEWEST = KNOWN[-1]


def rules_for(release: str | None) -> tuple[Rules, ...]:
    """Return the rules that a kernel may follow; several where it is not known which.

    :param release: as ``uname -r`` has it; None: not known.
    """
    match = re.match(r"(\d+)\.(\d+)", release or "")
    if match is None:
        return KNOWN
    version = Release(int(match[1]), int(match[2]))
    below = [r for r in KNOWN if r.release <= version][-1:]
    above = [r for r in KNOWN if r.release >= version][:1]
    return tuple(dict.fromkeys([*below, *above]))


# ---------------------------------------------------------------------------- words and numbers


class Argument(NamedTuple):
    """One parameter: its name, its value (None without ``=``), and the text behind it."""

    name: str
    value: str | None
    rest: str


def next_arg(text: str) -> Argument:
    """Split off the first parameter of a text that begins with no space (lib/cmdline.c).

    Quotes around a value, or around name and value, go; quotes elsewhere stay.
    """
    is_quoted = text.startswith('"')
    text = text[is_quoted:]
    inside, equals, end = is_quoted, 0, len(text)
    for at, char in enumerate(text):
        if char in _SPACE and not inside:
            end = at
            break
        if char == "=" and not equals:
            equals = at
        if char == '"':
            inside = not inside
    rest = text[end + 1 :].lstrip(_SPACE)
    if not equals:
        return Argument(_unquoted(text[:end], is_quoted), None, rest)
    value = text[equals + 1 : end]
    if value.startswith('"'):
        value, is_quoted = value[1:], True
    return Argument(text[:equals], _unquoted(value, is_quoted), rest)


def _unquoted(text: str, is_quoted: bool) -> str:
    return text[:-1] if is_quoted and text.endswith('"') else text


def arguments(command_line: str) -> Iterator[Argument]:
    """Yield the parameters up to ``--``, as parse_args() and handle_mem_options() take them.

    Characters are bytes (Latin-1), of which both read the first 2047.
    """
    text = _bytes(command_line)[: _COMMAND_LINE_SIZE - 1].lstrip(_SPACE)
    while text:
        one = next_arg(text)
        if one.value is None and one.name == "--":
            return
        yield one
        text = one.rest


def _bytes(command_line: str) -> str:
    data = command_line.encode("utf-8", "surrogateescape")
    return data.partition(b"\0")[0].decode("latin-1")


def _text(data: str) -> str:
    return data.encode("latin-1").decode("utf-8", "surrogateescape")


def cmdline_find_option_bool(command_line: str, option: str) -> bool:
    """Tell whether a word is there, as the decompressor looks for ``nokaslr``.

    It knows neither quotes nor ``--``; every byte up to the space parts words. A word that is the
    beginning of the option (``no``) hides the next one, if one space parts them.
    """
    words = re.split("([\x01- ])", _bytes(command_line))[::2]  # also empty ones, between spaces
    hidden = False
    for word in words:
        if word == option and not hidden:
            return True
        hidden = not hidden and word != "" and option.startswith(word)
    return False


class Number(NamedTuple):
    """A number at the beginning of a text, and how many characters it takes."""

    value: int
    length: int


def simple_strtoull(text: str, *, saturates: bool) -> Number:
    """Read the digits at the beginning of a text: 0x hexadecimal, 0 octal; none: 0."""
    base, at = 10, 0
    if text.startswith("0"):
        is_hex = text[1:2] in ("x", "X") and text[2:3] in tuple(_HEX)
        base, at = (16, 2) if is_hex else (8, 0)
    end = at
    while end < len(text) and text[end] in _HEX and int(text[end], 16) < base:
        end += 1
    value = int(text[at:end] or "0", base)
    return Number(min(value, _ULLONG_MAX) if saturates else value & _ULLONG_MAX, end)


def memparse(text: str, rules: Rules, *, decompressor: bool = False) -> Number:
    """Read a number with one suffix of K to E.

    :param decompressor: its own simple_strtoull() (boot/string.c) never saturates.
    """
    digits = simple_strtoull(text, saturates=rules.saturates and not decompressor)
    shift = _SHIFT.get(text[digits.length : digits.length + 1].lower())
    if shift is None or (rules.saturates and not digits.length):
        return digits
    value = digits.value << shift
    if value > _ULLONG_MAX:
        value = _ULLONG_MAX if rules.saturates else value & _ULLONG_MAX
    return Number(value, digits.length + 1)


def _kstrtoull(text: str) -> int | None:
    """Return the number that is all of a text (boot/string.c); None: there is none."""
    match = re.fullmatch(r"\+?(0[xX][0-9a-fA-F]+|0[0-7]*|[1-9][0-9]*)\n?", text, re.ASCII)
    if match is None:
        return None
    value = simple_strtoull(match[1], saturates=True).value
    too_large = value == _ULLONG_MAX and simple_strtoull(match[1], saturates=False).value != value
    return None if too_large else value


# ---------------------------------------------------------------------------- the decompressor


class Avoided(NamedTuple):
    """A range that the decompressor avoids, in bytes, and its word.

    ``start + size`` may be beyond 2**64; then it protects nothing for certain.
    """

    start: int
    size: int
    word: str


class MemOptions(NamedTuple):
    """What the decompressor keeps of the command line.

    :ivar avoided: mem_avoid[]: at most :data:`MAX_MEMMAP_REGIONS` ranges
    :ivar mem_limit: the image ends there at the latest; bytes
    :ivar limit_word: set that limit; None: the kernel's own limit
    :ivar memmap_too_large: KASLR leaves the image where the loader has put it
    :ivar max_gb_huge_pages: so many pages of 1 GiB it leaves out of its choice
    """

    avoided: tuple[Avoided, ...]
    mem_limit: int
    limit_word: str | None
    memmap_too_large: bool
    max_gb_huge_pages: int


class _Decompressor:
    """The variables of kaslr.c while handle_mem_options() reads the command line."""

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self.avoided: list[Avoided] = []
        self.limit = MAXMEM
        self.limit_word: str | None = None
        self.too_large = False
        self.gb_pages = 0
        self._is_gb_page = False

    def lower(self, size: int, word: str) -> None:
        """Lower mem_limit; it never rises."""
        if size < self.limit:
            self.limit, self.limit_word = size, word

    def memparse(self, text: str) -> Number:
        return memparse(text, self.rules, decompressor=True)

    def mem_avoid_memmap(self, name: str, value: str | None) -> None:
        """Take the ranges of one parameter, up to the first that is none.

        The fifth of one parameter switches KASLR off. Once there are four, it does not look at
        further parameters: their ranges are not avoided, and KASLR stays on.
        """
        if len(self.avoided) >= MAX_MEMMAP_REGIONS:
            return
        left = [] if value is None else value.split(",")
        while left and len(self.avoided) < MAX_MEMMAP_REGIONS:
            found = self.parse_memmap(left[0], is_efi=name != "memmap")
            if found is None:
                break
            word = f"{name}={_text(left.pop(0))}"
            start, size = found
            if start:
                self.avoided.append(Avoided(start, size, word))
            elif size:
                self.lower(size, word)
        if left and len(self.avoided) >= MAX_MEMMAP_REGIONS:
            self.too_large = True

    def parse_memmap(self, text: str, *, is_efi: bool) -> tuple[int, int] | None:
        """Return start and size; start 0: a limit of that size, or with size 0 nothing."""
        if text.startswith("exactmap"):
            return None
        size, length = self.memparse(text)
        if not length:
            return None
        operator, place = text[length : length + 1], text[length + 1 :]
        if operator in ("#", "$", "!"):
            return self.memparse(place).value, size
        if operator != "@":
            return 0, size
        return self._soft_reserved(place, size) if is_efi else (0, 0)

    def _soft_reserved(self, place: str, size: int) -> tuple[int, int]:
        """Take ``START:ATTRIBUTE`` of efi_fake_mem=: it counts where it soft-reserves."""
        start, length = self.memparse(place)
        flags = _kstrtoull(place[length + 1 :]) if place[length : length + 1] == ":" else None
        return (start, size) if (flags or 0) & _EFI_MEMORY_SP else (0, 0)

    def parse_gb_huge_pages(self, name: str, value: str | None) -> None:
        """Count the huge pages of 1 GiB."""
        if name == "hugepagesz":
            self._is_gb_page = value is not None and self.memparse(value).value == _GIB
        elif name == "hugepages" and self._is_gb_page and value is not None:
            if not self.rules.whole_hugepages:
                self.gb_pages = simple_strtoull(value, saturates=False).value
            elif (number := _kstrtoull(value)) is not None:
                self.gb_pages = number

    def mem(self, value: str | None) -> bool:
        """Take a limit of mem=; False: the rest of the command line is not looked at.

        A ``mem`` without a value has the decompressor read what is at address 0.
        """
        if value == "nopentium":
            return True
        size = 0 if value is None else self.memparse(value).value
        if size:
            self.lower(size, f"mem={_text(value or '')}")
        return bool(size)


def handle_mem_options(command_line: str, rules: Rules = NEWEST) -> MemOptions:
    """Read a command line as the decompressor does: memmap=, mem=, hugepages=.

    Only ``SIZE#START``, ``SIZE$START`` and ``SIZE!START`` are ranges to avoid. ``SIZE@START`` is
    nothing. All else (``SIZE``, ``SIZE%START...``, and every range with START 0) lowers the limit
    of the image's end to SIZE. A word without a number ends its parameter, as ``exactmap`` does;
    ``mem=0`` ends the command line.
    """
    state = _Decompressor(rules)
    for name, value, _ in arguments(command_line):
        if name == "memmap" or (name == "efi_fake_mem" and rules.avoids_fake_mem):
            state.mem_avoid_memmap(name, value)
        elif "hugepages" in name:
            state.parse_gb_huge_pages(name, value)
        elif name == "mem" and not state.mem(value):
            break
    return MemOptions(
        tuple(state.avoided), state.limit, state.limit_word, state.too_large, state.gb_pages
    )


class Kaslr(enum.Enum):
    """What KASLR does about a region."""

    AVOIDED = "avoided"
    NOT_AVOIDED = "not avoided"
    OFF = "off"


class Verdict(NamedTuple):
    """What KASLR does about a region, and why.

    :ivar at: the first address that is not avoided; None if all are.
    """

    kaslr: Kaslr
    at: PhysAddr | None
    why: str


def kaslr(
    command_line: str, start: PhysAddr, end: PhysAddr, rules: tuple[Rules, ...] = KNOWN
) -> Verdict:
    """Tell whether the decompressor may put the kernel's image into a region, or a part of it.

    choose_random_location(): nothing is moved after ``nokaslr``, nor after memmap_too_large
    (find_random_phys_addr()); then the image stays where the loader has put it. All else is
    memory, as far as process_mem_region() knows: the kernel's changes come later. That the
    firmware may keep the region apart, that movable_node or huge pages may leave it out, or that
    a gap may be too small for an image, is not taken into account.

    :param rules: of the kernel in question; the worst of their verdicts counts.
    """
    if cmdline_find_option_bool(command_line, "nokaslr"):
        return Verdict(Kaslr.OFF, None, "nokaslr")
    verdicts = [_verdict(command_line, start, end, one) for one in rules]
    worst = [Kaslr.NOT_AVOIDED, Kaslr.AVOIDED, Kaslr.OFF]
    return min(verdicts, key=lambda verdict: worst.index(verdict.kaslr))


def _verdict(command_line: str, start: PhysAddr, end: PhysAddr, rules: Rules) -> Verdict:
    options = handle_mem_options(command_line, rules)
    if options.memmap_too_large:
        return Verdict(Kaslr.OFF, None, "a parameter goes on behind the fourth range")
    at, words = int(start), []
    for one in sorted(options.avoided):
        if one.start <= at < one.start + one.size <= _ULLONG_MAX:
            at = one.start + one.size
            words.append(one.word)
    if at < end and options.mem_limit <= at:
        words.append(options.limit_word or "the end of memory")
        at = end
    if at >= end:
        return Verdict(Kaslr.AVOIDED, None, ", ".join(words))
    return Verdict(Kaslr.NOT_AVOIDED, PhysAddr(at), _why_not(command_line, at, rules, options))


def _why_not(command_line: str, at: int, rules: Rules, options: MemOptions) -> str:
    """Say why the decompressor does not keep clear of an address that the kernel gives up."""
    word = next(
        (
            w
            for w in e820_words(command_line, rules)
            if w.change is not None and w.change.start <= at < w.change.start + w.change.size
        ),
        None,
    )
    if word is None:
        return "no memmap= covers it"
    if handle_mem_options(word.text, rules).avoided:
        if len(options.avoided) < MAX_MEMMAP_REGIONS:
            return f"it does not get as far as {word.text}"
        return f"{word.text} comes after the {MAX_MEMMAP_REGIONS} ranges that it counts"
    limit = handle_mem_options(word.text, rules).mem_limit
    if limit < MAXMEM:
        return f"it takes {word.text} for a limit of {format_number(limit)}"
    return f"it does not count {word.text}"


# ---------------------------------------------------------------------------- the kernel


class Action(enum.Enum):
    """What a word does to the memory map."""

    ADD = "e820__range_add"
    UPDATE = "e820__range_update"
    REMOVE = "e820__range_remove"
    CLEAR = "exactmap"


class Change(NamedTuple):
    """A change of the memory map: bytes ``start`` to ``start + size``.

    :ivar old: the type that is changed or removed; 0: any
    :ivar new: the type that it becomes; 0 for a removal
    """

    action: Action
    start: int
    size: int
    old: int
    new: int


class Word(NamedTuple):
    """One word of memmap= or mem=, and what the kernel makes of it.

    :ivar text: as it is written, with the parameter's name
    :ivar change: None: the kernel ignores it
    :ivar rest: what the kernel does not understand behind it
    """

    text: str
    change: Change | None
    rest: str

    @property
    def limit(self) -> int | None:
        """The address from which on the kernel uses no RAM, in bytes; None: it is no limit."""
        change = self.change
        return change.start if change is not None and change == _limit(change.start) else None

    @property
    def stops_boot(self) -> str | None:
        """Why the kernel stops at boot (BUG_ON(), early_panic()); None: it does not for this."""
        change = self.change
        if change is None:
            return None
        if change.action is Action.UPDATE and change.old == change.new:
            return "it changes a type to itself"
        if change.action is Action.ADD and change.start + change.size > _ULLONG_MAX:
            return "it goes beyond the last address"
        return None

    @property
    def trouble(self) -> str | None:
        """What is wrong with it, in words; None: nothing."""
        change = self.change
        if change is None:
            behind = f" for {self.rest!r} behind it" if self.rest else ""
            return f"the kernel ignores it{behind}"
        if self.stops_boot is not None:
            return f"the kernel stops at boot: {self.stops_boot}"
        if not self.rest:
            return None
        taken = self.text[: len(self.text) - len(self.rest)]
        meaning = f"the kernel takes it for {taken}"
        if self.limit is not None:
            meaning += f", and uses no memory above {format_number(self.limit)}"
        return meaning


def parse_memmap_one(text: str, rules: Rules = NEWEST) -> Word:
    """Take one word of memmap=, as it stands between commas.

    What is behind a number that it understands is ignored, but for ``%``, which is then ignored
    as a whole. A size without one of the operators is a limit: all RAM from there on goes.
    """
    word = f"memmap={_text(text)}"
    if text.startswith("exactmap"):
        return Word(word, Change(Action.CLEAR, 0, _ULLONG_MAX, 0, 0), "")
    size, length = memparse(text, rules)
    if not length:
        return Word(word, None, "")
    operator, place = text[length : length + 1], text[length + 1 :]
    if operator not in (*_OPERATORS, "%"):
        return Word(word, _limit(size), _text(text[length:]))
    start, length = memparse(place, rules)
    rest = place[length:]
    if operator != "%":
        return Word(word, Change(Action.ADD, start, size, 0, _OPERATORS[operator]), _text(rest))
    old, rest = _type(rest, "-", rules)
    new, rest = _type(rest, "+", rules)
    if rest:
        return Word(word, None, _text(rest))
    if new and not old:
        return Word(word, Change(Action.ADD, start, size, 0, new), "")
    size = min(size, _ULLONG_MAX - start)
    return Word(word, Change(Action.UPDATE if new else Action.REMOVE, start, size, old, new), "")


def _type(text: str, sign: str, rules: Rules) -> tuple[int, str]:
    """Take the type behind a sign (32 bits of it), and return it and the rest."""
    if not text.startswith(sign):
        return 0, text
    value, length = simple_strtoull(text[1:], saturates=rules.saturates)
    return value & 0xFFFFFFFF, text[1 + length :]


def _limit(size: int) -> Change:
    return Change(Action.REMOVE, size, _ULLONG_MAX - size, RAM, 0)


def parse_memopt(text: str, rules: Rules = NEWEST) -> Word:
    """Take a value of mem=: a limit; 0 is ignored, and so is what is behind the number."""
    size, length = memparse(text, rules)
    change = _limit(size) if size and text != "nopentium" else None
    return Word(f"mem={_text(text)}", change, _text(text[length:]) if change else "")


def e820_words(command_line: str, rules: Rules = NEWEST) -> list[Word]:
    """Return the words that change the memory map, and those that were to, in their order."""
    found = []
    for name, value, _ in arguments(command_line):
        if name == "memmap" and value is not None:
            found += [parse_memmap_one(text, rules) for text in value.split(",")]
        elif name == "mem" and value is not None:
            found.append(parse_memopt(value, rules))
    return found


def lost_words(command_line: str) -> list[str]:
    """Return the words that have ``memmap=`` in them, but are no memmap= to the kernel."""
    return [
        _text(f"{one.name}={one.value}")
        for one in arguments(command_line)
        if one.name.endswith("memmap") and one.name != "memmap" and one.value is not None
    ]


class Entry(NamedTuple):
    """A range of the memory map and its type; bytes, ``end`` is not part of it."""

    start: int
    end: int
    kind: int


def memory_map(firmware: list[Entry], words: list[Word]) -> list[Entry]:
    """Return the memory map that e820__update_table() makes of the firmware's and all words.

    Entries may overlap: where they do, the highest type counts, whatever its place. Neighbours of
    one type are one entry here.
    """
    table = _table(firmware, words)
    found: list[Entry] = []
    for low, high in itertools.pairwise(sorted({e for one in table for e in (one.start, one.end)})):
        kind = max((e.kind for e in table if e.start <= low and high <= e.end), default=0)
        if found and found[-1].end == low and found[-1].kind == kind:
            low = found.pop().start
        if kind:
            found.append(Entry(low, high, kind))
    return found


def _table(firmware: list[Entry], words: list[Word]) -> list[Entry]:
    """Return the entries before e820__update_table(): none is sorted, some may be empty."""
    table = list(firmware)
    for change in (word.change for word in words if word.change is not None):
        if change.action is Action.CLEAR:
            table = []
        elif change.action is Action.ADD:
            table.append(Entry(change.start, change.start + change.size, change.new))
        else:
            table = [part for entry in table for part in _carved(entry, change)]
    return table


def _carved(entry: Entry, change: Change) -> list[Entry]:
    """Return what is left of an entry, and what an update makes of the rest of it.

    What is removed as a whole stays as an empty entry: it counts. A change of no bytes inside the
    entry cuts it in two.
    """
    low, high = max(entry.start, change.start), min(entry.end, change.start + change.size)
    touches = entry.start == low == high < entry.end or entry.start < low == high == entry.end
    if change.old not in (0, entry.kind) or low > high or touches:
        return [entry]
    parts = [Entry(entry.start, low, entry.kind), Entry(high, entry.end, entry.kind)]
    parts = [part for part in parts if part.start < part.end]
    if change.action is Action.UPDATE:
        parts.append(Entry(low, high, change.new))
    return parts or [Entry(0, 0, 0)]


def stops_boot(command_line: str, rules: Rules = NEWEST) -> str | None:
    """Say why a kernel stops at boot by its words of memmap=; None: it does not for these.

    Besides single words (:attr:`Word.stops_boot`), a map of fewer than two entries stops it. The
    firmware's own has more.
    """
    words = e820_words(command_line, rules)
    for word in words:
        if word.stops_boot is not None:
            return f"{word.text}: {word.stops_boot}"
    firmware = [Entry(0, 0, RAM), Entry(0, 0, RESERVED)]
    if len(_table(firmware, words)) < 2:
        return "memmap=exactmap: fewer than two ranges are given behind it"
    return None


def _edges(change: Change | None) -> tuple[int, ...]:
    return () if change is None else (change.start, change.start + change.size)


def _apply(types: dict[int, Word | None], word: Word, low: int, high: int) -> bool:
    """Apply a word to a piece that it covers whole or not at all; tell whether it took a type.

    :param types: the types that entries give the piece, and the word of each
    """
    change = word.change
    if change is None or not (change.start <= low and high <= change.start + change.size):
        return False
    if change.action is Action.ADD:
        types[change.new] = word
        return False
    old = [change.old] if change.old else list(types)
    taken = [one for one in old if one in types]
    for one in taken:
        del types[one]
    if taken and change.action is Action.UPDATE:
        types[change.new] = word
    return bool(taken)


# ---------------------------------------------------------------------------- regions


class Kind(enum.Enum):
    """The use that the kernel has for a range."""

    RAM = "ordinary memory"
    REMOVED = "removed"
    RESERVED = "reserved"
    SOFT = "soft-reserved"
    PMEM = "persistent memory"
    OTHER = "something else"


_KINDS = {
    0: Kind.REMOVED,
    RAM: Kind.RAM,
    RESERVED: Kind.RESERVED,
    SOFT_RESERVED: Kind.SOFT,
    PMEM: Kind.PMEM,
    PRAM: Kind.PMEM,
}


class Reservation(NamedTuple):
    """One range of one word, if it is memory before; bytes, ``end`` is not part of it."""

    start: PhysAddr
    end: PhysAddr
    kind: Kind
    parameter: str


class Piece(NamedTuple):
    """A part of a range, and what is in force in all of it; bytes, ``end`` is not part of it.

    :ivar reservation: None: no word has changed what the firmware reports
    """

    start: PhysAddr
    end: PhysAddr
    reservation: Reservation | None
    kind: Kind


def reservations(command_line: str, rules: Rules = NEWEST) -> list[Reservation]:
    """Return the ranges that words of memmap= give another use, each by itself, in order.

    Limits and exactmap are not among them.
    """
    found = []
    for word in e820_words(command_line, rules):
        change = word.change
        if change is None or not change.size or change.action is Action.CLEAR:
            continue
        if change.old in (0, RAM) and word.limit is None:
            found.append(_reservation(word, change))
    return found


def _reservation(word: Word, change: Change) -> Reservation:
    kind = _KINDS.get(change.new, Kind.OTHER)
    end = change.start + change.size
    return Reservation(PhysAddr(change.start), PhysAddr(end), kind, word.text)


def coverage(
    command_line: str,
    start: PhysAddr,
    end: PhysAddr,
    rules: Rules = NEWEST,
    firmware: Sequence[Entry] | None = None,
) -> list[Piece]:
    """Cut ``start`` to ``end`` where something else is in force, by all words together.

    :param firmware: the memory map before all words; None: it has RAM there.
    """
    words = e820_words(command_line, rules)
    table = [Entry(start, end, RAM)] if firmware is None else firmware
    edges = {int(start), int(end)}
    edges.update(edge for one in table for edge in one[:2] if start < edge < end)
    edges.update(edge for word in words for edge in _edges(word.change) if start < edge < end)
    pieces: list[Piece] = []
    for low, high in itertools.pairwise(sorted(edges)):
        one = _in_force(words, table, PhysAddr(low), PhysAddr(high))
        if pieces and pieces[-1][2:] == one[2:]:
            one = one._replace(start=pieces.pop().start)
        pieces.append(one)
    return pieces


def _in_force(words: list[Word], table: Sequence[Entry], low: PhysAddr, high: PhysAddr) -> Piece:
    types: dict[int, Word | None] = {e.kind: None for e in table if e.start <= low < high <= e.end}
    last: Word | None = None
    for word in words:
        if _apply(types, word, low, high):
            last = word
    kind = max(types, default=0)
    word_in_force = types[kind] if types else last
    reservation = None
    if word_in_force is not None and word_in_force.change is not None:
        change = word_in_force.change
        reservation = Reservation(
            PhysAddr(change.start),
            PhysAddr(change.start + change.size),
            _KINDS.get(kind, Kind.OTHER),
            word_in_force.text,
        )
    return Piece(low, high, reservation, _KINDS.get(kind, Kind.OTHER))
