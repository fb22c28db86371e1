"""The native path of a file, as the attribute tells it."""

from __future__ import annotations

import errno
import json
import os

import pytest

from pkernfs.fuse.segment_xattr import NAME, SegmentInfo
from pkernfs.plain.segments import native_path_of


def record(path: object) -> bytes:
    """The attribute of a file whose segment has this path."""
    return json.dumps(
        SegmentInfo(3, "directory", str(path), 1 << 21, 1 << 21)._asdict() | {"path": path}
    ).encode()


def answering(monkeypatch: pytest.MonkeyPatch, value: bytes | int) -> None:
    """Have every file answer so: with a value, or an errno."""

    def getxattr(path: str, name: str) -> bytes:
        assert (path, name) == ("/proc/self/fd/7", NAME)
        if isinstance(value, int):
            raise OSError(value, os.strerror(value))
        return value

    monkeypatch.setattr(os, "getxattr", getxattr)


def test_a_path_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    answering(monkeypatch, record("/dev/shm/pk/segment-3"))
    assert native_path_of(7) == "/dev/shm/pk/segment-3"


@pytest.mark.parametrize("error", [errno.ENODATA, errno.EOPNOTSUPP])
def test_a_file_without_a_segment(monkeypatch: pytest.MonkeyPatch, error: int) -> None:
    answering(monkeypatch, error)
    assert native_path_of(7) is None


def test_a_dead_mount_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    answering(monkeypatch, errno.ENOTCONN)
    with pytest.raises(OSError, match="not connected"):
        native_path_of(7)


@pytest.mark.parametrize("path", ["relative", "", None, 5])
def test_a_path_that_is_none(monkeypatch: pytest.MonkeyPatch, path: object) -> None:
    answering(monkeypatch, record(path))
    assert native_path_of(7) is None


@pytest.mark.parametrize("value", [b"{}", b"[]", b"x", b"\xff"])
def test_a_value_of_another_version(monkeypatch: pytest.MonkeyPatch, value: bytes) -> None:
    answering(monkeypatch, value)
    assert native_path_of(7) is None
