"""mkfs.pkernfs: what it formats, and what it refuses, leaving every byte as it was."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pkernfs import layout
from pkernfs.errors import RegionError
from pkernfs.region.region import Region
from support.command_lines import (
    FOREIGN,
    MIB,
    SIZE,
    Command,
    no_superblock,
    no_superblocks,
    refused,
    unchanged,
)
from support.huge_pages import huge_pages

BAD_SIZES = ["", "G", "1.5G", "-1", "+1", "1 G", "1GB", "1iB", "0x", "0xZ", "1e9", "ten", "\u0661"]


@pytest.mark.parametrize(
    "text", [*BAD_SIZES, "9223372036854775808", "8388608T", "9" * 5000, "0x" + "9" * 5000]
)
def test_size_nonsense(text: str, command: Command, tmp_path: Path) -> None:
    outcome = command("mkfs.pkernfs", f"-s{text}" if text else "-s=", tmp_path / "region")
    refused(outcome, 1, "mkfs.pkernfs", "bad size")
    assert not (tmp_path / "region").exists()


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
def test_mkfs_directory(args: list[str], command: Command) -> None:
    refused(command("mkfs.pkernfs", *args, "/proc"), 1, "mkfs.pkernfs", "/proc: no pool")


def test_mkfs_of_what_is_nearly_a_range(
    tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    hint = "(did you mean 1G!4G?)"
    refused(command("mkfs.pkernfs", "1G%4G"), 1, "mkfs.pkernfs", f"no such file {hint}")
    refused(
        command("fsck.pkernfs", "1G$4G"), 8, "fsck.pkernfs", f"No such file or directory {hint}"
    )
    refused(command("pkernfs", "info", r"1G\!4G"), 1, "pkernfs", hint)


def test_which_condition_a_size_fails(tmp_path: Path, command: Command) -> None:
    at = tmp_path / "region"
    small = command("mkfs.pkernfs", "-s1M", at)
    refused(small, 1, "mkfs.pkernfs", "bad size: got 1M, expected 8 MiB or more")
    assert "multiple" not in small.err
    odd = command("mkfs.pkernfs", "-s0x2000001", at)
    refused(odd, 1, "mkfs.pkernfs", "expected a multiple of 4096 bytes")
    refused(command("mkfs.pkernfs", "-s1GB", at), 1, "mkfs.pkernfs", "(did you mean 1G?)")


def test_mkfs_through_a_link_to_nothing(tmp_path: Path, command: Command) -> None:
    """hugetlbfs and tmpfs are empty after a boot; the link on a disk is still there."""
    link = tmp_path / "link"
    link.symlink_to("gone")
    why = f"it is a link to {tmp_path}/gone, which is not there"
    for args in ([], ["-s16M"]):
        refused(command("mkfs.pkernfs", *args, link), 1, "mkfs.pkernfs", f"cannot create: {why}")
    refused(command("fsck.pkernfs", link), 8, "fsck.pkernfs", f"cannot open: {why}")
    refused(command("pkernfs", "info", link), 1, "pkernfs", "gone: cannot open: No such")
    assert os.listdir(tmp_path) == ["link"]


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


@pytest.mark.parametrize("harm", [lambda path: None, no_superblock, no_superblocks])
def test_mkfs_pkernfs(harm: Callable[[Path], None], region: Path, command: Command) -> None:
    harm(region)
    with unchanged(region):
        refused(command("mkfs.pkernfs", region), 1, "mkfs.pkernfs", str(region))
    assert command("mkfs.pkernfs", "-f", "-L", "new", region).status == 0
    assert json.loads(command("pkernfs", "info", "--json", region).out)["label"] == "new"


def test_what_is_printed(tmp_path: Path, command: Command) -> None:
    path = tmp_path / "region"
    assert command("mkfs.pkernfs", "-s", SIZE, path).out == f"{path}: 16 MiB\n"
    outcome = command("mkfs.pkernfs", "-f", "-L", "here", path)
    assert outcome == (0, f"{path}: 16 MiB, label here\n", "")


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("512M!1G", "-s: 512M!1G has a size of its own"),
        ("/dev/dax0.0", "/dev/dax0.0: no such device"),
        ("none", "none: no pkernfs= on the kernel command line"),
    ],
)
def test_a_size_for_what_has_one_or_is_not_there(spec: str, says: str, command: Command) -> None:
    refused(command("mkfs.pkernfs", "-s", SIZE, spec), 1, "mkfs.pkernfs", says)


@pytest.mark.parametrize("before", [None, 0, SIZE // 2])
def test_a_failure_leaves_the_file_as_it_was(
    before: int | None, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that was made or made larger for it."""
    path = tmp_path / "region"
    if before is not None:
        path.write_bytes(b"kept" * (before // 4))

    def fail(*args: object, **kwargs: object) -> None:
        assert path.stat().st_size == SIZE
        raise RegionError("no memory")

    monkeypatch.setattr("pkernfs.fs.mkfs.make_filesystem", fail)
    with unchanged(path):
        outcome = command("mkfs.pkernfs", "-f", "-s", SIZE, path)
        refused(outcome, 1, "mkfs.pkernfs", f"{path}: no memory")


@pytest.mark.usefixtures("impatient")
def test_a_file_in_use_is_not_extended(region: Path, command: Command) -> None:
    with Region.open(str(region), write=True) as held, unchanged(region):
        held.serving(True)
        for force in ([], ["-f"]):
            outcome = command("mkfs.pkernfs", *force, "-s", 2 * SIZE, region)
            refused(outcome, 1, "mkfs.pkernfs", "in use" if force else "-f extends")


# ------------------------------------------------------------------------------ a directory


@pytest.fixture
def pool() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="pkernfs-test.", dir="/dev/shm") as directory:
        yield Path(directory)


def test_a_directory_gets_a_base_range_and_a_pool(pool: Path, command: Command) -> None:
    outcome = command("mkfs.pkernfs", "-L", "here", "-s", SIZE, pool)
    assert (outcome.status, outcome.err) == (0, "")
    assert os.listdir(pool) == ["base"]
    assert (pool / "base").stat().st_size == SIZE
    facts = json.loads(command("pkernfs", "info", "--json", pool).out)
    assert facts["label"] == "here"
    assert facts["features"]["incompat"] == layout.FEATURE_SEGMENTS
    assert command("fsck.pkernfs", f"{pool}/").status == 0
    with unchanged(pool / "base"):
        refused(command("mkfs.pkernfs", "-s", SIZE, pool), 1, "mkfs.pkernfs", "label 'here'")


def test_a_directory_that_is_no_pool(pool: Path, command: Command) -> None:
    refused(command("mkfs.pkernfs", pool), 1, "mkfs.pkernfs", "-s SIZE makes one")
    pool.chmod(0o777)
    outcome = command("mkfs.pkernfs", "-s", SIZE, pool)
    refused(outcome, 1, "mkfs.pkernfs", str(pool), "others can write to it")
    assert not os.listdir(pool)


def test_a_hugetlbfs_with_too_small_a_size(command: Command) -> None:
    """``mount -o size=`` less than the base range: one line, and nothing is left."""
    with huge_pages(SIZE) as huge:
        place = huge / "quota"
        place.mkdir()
        words = ["-t", "hugetlbfs", "-o", f"size={SIZE // 2},mode=711", "none", str(place)]
        subprocess.run(["mount", *words], check=True)
        try:
            for region in (f"{place}/", place / "region"):
                outcome = command("mkfs.pkernfs", "-s", SIZE, region)
                refused(outcome, 1, "mkfs.pkernfs", "cannot map: Cannot allocate memory")
                assert not os.listdir(place)
        finally:
            subprocess.run(["umount", place], check=True)


def test_segments_without_their_base_range_are_not_removed_unasked(
    pool: Path, command: Command
) -> None:
    for number in (10, 9):
        (pool / f"segment-{number}").write_bytes(b"a guest")
    (pool / "other").write_bytes(b"a file")
    outcome = command("mkfs.pkernfs", "-s", SIZE, pool)
    refused(outcome, 1, "mkfs.pkernfs", "it holds segment-9 of a pkernfs and 1 more; -f removes")
    assert len(os.listdir(pool)) == 3
    assert command("mkfs.pkernfs", "-f", "-s", SIZE, pool).status == 0
    assert sorted(os.listdir(pool)) == ["base", "other"]
