"""The commands: every bad input is one line, the right exit status, and no changed byte.

They run in this process wherever no daemon is needed. Real mounts are in test_setup_mount8.py.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from pkernfs import __version__, cli, layout
from pkernfs.options import MOUNT_OPTIONS
from pkernfs.region.region import Region
from support.superblocks import damage, edit_superblocks

MIB = 1 << 20
SIZE = 16 * MIB
NOBODY = 65534


class Outcome(NamedTuple):
    """What a command did."""

    status: int
    out: str
    err: str


Command = Callable[..., Outcome]
PROGRAMS = {"pkernfs": cli.main, "mkfs.pkernfs": cli.mkfs_main, "fsck.pkernfs": cli.fsck_main}


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """Run a command line in this process."""

    def run(program: str, *args: object) -> Outcome:
        try:
            status = PROGRAMS[program]([str(arg) for arg in args])
        except SystemExit as end:  # --help and --version, by argparse
            status = int(end.code or 0)
        captured = capsys.readouterr()
        return Outcome(status, captured.out, captured.err)

    return run


@pytest.fixture
def region(tmp_path: Path, command: Command) -> Path:
    """A region of 16 MiB with an empty pkernfs."""
    path = tmp_path / "region"
    assert command("mkfs.pkernfs", "-L", "here", "-s", SIZE, path).status == 0
    return path


def digest(path: Path) -> str:
    """What the bytes of a file are, and how many."""
    return f"{path.stat().st_size} {hashlib.sha256(path.read_bytes()).hexdigest()}"


@contextmanager
def unchanged(path: Path) -> Iterator[None]:
    """The file has the same bytes at the end, or is as missing as before."""
    before = digest(path) if path.is_file() else path.exists()
    yield
    assert (digest(path) if path.is_file() else path.exists()) == before


def refused(outcome: Outcome, status: int, who: str, *words: str) -> None:
    """One line ``who: ...`` on stderr that has the words, nothing on stdout, and the status."""
    assert outcome.status == status, outcome
    assert outcome.out == ""
    assert outcome.err.endswith("\n")
    assert outcome.err.count("\n") == 1
    assert outcome.err.startswith(f"{who}: ")
    for word in words:
        assert word in outcome.err


def mounting(command: Command, region: object, mount_point: object, options: str = "rw") -> Outcome:
    """A mount that is expected to fail before FUSE comes in, in the foreground."""
    return command("pkernfs", "mount", "-f", "-o", options, region, mount_point)


# ------------------------------------------------------------------------------- numbers, options


BAD_SIZES = ["", "G", "1.5G", "-1", "+1", "1 G", "1GB", "1GiB", "0x", "0xZ", "1e9", "ten", "\u0661"]


@pytest.mark.parametrize(
    "text", [*BAD_SIZES, "9223372036854775808", "8388608T", "9" * 5000, "0x" + "9" * 5000]
)
def test_size_nonsense(text: str, command: Command, tmp_path: Path) -> None:
    outcome = command("mkfs.pkernfs", f"-s{text}" if text else "-s=", tmp_path / "region")
    refused(outcome, 1, "mkfs.pkernfs", "bad size")
    assert not (tmp_path / "region").exists()


# ------------------------------------------------------------------------------- the command line


def test_version_and_help(command: Command) -> None:
    for program in PROGRAMS:
        assert command(program, "--version") == (0, f"{program} {__version__}\n", "")
        assert command(program, "--help").status == 0
    for name in cli.COMMANDS:
        assert command("pkernfs", name, "--help").out.startswith(f"usage: pkernfs {name}")
        assert name in command("pkernfs", "--help").out


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


@pytest.mark.parametrize("args", [["info", "REGION"], ["extents", "REGION"], ["--version"]])
def test_starts_without_fuse(args: list[str], region: Path) -> None:
    """Importing trio and pyfuse3 takes longer than all that these commands do."""
    program = "import sys; from pkernfs.cli import main; status = main()\n"
    program += "assert not {'trio', 'pyfuse3', 'asyncio'} & set(sys.modules)"
    line = [sys.executable, "-c", program, *(str(region) if a == "REGION" else a for a in args)]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ------------------------------------------------------------------------------- mkfs.pkernfs


def test_mkfs(region: Path, command: Command) -> None:
    assert region.stat().st_size == SIZE
    facts = json.loads(command("pkernfs", "info", "--json", region).out)
    assert facts["label"] == "here"
    assert command("fsck.pkernfs", region).status == 0


def test_mkfs_existing_file(tmp_path: Path, command: Command) -> None:
    path = tmp_path / "region"
    for size in (0, SIZE):  # an empty file is extended, one of the size is taken
        path.write_bytes(b"")
        os.truncate(path, size)
        assert command("mkfs.pkernfs", "-s", SIZE, path).status == 0
        assert path.stat().st_size == SIZE
        assert command("fsck.pkernfs", path).status == 0


@pytest.mark.parametrize("force", [[], ["-f"]])
def test_mkfs_never_cuts(force: list[str], region: Path, command: Command) -> None:
    with unchanged(region):
        outcome = command("mkfs.pkernfs", *force, "-s", SIZE // 2, region)
        refused(outcome, 1, "mkfs.pkernfs", "another size")


def test_mkfs_extends_with_force(region: Path, command: Command) -> None:
    with unchanged(region):
        refused(command("mkfs.pkernfs", "-s", 2 * SIZE, region), 1, "mkfs.pkernfs", "-f extends")
    assert command("mkfs.pkernfs", "-f", "-s", 2 * SIZE, region).status == 0
    assert region.stat().st_size == 2 * SIZE
    assert command("fsck.pkernfs", region).status == 0


def test_mkfs_missing(tmp_path: Path, command: Command) -> None:
    refused(command("mkfs.pkernfs", tmp_path / "none"), 1, "mkfs.pkernfs", "no such file", "-s")
    outcome = command("mkfs.pkernfs", "-s", SIZE, tmp_path / "no" / "region")
    refused(outcome, 1, "mkfs.pkernfs", "No such file")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("args", [[], ["-f"], ["-s", "16M"], ["-f", "-s", "16M"]])
def test_mkfs_directory(args: list[str], tmp_path: Path, command: Command) -> None:
    refused(command("mkfs.pkernfs", *args, tmp_path), 1, "mkfs.pkernfs", "irectory")


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, MIB, layout.MIN_REGION_BYTES - 1])
def test_mkfs_too_small(size: int, tmp_path: Path, command: Command) -> None:
    path = tmp_path / "region"
    path.write_bytes(b"")
    os.truncate(path, size)
    with unchanged(path):
        refused(command("mkfs.pkernfs", path), 1, "mkfs.pkernfs", "small")
        refused(command("mkfs.pkernfs", "-f", path), 1, "mkfs.pkernfs", "small")
    new = tmp_path / "new"
    refused(command("mkfs.pkernfs", "-s", size, new), 1, "mkfs.pkernfs", "bad size")
    assert not new.exists()


def test_mkfs_label(tmp_path: Path, command: Command) -> None:
    for label in ("x" * 65, "\u00e9" * 33, "a\nb"):
        outcome = command("mkfs.pkernfs", "-L", label, "-s", SIZE, tmp_path / "region")
        refused(outcome, 1, "mkfs.pkernfs", "bad label")
    assert list(tmp_path.iterdir()) == []
    label = "\u00e9" * 32
    assert command("mkfs.pkernfs", "-L", label, "-s", SIZE, tmp_path / "region").status == 0
    facts = json.loads(command("pkernfs", "info", "--json", tmp_path / "region").out)
    assert facts["label"] == label


def _ext4(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(1024 + 56)
        file.write(b"\x53\xef")


def _xfs(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(b"XFSB")


def _random(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(os.urandom(64 << 10))


def _one_byte(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(5000)
        file.write(b"x")


def _no_superblock(path: Path) -> None:
    damage(path, layout.SUPERBLOCK_PAGE * layout.PAGE)


def _no_superblocks(path: Path) -> None:
    damage(path, layout.SUPERBLOCK_PAGE * layout.PAGE)
    damage(path, layout.BACKUP_PAGE * layout.PAGE)


FOREIGN = [_ext4, _xfs, _random, _one_byte]


@pytest.mark.parametrize("fill", FOREIGN)
def test_mkfs_other_data(fill: Callable[[Path], None], tmp_path: Path, command: Command) -> None:
    path = tmp_path / "region"
    path.write_bytes(b"")
    os.truncate(path, SIZE)
    fill(path)
    with unchanged(path):
        refused(command("mkfs.pkernfs", path), 1, "mkfs.pkernfs", str(path))
        refused(command("mkfs.pkernfs", "-s", SIZE, path), 1, "mkfs.pkernfs", str(path))
    assert command("mkfs.pkernfs", "-f", path).status == 0
    assert command("fsck.pkernfs", path).status == 0


@pytest.mark.parametrize("harm", [lambda path: None, _no_superblock, _no_superblocks])
def test_mkfs_pkernfs(harm: Callable[[Path], None], region: Path, command: Command) -> None:
    harm(region)
    with unchanged(region):
        refused(command("mkfs.pkernfs", region), 1, "mkfs.pkernfs", str(region))
    assert command("mkfs.pkernfs", "-f", "-L", "new", region).status == 0
    assert json.loads(command("pkernfs", "info", "--json", region).out)["label"] == "new"


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


@contextmanager
def as_nobody() -> Iterator[None]:
    """For root: without its privilege to write everywhere."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)
        importlib.invalidate_caches()  # directories that NOBODY may not search are there


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


# ------------------------------------------------------------------------------- mount


def test_mount_usage(region: Path, command: Command, tmp_path: Path) -> None:
    with unchanged(region):
        for option in ("bogus", "ro=1", "phys_base", "phys_base=1Q", "phys_base=12", "cache=warm"):
            refused(mounting(command, region, tmp_path, option), 1, "pkernfs", option.split("=")[0])
            # ... and in the form that mount(8) uses, before anything goes to the background
            outcome = command("pkernfs", region, tmp_path, "-o", f"rw,dev,{option}")
            refused(outcome, 1, "pkernfs")


def test_mount_point(region: Path, command: Command, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with unchanged(region):
        refused(mounting(command, region, tmp_path / "no"), 32, "pkernfs", "does not exist")
        refused(mounting(command, region, file), 32, "pkernfs", "not a directory")


def test_mount_bad_regions(command: Command, tmp_path: Path) -> None:
    refused(mounting(command, tmp_path / "no", tmp_path), 32, "pkernfs", "No such file")
    refused(mounting(command, tmp_path, tmp_path), 32, "pkernfs", "irectory")
    refused(mounting(command, "/dev/null", tmp_path), 32, "pkernfs", "/dev/null")
    for size in (0, 4096, MIB):
        small = tmp_path / f"small-{size}"
        small.write_bytes(bytes(size))
        with unchanged(small):
            refused(mounting(command, small, tmp_path), 32, "pkernfs")
            refused(mounting(command, small, tmp_path, "mkfs"), 32, "pkernfs", str(small))


@pytest.mark.parametrize("fill", FOREIGN)
@pytest.mark.parametrize("options", ["rw", "mkfs"])
def test_mount_other_data(
    fill: Callable[[Path], None], options: str, command: Command, tmp_path: Path
) -> None:
    path = tmp_path / "region"
    path.write_bytes(b"")
    os.truncate(path, SIZE)
    fill(path)
    with unchanged(path):
        refused(mounting(command, path, tmp_path, options), 32, "pkernfs")


@pytest.mark.parametrize("options", ["rw", "ro", "mkfs"])
def test_mount_never_formats_a_damaged_pkernfs(
    options: str, region: Path, command: Command, tmp_path: Path
) -> None:
    _no_superblocks(region)
    with unchanged(region):
        refused(mounting(command, region, tmp_path, options), 32, "pkernfs")


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


def test_truncated_since_mkfs(region: Path, command: Command, tmp_path: Path) -> None:
    os.truncate(region, SIZE // 2)
    with unchanged(region):
        refused(mounting(command, region, tmp_path), 32, "pkernfs", str(region))
        assert command("fsck.pkernfs", region).status in (4, 8)
        assert command("mkfs.pkernfs", region).status == 1


# ------------------------------------------------------------------------------- fsck.pkernfs


def test_fsck_statuses(region: Path, command: Command) -> None:
    with unchanged(region):
        for options in ([], ["-n"], ["-f"], ["-v"], ["-n", "-f", "-v"]):
            outcome = command("fsck.pkernfs", *options, region)
            assert (outcome.status, outcome.err) == (0, "")
            assert "clean" in outcome.out
    damage(region, layout.SUPERBLOCK_PAGE * layout.PAGE)
    with unchanged(region):
        assert command("fsck.pkernfs", region).status == 4
        assert command("fsck.pkernfs", "-n", region).status == 4
    assert command("fsck.pkernfs", "-y", region).status == 1
    for option in ("-y", "-p", "-a", "-n"):
        assert command("fsck.pkernfs", option, region).status == 0


def test_fsck_json(region: Path, command: Command) -> None:
    report = json.loads(command("fsck.pkernfs", "--json", region).out)
    assert report["problems"] == []
    damage(region, layout.SUPERBLOCK_PAGE * layout.PAGE)
    outcome = command("fsck.pkernfs", "--json", region)
    assert outcome.status == 4
    problems = json.loads(outcome.out)["problems"]
    assert problems
    assert all({"code", "message", "fixed"} <= set(problem) for problem in problems)


@pytest.mark.parametrize("fill", FOREIGN)
@pytest.mark.parametrize("option", ["-n", "-y"])
def test_fsck_other_data(
    fill: Callable[[Path], None], option: str, command: Command, tmp_path: Path
) -> None:
    path = tmp_path / "region"
    path.write_bytes(b"")
    os.truncate(path, SIZE)
    fill(path)
    with unchanged(path):
        refused(command("fsck.pkernfs", option, path), 8, "fsck.pkernfs", str(path))


def test_fsck_bad_regions(command: Command, tmp_path: Path) -> None:
    refused(command("fsck.pkernfs", tmp_path / "no"), 8, "fsck.pkernfs", "No such file")
    refused(command("fsck.pkernfs", tmp_path), 8, "fsck.pkernfs", "irectory")


# ------------------------------------------------------------------------------- info, extents


def test_info(region: Path, command: Command) -> None:
    with unchanged(region):
        text = command("pkernfs", "info", region)
        facts = json.loads(command("pkernfs", "info", "--json", region).out)
    assert (text.status, text.err) == (0, "")
    assert "here" in text.out
    assert facts["region"] == str(region)
    assert facts["mount_points"] == []


def test_info_backup_superblock(region: Path, command: Command) -> None:
    _no_superblock(region)
    with unchanged(region):
        outcome = command("pkernfs", "info", "--json", region)
    assert outcome.status == 0
    assert json.loads(outcome.out)["label"] == "here"
    assert "backup" in outcome.err


def test_info_refuses(command: Command, tmp_path: Path) -> None:
    refused(command("pkernfs", "info", tmp_path), 1, "pkernfs", "directory")
    refused(command("pkernfs", "info", tmp_path / "no"), 1, "pkernfs", "No such file")
    for fill in FOREIGN:
        path = tmp_path / fill.__name__
        path.write_bytes(bytes(SIZE))
        fill(path)
        refused(command("pkernfs", "info", path), 1, "pkernfs", str(path))


def test_extents_refuses(command: Command, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"x")
    refused(command("pkernfs", "extents", file), 1, "pkernfs", "not on a pkernfs mount")
    refused(command("pkernfs", "extents", tmp_path / "no"), 1, "pkernfs", "No such file")


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


def test_documents_have_every_mount_option() -> None:
    text = (Path(__file__).parents[1] / "docs" / "operations.md").read_text()
    assert all(f"`{option.name}" in text for option in MOUNT_OPTIONS)


def test_manual_pages_leave_nothing_unexpanded(pages: dict[str, str]) -> None:
    assert all("@" not in page for page in pages.values())


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


def test_remount_is_refused(command: Command, tmp_path: Path) -> None:
    outcome = mounting(command, tmp_path / "region", tmp_path, "remount,ro")
    refused(outcome, 32, "pkernfs", "cannot remount")
