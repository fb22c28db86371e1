"""Where a caller's path leads, from its root and directories, with its permissions and not ours."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pkernfs.plain.caller import Caller, own_identity
from pkernfs.plain.lookup import find, may_access, open_native
from pkernfs.plain.opens import (
    AT_FDCWD,
    RESOLVE_BENEATH,
    RESOLVE_IN_ROOT,
    RESOLVE_NO_SYMLINKS,
    Opening,
)
from support.mounting import child

NOBODY = own_identity()._replace(uid=65534, gid=65534, groups=frozenset({65534}), capabilities=0)
CAP_DAC_OVERRIDE = 1 << 1
_LOOP, _OUTSIDE = "Too many levels of symbolic links", "Invalid cross-device link"
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A directory ``tree`` with ``sub/file`` in it, and links; beside it another ``sub/file``."""
    tree = tmp_path / "tree"
    for directory in (tree, tmp_path):
        (directory / "sub").mkdir(parents=True)
        (directory / "sub" / "file").write_text(directory.name)
    (tree / "link").symlink_to("sub/file")
    (tree / "absolute").symlink_to("/sub/file")
    return tree


def us() -> Caller:
    """This thread, as somebody else's."""
    return Caller(threading.get_native_id())


def found(
    caller: Caller, path: object, flags: int = 0, directory: int = AT_FDCWD, how: int = 0
) -> str:
    """The text of what a path leads to."""
    fd = find(caller, Opening(directory, 0, flags, how), os.fsencode(str(path)))
    try:
        return Path(f"/proc/self/fd/{fd}").read_text()
    finally:
        os.close(fd)


@contextmanager
def waiting(prepare: Callable[[], object]) -> Iterator[Caller]:
    """A process that has done something, and waits."""
    done, told = os.pipe()

    def work() -> None:
        prepare()
        os.write(told, b"1")
        signal.pause()

    try:
        with child(work) as pid:
            os.close(told)
            assert os.read(done, 1), "it has ended"
            yield Caller(pid)
    finally:
        os.close(done)


def test_a_path_starts_where_the_caller_says(tree: Path) -> None:
    assert found(us(), tree / "sub" / "file") == "tree"
    directory = os.open(tree / "sub", os.O_RDONLY)
    try:
        for path in ("file", "../link", "../sub/../sub/file"):
            assert found(us(), path, directory=directory) == "tree"
        with pytest.raises(FileNotFoundError):
            found(us(), "", directory=directory)
        with pytest.raises(FileNotFoundError):
            found(us(), "none", directory=directory)
    finally:
        os.close(directory)


def test_the_callers_working_directory(tree: Path) -> None:
    with waiting(lambda: os.chdir(tree / "sub")) as caller:
        assert found(caller, "file") == "tree"
        assert found(caller, "../link") == "tree"
        assert found(caller, tree.parent / "sub/file") == tree.parent.name
        with pytest.raises(FileNotFoundError):
            found(us(), "file")


def test_a_link_at_the_end_is_not_followed_if_not_wanted(tree: Path) -> None:
    assert found(us(), tree / "link") == "tree"
    fd = find(us(), Opening(AT_FDCWD, 0, os.O_NOFOLLOW), os.fsencode(tree / "link"))
    assert os.readlink("", dir_fd=fd) == "sub/file"
    os.close(fd)
    with pytest.raises(OSError, match=_LOOP):
        found(us(), tree / "link", how=RESOLVE_NO_SYMLINKS)


def test_magic_links_are_the_kernels(tree: Path) -> None:
    """They would be those of the supervisor."""
    fd = os.open(tree / "sub" / "file", os.O_RDONLY)
    try:
        for path in (f"/proc/self/fd/{fd}", f"/dev/fd/{fd}", f"/proc/self/cwd/{tree}/link"):
            with pytest.raises(OSError, match=_LOOP):
                found(us(), path)
    finally:
        os.close(fd)


def test_what_openat2_asks_for(tree: Path) -> None:
    directory = os.open(tree, os.O_RDONLY)
    try:
        assert found(us(), "link", directory=directory, how=RESOLVE_BENEATH) == "tree"
        assert found(us(), "absolute", directory=directory, how=RESOLVE_IN_ROOT) == "tree"
        assert found(us(), "/absolute", directory=directory, how=RESOLVE_IN_ROOT) == "tree"
        for path in ("../sub/file", "absolute", str(tree / "link")):
            with pytest.raises(OSError, match=_OUTSIDE):
                found(us(), path, directory=directory, how=RESOLVE_BENEATH)
    finally:
        os.close(directory)


@as_root
def test_another_root(tree: Path) -> None:
    def enter() -> None:
        os.chroot(tree)
        os.chdir("/sub")

    with waiting(enter) as caller:
        for path in ("/sub/file", "/absolute", "/link", "/../../sub/file", "file"):
            assert found(caller, path) == "tree"
        # From the working directory we would come to what is beside its root.
        for path in ("../../sub/file", "../absolute"):
            with pytest.raises(OSError, match=_OUTSIDE):
                found(caller, path)


@as_root
@pytest.mark.fuse
def test_another_mount_namespace(tree: Path) -> None:
    mount = f"mount --bind {tree.parent}/sub {tree}/sub && echo && read x"
    process = subprocess.Popen(
        ["unshare", "-m", "sh", "-c", mount],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=tree,
    )
    with process:
        assert process.stdin
        assert process.stdout
        process.stdout.readline()
        assert found(us(), tree / "sub/file") == "tree"
        assert found(Caller(process.pid), tree / "sub/file") == tree.parent.name
        assert found(Caller(process.pid), "sub/file") == tree.parent.name
        process.stdin.close()


@as_root
def test_the_callers_permissions_count(tree: Path) -> None:
    file = os.fsencode(tree / "sub" / "file")
    opening = Opening(AT_FDCWD, 0, os.O_RDWR)
    for directory in [tree, *tree.parents[:-1]]:
        directory.chmod(directory.stat().st_mode | 0o1)
    os.chown(file, NOBODY.uid, NOBODY.gid)
    os.chmod(file, 0o600)
    fd = find(us(), opening, file, NOBODY)
    assert may_access(NOBODY, fd, os.R_OK | os.W_OK)
    os.close(open_native(NOBODY, os.fsdecode(file), opening))
    os.chmod(file, 0o400)
    assert not may_access(NOBODY, fd, os.R_OK | os.W_OK)
    assert may_access(NOBODY, fd, os.R_OK)
    assert may_access(None, fd, os.R_OK | os.W_OK)
    os.close(fd)
    with pytest.raises(PermissionError):
        open_native(NOBODY, os.fsdecode(file), opening)
    os.chmod(tree / "sub", 0o700)
    with pytest.raises(PermissionError):
        find(us(), opening, file, NOBODY)
    # Ours are back each time.
    os.close(find(us(), opening, file))
    assert own_identity().may_all_of(own_identity()._replace(capabilities=CAP_DAC_OVERRIDE))


@as_root
def test_capabilities_count_and_groups(tree: Path) -> None:
    """Root in a container that lacks them is stopped by modes; a group opens what it may."""
    file = tree / "sub" / "file"
    opening = Opening(AT_FDCWD, 0, os.O_RDONLY)
    os.chown(file, 7, 8)
    file.chmod(0o040)
    ours = own_identity()
    os.close(open_native(ours, str(file), opening))
    with pytest.raises(PermissionError):
        open_native(ours._replace(capabilities=0), str(file), opening)
    os.close(open_native(ours._replace(capabilities=CAP_DAC_OVERRIDE), str(file), opening))
    in_group = NOBODY._replace(groups=frozenset({8, 9}))
    for directory in [tree / "sub", tree, *tree.parents[:-1]]:
        directory.chmod(directory.stat().st_mode | 0o1)
    os.close(open_native(in_group, str(file), opening))
    assert own_identity() == ours


@as_root
def test_who_cannot_be_somebody_else_does_not_try(tree: Path) -> None:
    def try_it() -> None:
        with pytest.raises(PermissionError):
            find(us(), Opening(AT_FDCWD, 0, 0), b"/", NOBODY._replace(uid=5))
        assert own_identity().uid == NOBODY.uid

    with child(try_it, NOBODY.uid) as pid:
        _, status = os.waitpid(pid, 0)
    assert status == 0


def test_a_native_path_is_no_link(tree: Path) -> None:
    with pytest.raises(OSError, match=_LOOP):
        open_native(None, str(tree / "link"), Opening(AT_FDCWD, 0, os.O_RDONLY))
