"""What /proc and a process' memory tell of a thread."""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import threading
from pathlib import Path

import pytest

from pkernfs.plain.caller import (
    Caller,
    Identity,
    can_be_read,
    own_control_groups,
    own_identity,
)
from support.mounting import child, run_as

PAGE = mmap.PAGESIZE


def us() -> Caller:
    """This thread, as somebody else's."""
    return Caller(threading.get_native_id())


@pytest.fixture
def pages() -> tuple[mmap.mmap, int]:
    """Two pages of this process, of which the second one is not readable; the first's address."""
    memory = mmap.mmap(-1, 2 * PAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(address + PAGE), PAGE, 0) == 0
    return memory, address


def test_a_path_may_end_where_the_memory_does(pages: tuple[mmap.mmap, int]) -> None:
    memory, address = pages
    memory[PAGE - 5 : PAGE] = b"/tmp\0"
    assert us().path(address + PAGE - 5) == b"/tmp"
    assert us().read(address + PAGE - 5, 4096) == b"/tmp\0"
    assert us().path(address) == b""


def test_a_path_without_an_end_is_an_error(pages: tuple[mmap.mmap, int]) -> None:
    memory, address = pages
    memory[PAGE - 4 : PAGE] = b"/tmp"
    for at in (address + PAGE - 4, address + PAGE, 0, 2**64 - 10):
        with pytest.raises(OSError, match=r"without an end|Bad address"):
            us().path(at)
    libc = ctypes.CDLL(None)
    assert libc.mprotect(ctypes.c_void_p(address + PAGE), PAGE, 3) == 0
    memory[:] = b"x" * (2 * PAGE)
    with pytest.raises(OSError, match="without an end"):
        us().path(address)


def test_a_path_may_go_over_a_page(pages: tuple[mmap.mmap, int]) -> None:
    memory, address = pages
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(address + PAGE), PAGE, 3) == 0
    memory[PAGE - 3 : PAGE + 4] = b"/ab/cd\0"
    assert us().path(address + PAGE - 3) == b"/ab/cd"


def test_its_places(tmp_path: Path) -> None:
    here = us().directory(None)
    there = os.open(tmp_path, os.O_RDONLY)
    file = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    try:
        assert os.path.samestat(os.fstat(here), os.stat("."))
        again = us().directory(there)
        assert os.path.samestat(os.fstat(again), os.stat(tmp_path))
        os.close(again)
        with pytest.raises(NotADirectoryError):
            us().directory(file)
        with pytest.raises(FileNotFoundError):
            us().directory(4000)
    finally:
        for fd in (here, there, file):
            os.close(fd)
    assert os.path.samestat(os.stat(us().root), os.stat("/"))


def test_whose_permissions_it_has() -> None:
    assert us().identity() == own_identity()
    own = own_identity()
    assert (own.uid, own.gid) == (os.geteuid(), os.getegid())
    assert own.groups == set(os.getgroups())
    assert us().control_groups() == own_control_groups()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_another_user_is_told_from_us() -> None:
    ready, wanted = os.pipe()

    def wait_for_the_end() -> None:
        os.write(wanted, b"1")
        signal.pause()

    with child(wait_for_the_end, 65534) as pid:
        os.read(ready, 1)
        found = Caller(pid).identity()
    assert (found.uid, found.gid, found.capabilities) == (65534, 65534, 0)
    assert not found.may_all_of(own_identity())
    with pytest.raises(FileNotFoundError):
        Caller(2**22 + 1).identity()


def test_a_process_that_we_were_forked_from_can_be_read() -> None:
    parent = os.getpid()

    def look() -> None:
        assert can_be_read(parent)
        assert not can_be_read(2**22 + 1)

    run_as(0, look)


def test_who_may_more() -> None:
    bob = Identity(1, 1, frozenset({1, 2}), 0b11)
    assert bob.may_all_of(bob)
    assert bob.may_all_of(bob._replace(capabilities=1))
    assert not bob.may_all_of(bob._replace(capabilities=0b100))
    assert not bob.may_all_of(bob._replace(groups=frozenset({1})))
    assert not bob.may_all_of(bob._replace(uid=2))
