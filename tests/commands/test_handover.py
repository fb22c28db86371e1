"""``pkernfs handover`` on real mounts: who is in the way, what is refused, what is told after."""

from __future__ import annotations

import errno
import json
import mmap
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pkernfs.control import client
from pkernfs.control.protocol import Abort, Commit, Freeze, Frozen, MakeManifest, WriteManifest
from pkernfs.control.wire import Call, request_line
from pkernfs.dma.mount import mount_filesystem
from pkernfs.errors import BusyError, InvalidError, PermissionDeniedError
from pkernfs.quantities import Ino, RegionOff
from pkernfs.region.region import Region
from support.control import answer_to, socket_of
from support.mounted_pool import MountedPool, native_of
from support.mounting import (
    _PROGRAM,
    Mapper,
    Mounted,
    child,
    own_mount_namespace,
    run_as,
    run_pkernfs,
    wait_until,
)

pytestmark = pytest.mark.fuse

MIB = 1 << 20
ENDS = "it ends with this kernel; nothing here survives a kexec"
FORCED = re.compile(rf"pkernfs: forced, although: \S+: {ENDS}\n")


@pytest.fixture
def mounted() -> Iterator[Mounted]:
    with Mounted(64 * MIB, "allow_other") as m:
        (m.path / "ram").write_bytes(os.urandom(5 * MIB))
        (m.path / "dir").mkdir()
        (m.path / "dir" / "small").write_bytes(b"small")
        yield m


def handover(*words: str) -> subprocess.CompletedProcess[str]:
    """Hand over, although the region is on tmpfs; what it said, but for that."""
    done = run_pkernfs("handover", "--force", *words)
    said = [line for line in done.stderr.splitlines(keepends=True) if not FORCED.fullmatch(line)]
    done.stderr = "".join(said)
    return done


def hand_over(m: Mounted, *words: str) -> dict[str, Any]:
    done = handover("--json", *words, str(m.path))
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def info(m: Mounted) -> dict[str, Any]:
    done = run_pkernfs("info", "--json", str(m.path))
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def verified(m: Mounted) -> dict[str, Any]:
    """What the daemon has found, once it has looked at everything."""
    wait_until(lambda: info(m)["verification"]["state"] == "done", "the verification")
    found: dict[str, Any] = info(m)["verification"]
    return found


def place(m: Mounted, path: str) -> RegionOff:
    """Region offset of a file's first byte."""
    done = run_pkernfs("extents", "--json", str(m.path / path))
    return RegionOff(json.loads(done.stdout)["extents"][0]["region_offset"])


def scribble(m: Mounted, offset: RegionOff, data: bytes) -> None:
    with Region.open(str(m.region), write=True) as region:
        region.copy_in(offset, data)


def refused(work: Callable[[], object]) -> None:
    with pytest.raises(OSError, match="Read-only") as failure:
        work()
    assert failure.value.errno == errno.EROFS


# ---------------------------------------------------------------------- the way of it


def test_frozen_until_the_next_mount(mounted: Mounted) -> None:
    path = mounted.path
    found = hand_over(mounted)
    assert found["number"] == 1
    assert found["inodes"] == 5
    assert found["digest_bytes"] == 0
    refused(lambda: (path / "new").write_bytes(b"x"))
    refused(lambda: (path / "ram").write_bytes(b"x"))
    refused(lambda: os.close(os.open(path / "ram", os.O_RDWR)))
    refused(lambda: (path / "dir" / "small").unlink())
    refused(lambda: os.setxattr(path / "ram", "user.a", b"b"))
    refused(lambda: os.utime(path / "ram"))
    refused(lambda: (path / "new").mkdir())
    assert (path / "dir" / "small").read_bytes() == b"small"
    assert info(mounted)["state"] == "frozen"
    assert info(mounted)["handover"]["number"] == 1
    mounted.unmount()
    mounted.start()
    (path / "new").write_bytes(b"x")
    after = info(mounted)
    assert after["state"] == "mounted"
    assert after["handover"] is None
    assert after["arrival"] == "remount"
    assert after["history"][0]["result"] == "metadata unchanged"
    assert after["history"][0]["gap_ns"] > 0
    assert after["verification"]["changes"] == []
    mounted.unmount()
    assert "remount: mounted " in mounted.words()


def test_abort(mounted: Mounted) -> None:
    assert "there is no handover to undo" in handover("--abort", str(mounted.path)).stderr
    for _ in range(2):
        hand_over(mounted, "--digest")
        again = handover(str(mounted.path))
        assert again.returncode == 1
        assert "handed over already; pkernfs handover --abort" in again.stderr
        done = handover("--abort", str(mounted.path))
        assert (done.returncode, done.stderr) == (0, "")
        (mounted.path / "dir" / "small").write_bytes(b"small")
        assert info(mounted)["state"] == "mounted"
    assert not info(mounted)["history"]


def test_a_frozen_one_survives_its_daemon(mounted: Mounted) -> None:
    hand_over(mounted, "--digest")
    mounted.kill()
    mounted.start()
    assert verified(mounted)["changes"] == []
    assert info(mounted)["history"][0]["result"] == "unchanged"


def test_tables_are_frozen_as_well() -> None:
    with Mounted(64 * MIB, "phys_base=0x40000000") as m:
        file, domain = m.path / "ram", m.path / "iommu" / "dom-0"
        file.write_bytes(bytes(4 * MIB))
        assert run_pkernfs("iommu", "create", str(m.path)).returncode == 0
        domain.touch()
        os.truncate(domain, 2 * MIB)
        assert run_pkernfs("iommu", "map", str(domain), "0", str(file)).returncode == 0
        hand_over(m, "--digest")
        for words in (
            ("iommu", "map", str(domain), "0x40000000", str(file)),
            ("iommu", "unmap", str(domain), "0", "2M"),
            ("iommu", "attach", str(domain), "0000:00:05.0"),
        ):
            done = run_pkernfs(*words)
            assert done.returncode == 1, words
            assert (
                "Read-only" in done.stderr or "frozen" in done.stderr or "read-only" in done.stderr
            )
        at = place(m, "ram")
        m.unmount()
        m.start()
        assert verified(m)["changes"] == []
        hand_over(m, "--digest")
        m.unmount()
        scribble(m, at, b"by a device")
        m.start()
        (change,) = verified(m)["changes"]
        assert change["path"] == "/ram"
        assert change["what"] == (
            "bytes 0x0..0x200000 (dom-0 maps it at iova 0x0: a device may write there)"
        )


# ---------------------------------------------------------------------- who is in the way


def test_open_for_writing_is_named(mounted: Mounted) -> None:
    file = mounted.path / "dir" / "small"

    def hold() -> None:
        fd = os.open(file, os.O_WRONLY)
        os.write(write_end, b"1")
        signal.pause()
        os.close(fd)

    read_end, write_end = os.pipe()
    with child(hold) as pid:
        os.read(read_end, 1)
        done = handover(str(mounted.path))
        assert done.returncode == 1
        comm = Path(f"/proc/{pid}/comm").read_text().strip()
        assert done.stderr == (
            f"pkernfs: {mounted.path}: open for writing: {file} by process {pid} ({comm})\n"
        )
        (mounted.path / "new").write_bytes(b"nothing is frozen")
    os.close(read_end)
    os.close(write_end)
    hand_over(mounted)


def test_open_for_reading_is_nobody_s_business(mounted: Mounted) -> None:
    with open(mounted.path / "ram", "rb") as file:
        hand_over(mounted)
        assert len(file.read()) == 5 * MIB


def test_a_mapping_is_named_and_what_it_wrote_is_in(mounted: Mounted) -> None:
    ram = mounted.path / "ram"
    with Mapper(ram, 5 * MIB) as mapper:
        mapper.store(MIB, b"stored through a mapping")
        mapper.tell("close")
        done = handover(str(mounted.path))
        assert done.returncode == 1
        assert f"{ram} by process" in done.stderr
        mapper.end()
    hand_over(mounted, "--digest")
    mounted.unmount()
    assert mounted.in_region(b"stored through a mapping")
    mounted.start()
    assert verified(mounted)["changes"] == []


def test_a_read_only_mapping_may_stay(mounted: Mounted) -> None:
    with open(mounted.path / "ram", "rb") as file:
        memory = mmap.mmap(file.fileno(), 0, mmap.MAP_SHARED, mmap.PROT_READ)
    hand_over(mounted)
    assert len(memory[: 2 * MIB]) == 2 * MIB
    memory.close()


def test_who_maps_the_region_is_warned_of(mounted: Mounted) -> None:
    with open(mounted.region, "r+b") as file:
        memory = mmap.mmap(file.fileno(), 4096)
    done = handover("--digest", str(mounted.path))
    assert done.returncode == 0
    assert f"process {os.getpid()} (" in done.stderr
    assert "maps the region itself" in done.stderr
    memory.close()
    handover("--abort", str(mounted.path))
    assert handover("--digest", str(mounted.path)).stderr == ""


# ---------------------------------------------------------------------- interrupted, and hostile


def test_an_interrupted_handover_thaws(mounted: Mounted) -> None:
    for _ in range(3):
        lease = client.stream(str(mounted.path), Freeze())
        frozen = next(lease)
        assert isinstance(frozen, Frozen)
        assert frozen.number == 1
        refused(lambda: (mounted.path / "new").write_bytes(b"x"))
        with pytest.raises(BusyError, match="another handover is under way"):
            next(client.stream(str(mounted.path), Freeze()))
        with pytest.raises(BusyError, match="under way"):
            client.call(str(mounted.path), Abort())
        made = client.call(str(mounted.path), MakeManifest(100_000))
        assert made.ino
        lease.close()
        wait_until(lambda: info(mounted)["state"] == "mounted", "no state changed")
        wait_until(lambda: _writes(mounted), "the thaw")


def _writes(m: Mounted) -> bool:
    try:
        (m.path / "probe").write_bytes(b"x")
    except OSError:
        return False
    return True


def test_a_region_that_ends_with_this_kernel(mounted: Mounted) -> None:
    """Nothing is frozen; with --force it is said all the same."""
    done = run_pkernfs("handover", str(mounted.path))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"pkernfs: {mounted.path}: {mounted.region}: {ENDS}\n"
    assert _writes(mounted)
    done = run_pkernfs("handover", "--force", str(mounted.path))
    assert done.returncode == 0
    assert done.stderr == f"pkernfs: forced, although: {mounted.region}: {ENDS}\n"
    assert not _writes(mounted)


def test_sigkill_to_the_command(mounted: Mounted) -> None:
    """At some instant of it: frozen with a record, or thawed."""
    for delay in range(12):
        command = [
            sys.executable,
            "-c",
            _PROGRAM,
            "handover",
            "--force",
            "--digest",
            str(mounted.path),
        ]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        if delay:
            wait_until(lambda p=process: _has_socket(p.pid), "its start")  # type: ignore[misc]
            os.sched_yield()
        process.kill()
        process.communicate()
        frozen = info(mounted)["state"] == "frozen"
        if frozen:
            assert handover("--abort", str(mounted.path)).returncode == 0
        wait_until(lambda: _writes(mounted), "the thaw")


def _has_socket(pid: int) -> bool:
    try:
        links = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]
    except OSError:
        return True
    return any(link.startswith("socket:") for link in links)


def test_unmounting_amid_a_handover(mounted: Mounted) -> None:
    lease = client.stream(str(mounted.path), Freeze())
    next(lease)
    mounted.unmount()
    with pytest.raises(client.NoDaemonError):
        next(lease)
    assert info_of_region(mounted)["state"] == "clean"


def info_of_region(m: Mounted) -> dict[str, Any]:
    done = run_pkernfs("info", "--json", str(m.region))
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize(
    "request_", [MakeManifest(4096), WriteManifest(Ino(3), 0, b""), Commit(Ino(0), 0, 0)]
)
def test_nothing_without_a_freeze(mounted: Mounted, request_: Call[Any]) -> None:
    with pytest.raises(InvalidError, match="no freeze is under way"):
        client.call(str(mounted.path), request_)


@pytest.mark.parametrize("value", [-1, 1 << 64, "x", None, 1.5, True, [1]])
def test_bad_numbers_are_refused(mounted: Mounted, value: Any) -> None:
    lease = client.stream(str(mounted.path), Freeze())
    next(lease)
    requests: list[Call[Any]] = [
        MakeManifest(value),
        WriteManifest(Ino(3), value, b""),
        Commit(value, 0, 0),
    ]
    for request in requests:
        with pytest.raises(InvalidError, match="bad "):
            client.call(str(mounted.path), request)
    line = request_line(WriteManifest(Ino(3), 0, b"x")).replace(b'"eA=="', b'"!!"')
    assert "base64" in answer_to(socket_of(mounted.path), line)["error"]
    lease.close()


def test_another_user_cannot(mounted: Mounted) -> None:
    path = str(mounted.path)

    def ask() -> None:
        with pytest.raises(PermissionDeniedError):
            next(client.stream(path, Freeze()))

    run_as(1234, ask)
    (mounted.path / "new").write_bytes(b"x")


def test_elsewhere(tmp_path: Path) -> None:
    done = handover(str(tmp_path))
    assert done.returncode == 1
    assert done.stderr == f"pkernfs: {tmp_path}: not on a pkernfs mount\n"


def test_a_read_only_mount_has_nothing_to_hand_over() -> None:
    with Mounted(16 * MIB, "ro") as m:
        done = handover(str(m.path))
        assert done.returncode == 1
        assert "read-only file system" in done.stderr


def test_damage_is_not_handed_over(mounted: Mounted) -> None:
    (mounted.path / "victim").mkdir()
    (mounted.path / "victim" / "name").write_bytes(b"x")
    mounted.unmount()
    with Region.open(str(mounted.region), write=False) as region:
        fs = mount_filesystem(region, read_only=True)
        at = fs.inode(fs.lookup(Ino(1), b"victim").ino).body * 4096
        before = region.read(RegionOff(at + 100), 16)
    mounted.start()
    with open(mounted.region, "r+b") as file:
        file.seek(at + 100)
        file.write(b"\xff" * 16)
    done = handover(str(mounted.path))
    assert done.returncode == 1
    assert "not handed over: " in done.stderr
    assert f"at {at:#x}" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    with open(mounted.region, "r+b") as file:
        file.seek(at + 100)
        file.write(before)
    hand_over(mounted)


# ---------------------------------------------------------------------- afterwards


@pytest.mark.parametrize("options", ["", "verify"])
def test_changed_bytes_are_found_and_the_file_is_named(mounted: Mounted, options: str) -> None:
    at = place(mounted, "ram")
    small = place(mounted, "dir/small")
    found = hand_over(mounted, "--digest")
    assert found["digest_bytes"] >= 5 * MIB
    mounted.unmount()
    scribble(mounted, RegionOff(at + 4 * MIB + 7), b"scribbled")
    scribble(mounted, small, b"S")
    mounted.options = options
    mounted.start()
    changes = verified(mounted)["changes"]
    assert sorted(change["path"] for change in changes) == ["/dir/small", "/ram"]
    assert changes[0]["what"] or changes[1]["what"]
    by_path = {change["path"]: change["what"] for change in changes}
    assert by_path["/ram"] == "bytes 0x400000..0x600000"
    assert info(mounted)["history"][0]["result"] == "changed"
    assert info(mounted)["history"][0]["changed"] == 2
    assert (mounted.path / "dir" / "small").read_bytes() == b"Small"
    (mounted.path / "new").write_bytes(b"the others can be used")
    text = run_pkernfs("info", str(mounted.path)).stdout
    assert "changed: /ram: bytes 0x400000..0x600000\n" in text
    mounted.unmount()
    assert "changed since the handover: /ram: bytes 0x400000..0x600000" in mounted.words()


# ---------------------------------------------------------------------- segments


@pytest.fixture
def pool() -> Iterator[MountedPool]:
    with MountedPool(options="allow_other") as m:
        yield m


def guest(m: MountedPool, name: str, size: int) -> Path:
    """A file whose segment holds random bytes; the path of the segment."""
    native = native_of(m.file(name, size))
    with native.open("r+b") as file:
        file.write(os.urandom(size))
    return native


def flip(native: Path, offset: int) -> None:
    with native.open("r+b") as file:
        (byte,) = os.pread(file.fileno(), 1, offset)
        os.pwrite(file.fileno(), bytes([byte ^ 1]), offset)


@pytest.mark.parametrize("options", ["allow_other", "allow_other,verify"])
def test_segments_are_compared(pool: MountedPool, options: str) -> None:
    """A changed one is named by its file, a lost one is said to be lost, the others are right."""
    natives = [guest(pool, f"ram{number}", 5 * MIB) for number in range(4)]
    (pool.path / "flat").write_bytes(b"flat")
    assert hand_over(pool, "--digest")["digest_bytes"] > 20 * MIB
    pool.unmount()
    flip(natives[1], 3 * MIB)
    natives[2].unlink()
    pool.damaged = True
    pool.options = options
    pool.start()
    found = verified(pool)
    assert found["changes"] == [{"path": "/ram1", "what": "bytes 0x200000..0x400000"}]
    lost = "segment-3: lost: there is no file of that name"
    assert found["lost"] == [{"path": "/ram2", "why": lost}]
    assert found["not_verified"] == 0
    text = run_pkernfs("info", str(pool.path)).stdout
    assert "changed: /ram1: bytes 0x200000..0x400000\n" in text
    assert f"lost: /ram2: {lost}\n" in text
    words = pool.ended()
    assert "changed since the handover: /ram1: bytes 0x200000..0x400000" in words
    assert f"lost: /ram2: {lost}" in words


def test_segments_that_are_as_they_were(pool: MountedPool) -> None:
    """They may be read, mapped and owned by others: only their bytes count."""
    native = guest(pool, "ram", 5 * MIB)
    sparse = native_of(pool.file("sparse", 256 * MIB))
    assert (pool.path / "ram").read_bytes()[:10] == native.read_bytes()[:10]
    done = hand_over(pool, "--digest")
    assert done["digest_bytes"] < 10 * MIB
    assert done["not_digested"] == 0
    assert sparse.stat().st_blocks == 0
    pool.kill()
    pool.start()
    assert verified(pool)["changes"] == verified(pool)["lost"] == []
    assert info(pool)["history"][0]["result"] == "unchanged"
    assert sparse.stat().st_blocks == 0


def test_a_cut_segment_keeps_nobody_from_a_kexec(pool: MountedPool) -> None:
    native = guest(pool, "ram", 5 * MIB)
    guest(pool, "other", 2 * MIB)
    pool.damaged = True
    os.truncate(native, 2 * MIB)
    done = handover("--digest", str(pool.path))
    assert done.returncode == 0
    assert done.stderr == (
        f"pkernfs: {pool.path}: /ram: no digests: segment-1: lost: it was cut: got 2097152 bytes, "
        "expected 6291456 or more\n"
    )
    assert f"{pool.path}: files without digests, for they could not be read: 1\n" in done.stdout
    pool.unmount()
    pool.start()
    found = verified(pool)
    assert found["changes"] == []
    assert [file["path"] for file in found["lost"]] == ["/ram"]


def test_who_maps_a_segment_is_warned_of(pool: MountedPool) -> None:
    """Its owner needs no open file in the mount; the handover goes on."""
    native = guest(pool, "ram", 2 * MIB)
    guest(pool, "other", 2 * MIB)
    with native.open("r+b") as file:
        memory = mmap.mmap(file.fileno(), 0)
    done = handover("--digest", str(pool.path))
    assert done.returncode == 0
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"pkernfs: {pool.path}: process {os.getpid()} (")
    assert line.endswith(
        ") maps the memory of /ram: what it changes from now on differs from the digests"
    )
    memory[5] ^= 255
    memory.close()
    pool.unmount()
    pool.start()
    assert [change["path"] for change in verified(pool)["changes"]] == ["/ram"]


def test_in_the_background(mounted: Mounted, tmp_path: Path) -> None:
    """mount without -f says what it has found before it returns."""
    hand_over(mounted, "--digest")
    at = place(mounted, "ram")
    mounted.unmount()
    scribble(mounted, at, b"scribbled")
    done = run_pkernfs("mount", "-o", "verify", str(mounted.region), str(mounted.path))
    assert done.returncode == 0
    first, second = done.stderr.splitlines()
    assert first.startswith(f"pkernfs: {mounted.region}: remount: mounted ")
    assert first.endswith(" s after handover 1")
    assert second == (
        f"pkernfs: {mounted.region}: changed since the handover: /ram: bytes 0x0..0x200000"
    )
    subprocess.run(["umount", str(mounted.path)], check=True)
    wait_until(lambda: info_of_region(mounted)["state"] == "clean", "the daemon's end")


def test_another_boot_is_a_live_update() -> None:
    """The boot id is the kernel's: here, in a mount namespace, another one is in its place."""

    def work() -> None:
        boot_id = "/proc/sys/kernel/random/boot_id"
        own_mount_namespace()
        with Mounted(16 * MIB) as m:
            hand_over(m)
            m.unmount()
            other = m.directory / "boot_id"
            other.write_text("01234567-89ab-cdef-0123-456789abcdef\n")
            subprocess.run(
                ["mount", "--bind", other, "/proc/sys/kernel/random/boot_id"], check=True
            )
            m.start()
            found = info(m)
            assert found["arrival"] == "live update"
            assert found["boot_id"] == "01234567-89ab-cdef-0123-456789abcdef"
            assert found["history"][0]["boot_id_after"] == found["boot_id"]
            assert found["history"][0]["boot_id_before"] != found["boot_id"]
            text = run_pkernfs("info", str(m.path)).stdout
            assert "history: live update, mounted " in text
            m.unmount()
            assert "live update: mounted " in m.words()
            subprocess.run(["umount", boot_id], check=True)

    run_as(0, work)
