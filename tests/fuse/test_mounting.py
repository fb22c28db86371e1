"""What a mount asks of libfuse and of the kernel; the end of mounts is in test_mount.py."""

from __future__ import annotations

import os
import subprocess

import pytest

from pkernfs.control.mounts import FSTYPE, Mount
from pkernfs.fuse import mounting
from pkernfs.options import parse_mount_options


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", set()),
        ("ro,noatime", {"ro", "noatime"}),
        ("relatime,strictatime,diratime", set()),
        ("allow_other,cache=page,spin=5,segments=no,phys_base=4096,mkfs,verify", {"allow_other"}),
        ("context=system_u:object_r:x_t", {"context=system_u:object_r:x_t"}),
    ],
)
def test_libfuse_gets_what_it_knows(text: str, words: set[str]) -> None:
    always = {"default_permissions", "subtype=pkernfs"}
    options = parse_mount_options([text] if text else [])
    assert mounting.fuse_options(options) == always | words


def test_a_device_without_settings_is_left_alone() -> None:
    mounting.tune_backing_device(os.makedev(4095, 4095))


@pytest.mark.parametrize(
    ("left", "detached"),
    [
        (None, False),
        (Mount(7, "/mnt/a", FSTYPE, "/dev/shm/a"), True),
        (Mount(7, "/mnt/a", FSTYPE, "/dev/shm/b"), False),
        (Mount(7, "/mnt/a", "tmpfs", "/dev/shm/a"), False),
    ],
)
def test_only_its_own_mount_is_detached(
    left: Mount | None, detached: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[list[str]] = []
    monkeypatch.setattr(mounting, "mount_at", lambda path: left)
    monkeypatch.setattr(subprocess, "run", lambda words, **_: done.append(words))
    mounting.detach_what_is_left("/mnt/a", "/dev/shm/a")
    assert [words[-1] for words in done] == ["/mnt/a"] * detached
