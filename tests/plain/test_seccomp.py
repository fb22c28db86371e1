"""The filter by an interpreter of its instructions; the listener by threads that it stops."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from pkernfs.errors import BusyError, NotSupportedError, PkernfsError
from pkernfs.plain import seccomp
from pkernfs.plain.seccomp import (
    FALLOCATE,
    FTRUNCATE,
    OPEN,
    OPENAT,
    OPENAT2,
    filter_program,
    last_call,
    listen,
)
from support.stopped import Stopped

X86_64, I386, AARCH64 = 0xC000003E, 0x40000003, 0xC00000B7
NOTIFY, ALLOW = 0x7FC00000, 0x7FFF0000
X32 = 0x40000000


def verdict(number: int, args: list[int], arch: int = X86_64) -> int:
    """What the filter returns for a call, as the kernel would run it."""
    words = [number, arch, 0, 0]
    for arg in args + [0] * (6 - len(args)):
        words += [arg & 0xFFFFFFFF, arg >> 32]
    program, at, a = filter_program(), 0, 0
    while True:
        one = program[at]
        code, true, false, k = one & 0xFFFF, one >> 16 & 0xFF, one >> 24 & 0xFF, one >> 32
        at += 1
        match code:
            case 0x20:  # load
                a = words[k // 4]
            case 0x54:  # and
                a &= k
            case 0x05:  # jump
                at += k
            case 0x15:  # equal
                at += true if a == k else false
            case 0x45:  # any bit
                at += true if a & k else false
            case 0x06:
                return k
            case _:
                pytest.fail(f"no such instruction: {code:#x}")


PASSED = [
    os.O_PATH,
    os.O_DIRECTORY,
    os.O_TMPFILE | os.O_RDWR,
    os.O_TRUNC | os.O_WRONLY,
    os.O_CREAT | os.O_EXCL | os.O_RDWR,
]
STOPPED = [
    os.O_RDONLY,
    os.O_RDWR | os.O_CLOEXEC,
    os.O_RDWR | os.O_CREAT,
    os.O_WRONLY | os.O_EXCL | os.O_APPEND,
]


@pytest.mark.parametrize("flags", PASSED + STOPPED)
def test_the_flags_decide_in_the_kernel(flags: int) -> None:
    expected = ALLOW if flags in PASSED else NOTIFY
    assert verdict(OPEN, [1, flags, 0o644]) == expected
    assert verdict(OPENAT, [0xFFFFFF9C, 1, flags, 0o644]) == expected
    assert verdict(OPENAT2, [0xFFFFFF9C, 1, 2, 24]) == NOTIFY, "its flags are in memory"
    assert seccomp.is_left_to_kernel(flags) == (expected == ALLOW)


def test_other_calls_and_other_architectures_are_the_kernels() -> None:
    stopped = (OPEN, OPENAT, OPENAT2, FTRUNCATE, FALLOCATE)
    assert {verdict(n, [0] * 6) for n in range(500) if n not in stopped} == {ALLOW}
    assert {verdict(n, [0] * 6) for n in stopped} == {NOTIFY}
    for number in stopped:
        assert verdict(number, [0] * 4, I386) == verdict(number, [0] * 4, AARCH64) == ALLOW
        assert verdict(number | X32, [0] * 4) == ALLOW
    assert verdict(5, [0] * 4, I386) == ALLOW, "open of i386"


def test_an_open_goes_on(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("as it is")
    with Stopped(lambda: (tmp_path / "file").read_text()) as thread:
        call = thread.receive()
        assert call.number == OPENAT
        assert last_call(thread.slot) == call.id
        assert thread.listener.is_valid(call.id)
        thread.listener.go_on(call.id)
        assert thread.end() == "as it is"
        assert not thread.listener.is_valid(call.id)
        thread.listener.go_on(call.id)  # in vain, and no error


@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.parametrize("on_exec", [False, True])
def test_an_open_is_answered_with_a_descriptor(tmp_path: Path, on_exec: bool, waits: bool) -> None:
    (tmp_path / "other").write_text("something else")
    other = os.open(tmp_path / "other", os.O_RDONLY)
    try:
        with Stopped(lambda: os.open(tmp_path / "missing", os.O_RDONLY)) as thread:
            call = thread.receive()
            thread.listener.waits = waits  # False is what a kernel before 5.19 tells
            assert thread.listener.give(call.id, other, close_on_exec=on_exec)
            given = thread.end()
            assert isinstance(given, int), given
            try:
                assert os.pread(given, 100, 0) == b"something else"
                assert os.get_inheritable(given) != on_exec
            finally:
                os.close(given)
            assert not thread.listener.give(call.id, other, close_on_exec=False)
    finally:
        os.close(other)


def test_without_a_listener_opens_fail() -> None:
    """What a supervisor that is killed leaves behind, were there no keeper."""
    with Stopped(lambda: os.open("/", os.O_RDONLY)) as thread:
        thread.receive()
        thread.listener.close()
        failed = thread.end()
        assert isinstance(failed, OSError)
        assert failed.errno == errno.ENOSYS


def test_this_kernel_can_answer_with_descriptors() -> None:
    with Stopped(lambda: None) as thread:
        assert thread.listener.can_give()


def test_a_second_listener_is_refused() -> None:
    def nested() -> str:
        seen = ""
        try:
            listen(os.getpid())
        except BusyError as error:
            seen = str(error)
        return seen

    with Stopped(nested) as thread:
        thread.listener.go_on(thread.receive().id)  # its status, for capabilities
        assert thread.end() == (
            "exec: another supervisor listens to this process: no exec inside an exec"
        )


def test_another_machine_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "uname", lambda: os.uname_result(("Linux", "", "", "", "aarch64")))
    with pytest.raises(NotSupportedError, match="got aarch64"):
        listen(1)


@pytest.mark.parametrize(
    ("error", "expected"),
    [(errno.ENOSYS, "no seccomp user notification"), (errno.EPERM, "forbids more")],
)
def test_a_kernel_without_it_is_named(
    error: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Lib:
        def pk_no_new_privs(self) -> None:
            pass

        def pk_let_trace(self, pid: int) -> None:
            pass

        def pk_seccomp_listen(self, program: list[int], length: int, waits: object) -> int:
            return -error

    monkeypatch.setattr(seccomp, "lib", Lib())
    with pytest.raises(PkernfsError, match=expected):
        listen(1)
