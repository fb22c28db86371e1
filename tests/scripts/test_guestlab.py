"""Guest memory on a real mount: QEMU runs a Debian kernel in a file of it, and things are killed.

What must survive is found by content: pages that the guest itself has filled with a random marker.
"""

from __future__ import annotations

import os
import secrets
import signal
from collections.abc import Iterator
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest

from guestlab import GuestLabError, initramfs, kernel, machine, memory
from livemount import LiveMount, extents, fresh, read_region, run

pytestmark = [pytest.mark.vm, pytest.mark.fuse]

MIB = 1 << 20
REGION_BYTES = 256 * MIB
RAM_BYTES = 192 * MIB
MARKED_PAGES = 4096
BOOT_SECONDS = 90


@pytest.fixture(scope="module")
def guest_kernel() -> kernel.Kernel:
    """A Debian kernel, from the cache or by apt."""
    try:
        return kernel.fetch(kernel.default_cache())
    except GuestLabError as error:
        if "vm" in os.environ.get("PKERNFS_REQUIRE", "").split(","):
            pytest.fail(f"vm is required (PKERNFS_REQUIRE): {error}")
        pytest.skip(f"no kernel to boot: {error}")


@pytest.fixture
def live(tmp_path: Path) -> Iterator[LiveMount]:
    """A mounted, empty file system; after the test fsck finds the region clean."""
    live = LiveMount(tmp_path / "region", tmp_path / "mnt")
    live.directory.mkdir()
    with fresh(live, REGION_BYTES):
        yield live


@pytest.fixture
def recipe(live: LiveMount, guest_kernel: kernel.Kernel, tmp_path: Path) -> machine.Recipe:
    """An idle guest whose memory is a new file in the mount."""
    ram = live.directory / "guest-ram"
    ram.touch()
    os.truncate(ram, RAM_BYTES)
    return machine.Recipe(
        kernel=guest_kernel,
        initramfs=initramfs.build(tmp_path),
        ram=ram,
        ram_bytes=RAM_BYTES,
        marker=new_marker(),
        pages=MARKED_PAGES,
    )


def new_marker() -> str:
    """A text that no other guest has written."""
    return "pkernfs-" + secrets.token_hex(8)


def test_memory_of_a_killed_guest_survives_the_daemons_sigkill(
    live: LiveMount, recipe: machine.Recipe
) -> None:
    """Process death brings MAP_SHARED stores into the region, twice in the same file."""
    for _ in range(2):
        life = replace(recipe, marker=new_marker(), busy=True)
        with machine.booted(life, BOOT_SECONDS) as guest:
            banner = guest.banner()
            guest.stop(signal.SIGKILL)  # amid its stores
        before = memory.search(life.ram, life.marker, banner)
        assert sorted(before.marked) == list(range(MARKED_PAGES))
        assert before.banners
        pieces = extents(life.ram)
        live.kill_daemon()
        run("umount", str(live.directory))
        in_region = read_region(live.region, pieces, RAM_BYTES)
        assert sha256(in_region).hexdigest() == before.sha256
        live.mount()
        assert extents(life.ram) == pieces
        assert memory.search(life.ram, life.marker, banner) == before


def test_fsync_under_a_running_guest_is_a_promise(live: LiveMount, recipe: machine.Recipe) -> None:
    """What the guest had stored before an fsync outlives a daemon that dies under it."""
    with machine.booted(recipe, BOOT_SECONDS) as guest:
        banner = guest.banner()
        with recipe.ram.open("rb") as handle:
            os.fsync(handle.fileno())
        live.kill_daemon()
        guest.stop(signal.SIGKILL)  # too late: there is nobody left to write its pages to
    run("umount", "-l", str(live.directory))
    live.mount()
    found = memory.search(recipe.ram, recipe.marker, banner)
    assert found.size == RAM_BYTES
    assert sorted(found.marked) == list(range(MARKED_PAGES))
    assert found.torn == []
    assert found.banners
