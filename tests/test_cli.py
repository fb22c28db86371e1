"""The command line: parsers, exit statuses, one line for a failure; manual pages agree with it.

Commands run in this process, as in tests/commands, where each has its own bad input. What several
of them do to the same region is here.
"""

from __future__ import annotations

import argparse
import ast
import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pkernfs import __version__, cli, layout
from pkernfs.options import MOUNT_OPTIONS
from pkernfs.region.region import Region
from support.command_lines import (
    PROGRAMS,
    SIZE,
    Command,
    as_nobody,
    formatted,
    mounting,
    refused,
    unchanged,
)
from support.superblocks import damage, edit_superblocks


@pytest.fixture
def region(tmp_path: Path, command: Command) -> Path:
    """A region of 16 MiB with an empty pkernfs."""
    return formatted(tmp_path, command)


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    ("program", "words", "status"),
    [
        ("pkernfs", "--help", 1),
        ("pkernfs", "--version", 1),
        ("pkernfs", "info --help", 1),
        ("pkernfs", "iommu map --help", 1),
        ("pkernfs", "mount -h", 32),
        ("pkernfs", "info REGION", 1),
        ("pkernfs", "info --json REGION", 1),
        ("pkernfs", "doctor", 1),
        ("mkfs.pkernfs", "-f REGION", 1),
        ("fsck.pkernfs", "-n -v REGION", 8),
        ("fsck.pkernfs", "-n --json REGION", 8),
    ],
)
def test_no_room_for_what_is_printed(
    region: Path, program: str, words: str, status: int, unbuffered: str
) -> None:
    """It is standard output that lacks room, not the region; and the command failed."""
    entry = {"pkernfs": "main", "mkfs.pkernfs": "mkfs_main", "fsck.pkernfs": "fsck_main"}[program]
    line = f"import sys; from pkernfs.cli import {entry} as main; sys.exit(main())"
    command = [sys.executable, "-c", line, *words.replace("REGION", str(region)).split()]
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            command, stdout=full, stderr=subprocess.PIPE, text=True, env=environment
        )
    assert done.stderr == f"{program}: standard output: No space left on device\n"
    assert done.returncode == status


def test_a_reader_that_has_gone_is_told_nothing(region: Path) -> None:
    """Unlike a full disk it is no error of anybody's."""
    line = "import sys; from pkernfs.cli import main; sys.exit(main())"
    read_end, write_end = os.pipe()
    os.close(read_end)
    with os.fdopen(write_end, "w") as nobody:
        done = subprocess.run(
            [sys.executable, "-c", line, "info", str(region)], stdout=nobody, stderr=subprocess.PIPE
        )
    assert (done.returncode, done.stderr) == (1, b"")


def subcommands(parser: argparse.ArgumentParser) -> list[str]:
    """The second words of a command that has them."""
    groups = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    return [name for group in groups for name in group.choices]


def test_version_and_help(command: Command) -> None:
    for program in PROGRAMS:
        assert command(program, "--version") == (0, f"{program} {__version__}\n", "")
        assert command(program, "--help").status == 0
    for name in cli.COMMANDS:
        assert command("pkernfs", name, "--help").out.startswith(f"usage: pkernfs {name}")
        for more in subcommands(cli.build_parser(name, f"pkernfs {name}")):
            usage = f"usage: pkernfs {name} {more}"
            assert command("pkernfs", name, more, "--help").out.startswith(usage)
        assert name in command("pkernfs", "--help").out


@pytest.mark.parametrize("columns", [None, "", "0", "-1", "x", "40", "200"])
@pytest.mark.parametrize("size", [None, 0, 132])
def test_help_is_as_wide_as_argparse_makes_it(
    columns: str | None, size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def terminal_size(fd: int) -> os.terminal_size:
        if size is None:
            raise OSError(errno.ENOTTY, "not a terminal")
        return os.terminal_size((size, 24))

    monkeypatch.setattr(os, "get_terminal_size", terminal_size)
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns is not None:
        monkeypatch.setenv("COLUMNS", columns)
    expected = argparse.HelpFormatter("x")._width
    assert cli.Parser()._get_formatter()._width == expected
    monkeypatch.setattr(sys, "__stdout__", None)
    assert cli.Parser()._get_formatter()._width == argparse.HelpFormatter("x")._width


def test_a_command_does_not_wait_for_shutil() -> None:
    program = "import sys; from pkernfs import cli; cli.build_parser('handover', 'pkernfs')"
    program += "; sys.exit('shutil' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


@pytest.mark.parametrize(
    ("line", "status"),
    [
        ("pkernfs", 1),
        ("pkernfs bogus", 1),
        ("pkernfs --bogus", 1),
        ("pkernfs info", 1),
        ("pkernfs info --bogus x", 1),
        ("pkernfs extents", 1),
        ("pkernfs mount region", 1),
        ("pkernfs region mnt -o", 1),
        ("pkernfs region mnt more", 1),
        ("mkfs.pkernfs", 1),
        ("mkfs.pkernfs -x region", 1),
        ("fsck.pkernfs", 16),
        ("fsck.pkernfs -x region", 16),
        ("fsck.pkernfs -n -y region", 16),
    ],
)
def test_usage(line: str, status: int, command: Command) -> None:
    program, *args = line.split()
    refused(command(program, *args), status, program)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("pkernfs inof", "inof is not a command (did you mean info?)"),
        ("pkernfs inof /mnt", "inof is not a command (did you mean info?)"),
        ("pkernfs kexecute --dry-run", "kexecute is not a command (did you mean kexec?)"),
        ("pkernfs umount /mnt", "umount is not a command of pkernfs: umount MNT"),
        ("pkernfs list", "list is not a command of pkernfs: findmnt -t fuse.pkernfs"),
        ("pkernfs mkfs -s 1G /x", "mkfs is not a command of pkernfs: mkfs.pkernfs REGION"),
        ("pkernfs iommu atach", "atach is not a command (did you mean attach?)"),
        ("pkernfs iommu bogus", "bogus is not a command (try pkernfs iommu --help)"),
        ("pkernfs Info /mnt", "Info is not a command (did you mean info?)"),
        ("pkernfs df /mnt", "df is not a command of pkernfs: df MNT"),
        ("pkernfs -v", "unrecognized arguments: -v (try pkernfs --help)"),
        ("pkernfs unmount /mnt -f", "unmount is not a command of pkernfs: umount MNT"),
        ("pkernfs bogus", "bogus: not a command, and no mount point after it"),
    ],
)
def test_a_word_that_is_no_command(line: str, says: str, command: Command) -> None:
    program, *args = line.split()
    refused(command(program, *args), 1, program, says)


@pytest.mark.parametrize("word", ["inof", "list"])
def test_a_word_with_options_of_a_mount_is_a_region(
    word: str, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As mount(8) calls it: the status is that of a mount that failed."""
    monkeypatch.chdir(tmp_path)
    outcome = command("pkernfs", word, tmp_path, "-o", "rw")
    refused(outcome, 32, "pkernfs", f"{tmp_path / word}: cannot open: No such file or directory")


def test_a_region_may_have_the_name_of_a_command(
    region: Path, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("list", "inof"):
        (tmp_path / name).symlink_to(region)
        refused(command("pkernfs", name, "no"), 32, "pkernfs", "mount point does not exist")
    assert not set(cli.ELSEWHERE) & set(cli.COMMANDS)


def test_one_line_whatever_is_in_a_name(command: Command, tmp_path: Path) -> None:
    refused(command("pkernfs", "info", tmp_path / "a\nb\x1b[2J"), 1, "pkernfs", "a\\nb\\x1b[2J")


def test_reader_that_goes_away(region: Path) -> None:
    program = "import sys; from pkernfs.cli import main; sys.exit(main())"
    line = [sys.executable, "-c", program, "info", "--json", str(region)]
    read_end, write_end = os.pipe()
    os.close(read_end)
    done = subprocess.run(line, stdout=write_end, stderr=subprocess.PIPE, text=True)
    os.close(write_end)
    assert (done.returncode, done.stderr) == (1, "")


def test_interrupt(monkeypatch: pytest.MonkeyPatch, command: Command, tmp_path: Path) -> None:
    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pkernfs.fs.mkfs.make_filesystem", interrupt)
    outcome = command("mkfs.pkernfs", "-s", SIZE, tmp_path / "region")
    refused(outcome, 130, "mkfs.pkernfs", "interrupted")
    assert not (tmp_path / "region").exists()


def test_bug_is_not_a_repaired_file_system(
    monkeypatch: pytest.MonkeyPatch, region: Path, command: Command
) -> None:
    """Python's exit status for a traceback is 1, which fsck(8) reads as "all repaired"."""

    def bug(*args: object, **kwargs: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("pkernfs.commands.fsck.run", bug)
    outcome = command("fsck.pkernfs", region)
    assert outcome.status == 8
    assert "Traceback" in outcome.err


@pytest.mark.parametrize("args", [["info", "REGION"], ["extents", "REGION"], ["--version"]])
def test_starts_without_fuse(args: list[str], region: Path) -> None:
    """Importing trio and pyfuse3 takes longer than all that these commands do."""
    program = "import sys; from pkernfs.cli import main; status = main()\n"
    program += "assert not {'trio', 'pyfuse3', 'asyncio'} & set(sys.modules)"
    line = [sys.executable, "-c", program, *(str(region) if a == "REGION" else a for a in args)]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_handover_waits_for_no_module_that_it_does_not_need() -> None:
    """OpenSSL alone would take it 3 ms, while guests stand still."""
    program = "import sys, pkernfs.commands.handover, pkernfs.kexec.handover\n"
    program += "print({'_hashlib', 'pkernfs.fs.comparison', 'pkernfs.dma'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("set()\n", "")


def test_json_is_indented_whoever_prints_it() -> None:
    """But for what programs alone read: messages, and the value of an attribute."""
    for_programs = {"control/wire.py", "fuse/segment_xattr.py", "vmm/qmp.py"}
    sources = Path(cli.__file__).parent
    found = 0
    for path in sources.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and ast.unparse(node.func) == "json.dumps"):
                continue
            found += 1
            if str(path.relative_to(sources)) not in for_programs:
                assert [ast.unparse(k) for k in node.keywords] == ["indent=2"], (path, node.lineno)
    assert found > len(for_programs)


# ------------------------------------------------------------------------------- several commands


@pytest.mark.usefixtures("impatient")
def test_in_use(region: Path, command: Command, tmp_path: Path) -> None:
    """What a mount holds is refused by all that would change it, and by a second mount."""
    with Region.open(str(region), write=True) as held, unchanged(region):
        held.serving(True)
        refused(command("mkfs.pkernfs", region), 1, "mkfs.pkernfs", "in use")
        refused(command("mkfs.pkernfs", "-f", region), 1, "mkfs.pkernfs", "in use")
        bigger = command("mkfs.pkernfs", "-f", "-s", 2 * SIZE, region)
        refused(bigger, 1, "mkfs.pkernfs", "in use")
        refused(command("fsck.pkernfs", region), 8, "fsck.pkernfs", "in use")
        refused(command("fsck.pkernfs", "-y", region), 8, "fsck.pkernfs", "in use")
        refused(mounting(command, region, tmp_path), 32, "pkernfs", "in use")
        assert command("pkernfs", "info", region).status == 0
    assert command("fsck.pkernfs", region).status == 0  # a lock ends with its holder


@pytest.mark.parametrize(
    ("line", "status", "says"),
    [
        *[
            (f"pkernfs {words}", 1, "not a region: it is a directory and not on a pkernfs mount")
            for words in (
                "info DIR", "info --json DIR", "iommu show DIR", "iommu check DIR",
                "iommu export DIR", "iommu translate DIR 0000:00:05.0 0",
            )
        ],
        *[
            (f"pkernfs {words}", 1, "not on a pkernfs mount")
            for words in (
                "extents DIR", "qemu-args DIR", "handover DIR", "iommu activate DIR",
                "iommu deactivate DIR", "iommu detach DIR 0000:00:05.0", "iommu create DIR",
            )
        ],
        ("pkernfs DIR DIR", 32, "not a region: it is a directory"),
        ("fsck.pkernfs DIR", 8, "not a region: it is a directory"),
    ],
)  # fmt: skip
def test_a_directory_where_nothing_is_mounted(
    line: str, status: int, says: str, command: Command, tmp_path: Path
) -> None:
    """By every command: after an umount, or with the mount not made yet."""
    program, *words = line.replace("DIR", str(tmp_path)).split()
    refused(command(program, *words), status, program, f"{tmp_path}: ", says)


def test_not_writable(region: Path, command: Command, tmp_path: Path) -> None:
    region.chmod(0o444)
    for directory in (tmp_path, *tmp_path.parents):
        if directory.stat().st_uid == os.geteuid() and directory != Path("/"):
            directory.chmod(directory.stat().st_mode | 0o055)
    with unchanged(region), as_nobody():
        refused(command("mkfs.pkernfs", "-f", region), 1, "mkfs.pkernfs", "Permission denied")
        refused(command("fsck.pkernfs", "-y", region), 8, "fsck.pkernfs", "Permission denied")
        refused(mounting(command, region, tmp_path), 32, "pkernfs", "Permission denied")
        assert command("fsck.pkernfs", "-n", region).status == 0
        new = tmp_path / "new"
        refused(command("mkfs.pkernfs", "-s", SIZE, new), 1, "mkfs.pkernfs", "Permission denied")


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"version_major": layout.VERSION_MAJOR + 1}, "version"),
        ({"feature_incompat": 1 << 31}, "feature"),
    ],
)
def test_mount_newer_format(
    fields: dict[str, int], word: str, region: Path, command: Command, tmp_path: Path
) -> None:
    edit_superblocks(region, **fields)
    with unchanged(region):
        refused(mounting(command, region, tmp_path), 32, "pkernfs", word)
        refused(mounting(command, region, tmp_path, "mkfs"), 32, "pkernfs")
        refused(command("mkfs.pkernfs", region), 1, "mkfs.pkernfs")
        outcome = command("fsck.pkernfs", "-y", region)
        refused(outcome, 8, "fsck.pkernfs", word)


@pytest.mark.parametrize("page", [layout.STATE_PAGE, layout.FIRST_MAP_PAGE])
def test_damage_that_a_check_repairs_is_told_with_the_command(
    page: int, region: Path, command: Command, tmp_path: Path
) -> None:
    damage(region, page * layout.PAGE)
    refused(mounting(command, region, tmp_path), 32, "pkernfs", ": run fsck.pkernfs -y\n")
    if page == layout.STATE_PAGE:
        refused(command("pkernfs", "iommu", "check", region), 1, "pkernfs", "run fsck.pkernfs -y\n")
    assert command("fsck.pkernfs", "-y", region).status == 1
    assert command("fsck.pkernfs", region).status == 0


@pytest.mark.parametrize("lost", ["both superblocks", "the end"])
def test_damage_that_no_check_repairs_names_none(
    lost: str, region: Path, command: Command, tmp_path: Path
) -> None:
    if lost == "the end":
        os.truncate(region, SIZE // 2)
    else:
        for page in (layout.SUPERBLOCK_PAGE, layout.BACKUP_PAGE):
            damage(region, page * layout.PAGE + 64)
    for outcome in (mounting(command, region, tmp_path), command("pkernfs", "info", region)):
        assert outcome.status
        assert "fsck" not in outcome.err
    assert command("fsck.pkernfs", "-y", region).status == 8


def test_truncated_since_mkfs(region: Path, command: Command, tmp_path: Path) -> None:
    os.truncate(region, SIZE // 2)
    with unchanged(region):
        refused(mounting(command, region, tmp_path), 32, "pkernfs", str(region))
        assert command("fsck.pkernfs", region).status in (4, 8)
        assert command("mkfs.pkernfs", region).status == 1


# -------------------------------------------------------------------------------- manual pages


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The manual pages by name, without groff's escapes of minus signs."""
    script = Path(__file__).parents[1] / "scripts" / "man"
    directory = tmp_path_factory.mktemp("man8")
    subprocess.run([sys.executable, str(script), str(directory)], check=True)
    return {page.name: page.read_text().replace("\\-", "-") for page in directory.iterdir()}


def test_manual_pages_have_every_option(pages: dict[str, str]) -> None:
    assert set(pages) == {"pkernfs.8", "pkernfs-iommu.8", "mkfs.pkernfs.8", "fsck.pkernfs.8"}
    for name in [*cli.COMMANDS, *cli.PROGRAMS]:
        page = pages[f"{name}.pkernfs.8" if name in cli.PROGRAMS else "pkernfs.8"]
        for action in cli.build_parser(name, name)._actions:
            for option in action.option_strings:
                assert f"\\fB{option}\\fR" in page, (name, option)
    for mount_option in MOUNT_OPTIONS:
        assert f"\\fB{mount_option.name}\\fR" in pages["pkernfs.8"]


def test_the_manual_page_of_iommu_has_every_option(pages: dict[str, str]) -> None:
    page = pages["pkernfs-iommu.8"]
    (subcommands,) = [
        a
        for a in cli.build_parser("iommu", "pkernfs iommu")._actions
        if isinstance(a, argparse._SubParsersAction)
    ]
    for name, parser in subcommands.choices.items():
        assert f".B pkernfs iommu {name}\n" in page
        assert parser.format_help().startswith(f"usage: pkernfs iommu {name} ")
        for action in parser._actions:
            for option in action.option_strings:
                assert f"\\fB{option}\\fR" in page, (name, option)
            assert action.help, (name, action.dest)


def test_manual_pages_have_every_exit_status(pages: dict[str, str]) -> None:
    for name, row in {**cli.COMMANDS, **cli.PROGRAMS}.items():
        page = pages[f"{name}.pkernfs.8" if name in cli.PROGRAMS else "pkernfs.8"]
        section = page.partition(".SH EXIT STATUS\n")[2].partition("\n.SH ")[0]
        for status in (0, row.usage_status, row.failure_status, row.interrupted_status):
            assert f".B {status}\n" in section, (name, status)


def test_documents_have_every_mount_option() -> None:
    text = (Path(__file__).parents[1] / "docs" / "operations.md").read_text()
    assert all(f"`{option.name}" in text for option in MOUNT_OPTIONS)


def test_manual_pages_leave_nothing_unexpanded(pages: dict[str, str]) -> None:
    assert all("@" not in page for page in pages.values())
