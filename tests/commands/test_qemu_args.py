"""``pkernfs qemu-args``: what is refused, with a remedy that works, and a real guest in the region.

A remedy is taken from the message and run as it stands.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from guestlab import counter
from pkernfs import cli
from pkernfs.commands import qemu_args
from pkernfs.errors import PkernfsError
from pkernfs.fuse import segment_xattr
from pkernfs.fuse.extents_xattr import Extent
from pkernfs.quantities import PhysAddr, RegionOff
from support.counting_guests import count_at, counting, ring_in
from support.mounted_pool import MountedPool
from support.mounting import MIB, Mounted, run_as, run_pkernfs, wait_until

BLOCK = 2 * MIB


@pytest.fixture
def mounted() -> Iterator[Mounted]:
    """A mount of 64 MiB; fsck finds it clean in the end."""
    with Mounted() as mounted:
        yield mounted


@pytest.fixture
def qemu(tmp_path: Path) -> Callable[[str], str]:
    """Makes a program that says what a QEMU, or something else, says of its version."""

    def make(says: str) -> str:
        path = tmp_path / "qemu"
        path.write_text(f"#!/bin/sh\necho {shlex.quote(says)}\n")
        path.chmod(0o755)
        return str(path)

    return make


def sized(path: Path, size: int) -> Path:
    """A new file of ``size`` bytes."""
    with path.open("wb") as file:
        file.truncate(size)
    return path


def refused(*words: str) -> str:
    """What ``pkernfs qemu-args`` says when it refuses: one line."""
    done = run_pkernfs("qemu-args", *words)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("pkernfs: ")
    assert done.stderr.count("\n") == 1
    return done.stderr.rstrip("\n")


def shell(command: str) -> None:
    """Run a command that a message recommends."""
    subprocess.run(["sh", "-c", command], check=True, timeout=20)


# ------------------------------------------------------------------------------- no mount needed


def test_joins_by_region_offset_only() -> None:
    """Physical addresses of huge pages jump where the region does not."""
    extents = [
        Extent(0, BLOCK, RegionOff(8 * BLOCK), PhysAddr(0x40000000)),
        Extent(BLOCK, BLOCK, RegionOff(9 * BLOCK), PhysAddr(0x200000)),
        Extent(2 * BLOCK, BLOCK, RegionOff(11 * BLOCK), PhysAddr(0x400000)),
        Extent(4 * BLOCK, BLOCK, RegionOff(12 * BLOCK), PhysAddr(0x600000)),  # behind a hole
    ]
    assert qemu_args.join(extents) == [
        (0, 2 * BLOCK, 8 * BLOCK),
        (2 * BLOCK, BLOCK, 11 * BLOCK),
        (4 * BLOCK, BLOCK, 12 * BLOCK),
    ]
    assert qemu_args.join([]) == []


@pytest.mark.parametrize("version", ["8.1.0", "8.1", "8.10.1", "10.0.13", "11.0.50"])
def test_new_enough(version: str, qemu: Callable[[str], str]) -> None:
    path = qemu(f"QEMU emulator version {version} (Debian 1:{version}+ds-1)")
    assert qemu_args.check_qemu(path) == (path, version)


@pytest.mark.parametrize("version", ["8.0.5", "7.2.22", "2.11.1"])
def test_too_old(version: str, qemu: Callable[[str], str]) -> None:
    path = qemu(f"QEMU emulator version {version} (Debian 1:{version}+dfsg-7)")
    with pytest.raises(PkernfsError, match=rf"too old: got QEMU {version}, expected 8\.1.*install"):
        qemu_args.check_qemu(path)


@pytest.mark.parametrize("version", ["5.0.0", "7.2.22", "8.0.5"])
def test_a_whole_file_needs_no_offset(version: str, qemu: Callable[[str], str]) -> None:
    path = qemu(f"QEMU emulator version {version}")
    assert qemu_args.check_qemu(path, offset=False) == (path, version)
    with pytest.raises(PkernfsError, match=r"got QEMU 4\.2\.1, expected 5\.0 or later"):
        qemu_args.check_qemu(qemu("QEMU emulator version 4.2.1"), offset=False)
    with pytest.raises(PkernfsError, match="cpr-reboot"):
        qemu_args.check_qemu(qemu(f"QEMU emulator version {version}"), live_update=True)


@pytest.mark.parametrize("version", ["8.1.5", "7.2.22"])
def test_too_old_for_a_live_update(version: str, qemu: Callable[[str], str]) -> None:
    """The version that is named is the one that is needed, not that of offset=."""
    path = qemu(f"QEMU emulator version {version}")
    with pytest.raises(PkernfsError, match=rf"got QEMU {version}, expected 8\.2 .*\(cpr-reboot\)"):
        qemu_args.check_qemu(path, live_update=True)
    assert qemu_args.check_qemu(qemu("QEMU emulator version 8.2.0"), live_update=True)


@pytest.mark.parametrize("says", ["", "qemu", "GNU bash, version 9.2.15", "QEMU version new"])
def test_no_qemu(says: str, qemu: Callable[[str], str]) -> None:
    with pytest.raises(PkernfsError, match="does not tell a version of QEMU"):
        qemu_args.check_qemu(qemu(says))


def test_missing_qemu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(PkernfsError, match="qemu-system-x86_64: no such program: apt-get install"):
        qemu_args.check_qemu("qemu-system-x86_64")
    with pytest.raises(PkernfsError, match="no such program"):
        qemu_args.check_qemu(str(tmp_path / "no"))
    (tmp_path / "broken").write_text("no program")
    (tmp_path / "broken").chmod(0o755)
    with pytest.raises(PkernfsError, match="does not tell a version"):
        qemu_args.check_qemu(str(tmp_path / "broken"))


@pytest.mark.parametrize(
    ("source", "path", "start"),
    [("1G!1G", "/dev/mem", 1 << 30), ("512M!0x140000000", "/dev/mem", 0x140000000)],
)
def test_physical_regions(source: str, path: str, start: int) -> None:
    assert qemu_args.mem_path_of(source) == (path, start, BLOCK)


def test_not_on_a_mount(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = sized(tmp_path / "file", BLOCK)
    assert cli.main(["qemu-args", str(file)]) == 1
    assert "not on a pkernfs mount" in capsys.readouterr().err
    assert cli.main(["qemu-args", str(tmp_path / "no")]) == 1
    assert "No such file" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["", "1", "a,b", "a b", "-x", "\u00e9"])
def test_bad_id(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["qemu-args", f"--id={name}", str(tmp_path)]) == 1
    assert "bad id" in capsys.readouterr().err


# ------------------------------------------------------------------------------- with a mount


@pytest.mark.fuse
def test_options(mounted: Mounted, qemu: Callable[[str], str]) -> None:
    ram = sized(mounted.path / "guest-ram", 4 * BLOCK)
    new = qemu("QEMU emulator version 8.1.0")
    facts = json.loads(run_pkernfs("qemu-args", "--qemu", new, "--json", str(ram)).stdout)
    (extent,) = json.loads(run_pkernfs("extents", "--json", str(ram)).stdout)["extents"]
    assert facts["object"] == {
        "qom-type": "memory-backend-file",
        "id": "pkernfs",
        "size": 4 * BLOCK,
        "mem-path": str(mounted.region),
        "offset": extent["region_offset"],
        "align": BLOCK,
        "share": True,
    }
    assert (facts["qemu"], facts["qemu_version"]) == (new, "8.1.0")
    line = run_pkernfs("qemu-args", "--qemu", new, "--id", "ram.0", str(ram)).stdout
    assert shlex.split(line) == [
        "-object",
        f"memory-backend-file,id=ram.0,size={4 * BLOCK},mem-path={mounted.region},"
        f"offset={extent['region_offset']},align={BLOCK},share=on",
        "-machine",
        "memory-backend=ram.0",
    ]


@pytest.fixture
def pooled() -> Iterator[MountedPool]:
    """A mount with a pool; fsck finds it clean in the end."""
    with MountedPool() as mounted:
        yield mounted


@pytest.mark.fuse
def test_options_of_a_segment(pooled: MountedPool, qemu: Callable[[str], str]) -> None:
    ram = pooled.file("guest-ram", 4 * BLOCK)
    old = qemu("QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)")
    facts = json.loads(run_pkernfs("qemu-args", "--qemu", old, "--json", str(ram)).stdout)
    path = str(pooled.pool / "segment-1")
    assert facts["object"] == {
        "qom-type": "memory-backend-file",
        "id": "pkernfs",
        "size": 4 * BLOCK,
        "mem-path": path,
        "align": BLOCK,
        "share": True,
    }
    assert (facts["segment"], facts["region_offset"]) == (1, None)
    line = run_pkernfs("qemu-args", "--qemu", old, str(ram)).stdout
    assert shlex.split(line)[1] == (
        f"memory-backend-file,id=pkernfs,size={4 * BLOCK},mem-path={path},align={BLOCK},share=on"
    )
    assert "cpr-reboot" in refused("--live-update", "--qemu", old, str(ram))
    os.rename(path, f"{path}-aside")
    assert "its segment is lost, or elsewhere" in refused("--qemu", old, str(ram))
    os.rename(f"{path}-aside", path)


@pytest.mark.fuse
def test_sizes_of_large_segments(pooled: MountedPool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A segment of pages of 1 GiB can be mapped in whole ones only."""
    ram = pooled.file("guest ram", 3 * BLOCK)
    found = segment_xattr.read(str(ram))
    assert found is not None
    large = found._replace(granule=4 * BLOCK)
    monkeypatch.setattr(segment_xattr, "read", lambda file: large)
    with pytest.raises(PkernfsError, match="no multiple of 8 MiB: got 6291456 bytes") as refusal:
        qemu_args.describe(str(ram), "ram")
    said = str(refusal.value)
    shell(said[said.index("truncate") :])
    assert qemu_args.describe(str(ram), "ram")["object"]["size"] == 4 * BLOCK


@pytest.mark.fuse
def test_sizes(mounted: Mounted, qemu: Callable[[str], str]) -> None:
    new = qemu("QEMU emulator version 8.1.0")
    ram = sized(mounted.path / "guest ram", 0)
    assert "it is empty: truncate -s SIZE" in refused("--qemu", new, str(ram))
    os.truncate(ram, 3 * MIB)
    said = refused("--qemu", new, str(ram))
    assert "no multiple of 2 MiB: got 3145728 bytes" in said
    shell(said[said.index("truncate") :])
    assert ram.stat().st_size == 2 * BLOCK
    assert run_pkernfs("qemu-args", "--qemu", new, str(ram)).returncode == 0


@pytest.mark.fuse
def test_holes(mounted: Mounted, qemu: Callable[[str], str]) -> None:
    new = qemu("QEMU emulator version 8.1.0")
    ram = sized(mounted.path / "guest ram", 4 * BLOCK)
    subprocess.run(["fallocate", "-p", "-o", str(BLOCK), "-l", str(2 * BLOCK), ram], check=True)
    said = refused("--qemu", new, str(ram))
    assert "4 MiB of it are holes" in said
    shell(said[said.index("fallocate") :])
    assert run_pkernfs("qemu-args", "--qemu", new, str(ram)).returncode == 0


@pytest.mark.fuse
def test_pieces(mounted: Mounted, qemu: Callable[[str], str]) -> None:
    """Also of a file whose name is no plain word, with its mode, owner and attributes."""
    new = qemu("QEMU emulator version 8.1.0")
    ram, other = mounted.path / "it's -ram", mounted.path / "other"
    for number in range(4):
        for path in (ram, other):
            with path.open("ab") as file:
                file.write(bytes([number + 1]) * BLOCK)
                file.truncate()
                os.fsync(file.fileno())
    content = ram.read_bytes()
    ram.chmod(0o640)
    os.chown(ram, 123, 45)
    os.setxattr(ram, "user.note", b"kept")
    said = refused("--qemu", new, str(ram))
    found = re.search(r"in (\d+) pieces: (cp .*) \(needs 8 MiB free in one run\)", said)
    assert found is not None
    assert int(found[1]) > 1
    (mounted.path / "it's -ram.new").write_bytes(b"somebody's")
    again = refused("--qemu", new, str(ram))
    assert "-ram.new~" in again
    shell(again[again.index("cp ") : again.index(" (needs")])
    assert run_pkernfs("qemu-args", "--qemu", new, str(ram)).returncode == 0
    assert ram.read_bytes() == content
    info = ram.stat()
    assert (info.st_mode & 0o7777, info.st_uid, info.st_gid) == (0o640, 123, 45)
    assert os.getxattr(ram, "user.note") == b"kept"
    assert (mounted.path / "it's -ram.new").read_bytes() == b"somebody's"


@pytest.mark.fuse
def test_not_guest_memory(mounted: Mounted, qemu: Callable[[str], str]) -> None:
    new = qemu("QEMU emulator version 8.1.0")
    assert "not a regular file" in refused("--qemu", new, str(mounted.path))
    os.mkfifo(mounted.path / "pipe")
    assert "not a regular file" in refused("--qemu", new, str(mounted.path / "pipe"))
    ram = sized(mounted.path / "ram", BLOCK)
    (mounted.path / "name").symlink_to("ram")
    assert run_pkernfs("qemu-args", "--qemu", new, str(mounted.path / "name")).returncode == 0
    mounted.region.rename(mounted.region.with_name("moved"))
    said = refused("--qemu", new, str(ram))
    mounted.region.with_name("moved").rename(mounted.region)
    assert "has lost its name" in said


@pytest.mark.fuse
def test_tables_are_not_guest_memory(mounted: Mounted, qemu: Callable[[str], str]) -> None:
    """Through QEMU a guest could write what the IOMMU walks."""
    tables = sized(mounted.path / "iommu" / "dom-0", BLOCK)
    said = refused("--qemu", qemu("QEMU emulator version 8.1.0"), str(tables))
    assert "the tables of an IOMMU" in said


@pytest.mark.fuse
def test_large_pages(mounted: Mounted, monkeypatch: pytest.MonkeyPatch) -> None:
    """A region whose pages are of 1 GiB can be mapped in whole ones only."""
    ram = sized(mounted.path / "ram", 2 * BLOCK)
    assert qemu_args.describe(str(ram), "ram")["object"]["align"] == BLOCK
    place = qemu_args.MemPath(str(mounted.region), 0, 1 << 30)
    monkeypatch.setattr(qemu_args, "mem_path_of", lambda source: place)
    with pytest.raises(PkernfsError, match="in units of 1 GiB"):
        qemu_args.describe(str(ram), "ram")


@pytest.mark.fuse
def test_read_only_mount(qemu: Callable[[str], str]) -> None:
    with Mounted() as mounted:
        ram = sized(mounted.path / "ram", BLOCK)
        mounted.unmount()
        mounted.options = "ro"
        mounted.start()
        said = refused("--qemu", qemu("QEMU emulator version 8.1.0"), str(ram))
        assert "mounted read-only" in said


@pytest.mark.fuse
def test_stores_of_mappings_are_flushed(mounted: Mounted, qemu: Callable[[str], str]) -> None:
    """What a program stored through the mount is what the guest will find."""
    from support.mounting import Mapper

    ram = sized(mounted.path / "ram", BLOCK)
    with Mapper(ram, BLOCK) as mapper:
        mapper.store(5000, b"from a mapping")
        assert not mounted.in_region(b"from a mapping")
        new = qemu("QEMU emulator version 8.1.0")
        assert run_pkernfs("qemu-args", "--qemu", new, str(ram)).returncode == 0
        assert mounted.in_region(b"from a mapping")


@pytest.mark.fuse
def test_a_native_file_is_mapped_by_its_plain_path(qemu: Callable[[str], str]) -> None:
    """Whoever may open it may ask, and the path is what a guest of any kernel has had."""
    old = qemu("QEMU emulator version 7.2.0")
    with MountedPool(options="allow_other") as pooled:
        ram = pooled.file("ram", 2 * BLOCK)
        number = qemu_args.describe(str(ram), "ram")["segment"]
        assert run_pkernfs("native", str(ram), "on").returncode == 0
        found = qemu_args.describe(str(ram), "ram")
        assert found["object"] == {
            "qom-type": "memory-backend-file", "id": "ram", "size": 2 * BLOCK,
            "mem-path": str(ram), "align": BLOCK, "share": True,
        }  # fmt: skip
        assert (found["segment"], found["region_offset"]) == (number, None)
        assert f"mem-path={ram}," in run_pkernfs("qemu-args", "--qemu", old, str(ram)).stdout

        def ask() -> None:
            assert qemu_args.describe(str(ram), "ram") == {**found, "segment": None}

        run_as(4711, ask)
        assert run_pkernfs("native", str(ram), "off").returncode == 0
        assert qemu_args.describe(str(ram), "ram")["object"]["mem-path"] != str(ram)


@pytest.mark.fuse
def test_a_native_file_of_no_whole_units(pooled: MountedPool) -> None:
    """Who can see its size is refused; for the others the segment's counts."""
    ram = pooled.file("ram", BLOCK + 5000)
    assert run_pkernfs("native", str(ram), "on").returncode == 0
    with pytest.raises(PkernfsError, match=f"truncate -s {2 * BLOCK} "):
        qemu_args.describe(str(ram), "ram")


# ------------------------------------------------------------------------------- a real guest


def options_for(qemu: Path, ram: Path) -> list[str]:
    """The options of a machine whose memory is ``ram``."""
    line = run_pkernfs("qemu-args", "--qemu", str(qemu), str(ram))
    assert line.returncode == 0, line.stderr
    return ["-M", "pc", *shlex.split(line.stdout)]


@pytest.mark.fuse
@pytest.mark.vm
def test_guest_memory_is_the_region(new_qemu: Path, mounted: Mounted, tmp_path: Path) -> None:
    """While the guest runs, its stores are at once in the region, and what a read shows."""
    ram = sized(mounted.path / "ram", 4 * BLOCK)
    (extent,) = json.loads(run_pkernfs("extents", "--json", str(ram)).stdout)["extents"]
    place = extent["region_offset"]
    with counting(new_qemu, options_for(new_qemu, ram), tmp_path / "disk"):
        wait_until(lambda: count_at(mounted.region, place) > 100, "the guest counts")
        seen = [count_at(mounted.region, place), count_at(ram, 0), count_at(mounted.region, place)]
        assert seen == sorted(seen)
        assert 100 < seen[0] <= seen[2] < seen[0] + 100 * counter.HERTZ
        before = time.monotonic()
        wait_until(lambda: count_at(ram, 0) >= seen[2] + 20, "the mount shows later numbers")
        assert time.monotonic() - before < 10
    last = count_at(mounted.region, place)
    memory = ram.read_bytes()
    assert int.from_bytes(memory[counter.COUNT_ADDRESS :][:4], "little") == last
    assert ring_in(memory)[1:last] == list(range(1, last))
    assert mounted.region.read_bytes()[place : place + len(memory)] == memory


@pytest.mark.fuse
@pytest.mark.vm
def test_guest_memory_is_the_segment(pooled: MountedPool, tmp_path: Path) -> None:
    """By the QEMU that this host has, whatever its version: none needs an offset."""
    found = shutil.which("qemu-system-x86_64")
    assert found is not None
    ram = pooled.file("ram", 4 * BLOCK)
    memory = Path(qemu_args.describe(str(ram), "ram")["object"]["mem-path"])
    with counting(Path(found), options_for(Path(found), ram), tmp_path / "disk"):
        wait_until(lambda: count_at(memory, 0) > 100, "the guest counts")
        seen = [count_at(memory, 0), count_at(ram, 0), count_at(memory, 0)]
        assert seen == sorted(seen)
        (holder,) = json.loads(run_pkernfs("holders", "--json", str(ram)).stdout)["files"][0][
            "holders"
        ]
        assert (holder["how"], holder["through"]) == ("maps it", "segment")
    assert ram.read_bytes() == memory.read_bytes()
