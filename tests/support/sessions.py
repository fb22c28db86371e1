"""Sessions in Markdown: blocks of ``console``, with what is typed and what it prints.

A line that begins with ``# `` is typed by root, and the lines below it are what it prints. Words
after ``console`` say where a block can be typed; no reader of the rendered page sees them:

- no word: on this host, in a shell whose directory is the checkout;
- ``qemu``: the same, where there is a QEMU that pkernfs can use (8.2 or later);
- ``passthrough``: the same, where the kernel passes mappings through to a segment;
- ``lab``: in the machine that ``scripts/lab shell`` boots; ``lab=units``: with ``--units``;
- ``shown=FILE``: nowhere; the test or script FILE does the like, or ``shown=host`` where it is for
  the machine at hand to say.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

_PROMPT = "# "
#: What is another one each time, and is compared by its form only.
_MEASURED = re.compile(r"\b\d+(\.\d+)? (ms|s|KiB|[KMG]iB/s)(?!\w)")
#: What is another one each time, and the same wherever it stands: digests and addresses.
_NAMED = re.compile(r"\b(0x[0-9a-f]{6,}|[0-9a-f]{32,64})\b")


class Block(NamedTuple):
    """A block of ``console``: its document, its first line's number, its words and its lines."""

    document: Path
    number: int
    words: tuple[str, ...]
    lines: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.document.relative_to(ROOT)}:{self.number}"

    @property
    def place(self) -> str:
        """Where it is typed: ``host``, ``lab``, ``lab=units``, or nowhere (empty)."""
        if any(word.startswith("shown=") for word in self.words):
            return ""
        return next((word for word in self.words if word.startswith("lab")), "host")

    def commands(self) -> list[Command]:
        """Return what is typed, each with what the document has it print."""
        found: list[tuple[str, list[str]]] = []
        for line in self.lines:
            if line.startswith(_PROMPT):
                found.append((line.removeprefix(_PROMPT), []))
            else:
                assert found, f"{self}: it begins with no prompt"
                found[-1][1].append(line)
        return [Command(f"{self}: {typed}", typed, "\n".join(said)) for typed, said in found]


class Command(NamedTuple):
    """What is typed, what the document has it print, and where that stands."""

    where: str
    typed: str
    printed: str


def blocks(document: Path) -> list[Block]:
    """Read the blocks of ``console`` in a document, in order."""
    found = []
    lines = document.read_text().splitlines()
    inside: list[str] | None = None
    for number, line in enumerate(lines, 1):
        if inside is None and line.startswith("```"):
            inside, words, begin = [], line.removeprefix("```").split(), number
        elif inside is not None and line == "```":
            if words[:1] == ["console"]:
                found.append(Block(document, begin, tuple(words[1:]), tuple(inside)))
            inside = None
        elif inside is not None:
            inside.append(line)
    assert inside is None, f"{document}: a block does not end"
    return found


def typed_at(document: Path, place: str) -> list[Block]:
    """Choose the blocks of a document that can be typed at a place."""
    return [block for block in blocks(document) if block.place == place]


def form(texts: Iterable[str]) -> list[str]:
    """Return what is printed without what differs each time.

    The first digest or address becomes ``<1>`` wherever it stands, the next one ``<2>``.
    """
    names: dict[str, str] = {}

    def name(match: re.Match[str]) -> str:
        return names.setdefault(match[0], f"<{len(names) + 1}>")

    def plain(text: str) -> str:
        lines = [line.rstrip() for line in text.strip("\n").splitlines()]
        return _NAMED.sub(name, _MEASURED.sub(r"<number> \2", "\n".join(lines)))

    return [plain(text) for text in texts]


def compare(commands: list[Command], printed: list[str]) -> None:
    """Compare what was printed with what the document has, command by command.

    :raises AssertionError: it differs; with the command and both texts.
    """
    wanted, found = form(command.printed for command in commands), form(printed)
    for command, said, want, got in zip(commands, printed, wanted, found, strict=True):
        assert got == want, f"{command.where}\n--- expected\n{command.printed}\n--- got\n{said}"
