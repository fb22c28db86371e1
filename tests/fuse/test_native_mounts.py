"""Native files of real mounts: names that lead to segments, also after the daemon's end."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pkernfs.control.mounts import beneath, mount_at, read_mounts
from pkernfs.errors import PermissionDeniedError, RegionError
from pkernfs.fuse.native_mounts import NativeMounts
from pkernfs.quantities import Ino, PageNo
from pkernfs.region.region import Region
from support.damage import Damage, Populated
from support.mounted_pool import MountedPool, huge_pool, native_of, tmpfs
from support.mounting import MIB, run_as, run_pkernfs, wait_until

pytestmark = pytest.mark.fuse

SEED = int(os.environ.get("PKERNFS_SEED") or random.randrange(1 << 32))


def native(mounted: MountedPool, name: str = "f", size: int = 4 * MIB) -> tuple[Path, Path]:
    """A native file, and its segment's."""
    path = mounted.file(name, size)
    segment = native_of(path)
    switch(path, "on")
    return path, segment


def pkernfs(*words: object) -> subprocess.CompletedProcess[str]:
    return run_pkernfs(*map(str, words))


def switch(path: Path, way: str) -> None:
    done = pkernfs("native", path, way)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def is_native(path: Path, segment: Path) -> bool:
    return os.path.samefile(path, segment)


def covers(mounted: MountedPool) -> list[str]:
    """What is mounted below the mount point."""
    place = f"{mounted.path}/"
    return [m.mount_point for m in read_mounts() if m.mount_point.startswith(place)]


def store(path: Path) -> None:
    with path.open("r+b", buffering=0) as opened, mmap.mmap(opened.fileno(), 0) as memory:
        memory[7:10] = b"new"


def is_refused(path: Path) -> None:
    with pytest.raises(PermissionError):
        path.open("r+b")


@pytest.fixture
def mounted() -> Iterator[MountedPool]:
    with MountedPool(options="allow_other") as mounted:
        yield mounted


def test_the_name_is_the_segment(mounted: MountedPool) -> None:
    path, segment = native(mounted)
    assert is_native(path, segment)
    with path.open("r+b") as opened, mmap.mmap(opened.fileno(), 0) as memory:
        memory[5:9] = b"word"
        assert segment.read_bytes()[5:9] == b"word"
    switch(path, "off")
    assert not is_native(path, segment)
    assert not covers(mounted)
    with path.open("rb") as file:
        assert file.read(9)[5:] == b"word"


def test_its_owner_opens_it_and_nobody_else(mounted: MountedPool) -> None:
    path = mounted.file("f", 2 * MIB)
    os.chown(path, 12345, 12345)
    os.chmod(path, 0o600)
    segment = native_of(path)
    switch(path, "on")
    run_as(12345, lambda: store(path))
    assert segment.read_bytes()[7:10] == b"new"
    run_as(12346, lambda: is_refused(path))


def test_chmod_of_the_name_is_for_the_segment_alone(mounted: MountedPool) -> None:
    path, segment = native(mounted)
    path.chmod(0o666)
    assert segment.stat().st_mode & 0o777 == 0o666
    switch(path, "off")
    assert segment.stat().st_mode & 0o777 == path.stat().st_mode & 0o777 == 0o644


def test_only_root_sees_below(mounted: MountedPool) -> None:
    path, _ = native(mounted)

    def look() -> None:
        with pytest.raises(PermissionDeniedError, match="only root sees below"), beneath(str(path)):
            pass

    run_as(12345, look)


def test_every_name_is_covered(mounted: MountedPool) -> None:
    path = mounted.file("f", 2 * MIB)
    (mounted.path / "a dir").mkdir()
    other = mounted.path / "a dir" / "with \n in it"
    os.link(path, other)
    segment = native_of(path)
    switch(other, "on")
    assert is_native(path, segment)
    assert is_native(other, segment)
    switch(path, "off")
    assert not covers(mounted)


def test_it_is_native_at_the_next_mount(mounted: MountedPool) -> None:
    path, segment = native(mounted)
    subprocess.run(["umount", "-R", mounted.path], check=True)
    mounted.wait()
    assert not covers(mounted)
    mounted.start()
    wait_until(lambda: is_native(path, segment), "the name")
    done = subprocess.run(["umount", mounted.path], capture_output=True, text=True, check=False)
    assert "busy" in done.stderr
    assert mounted.daemon is not None
    mounted.daemon.send_signal(signal.SIGTERM)
    mounted.wait()
    assert not covers(mounted)


def test_a_mapping_outlives_a_killed_daemon(mounted: MountedPool) -> None:
    path, segment = native(mounted)
    with path.open("r+b") as opened, mmap.mmap(opened.fileno(), 0) as memory:
        assert mounted.daemon is not None
        mounted.daemon.kill()
        mounted.daemon.wait()
        memory[:3] = b"old"
        assert is_native(path, segment)  # the name goes on leading there
        subprocess.run(["umount", "-l", mounted.path], check=True)
        assert not covers(mounted)
        mounted.start()
        wait_until(lambda: is_native(path, segment), "the name")
        assert covers(mounted) == [str(path)]
        memory[3:6] = b"new"
        assert path.read_bytes()[:6] == b"oldnew"
    switch(path, "off")
    assert not covers(mounted)


def test_commands_find_the_file_below(mounted: MountedPool) -> None:
    path, segment = native(mounted)
    for words in (["path", path], ["extents", path], ["holders", path]):
        done = pkernfs(*words)
        assert done.returncode == 0, done.stderr
    assert pkernfs("path", path).stdout.strip() == str(segment)
    assert pkernfs("qemu-args", path).returncode == 0
    assert json.loads(pkernfs("path", "--json", path).stdout)["native"] is True
    assert f"{path} (segment 1, {segment}, native): nobody" in pkernfs("holders", path).stdout
    done = pkernfs("segment", path, "off")
    assert (done.returncode, "it is native" in done.stderr) == (1, True)


def test_huge_pages() -> None:
    with huge_pool(4 * MIB) as mounted:
        path, segment = native(mounted)
        with path.open("r+b") as opened, mmap.mmap(opened.fileno(), 0) as memory:
            memory[5:9] = b"word"
        switch(path, "off")
        with path.open("rb") as file:
            assert file.read(9)[5:] == b"word"
        assert native_of(path) == segment


def mounts_of(mounted: MountedPool) -> NativeMounts:
    here = mount_at(str(mounted.path))
    assert here is not None
    return NativeMounts(str(mounted.path), here.device)


def test_no_link_leads_elsewhere(mounted: MountedPool) -> None:
    """Users own the directories on the way, and may put links in their place."""
    path = mounted.file("f", 2 * MIB)
    segment, ino = native_of(path), Ino(path.stat().st_ino)
    mounts = mounts_of(mounted)
    with tmpfs() as outside:
        (outside / "f").touch()
        (mounted.path / "d").symlink_to(outside)
        (mounted.path / "link").symlink_to(outside / "f")
        for name in ("/d/f", "/link", "/no", "/../f", "/f/f", "/iommu"):
            with pytest.raises(RegionError):
                mounts.cover(name, ino, str(segment))
        assert not os.path.samefile(outside / "f", segment)
    with pytest.raises(RegionError, match="No such file"):
        mounts.cover("/f", ino, "/no/such/segment")
    with pytest.raises(RegionError, match="/no/such/mount: No such file"):
        NativeMounts("/no/such/mount", 1).cover("/f", ino, str(segment))
    other = mounted.file("other", 2 * MIB)
    with pytest.raises(RegionError, match="something else is there"):
        mounts.cover("/other", ino, str(segment))
    assert stat.S_ISREG(other.stat().st_mode)
    assert not covers(mounted)


def test_mounts_of_others_stay(mounted: MountedPool) -> None:
    path, _ = native(mounted)
    (mounted.path / "d").mkdir()
    with tmpfs() as other:
        subprocess.run(["mount", "--bind", other, mounted.path / "d"], check=True)
        switch(path, "off")
        assert covers(mounted) == [f"{mounted.path}/d"]
        subprocess.run(["umount", mounted.path / "d"], check=True)


def test_a_name_is_kept_while_it_is_covered(mounted: MountedPool) -> None:
    path, segment = native(mounted)
    for change in (path.unlink, lambda: path.rename(mounted.path / "g")):
        with pytest.raises(OSError, match="busy"):
            change()
    (mounted.path / "d").mkdir()
    (mounted.path / "d").rename(mounted.path / "e")
    switch(path, "off")
    shutil.rmtree(mounted.path / "e")
    path.unlink()
    mounted.wait_until_gone(segment)


def test_a_lost_segment_leaves_the_file(mounted: MountedPool) -> None:
    path, segment = native(mounted)
    other, _ = native(mounted, "other")
    with beneath(str(path)) as below:
        ino = os.stat(below).st_ino
    mounted.damaged = True
    mounted.kill()
    segment.unlink()
    mounted.start()
    wait_until(lambda: covers(mounted) == [str(other)], "the other name")
    with pytest.raises(OSError, match="Input/output"):
        path.read_bytes()
    switch(path, "off")
    subprocess.run(["umount", "-R", mounted.path], check=True)
    mounted.wait()
    assert f"inode {ino}: not native: segment-1: lost" in mounted.words()


def test_its_size_is_kept_where_it_is_not_covered(mounted: MountedPool) -> None:
    """In another mount namespace, where the names lead to the file; not even root cuts it."""
    path, segment = native(mounted)
    for size in ("0", "2M", "8M"):
        cut = f'umount "$0" && truncate -s {size} "$0"'
        done = subprocess.run(
            ["unshare", "-m", "sh", "-c", cut, path], capture_output=True, text=True, check=False
        )
        assert "resource busy" in done.stderr
    assert is_native(path, segment)
    switch(path, "off")
    os.truncate(path, 0)
    mounted.wait_until_gone(segment)


def test_a_damaged_directory_keeps_no_mount_from_others(mounted: MountedPool) -> None:
    path = mounted.file("f", 2 * MIB)
    (mounted.path / "d").mkdir()
    os.link(path, mounted.path / "d" / "f")
    segment = native_of(path)
    switch(path, "on")
    for number in range(200):  # more than an inode has room for: a page of its own
        (mounted.path / "d" / f"name {number} {'x' * 100}").touch()
    directory = Ino((mounted.path / "d").stat().st_ino)
    subprocess.run(["umount", "-R", mounted.path], check=True)
    mounted.wait()
    with Region.open(str(mounted.region), write=True) as region:
        damage = Damage(Populated(region))
        page = PageNo(damage.inode(directory).body)
        damage.flip(page, 777)
    mounted.start()
    wait_until(lambda: is_native(path, segment), "the name")
    assert f"{path} (segment 1, {segment}, native)" in pkernfs("holders", mounted.path).stdout
    assert covers(mounted) == [str(path)]
    switch(path, "off")
    with pytest.raises(OSError, match="clean"):
        os.listdir(mounted.path / "d")
    mounted.unmount()
    with Region.open(str(mounted.region), write=True) as region:
        Damage(Populated(region)).flip(page, 777)


def test_a_name_is_removed_where_it_is_not_covered(mounted: MountedPool) -> None:
    """In another mount namespace; that uncovers it here, and who has the segment keeps it."""
    path, segment = native(mounted)
    with path.open("r+b") as opened, mmap.mmap(opened.fileno(), 0) as memory:
        remove = 'umount "$0" && rm "$0"'
        subprocess.run(["unshare", "-m", "sh", "-c", remove, path], check=True)
        assert not covers(mounted)
        assert not path.exists()
        memory[:3] = b"new"
    mounted.wait_until_gone(segment)


def test_no_name_leads_to_a_segment_that_is_destroyed(mounted: MountedPool) -> None:
    """Whoever has mounted it there; the name of a device would soon be another's."""
    path, segment = native(mounted)
    other = mounted.file("other")
    subprocess.run(["mount", "--bind", segment, other], check=True)
    remove = 'umount "$0" && rm "$0"'
    subprocess.run(["unshare", "-m", "sh", "-c", remove, path], check=True)
    mounted.wait_until_gone(segment)
    assert not covers(mounted)
    other.unlink()


def test_a_daemon_is_killed_while_it_changes_a_name(mounted: MountedPool) -> None:
    """The next mount has the names of the file as the file says, and no bind mount too many."""
    print(f"PKERNFS_SEED={SEED}")
    moments = random.Random(SEED)
    path, segment = native(mounted)
    for _ in range(6):
        way = "off" if is_native(path, segment) else "on"
        command = [sys.executable, *mounted.program, "native", str(path), way]
        with subprocess.Popen(command, stderr=subprocess.DEVNULL) as asking:
            with contextlib.suppress(subprocess.TimeoutExpired):
                asking.wait(moments.uniform(0, 0.6))
            mounted.kill()
            asking.wait()
        mounted.start()
        told = json.loads(pkernfs("path", "--json", path).stdout)["native"]
        wait_until(lambda told=told: is_native(path, segment) == told, "the name")  # type: ignore[misc]
        assert covers(mounted) == [str(path)] * told
