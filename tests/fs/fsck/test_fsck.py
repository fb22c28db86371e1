"""fsck as a whole: a sound region, progress, and damage at random."""

from __future__ import annotations

import ast
import contextlib
import inspect
import random
import re
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pkernfs.dma.mount import mount_filesystem
from pkernfs.errors import PkernfsError, ReadOnlyError
from pkernfs.fs import fsck
from pkernfs.fs.fsck import Code, check
from pkernfs.layout import PAGE, ROOT_INO, SUPERBLOCK_PAGE
from pkernfs.quantities import PageNo, RegionOff, pages_from
from pkernfs.region.region import Region
from support.checking import MemoryFile
from support.damage import REGION_BYTES, Damage, Populated, populate
from support.repairs import Pristine, assert_mounts, read_all


def test_populated_region_is_clean(damage: Damage) -> None:
    report = check(damage.region, repair=False, verify_zero=True)
    assert report.clean
    assert not report.notes
    assert report.summary["inodes"] > 150
    assert_mounts(damage.region)


def test_repair_of_a_read_only_region() -> None:
    with MemoryFile(REGION_BYTES) as file:
        with file.open() as region:
            populate(region, names=2, attributes=1)
        with file.open(write=False) as region:
            assert check(region, repair=False).clean
            with pytest.raises(ReadOnlyError):
                check(region, repair=True)


def test_progress_only_grows(damage: Damage) -> None:
    seen: list[float] = []
    check(damage.region, repair=True, progress=lambda done, total: seen.append(done / total))
    assert seen == sorted(seen)
    assert 0 <= seen[0] <= seen[-1] <= 1


def outcome(region: Region) -> None:
    """Whatever the region holds: a refusal, or a repaired file system that mounts."""
    try:
        found = check(region, repair=False)
    except PkernfsError:
        return
    report = check(region, repair=True)
    assert report.counts == found.counts
    if report.counts[Code.NO_ROOM]:
        return
    again = check(region, repair=False)
    assert not again.problems, [str(p) for p in again.problems]
    assert not again.notes, [str(p) for p in again.notes]
    fs = mount_filesystem(region)
    read_all(fs)
    fs.unmount()
    assert check(region, repair=False).clean


def metadata(image: bytes) -> list[PageNo]:
    """Numbers of the pages that look like metadata."""
    pages = pages_from(SUPERBLOCK_PAGE, len(image) // PAGE)
    return [n for n in pages if image[n * PAGE : n * PAGE + 2] == b"PK"]


# Which metadata page (modulo their number), offset, how much or which word.
HITS = st.lists(
    st.tuples(st.integers(0, 1 << 16), st.integers(0, PAGE - 1), st.integers(0, 300)),
    min_size=1,
    max_size=6,
)


def use_damaged(region: Region) -> None:
    """Mount a damaged region, read all of it, change it: nothing but a PkernfsError comes of it."""
    with contextlib.suppress(PkernfsError):
        fs = mount_filesystem(region)
        with contextlib.suppress(PkernfsError):
            read_all(fs)
        for name in [entry[0] for entry in fs.readdir(ROOT_INO, 0)]:
            with contextlib.suppress(PkernfsError):
                fs.unlink(ROOT_INO, name)
        with contextlib.suppress(PkernfsError):
            ino = fs.create(ROOT_INO, b"after", stat.S_IFREG | 0o644, 0, 0).ino
            fs.write(ino, 0, b"x" * 20000)
            fs.setxattr(ino, b"user.after", b"y" * 3000)
        fs.unmount()


@pytest.mark.slow("each example is three checks and a mount")
@given(hits=HITS, mount=st.booleans())
def test_random_damage(pristine: Pristine, hits: list[tuple[int, int, int]], mount: bool) -> None:
    """Flipped bits and overwritten ranges: mount and fsck end well, or with a clear error."""
    pages = metadata(pristine[0])
    with Region.anonymous(REGION_BYTES) as region:
        region.copy_in(RegionOff(0), pristine[0])
        damage = Damage(Populated(region, pristine[1]))
        for choice, offset, length in hits:
            page = pages[choice % len(pages)]
            if length:
                damage.smash(page, offset, min(length, PAGE - offset))
            else:
                damage.flip(page, 8 * offset + choice % 8)
        if mount:
            use_damaged(region)
        outcome(region)


@pytest.mark.slow("each example is three checks and a mount")
@given(hits=HITS, mount=st.booleans())
def test_random_damage_with_good_checksums(
    pristine: Pristine, hits: list[tuple[int, int, int]], mount: bool
) -> None:
    """Somebody who can compute a checksum gets no further."""
    pages = metadata(pristine[0])
    with Region.anonymous(REGION_BYTES) as region:
        region.copy_in(RegionOff(0), pristine[0])
        damage = Damage(Populated(region, pristine[1]))
        for choice, at, how in hits:
            page = pages[choice % len(pages)]
            offset = at // 8 * 8
            with damage.edit(page) as buffer:
                if how < 150:
                    word = [0, 1, page, 1 << 63, (1 << 64) - 1, at][how % 6]
                    buffer[offset : offset + 8] = word.to_bytes(8, "little")
                else:
                    other = damage.page(pages[how % len(pages)])
                    end = min(offset + 64, PAGE)
                    buffer[offset:end] = other[offset:end]
        if mount:
            use_damaged(region)
        outcome(region)


@pytest.mark.slow("each example is three checks and a mount")
@given(seed=st.integers(0, 1 << 32), keep=st.booleans())
def test_random_bytes(pristine: Pristine, seed: int, keep: bool) -> None:
    """A region of noise, with or without a superblock in front."""
    noise = random.Random(seed)
    with Region.anonymous(REGION_BYTES) as region:
        region.copy_in(RegionOff(0), noise.randbytes(4 << 20))
        if keep:
            region.copy_in(RegionOff(0), pristine[0][:PAGE])
            if noise.random() < 0.5:
                region.copy_in(RegionOff(PAGE), pristine[0][PAGE : 2 * PAGE])
        outcome(region)


# ------------------------------------------------------------------------------ the passes


def passes_in_order() -> list[str]:
    """The modules that fsck calls, in the order of the first call of each."""
    tree = ast.parse(inspect.getsource(fsck._run))
    calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    calls.sort(key=lambda called: (called.lineno, called.col_offset))
    found = [getattr(fsck, ast.unparse(called).split(".")[0], None) for called in calls]
    names = [module.__name__ for module in found if inspect.ismodule(module)]
    return list(dict.fromkeys(name.rpartition(".")[2] for name in names))


def test_passes_are_numbered_in_the_order_in_which_they_run() -> None:
    order = passes_in_order()
    numbers: dict[int, str] = {}
    for path in Path(fsck.__file__).parent.glob("*.py"):
        if match := re.match(r'"""Pass (\d+): ', path.read_text()):
            assert int(match[1]) not in numbers, path.name
            numbers[int(match[1])] = path.stem
    assert numbers == dict(enumerate(order, 1))
    listed = " ".join((fsck.__doc__ or "").split())
    assert f"comes to them: {', '.join(order)}." in listed


def test_modules_that_are_no_pass_are_named() -> None:
    others = {path.stem for path in Path(fsck.__file__).parent.glob("*.py")}
    others -= {*passes_in_order(), "__init__", "survey"}
    listed = re.search(r"what they work with: (.*)\.$", " ".join((fsck.__doc__ or "").split()))
    assert listed
    assert set(re.findall(r"\w+(?=[ ,]|$)", re.sub(r"\(.*?\)", "", listed[1]))) == others
