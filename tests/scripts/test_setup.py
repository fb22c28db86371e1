"""What scripts/setup promises: mount(8), umount and a line of fstab work, in the background."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from pkernfs import layout
from support.superblocks import damage, edit_superblocks

pytestmark = pytest.mark.fuse

MIB = 1 << 20
SECONDS = 20.0


class Place(NamedTuple):
    """A region and a directory to mount it on."""

    region: Path
    mnt: Path


def run(*line: object, status: int = 0) -> subprocess.CompletedProcess[str]:
    """Run a command; its status is as expected."""
    words = [str(word) for word in line]
    done = subprocess.run(
        words, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == status, (words, done.returncode, done.stdout, done.stderr)
    return done


def daemons(place: Place) -> list[int]:
    """Processes that have the region open."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            maps = Path("/proc", pid, "maps").read_text()
        except OSError:
            continue
        if str(place.region) in maps:
            found.append(int(pid))
    return found


def eventually_gone(place: Place) -> None:
    """The daemon ends, within a time that no healthy one needs."""
    deadline = time.monotonic() + SECONDS
    while daemons(place):
        assert time.monotonic() < deadline, "the daemon is still there"
        time.sleep(0.01)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    """An empty pkernfs, not mounted; checked and cleaned up at the end."""
    for name in ("pkernfs", "mkfs.pkernfs", "fsck.pkernfs"):
        assert shutil.which(name), f"{name} is not in PATH: run scripts/setup"
    where = Place(tmp_path / "region", tmp_path / "mnt")
    where.mnt.mkdir()
    run("mkfs.pkernfs", "-s", "64M", where.region)
    try:
        yield where
        while os.path.ismount(where.mnt):
            run("umount", where.mnt)
        eventually_gone(where)
        run("fsck.pkernfs", where.region)
    finally:
        for pid in daemons(where):
            os.kill(pid, signal.SIGKILL)
        subprocess.run(["umount", "-q", "-l", where.mnt], capture_output=True)


def mount(place: Place, *options: str) -> None:
    """Mount with mount(8)."""
    extra = ["-o", ",".join(options)] if options else []
    run("mount", "-t", "fuse.pkernfs", *extra, place.region, place.mnt)


def test_mount_and_umount(place: Place) -> None:
    mount(place)
    (place.mnt / "file").write_text("hello")
    assert os.path.ismount(place.mnt)
    run("umount", place.mnt)
    eventually_gone(place)
    assert not list(place.mnt.iterdir())
    run("pkernfs", "mount", place.region, place.mnt)
    assert (place.mnt / "file").read_text() == "hello"


def test_fstab_line(place: Place) -> None:
    """With the noise that fstab lines have, and a PATH as bare as at boot."""
    fstab = place.region.with_name("fstab")
    options = "rw,noatime,nodev,nofail,noauto,_netdev,x-systemd.requires=x"
    fstab.write_text(f"{place.region} {place.mnt} fuse.pkernfs {options} 0 0\n")
    environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin:/usr/local/bin"}
    line = ["mount", "-T", str(fstab), str(place.mnt)]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    table = Path("/proc/self/mountinfo").read_text().splitlines()
    (entry,) = [words for words in map(str.split, table) if words[4] == str(place.mnt)]
    assert {"rw", "noatime", "nodev"} <= set(entry[5].split(","))
    assert entry[entry.index("-") + 1 :][:2] == ["fuse.pkernfs", str(place.region)]


def test_goes_to_the_background_when_it_answers(place: Place) -> None:
    done = run("pkernfs", place.region, place.mnt, "-o", "rw")
    assert (done.stdout, done.stderr) == ("", "")
    (place.mnt / "at once").touch()
    (daemon,) = daemons(place)
    assert os.getsid(daemon) == daemon  # no terminal's hang-up reaches it
    assert os.readlink(f"/proc/{daemon}/cwd") == "/"
    for fd in range(3):
        assert os.readlink(f"/proc/{daemon}/fd/{fd}") == "/dev/null"


def test_read_only(place: Place) -> None:
    mount(place, "ro")
    with pytest.raises(OSError, match="Read-only"):
        (place.mnt / "file").touch()


def test_unknown_ro_compat_feature_makes_it_read_only(place: Place) -> None:
    """A newer version may have written it so that this one must not write, but may read."""
    mount(place)
    (place.mnt / "file").write_text("kept")
    run("umount", place.mnt)
    eventually_gone(place)
    before = place.region.read_bytes()
    edit_superblocks(place.region, feature_ro_compat=1 << 40)
    mount(place)
    assert (place.mnt / "file").read_text() == "kept"
    with pytest.raises(OSError, match="Read-only"):
        (place.mnt / "new").touch()
    run("umount", place.mnt)
    eventually_gone(place)
    edit_superblocks(place.region, feature_ro_compat=0)
    assert place.region.read_bytes() == before


def test_backup_superblock_is_used_with_a_warning(place: Place) -> None:
    """The warning is seen by whoever mounts, in the background too."""
    damage(place.region, layout.SUPERBLOCK_PAGE * layout.PAGE)
    done = run("mount", "-t", "fuse.pkernfs", place.region, place.mnt)
    assert done.stderr.startswith("pkernfs: ")
    assert done.stderr.count("\n") == 1
    assert "backup" in done.stderr
    (place.mnt / "file").write_text("kept")
    run("umount", place.mnt)
    eventually_gone(place)
    run("fsck.pkernfs", "-y", place.region, status=1)
    done = run("mount", "-t", "fuse.pkernfs", place.region, place.mnt)
    assert done.stderr == ""
    assert (place.mnt / "file").read_text() == "kept"


def test_relative_names(place: Place) -> None:
    """The daemon changes its directory; the mount table must not be wrong afterwards."""
    here = place.region.parent
    line = ["pkernfs", "region", "mnt", "-o", "rw"]
    subprocess.run(line, cwd=here, check=True, timeout=60, capture_output=True)
    facts = json.loads(run("pkernfs", "info", "--json", place.mnt).stdout)
    assert facts["region"] == str(place.region)
    assert facts["mount_points"] == [str(place.mnt)]


def test_failure_is_said_in_the_foreground(place: Place) -> None:
    for region, word in ((place.region.with_name("no"), "No such file"), (place.mnt, "irectory")):
        done = run("mount", "-t", "fuse.pkernfs", region, place.mnt, status=32)
        assert word in done.stderr
        assert "Traceback" not in done.stderr
    done = run("mount", "-t", "fuse.pkernfs", "-o", "bogus", place.region, place.mnt, status=1)
    assert done.stderr == "pkernfs: unknown mount option: bogus\n"
    assert not os.path.ismount(place.mnt)
    assert not daemons(place)


def test_second_mount_is_refused(place: Place, tmp_path: Path) -> None:
    mount(place)
    other = tmp_path / "other"
    other.mkdir()
    done = run("pkernfs", place.region, other, status=32)
    assert "in use" in done.stderr
    assert done.stderr.count("\n") == 1
    spare = tmp_path / "spare"
    run("mkfs.pkernfs", "-s", "16M", spare)
    assert "busy" in run("pkernfs", spare, place.mnt, status=32).stderr
    said = run("pkernfs", place.mnt, other, status=32).stderr
    assert said == (
        f"pkernfs: {place.mnt}: {place.region} is mounted on it: umount it, and name that\n"
    )
    run("mkfs.pkernfs", "-f", place.region, status=1)
    run("fsck.pkernfs", place.region, status=8)
    (place.mnt / "still there").touch()


def test_mkfs_option(place: Place, tmp_path: Path) -> None:
    """Formats what is empty, and mounts what is there."""
    spare = tmp_path / "spare"
    spare.touch()
    os.truncate(spare, 64 * MIB)
    empty = Place(spare, place.mnt)
    run("mount", "-t", "fuse.pkernfs", spare, place.mnt, status=32)
    for _ in range(2):
        mount(empty, "mkfs")
        (place.mnt / "kept").touch()
        run("umount", place.mnt)
        eventually_gone(empty)
    mount(empty, "mkfs")
    assert (place.mnt / "kept").exists()
    run("umount", place.mnt)
    eventually_gone(empty)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_unmount(number: signal.Signals, place: Place) -> None:
    mount(place)
    (place.mnt / "file").write_text("kept")
    (daemon,) = daemons(place)
    os.kill(daemon, number)
    eventually_gone(place)
    assert not os.path.ismount(place.mnt)
    assert json.loads(run("pkernfs", "info", "--json", place.region).stdout)["state"] == "clean"
    mount(place)
    assert (place.mnt / "file").read_text() == "kept"


def test_mount_over_a_dead_one(place: Place) -> None:
    """After SIGKILL the mount is still in the table, and dead; mounting again is enough."""
    mount(place)
    (place.mnt / "file").write_text("kept")
    (daemon,) = daemons(place)
    os.kill(daemon, signal.SIGKILL)
    eventually_gone(place)
    with pytest.raises(OSError, match="connect") as dead:
        os.statvfs(place.mnt)
    assert dead.value.errno in (errno.ENOTCONN, errno.ECONNABORTED)
    facts = json.loads(run("pkernfs", "info", "--json", place.mnt).stdout)
    assert facts["region"] == str(place.region)
    mount(place)
    assert (place.mnt / "file").read_text() == "kept"
    table = Path("/proc/self/mountinfo").read_text().splitlines()
    assert sum(line.split()[4] == str(place.mnt) for line in table) == 1


def test_info_of_a_mount(place: Place) -> None:
    mount(place)
    (place.mnt / "sub").mkdir()
    for target in (place.region, place.mnt, place.mnt / "sub"):
        facts = json.loads(run("pkernfs", "info", "--json", target).stdout)
        assert facts["region"] == str(place.region)
        assert facts["mount_points"] == [str(place.mnt)]
        assert facts["state"] == "mounted"


def test_extents(place: Place) -> None:
    mount(place, "phys_base=0x40000000")
    file = place.mnt / "ram"
    with file.open("wb") as f:
        f.truncate(4 * MIB)
        f.write(b"begin" + bytes(4 * MIB - 8) + b"end")
    answer = json.loads(run("pkernfs", "extents", "--json", file).stdout)
    assert answer["file"] == str(file)
    os.sync()
    with place.region.open("rb") as region:
        content = bytearray(4 * MIB)
        for extent in answer["extents"]:
            assert set(extent) == {"offset", "length", "region_offset", "physical", "segment"}
            assert extent["segment"] is None
            assert extent["physical"] == 0x4000_0000 + extent["region_offset"]
            region.seek(extent["region_offset"])
            start = extent["offset"]
            content[start : start + extent["length"]] = region.read(extent["length"])
    assert content == file.read_bytes()
    assert "0x400000" in run("pkernfs", "extents", file).stdout
    for other in (place.mnt, place.mnt / "iommu"):
        said = run("pkernfs", "extents", other, status=1).stderr
        assert said == f"pkernfs: {other}: no extents: it is a directory\n"
    (place.mnt / "empty").touch()
    answer = json.loads(run("pkernfs", "extents", "--json", place.mnt / "empty").stdout)
    assert answer["extents"] == []
