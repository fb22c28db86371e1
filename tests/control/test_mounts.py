"""Lines of mountinfo: what is mounted, from where, whose, and which mount a path is in."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pkernfs.control import mounts
from pkernfs.control.mounts import (
    FSTYPE,
    Mount,
    beneath,
    canonical_spec,
    mount_at,
    mount_of,
    own_mount,
    refuse_mount_point,
    region_of,
)
from pkernfs.errors import BusyError, InvalidError

LINES = r"""22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
90 22 0:62 / /mnt/a rw,nodev shared:9 master:1 - fuse.pkernfs /dev/shm/a rw,user_id=1000
91 22 0:63 / /mnt/with\040space rw - fuse.pkernfs 512M!1G rw,user_id=0,group_id=0,allow_other
92 91 0:64 / /mnt/with\040space rw - tmpfs tmpfs rw
93 22 259:300 /sub /mnt/back\134slash rw - fuse.other /dev/shm/a rw,group_id=5
"""
A = Mount(os.makedev(0, 62), "/mnt/a", FSTYPE, "/dev/shm/a", 1000, 90, 22)
SPACE = Mount(os.makedev(0, 63), "/mnt/with space", FSTYPE, "512M!1G", 0, 91, 22)


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The mounts that this process sees."""
    path = tmp_path / "mountinfo"
    path.write_text(LINES)
    found = mounts.read_mounts(str(path))
    monkeypatch.setattr(mounts, "read_mounts", lambda: found)
    return path


def test_lines_are_read_in_order(table: Path) -> None:
    found = mounts.read_mounts()
    assert found[0] == Mount(os.makedev(8, 1), "/", "ext4", "/dev/sda1", None, 22, 1)
    assert found[1:3] == [A, SPACE]
    assert found[4] == Mount(
        os.makedev(259, 300), r"/mnt/back\slash", "fuse.other", "/dev/shm/a", None, 93, 22
    )


def test_names_may_be_any_bytes(tmp_path: Path) -> None:
    path = tmp_path / "mountinfo"
    path.write_bytes(b"90 22 0:62 / /mnt/\xff\r\x0c rw - fuse.pkernfs /dev/shm/\xc3\xbc\\011 rw\n")
    (mount,) = mounts.read_mounts(str(path))
    assert os.fsencode(mount.mount_point) == b"/mnt/\xff\r\x0c"
    assert mount.source == "/dev/shm/ü\t"


def test_the_topmost_mount_counts(table: Path) -> None:
    assert mount_at("/mnt/a/../a") == A
    topmost = mount_at("/mnt/with space")
    assert topmost is not None
    assert topmost.fstype == "tmpfs"
    assert mount_at("/mnt/b") is None


def test_a_daemon_finds_its_own_below_another(table: Path) -> None:
    assert own_mount("/mnt/with space", "512M!1G") == SPACE
    assert own_mount("/mnt/with space", "512M!2G") is None
    assert own_mount("/mnt/a", "512M!1G") is None


def test_the_mounts_of_a_region(table: Path) -> None:
    assert mounts.mounts_of_region("/dev/shm/a") == ["/mnt/a"], "another file system's is not"
    assert mounts.mounts_of_region("/dev/shm/b") == []


def test_a_mount_point_is_no_region_to_check(table: Path) -> None:
    for path in ("/mnt/a", "/mnt/../mnt/a"):
        with pytest.raises(BusyError, match="/dev/shm/a is mounted on it: umount it, and name"):
            refuse_mount_point(path)
    refuse_mount_point("/mnt/with space")
    refuse_mount_point("1G!1G")


def test_a_region_or_where_it_is_mounted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mount = Mount(7, str(tmp_path), FSTYPE, "512M!1G", 0)
    (tmp_path / "region").touch()
    assert region_of(str(tmp_path / "region")) == str(tmp_path / "region")
    with pytest.raises(InvalidError, match="it is a directory and not on a pkernfs mount"):
        region_of(str(tmp_path))
    (tmp_path / "base").touch()
    assert region_of(str(tmp_path)) == str(tmp_path / "base"), "the region in a directory"
    monkeypatch.setattr(mounts, "mount_of", lambda path: mount)
    assert region_of(str(tmp_path)) == "512M!1G", "anywhere in it"
    monkeypatch.setattr(mounts, "mount_of", lambda path: pytest.fail("its daemon may be dead"))
    monkeypatch.setattr(mounts, "mount_at", lambda path: mount)
    assert region_of(str(tmp_path)) == "512M!1G"


def test_a_path_is_in_a_mount_by_its_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = Mount(os.stat(tmp_path).st_dev, "/mnt/a", FSTYPE, "/dev/shm/a", 0)
    monkeypatch.setattr(mounts, "read_mounts", lambda: [A, here])
    assert mount_of(str(tmp_path)) == here
    monkeypatch.setattr(mounts, "read_mounts", lambda: [A, here._replace(fstype="tmpfs")])
    assert mount_of(str(tmp_path)) is None
    with pytest.raises(FileNotFoundError):
        mount_of(str(tmp_path / "missing"))


def test_a_region_has_one_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "region").touch()
    monkeypatch.chdir(tmp_path)
    assert canonical_spec("region") == canonical_spec("./region") == str(tmp_path / "region")


def test_what_nothing_covers_is_its_own_path(table: Path, tmp_path: Path) -> None:
    for path in (str(tmp_path), "/mnt/a", "/mnt/with space", "/no/such"):
        with beneath(path) as below:
            assert below == path
