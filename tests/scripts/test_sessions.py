"""README and docs are typed word for word, and print what stands there.

What can be typed on any host is typed here; tests/lab/test_shell.py types the rest.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from pkernfs import cli
from support.passthrough import is_offered
from support.sessions import (
    DOCUMENTS,
    ROOT,
    Block,
    Command,
    blocks,
    compare,
    form,
    typed_at,
)
from support.typing_host import PYTHON, type_at_host

#: Lines of indented blocks that are for a shell: they belong into a block of ``console``.
_UNTYPED = re.compile(r"^ {4}(# |(sudo )?(pkernfs|(mkfs|fsck)\.pkernfs|mount|umount|kexec) )", re.M)

_OURS = re.compile(r"(?<![\w/.])((?:mkfs\.|fsck\.)?pkernfs) ([^|;)#\n]+)")


def for_qemu(block: Block) -> bool:
    """Whether a block needs a QEMU."""
    return "qemu" in block.words


def prints_what_it_says(typed: list[Block], directory: Path, *programs: Path) -> None:
    """Every command prints what the document has it print, times and addresses aside."""
    # What has changed since the last set-up would be told in the session.
    line = [str(ROOT / "scripts/setup"), "--no-links"]
    subprocess.run(line, env={**os.environ, "PYTHON": PYTHON}, check=True, capture_output=True)
    scratch = directory / "scratch"
    scratch.mkdir()
    if not is_offered():
        typed = [block for block in typed if "passthrough" not in block.words]
    commands = [command for block in typed for command in block.commands()]
    lines = [command.typed for command in commands]
    compare(commands, type_at_host(lines, ROOT, scratch, programs))


@pytest.mark.fuse
@pytest.mark.slow("a whole document, typed")
@pytest.mark.parametrize(
    "document", [d for d in DOCUMENTS if typed_at(d, "host")], ids=lambda path: path.name
)
def test_without_qemu(document: Path, tmp_path: Path) -> None:
    """By somebody who has no QEMU, and leaves out what needs it."""
    typed = [block for block in typed_at(document, "host") if not for_qemu(block)]
    prints_what_it_says(typed, tmp_path)


@pytest.mark.vm
@pytest.mark.slow("a whole document, typed")
@pytest.mark.parametrize(
    "document",
    [d for d in DOCUMENTS if any(for_qemu(b) for b in blocks(d))],
    ids=lambda path: path.name,
)
def test_with_qemu(document: Path, tmp_path: Path, new_qemu: Path) -> None:
    """All that is for the host."""
    prints_what_it_says(typed_at(document, "host"), tmp_path, new_qemu)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_what_is_for_a_shell_is_typed_somewhere(document: Path) -> None:
    outside = re.sub(r"^```.*?^```$", "", document.read_text(), flags=re.M | re.S)
    assert not _UNTYPED.findall(outside)
    for block in blocks(document):
        for word in block.words:
            name, _, value = word.partition("=")
            assert name in ("qemu", "passthrough", "lab", "shown"), (str(block), word)
            assert value in ("", "host", "units") or (ROOT / value).is_file(), (str(block), word)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_what_is_shown_only_is_taken_by_the_commands(document: Path) -> None:
    """No test types it, so a word or an option that is no more would stay unseen."""
    for block in blocks(document):
        if block.place:
            continue
        typed = "\n".join(command.typed for command in block.commands())
        for match in _OURS.finditer(typed):
            program, words = str(match[1]), str(match[2])
            name, *arguments = [*program.split(".")[:-1], *shlex.split(words)]
            cli.build_parser(name, name).parse_args(arguments)


def test_tests_of_the_lab_have_the_names_that_documents_have() -> None:
    tests = "".join(path.read_text() for path in (ROOT / "tests/lab").glob("test_*.py"))
    names = re.findall(r"scripts/lab run ([a-z_]+)", "".join(d.read_text() for d in DOCUMENTS))
    assert len(names) >= 3
    for name in names:
        assert re.search(rf"^def \w*{name}\w*\(", tests, re.M), name


def test_the_same_is_written_in_the_same_way_everywhere() -> None:
    """One line of fstab; the options of QEMU through eval, for they are quoted for a shell."""
    pages = [page.read_text().replace("\\-", "-") for page in (ROOT / "docs/man").glob("*.in")]
    texts = [document.read_text() for document in DOCUMENTS] + pages
    lines = [
        line for text in texts for line in re.findall(r"^ *(/\S+ +/\S+ +fuse\.\S+ .*)", text, re.M)
    ]
    assert len(lines) == 3
    assert len(set(lines)) == 1
    uses = [line for text in texts for line in re.findall(r".*\$\(pkernfs qemu-args .*", text)]
    assert len(uses) == 3
    assert all('eval "qemu-system-x86_64 ' in line for line in uses)


def test_blocks(tmp_path: Path) -> None:
    document = tmp_path / "a.md"
    document.write_text("a\n```console lab\n# b\nc\n\nd\n# e\n```\n```python\n# f\n```\n")
    (block,) = blocks(document)
    assert (block.place, block.number) == ("lab", 2)
    assert [c[1:] for c in block._replace(document=ROOT / "x").commands()] == [
        ("b", "c\n\nd"),
        ("e", ""),
    ]
    assert Block(document, 1, ("shown=host",), ()).place == ""


def test_form_leaves_out_times_and_names_addresses() -> None:
    assert form(["took 1.5 ms", "took 20 ms"]) == ["took <number> ms"] * 2
    a, b = "0x100000", "0x200000"
    assert form([f"{a} {b}", a]) == form([f"{b} {a}", b]) != form([f"{a} {a}", a])
    assert form(["4 inodes"]) != form(["5 inodes"])


def test_a_difference_is_told_with_its_place() -> None:
    with pytest.raises(AssertionError, match=r"README\.md:7: ls"):
        compare([Command("README.md:7: ls", "ls", "a")], ["b\n"])
