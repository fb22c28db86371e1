"""A pkernfs as the upper layer of overlayfs, as containers have it: what is seen, and what is kept.

What overlayfs keeps in an upper layer is in Documentation/filesystems/overlayfs.rst: a whiteout (a
device node 0:0) for a name that was removed, the attribute trusted.overlay.opaque for a directory
that was made anew, trusted.overlay.redirect for one that was renamed, origin and index for what was
copied up.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.fuse

from support.mounting import Mounted, is_mounted, libc  # noqa: E402

RENAME_EXCHANGE = 2
OPTIONS = ["redirect_dir=off,index=off", "redirect_dir=on,index=on,metacopy=on"]


class Overlay:
    """A lower layer on tmpfs, an upper one on a pkernfs, and the merged tree."""

    def __init__(self, options: str) -> None:
        self.options = options
        self.pkernfs = Mounted(options="allow_other,suid")
        self.lower = self.pkernfs.directory / "lower"
        self.path = self.pkernfs.directory / "merged"
        self.upper = self.pkernfs.path / "upper"
        self.work = self.pkernfs.path / "work"

    def start(self) -> None:
        """Mount what is there.

        :raises AssertionError: overlayfs refuses the layers.
        """
        layers = f"lowerdir={self.lower},upperdir={self.upper},workdir={self.work}"
        command = ["mount", "-t", "overlay", "overlay", "-o", f"{layers},{self.options}"]
        done = subprocess.run([*command, str(self.path)], capture_output=True, text=True)
        assert not done.returncode, done.stderr

    def stop(self) -> None:
        subprocess.run(["umount", str(self.path)], check=True)

    def again(self) -> None:
        """Both mounts go, and come again."""
        self.stop()
        self.pkernfs.unmount()
        self.pkernfs.start()
        self.start()

    def after_kill(self) -> None:
        """The daemon is killed, and all mounted again."""
        assert self.pkernfs.daemon is not None
        self.pkernfs.daemon.kill()
        self.pkernfs.daemon.wait()
        subprocess.run(["umount", "-l", str(self.path)], check=True)
        subprocess.run(["umount", "-l", str(self.pkernfs.path)], check=True)
        self.pkernfs.start()
        self.start()


@contextlib.contextmanager
def overlay(options: str) -> Iterator[Overlay]:
    it = Overlay(options)
    with it.pkernfs:
        for directory in (it.lower, it.path, it.upper, it.work):
            directory.mkdir()
        populate(it.lower)
        it.start()
        try:
            yield it
        finally:
            if is_mounted(it.path):
                it.stop()


def populate(lower: Path) -> None:
    (lower / "file").write_bytes(b"lower content")
    (lower / "file").chmod(0o640)
    os.chown(lower / "file", 3, 4)
    os.utime(lower / "file", ns=(10**18, 10**18 + 1))
    os.setxattr(lower / "file", "trusted.kept", b"attribute")
    os.link(lower / "file", lower / "linked")
    (lower / "directory").mkdir()
    (lower / "directory" / "inside").write_bytes(b"inside")
    (lower / "directory" / "deep").mkdir()
    (lower / "directory" / "deep" / "down").write_bytes(b"down")
    (lower / "empty").mkdir()
    os.symlink("file", lower / "symlink")
    os.mkfifo(lower / "fifo")


@pytest.fixture(params=OPTIONS)
def any_overlay(request: pytest.FixtureRequest) -> Iterator[Overlay]:
    with overlay(request.param) as it:
        yield it


def names(path: Path) -> set[str]:
    return {entry.name for entry in path.iterdir()}


def is_whiteout(path: Path) -> bool:
    found = path.lstat()
    return stat.S_ISCHR(found.st_mode) and found.st_rdev == 0


ALL = {"file", "linked", "directory", "empty", "symlink", "fifo"}


def test_a_removed_name_is_a_whiteout(any_overlay: Overlay) -> None:
    merged, upper = any_overlay.path, any_overlay.upper
    assert names(merged) == ALL
    for name in ("file", "symlink", "fifo"):
        (merged / name).unlink()
    (merged / "empty").rmdir()
    assert names(merged) == {"linked", "directory"}
    assert all(is_whiteout(upper / name) for name in ("file", "symlink", "fifo", "empty"))
    any_overlay.again()
    assert names(merged) == {"linked", "directory"}
    (merged / "file").write_bytes(b"new")
    assert (merged / "file").read_bytes() == b"new"
    assert not is_whiteout(upper / "file")
    any_overlay.after_kill()
    assert names(merged) == {"linked", "directory", "file"}
    assert (merged / "file").read_bytes() == b"new"
    assert (merged / "linked").read_bytes() == b"lower content"


def test_a_directory_that_is_made_anew_is_opaque(any_overlay: Overlay) -> None:
    merged, upper = any_overlay.path, any_overlay.upper
    directory = merged / "directory"
    with pytest.raises(OSError, match="not empty"):
        directory.rmdir()
    (directory / "inside").unlink()
    (directory / "deep" / "down").unlink()
    (directory / "deep").rmdir()
    directory.rmdir()
    assert is_whiteout(upper / "directory")
    directory.mkdir()
    assert os.getxattr(upper / "directory", "trusted.overlay.opaque") == b"y"
    assert names(directory) == set()
    (directory / "new").write_bytes(b"n")
    any_overlay.again()
    assert names(directory) == {"new"}


def test_a_change_copies_up_all_that_a_file_is(any_overlay: Overlay) -> None:
    merged, lower = any_overlay.path, any_overlay.lower
    with (merged / "file").open("r+b") as file:
        file.seek(6)
        file.write(b"CHANGED")
    found = (merged / "file").stat()
    assert (stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid) == (0o640, 3, 4)
    assert found.st_atime_ns >= 10**18
    assert os.getxattr(merged / "file", "trusted.kept") == b"attribute"
    assert (merged / "file").read_bytes() == b"lower CHANGED"
    assert (lower / "file").read_bytes() == b"lower content"
    (merged / "directory" / "deep" / "down").chmod(0o600)
    any_overlay.again()
    assert (merged / "file").read_bytes() == b"lower CHANGED"
    assert (merged / "directory" / "deep" / "down").read_bytes() == b"down"
    assert stat.S_IMODE((merged / "directory" / "deep" / "down").stat().st_mode) == 0o600


def test_a_rename_leaves_a_whiteout(any_overlay: Overlay) -> None:
    merged, upper = any_overlay.path, any_overlay.upper
    (merged / "file").rename(merged / "directory" / "inside")
    assert is_whiteout(upper / "file")
    assert (merged / "directory" / "inside").read_bytes() == b"lower content"
    (merged / "new").write_bytes(b"new")
    (merged / "new").rename(merged / "linked")
    assert not (upper / "new").exists(), "there is no such name below"
    any_overlay.again()
    assert names(merged) == ALL - {"file"}
    assert (merged / "linked").read_bytes() == b"new"
    assert (merged / "directory" / "inside").read_bytes() == b"lower content"


def test_an_exchange(any_overlay: Overlay) -> None:
    merged = any_overlay.path
    a, b = os.fsencode(merged / "file"), os.fsencode(merged / "directory" / "inside")
    assert libc.renameat2(-100, a, -100, b, RENAME_EXCHANGE) == 0, os.strerror(ctypes.get_errno())
    any_overlay.again()
    assert (merged / "file").read_bytes() == b"inside"
    assert (merged / "directory" / "inside").read_bytes() == b"lower content"


def test_a_renamed_directory_is_redirected() -> None:
    with overlay("redirect_dir=on") as it:
        (it.path / "directory").rename(it.path / "moved")
        assert is_whiteout(it.upper / "directory")
        assert os.getxattr(it.upper / "moved", "trusted.overlay.redirect") == b"directory"
        it.after_kill()
        assert names(it.path) == ALL - {"directory"} | {"moved"}
        assert (it.path / "moved" / "deep" / "down").read_bytes() == b"down"
        (it.path / "moved" / "inside").unlink()
        assert names(it.path / "moved") == {"deep"}


def test_without_redirects_a_directory_cannot_move() -> None:
    """Programs copy it then: mv(1) does."""
    with overlay("redirect_dir=off") as it:
        with pytest.raises(OSError, match="cross-device") as caught:
            (it.path / "directory").rename(it.path / "moved")
        assert caught.value.errno == errno.EXDEV
        subprocess.run(["mv", it.path / "directory", it.path / "moved"], check=True)
        assert (it.path / "moved" / "deep" / "down").read_bytes() == b"down"


def test_hard_links_stay_one_file_with_an_index() -> None:
    with overlay("index=on") as it:
        with (it.path / "linked").open("ab") as file:
            file.write(b", and more")
        assert (it.path / "file").read_bytes() == b"lower content, and more"
        numbers = {(it.path / name).stat().st_ino for name in ("file", "linked")}
        assert len(numbers) == 1
        it.again()
        assert (it.path / "file").read_bytes() == b"lower content, and more"
        (it.path / "file").unlink()
        assert (it.path / "linked").read_bytes() == b"lower content, and more"


def test_a_number_outlives_the_copy() -> None:
    with overlay("xino=on,index=on,nfs_export=on") as it:
        before = (it.path / "file").stat().st_ino
        (it.path / "file").chmod(0o600)
        assert (it.path / "file").stat().st_ino == before
        it.again()
        assert (it.path / "file").stat().st_ino == before


def test_a_file_without_a_name_gets_one(any_overlay: Overlay) -> None:
    merged = any_overlay.path
    fd = os.open(merged / "directory", os.O_TMPFILE | os.O_RDWR, 0o640)
    try:
        os.write(fd, b"made without a name")
        link = libc.linkat(-100, b"/proc/self/fd/%d" % fd, -100, os.fsencode(merged / "n"), 0x400)
        assert link == 0, os.strerror(ctypes.get_errno())
    finally:
        os.close(fd)
    any_overlay.again()
    assert (merged / "n").read_bytes() == b"made without a name"


def test_mappings_reach_the_upper_layer(any_overlay: Overlay) -> None:
    path = any_overlay.path / "file"
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapping:
        mapping[:5] = b"UPPER"
        mapping.flush()
    assert path.read_bytes() == b"UPPER content"
    any_overlay.again()
    assert path.read_bytes() == b"UPPER content"


def test_what_is_open_while_its_name_goes(any_overlay: Overlay) -> None:
    path = any_overlay.path / "file"
    with path.open("r+b") as file:
        path.unlink()
        file.write(b"still")
        file.seek(0)
        assert file.read() == b"still content"


def test_a_container_image_is_unpacked(any_overlay: Overlay, tmp_path: Path) -> None:
    """tar over a lower layer that has the names already, then all of it removed."""
    tree = tmp_path / "tree"
    for i in range(20):
        (tree / f"d{i}").mkdir(parents=True)
        for j in range(10):
            (tree / f"d{i}" / f"f{j}").write_bytes(b"%d" % (i * j))
    (tree / "directory").mkdir()
    (tree / "directory" / "inside").write_bytes(b"from the archive")
    archive = tmp_path / "archive.tar"
    subprocess.run(["tar", "-C", tree, "-cf", archive, "."], check=True)
    subprocess.run(["tar", "-C", any_overlay.path, "-xf", archive], check=True)
    assert (any_overlay.path / "directory" / "inside").read_bytes() == b"from the archive"
    assert (any_overlay.path / "d19" / "f9").read_bytes() == b"171"
    subprocess.run(["rm", "-r", *any_overlay.path.iterdir()], check=True)
    assert names(any_overlay.path) == set()
    assert names(any_overlay.upper) == ALL
    assert all(is_whiteout(any_overlay.upper / name) for name in ALL)
