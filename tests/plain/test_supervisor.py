"""Which opens are answered: decisions over threads that wait, with segments of ordinary files."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import functools
import os
import syslog
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pkernfs.host.sysroot import Host
from pkernfs.plain import supervisor
from pkernfs.plain.caller import Caller, own_identity
from pkernfs.plain.fitting import is_as_large
from pkernfs.plain.lookup import may_access
from pkernfs.plain.supervisor import SLOTS_BYTES, SegmentOf, Supervisor, release
from support.stopped import Stopped
from support.supervised import NATIVE, PLAIN, Files, StubMounts, make_files, stub_segment_of


@pytest.fixture
def files(tmp_path: Path) -> Files:
    """A file with a segment."""
    return make_files(tmp_path)


def opened(path: object, flags: int) -> Callable[[], bytes]:
    """Open and read a file, in whatever thread."""

    def work() -> bytes:
        fd = os.open(os.fspath(path), flags)  # type: ignore[call-overload]
        try:
            return os.pread(fd, len(NATIVE), 0)
        finally:
            os.close(fd)

    return work


def answer(
    files: Files,
    flags: int = os.O_RDWR,
    path: object = None,
    segment_of: SegmentOf = stub_segment_of,
    mounts: StubMounts | None = None,
) -> object:
    """Have a thread open the file, and decide on it once; return what it read, or its OSError."""
    with Stopped(opened(path or files.plain, flags)) as thread:
        call = thread.receive()
        mounts = mounts or StubMounts(str(files.directory))
        one = Supervisor(thread.listener, thread.slot, mounts, segment_of)
        try:
            done = one.answer(call)
        except OSError:
            done = False
        if not done:
            thread.listener.go_on(call.id)
        result = thread.end()
    if isinstance(result, bytes):
        assert done == (result != head(PLAIN))
    return result


def head(text: bytes) -> bytes:
    """As many bytes as a thread reads."""
    return text.ljust(len(NATIVE), b"\0")[: len(NATIVE)]


@pytest.mark.parametrize(
    "flags",
    [
        os.O_RDONLY,
        os.O_RDWR | os.O_CLOEXEC,
        os.O_RDWR | os.O_CREAT,
        os.O_RDWR | os.O_EXCL | os.O_APPEND,
        os.O_RDONLY | os.O_NOFOLLOW | os.O_NOATIME,
    ],
)
def test_a_file_with_a_segment_is_answered(files: Files, flags: int) -> None:
    assert answer(files, flags) == NATIVE


def test_the_flags_are_the_callers(files: Files) -> None:
    with Stopped(lambda: os.open(files.plain, os.O_RDWR | os.O_APPEND | os.O_SYNC)) as thread:
        call = thread.receive()
        mounts = StubMounts(str(files.directory))
        assert Supervisor(thread.listener, thread.slot, mounts, stub_segment_of).answer(call)
        fd = thread.end()
    assert isinstance(fd, int)
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    assert flags & os.O_ACCMODE == os.O_RDWR
    assert flags & (os.O_APPEND | os.O_SYNC | os.O_PATH) == os.O_APPEND | os.O_SYNC
    assert os.readlink(f"/proc/self/fd/{fd}") == str(files.native)
    os.close(fd)


def test_files_without_a_segment_go_on(files: Files) -> None:
    files.native.unlink()
    assert answer(files) == head(PLAIN)


def test_other_file_systems_go_on(files: Files) -> None:
    def never(_fd: int) -> str | None:
        pytest.fail("asked a file of another file system")

    assert answer(files, segment_of=never, mounts=StubMounts("/proc")) == head(PLAIN)


def test_a_directory_and_a_missing_file_go_on(files: Files) -> None:
    assert isinstance(answer(files, os.O_RDONLY, files.directory), IsADirectoryError)
    assert isinstance(answer(files, os.O_RDONLY, files.directory / "none"), FileNotFoundError)


def test_what_cannot_be_asked_goes_on(files: Files) -> None:
    def dead(_fd: int) -> str | None:
        raise ConnectionAbortedError

    assert answer(files, segment_of=dead) == head(PLAIN)


def test_a_mount_that_is_not_trusted_goes_on(files: Files) -> None:
    class Untrusted(StubMounts):
        def is_trusted(self, device: int, uid: int) -> bool:
            return False

    assert answer(files, mounts=Untrusted(str(files.directory))) == head(PLAIN)


def test_no_mounts_no_look(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    class Nothing(StubMounts):
        def are_there(self) -> bool:
            return False

    monkeypatch.setattr(supervisor, "find", lambda *_: pytest.fail("looked for it"))
    assert answer(files, mounts=Nothing(str(files.directory))) == head(PLAIN)


def test_another_users_file_is_not_created_over(files: Files) -> None:
    """fs.protected_regular is the kernel's to apply."""
    os.chown(files.plain, 5, 5)
    assert answer(files, os.O_RDWR | os.O_CREAT) == head(PLAIN)
    assert answer(files, os.O_RDWR) == NATIVE


@pytest.mark.parametrize("kind", ["fifo", "link", "directory"])
def test_a_native_path_must_be_memory(files: Files, kind: str) -> None:
    files.native.unlink()
    if kind == "fifo":
        os.mkfifo(files.native)
    elif kind == "link":
        files.native.symlink_to(files.plain)
    else:
        files.native.mkdir()
    assert answer(files) == head(PLAIN)


@pytest.mark.parametrize("more", [-1, 1])
def test_a_file_that_ends_elsewhere_than_its_segment_goes_on(files: Files, more: int) -> None:
    """A program would read past its end, or append there what the mount knows nothing of."""
    os.truncate(files.plain, files.native.stat().st_size + more)
    assert answer(files) == head(PLAIN)


def test_a_device_is_memory(files: Files) -> None:
    assert answer(files, segment_of=lambda _fd: "/dev/zero") == bytes(len(NATIVE))


def test_a_device_is_for_those_in_our_control_group(
    files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "own_control_groups", lambda: b"0::/another\n")
    assert answer(files, segment_of=lambda _fd: "/dev/zero") == head(PLAIN)
    assert answer(files) == NATIVE


def test_a_segment_that_goes_meanwhile_is_not_given(files: Files) -> None:
    """Its native path may be another file's by the time it is open."""
    answers: Iterator[str | None] = iter([str(files.native), None])
    assert answer(files, segment_of=lambda _fd: next(answers)) == head(PLAIN)


@pytest.mark.parametrize("right", ["native", "plain", "path"])
def test_what_the_caller_may_not_the_kernel_decides(
    files: Files, monkeypatch: pytest.MonkeyPatch, right: str
) -> None:
    """The caller is nobody; this thread is root, so that the kernel lets it in all the same."""
    ours = own_identity()
    nobody = ours._replace(uid=65534, gid=65534, groups=frozenset(), capabilities=0)
    monkeypatch.setattr(Caller, "identity", lambda _caller: nobody)
    for directory in (*files.plain.parents, files.native.parent):
        directory.chmod(directory.stat().st_mode | 0o1)
    for file in (files.plain, files.native):
        file.chmod(0o606)
    assert answer(files) == NATIVE
    forbidden = {"native": files.native, "plain": files.plain, "path": files.plain.parent}[right]
    forbidden.chmod(0o700)
    assert answer(files) == head(PLAIN)
    assert own_identity() == ours
    assert may_access(None, 0, os.F_OK)


def test_a_call_that_waits_no_more_is_not_answered(files: Files) -> None:
    """Its thread has been killed: what was read may be of another one with the number."""

    class Gone:
        def is_valid(self, _id: int) -> bool:
            return False

        def give(self, *_args: object, **_options: object) -> bool:
            pytest.fail("answered")

    with Stopped(opened(files.plain, os.O_RDWR)) as thread:
        call = thread.receive()
        mounts = StubMounts(str(files.directory))
        one = Supervisor(Gone(), thread.slot, mounts, stub_segment_of)  # type: ignore[arg-type]
        assert not one.answer(call)
        thread.listener.go_on(call.id)
        thread.end()


def test_a_path_that_cannot_be_read_goes_on(files: Files) -> None:
    libc = ctypes.CDLL(None, use_errno=True)

    def open_nowhere() -> tuple[int, int]:
        return libc.open(ctypes.c_void_p(16), 0), ctypes.get_errno()

    with Stopped(open_nowhere) as thread:
        call = thread.receive()
        mounts = StubMounts(str(files.directory))
        one = Supervisor(thread.listener, thread.slot, mounts, stub_segment_of)
        with pytest.raises(OSError, match="Bad address"):
            one.answer(call)
        thread.listener.go_on(call.id)
        assert thread.end() == (-1, 14)


# ------------------------------------------------------------------------------- threads


def serving(
    thread: Stopped, files: Files, segment_of: SegmentOf
) -> tuple[threading.Thread, memoryview]:
    """A supervisor at work in threads of this process, and its slots."""
    slots = memoryview(bytearray(SLOTS_BYTES))
    one = Supervisor(thread.listener, slots, StubMounts(str(files.directory)), segment_of)
    server = threading.Thread(target=one.serve, daemon=True)
    server.start()
    return server, slots


def test_it_serves_until_nobody_is_left(files: Files) -> None:
    def work() -> list[bytes]:
        return [opened(files.plain, os.O_RDONLY)() for _ in range(20)]

    with Stopped(work) as thread:
        server, _ = serving(thread, files, stub_segment_of)
        assert thread.end() == [NATIVE] * 20
        server.join(10)
        assert not server.is_alive()


def test_a_bug_holds_nobody_up(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(syslog, "syslog", lambda _level, text: told.append(text))

    def broken(_fd: int) -> str | None:
        raise ZeroDivisionError

    with Stopped(opened(files.plain, os.O_RDONLY)) as thread:
        server, _ = serving(thread, files, broken)
        assert thread.end() == head(PLAIN)
        server.join(10)
    assert "ZeroDivisionError" in told[0]


def test_an_answer_may_wait_for_another_open(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a file system whose daemon is below the supervisor; too many of them go on."""
    monkeypatch.setattr(supervisor, "MOST_THREADS", 3)
    other = make_files(files.directory, "other")
    held = threading.Barrier(3)
    released = threading.Event()

    def segment_of(fd: int) -> str | None:
        native = stub_segment_of(fd)
        if native == str(files.native) and not released.is_set():
            held.wait(10)
            released.wait(10)
        return native

    results: list[bytes] = []

    def work() -> list[bytes]:
        # Threads have the filter of the one that starts them.
        late = [threading.Thread(target=lambda: results.append(read())) for _ in range(2)]
        for one in late:
            one.start()
        held.wait(10)
        there = [opened(other.plain, os.O_RDONLY)() for _ in range(3)]
        released.set()
        for one in late:
            one.join(10)
        return there

    read = opened(files.plain, os.O_RDONLY)
    with Stopped(work) as thread:
        server, _ = serving(thread, files, segment_of)
        there = thread.end()
        server.join(10)
    assert there == [head(PLAIN)] * 3, "the last thread asks nobody"
    assert results == [NATIVE] * 2


def test_what_a_killed_supervisor_had_received_goes_on(files: Files) -> None:
    slots = memoryview(bytearray(SLOTS_BYTES))
    with Stopped(opened(files.plain, os.O_RDONLY)) as thread:
        assert thread.listener.receive(slots[80:160]) is not None
        release(thread.listener, slots)
        assert thread.end() == head(PLAIN)


def test_sizing_of_a_device_that_fits_succeeds(
    files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the kernel refuses of every device: of a dax device it is so already."""
    rdev = os.stat("/dev/null").st_rdev
    place = tmp_path / f"sys/dev/char/{os.major(rdev)}:{os.minor(rdev)}"
    place.mkdir(parents=True)
    (place / "size").write_text(f"{32 << 20}\n")
    (place / "subsystem").symlink_to("../../bus/dax")
    there = functools.partial(is_as_large, host=Host(str(tmp_path)))
    monkeypatch.setattr(supervisor, "is_as_large", there)
    with open("/dev/null", "r+b", buffering=0) as device, files.plain.open("r+b") as file:
        for number, size, expected in (
            (device.fileno(), 32 << 20, None),
            (device.fileno(), 16 << 20, errno.EINVAL),
            (file.fileno(), 5, None),
        ):
            assert truncated(files, number, size) == expected
        assert os.fstat(file.fileno()).st_size == 5


def truncated(files: Files, number: int, size: int) -> int | None:
    """Have a thread call ftruncate, and decide on it; return its errno."""
    with Stopped(lambda: os.ftruncate(number, size)) as thread:
        call = thread.receive()
        one = Supervisor(
            thread.listener, thread.slot, StubMounts(str(files.directory)), stub_segment_of
        )
        if not one.answer(call):
            thread.listener.go_on(call.id)
        result = thread.end()
    return result.errno if isinstance(result, OSError) else None
