"""The shim without a session: what is prepared for C, and what C's calls become.

What a kernel makes of it is in test_mount.py.
"""

from __future__ import annotations

import ctypes
import errno
import os
from typing import Any

import pytest

from pkernfs.errors import NotSupportedError
from pkernfs.fuse import shim
from pkernfs.quantities import Ino

from pkernfs.fuse._shim import ffi, lib  # isort: skip  # after the shim, which loads it for all


def test_libfuse_is_found_here() -> None:
    """By all that is loaded later: a fork of this process may mount."""
    assert hasattr(ctypes.CDLL(None), "fuse_session_new")


class Server:
    """Notes what it is asked, and answers with a number."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []

    def on_write(self, req: Any, ino: Ino, data: memoryview, offset: int, writeback: bool) -> int:
        self.asked.append(("write", req, ino, bytes(data), offset, writeback))
        return len(data)

    def on_fallocate(self, req: Any, ino: Ino, mode: int, offset: int, length: int) -> int:
        self.asked.append(("fallocate", req, ino, mode, offset, length))
        return shim.LATER

    def on_lseek(self, ino: Ino, offset: int, whence: int) -> int:
        self.asked.append(("lseek", ino, offset, whence))
        return -errno.ENXIO

    def on_copy(
        self, req: Any, ino_in: Ino, off_in: int, ino_out: Ino, off_out: int, length: int
    ) -> int:
        self.asked.append(("copy", req, ino_in, off_in, ino_out, off_out, length))
        return length

    def on_statx(self, ino: Ino, to: Any) -> int:
        self.asked.append(("statx", ino, to))
        return -errno.ENOENT


@pytest.fixture
def server() -> Server:
    server = Server()
    shim.prepare(server, fsname=b"a,b\\c", direct=True, spin_us=1.5)
    return server


def test_calls_of_c_go_to_the_server(server: Server) -> None:
    data = ffi.new("char[]", b"written")
    request = ffi.NULL
    assert shim._on_write(request, Ino(5), data, 7, 100, 1) == 7
    assert shim._on_fallocate(request, Ino(5), 3, 100, 200) == shim.LATER
    assert shim._on_lseek(Ino(5), 100, 4) == -errno.ENXIO
    assert shim._on_copy(request, Ino(5), 1, Ino(6), 2, 30) == 30
    to = ffi.new("struct pk_statx *")
    assert shim._on_statx(Ino(5), to) == -errno.ENOENT
    assert server.asked == [
        ("write", request, 5, b"written", 100, True),
        ("fallocate", request, 5, 3, 100, 200),
        ("lseek", 5, 100, 4),
        ("copy", request, 5, 1, 6, 2, 30),
        ("statx", 5, to),
    ]


def test_what_is_prepared(server: Server) -> None:
    assert ffi.string(lib.pk_mount_arg) == b"-ofsname=a\\,b\\\\c"
    assert lib.pk_spin_ns == 1500
    assert lib.pk_wanted & shim._DIRECT_IO_ALLOW_MMAP
    assert lib.pk_wanted & shim._HANDLE_KILLPRIV_V2
    shim.prepare(server, fsname=b"x", direct=False, killpriv=False)
    assert not lib.pk_wanted & (shim._DIRECT_IO_ALLOW_MMAP | shim._HANDLE_KILLPRIV_V2)
    assert not lib.pk_wanted & shim._PASSTHROUGH, "overlayfs could be stacked only once"
    assert lib.pk_unwanted == shim._AUTO_INVAL_DATA


def test_without_a_session_nothing_is_attached(server: Server) -> None:
    with pytest.raises(NotSupportedError, match="operations cannot be added"):
        shim.attach()
    assert not shim.attached()
    assert not shim.may_map_direct()
    assert not shim.capabilities().attached
    assert shim.device() == -1


def test_a_break_is_told_once(server: Server) -> None:
    assert not shim.found_no_request()
    lib.pk_idle = 1
    assert shim.found_no_request()
    assert not shim.found_no_request()


@pytest.mark.parametrize(
    ("trouble", "reason"),
    [
        ("", None),
        ("pool", "no pool on tmpfs"),
        ("libfuse", "libfuse 3.13"),
        ("kernel", "CONFIG_FUSE_PASSTHROUGH"),
        ("root", "CAP_SYS_ADMIN"),
    ],
)
def test_why_nothing_is_passed_through(
    server: Server, trouble: str, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    shim.prepare(server, fsname=b"x", direct=True, passthrough=trouble != "pool")
    monkeypatch.setattr(shim, "_attached", trouble != "libfuse")
    lib.pk_negotiated.offered = 0 if trouble == "kernel" else shim._PASSTHROUGH
    monkeypatch.setattr(shim, "_effective_capabilities", lambda: int(trouble != "root") << 21)
    found = shim.why_no_passthrough()
    if reason is None:
        assert found is None
    else:
        assert found is not None
        assert reason in found


def test_the_capabilities_of_this_process(server: Server) -> None:
    assert bool(shim._effective_capabilities() & shim._CAP_SYS_ADMIN) == (os.geteuid() == 0)


def test_the_handle_that_is_being_opened(server: Server) -> None:
    shim.pass_through(5 | 1 << 62, 9)
    assert (lib.pk_backed_fh, lib.pk_backing_id) == (5 | 1 << 62, 9)
    shim.prepare(server, fsname=b"x", direct=True)
    assert (lib.pk_backed_fh, lib.pk_backing_id) == (0, 0)
