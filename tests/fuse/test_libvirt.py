"""libvirt as a client of real mounts: domains whose memory is a file's own, of their own users.

The domain is the one of docs/operations.md, word for word; without KVM its type is qemu.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from guestlab import counter
from pagecache import cached_pages
from support.counting_guests import count_at, ring_in
from support.libvirt import MOUNT, USERS, Libvirt, needs_libvirt
from support.mounted_pool import MountedPool, huge_pool, native_of, tmpfs
from support.mounting import MIB, run_pkernfs
from support.passthrough import needs_passthrough
from support.waiting import until

pytestmark = [pytest.mark.vm, pytest.mark.fuse]

RAM_BYTES = 64 * MIB
DOCUMENT = Path(__file__).parents[2] / "docs" / "operations.md"
#: In the place of the nodes of dax segments: the document lists two of them.
NODES = {"dax0.1": "guest-a", "dax0.2": "guest-b", "dax0.3": "guest-a"}
SECLABEL = re.compile(r" *<seclabel .*?</seclabel>\n", re.DOTALL)


def block(words: str) -> str:
    """The one block of the document that begins with these words."""
    (found,) = re.findall(rf"^```\w+\n({words}.*?)^```$", DOCUMENT.read_text(), re.DOTALL | re.M)
    return str(found)


def documented() -> str:
    """The domain of the document, for a host without KVM."""
    return block("<domain ").replace("<domain type='kvm'", "<domain type='qemu'")


def domain(name: str) -> str:
    """The documented domain by another name: the name is also its user, disk and memory."""
    return documented().replace("guest-a", name)


def give(mounted: MountedPool, name: str, user: str | None = None) -> Path:
    """Make a guest's memory as the document does: the owner first, then the size."""
    ram = mounted.file(name)
    ram.chmod(0o600)
    os.chown(ram, USERS[user or name], USERS[user or name])
    os.truncate(ram, RAM_BYTES)
    return ram


def give_disk(libvirt: Libvirt, name: str) -> None:
    """Make the disk that a domain boots from: its guest counts."""
    (libvirt.images / f"{name}.img").write_bytes(counter.floppy())


@pytest.fixture(scope="module")
def mounted() -> Iterator[MountedPool]:
    """A mount with a pool on a tmpfs of its own."""
    needs_libvirt()
    needs_passthrough()
    with tmpfs() as memory, MountedPool(options="allow_other", place=memory) as pool:
        yield pool


@pytest.fixture(scope="module")
def served(mounted: MountedPool) -> Iterator[Libvirt]:
    """A libvirtd: it takes seconds to learn what QEMU can do, so tests share it."""
    with Libvirt(mounted.path, block("cgroup_device_acl"), NODES) as libvirt:
        yield libvirt


@pytest.fixture
def pooled(mounted: MountedPool, served: Libvirt) -> Iterator[MountedPool]:
    """The mount without files; no domain is left after the test."""
    with mounted.lent():
        yield mounted
        for name in served.virsh("list", "--name").split():
            served.virsh("destroy", name)
        for name in served.virsh("list", "--all", "--name").split():
            served.virsh("undefine", "--managed-save", name)


def start(libvirt: Libvirt, name: str, xml: str) -> None:
    give_disk(libvirt, name)
    libvirt.define(xml)
    libvirt.virsh("start", name)


def counts(ram: Path, beyond: int = 0) -> int:
    """Wait until the guest's count is 20 more than ``beyond``; return it."""
    until("the guest counts", lambda: count_at(ram) > beyond + 20, 60)
    return count_at(ram)


def test_the_documented_domain(pooled: MountedPool, served: Libvirt) -> None:
    """Its memory is the segment, not the page cache; managedsave and start, and it counts on."""
    ram = give(pooled, "guest-a")
    memory = native_of(ram)
    start(served, "guest-a", documented())
    assert "running" in served.virsh("dominfo", "guest-a")
    with ram.open("rb") as file, memory.open("rb") as own:
        counts(ram)
        seen = [count_at(place) for place in (memory, ram, memory, ram)]
        assert seen == sorted(seen)
        cached, there = cached_pages(file.fileno()), cached_pages(own.fileno())
    print(f"libvirt: page cache: {cached} pages of guest-a, {there} of its segment")
    assert (cached, there > 0) == (0, True)
    pid = served.guest("guest-a")
    assert Path(f"/proc/{pid}").stat().st_uid == USERS["guest-a"]
    assert "CapEff:\t0000000000000000\n" in Path(f"/proc/{pid}/status").read_text()
    assert f"process {pid} (qemu" in run_pkernfs("holders", str(ram)).stdout
    before = counts(ram)
    served.virsh("managedsave", "guest-a")
    saved = count_at(ram)
    assert "nobody" in run_pkernfs("holders", str(ram)).stdout
    served.virsh("start", "guest-a")
    last = counts(ram, beyond=saved)
    assert saved >= before
    assert ring_in(ram.read_bytes())[1:last] == list(range(1, last))
    served.virsh("destroy", "guest-a")
    served.virsh("undefine", "guest-a")
    # libvirt makes the disk its guest's, and leaves the owner of memory alone.
    assert (ram.stat().st_uid, ram.stat().st_mode & 0o777) == (USERS["guest-a"], 0o600)
    assert count_at(ram) >= last


def test_two_owners(pooled: MountedPool, served: Libvirt) -> None:
    """Neither guest's QEMU can open the other's memory, nor can a domain that names it start."""
    rams = {name: give(pooled, name) for name in ("guest-a", "guest-b")}
    for name, ram in rams.items():
        start(served, name, domain(name))
        counts(ram)
    for name, other in (("guest-a", "guest-b"), ("guest-b", "guest-a")):
        assert served.in_place_of(name, "head", "-c", "1", MOUNT / name).returncode == 0
        for path in (MOUNT / other, native_of(rams[other])):
            for words in (("head", "-c", "1", path), ("truncate", "-s", "0", path)):
                refusal = served.in_place_of(name, *words)
                assert "Permission denied" in refusal.stderr, (refusal, words)
    served.virsh("destroy", "guest-b")
    served.virsh("undefine", "guest-b")
    thief = domain("guest-b").replace(str(MOUNT / "guest-b"), str(MOUNT / "guest-a"))
    assert thief != domain("guest-b")
    served.define(thief)
    why = served.refused("start", "guest-b")
    print(f"libvirt: {why.splitlines()[-1]}")
    assert f"can't open backing store {MOUNT}/guest-a for guest RAM: Permission denied" in why
    counts(rams["guest-a"], beyond=count_at(rams["guest-a"]))


def test_nodes_of_dev(pooled: MountedPool, served: Libvirt) -> None:
    """A QEMU has the nodes that qemu.conf lists, and can open those of its own user."""
    counted = give(pooled, "guest-a")
    start(served, "guest-a", documented())
    counts(counted)
    said = [served.in_place_of("guest-a", "head", "-c", "1", f"/dev/{node}") for node in NODES]
    assert [done.returncode for done in said] == [0, 1, 1]
    assert "Permission denied" in said[1].stderr
    assert "No such file or directory" in said[2].stderr


def test_in_huge_pages() -> None:
    """By the native path, as the user that Debian's package makes for all guests."""
    needs_libvirt()
    xml, labels = SECLABEL.subn("", documented())
    assert labels == 1
    with huge_pool(RAM_BYTES, "allow_other") as pool, Libvirt(pool.path) as libvirt:
        ram = give(pool, "guest-a", "libvirt-qemu")
        memory = native_of(ram)
        start(libvirt, "guest-a", xml.replace(str(MOUNT / "guest-a"), str(memory)))
        counts(ram)
        assert Path(f"/proc/{libvirt.guest('guest-a')}").stat().st_uid == USERS["libvirt-qemu"]
        libvirt.virsh("managedsave", "guest-a")
        saved = count_at(memory)
        libvirt.virsh("start", "guest-a")
        last = counts(ram, beyond=saved)
        assert ring_in(memory.read_bytes())[1:last] == list(range(1, last))
