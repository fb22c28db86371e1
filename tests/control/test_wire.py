"""Lines that are no request or no answer, and ends that are of different versions."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pkernfs.control import client, wire
from pkernfs.control.protocol import Freeze, Ping, Pong
from pkernfs.control.table_protocol import FindRoot
from pkernfs.control.wire import VERSION, VersionError, parse_answer, parse_request
from pkernfs.errors import InvalidError, NoSpaceError, PkernfsError
from support.control import Serving, answer_to, connect, short_directory, socket_of
from support.mounting import Mounted, run_pkernfs

#: The line about two ends of different versions.
SAYS = "the daemon of this mount speaks protocol {}, this program {}: unmount and mount again"


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """A directory with a short name."""
    with short_directory() as path:
        yield path


async def _ping(request: Ping) -> Pong:
    return Pong(os.getpid(), "region", False)


# ---------------------------------------------------------------------- lines


@pytest.mark.parametrize(
    "line",
    [
        b'{"protocol": 2, "done": null}',
        b'{"protocol": 2, "done": {}}',
        b'{"protocol": 2, "item": "Pong", "value": {"pid": 1, "region": "", "read_only": true}}',
        b'{"protocol": 2, "done": {"pid": 1, "region": "", "read_only": true, "more": 1}}',
        b'{"protocol": 2, "done": {"pid": 1, "region": "", "read_only": true}, "more": 1}',
        b'{"protocol": 2, "error": "x"}',
        b'{"protocol": 2, "error": "x", "errno": "5"}',
        b'{"protocol": "2", "error": "x"}',
        b"[]",
        b"null",
        b"{",
        b"",
        b"\xff",
        b"[" * 500_000,
    ],
)
def test_an_answer_that_is_none(line: bytes) -> None:
    with pytest.raises(client.NoDaemonError, match=r"^MNT: the daemon's answer makes no sense$"):
        client._parse("MNT", Ping(), line)


def test_an_item_that_does_not_belong_there() -> None:
    line = wire.item_line(Pong(1, "", True))
    with pytest.raises(InvalidError, match="makes no sense"):
        parse_answer(line, Freeze())
    with pytest.raises(InvalidError, match="makes no sense"):
        parse_answer(wire.done_line(Pong(1, "", True)), Freeze())


def test_an_error_has_message_and_errno() -> None:
    found = parse_answer(wire.error_line(NoSpaceError("no space:\nhere")), Ping())
    assert isinstance(found, PkernfsError)
    assert (str(found), found.errno) == ("no space:\\nhere", errno.ENOSPC)


# ---------------------------------------------------------------------- an old client


def test_an_old_client_is_told(tmp_path: Path) -> None:
    """It reads ``error`` and ``errno`` of whatever object comes."""
    with Serving({Ping: _ping}, tmp_path / "sockets") as serving:
        for request in (b'{"op": "ping"}\n', b'{"op": "iommu.map", "domain": 0}\n'):
            answer = answer_to(serving.path, request)
            assert answer["error"] == SAYS.format(VERSION, 1)
            assert answer["errno"] == errno.EPROTONOSUPPORT


def test_a_client_of_another_version_is_told(tmp_path: Path) -> None:
    """Whatever else its requests look like."""
    with Serving({Ping: _ping}, tmp_path / "sockets") as serving:
        for request in (
            {"protocol": 3, "request": "ping", "arguments": {}},
            {"protocol": 3, "whatever": [1]},
            {"protocol": 0},
        ):
            answer = answer_to(serving.path, json.dumps(request).encode() + b"\n")
            assert answer["error"] == SAYS.format(VERSION, request["protocol"])


# ---------------------------------------------------------------------- an old daemon


def old_answer(line: bytes) -> dict[str, Any]:
    """The answer of a daemon of version 1, which does all that looks like a request to it."""
    request = json.loads(line)
    if not isinstance(request, dict) or not isinstance(request.get("op"), str):
        return {
            "error": 'control: the request is not {"op": NAME, ...}',
            "errno": errno.EINVAL,
        }
    return {"done": "what it was asked to do"}


def next_answer(line: bytes) -> dict[str, Any]:
    """The answer of a daemon of the version after this one."""
    return {"protocol": VERSION + 1, "error": "some other line", "errno": errno.EPROTONOSUPPORT}


@contextmanager
def other_daemon(path: Path, answer: Any) -> Iterator[None]:
    """Somebody who listens at ``path`` and answers as it does."""
    end = threading.Event()

    def serve() -> None:
        with contextlib.suppress(OSError):
            while not end.is_set():
                connection, _ = listening.accept()
                with connection, connection.makefile("rb") as lines:
                    if line := lines.readline():
                        connection.sendall(json.dumps(answer(line)).encode() + b"\n")

    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield
        finally:
            end.set()
            connect(path).close()
            thread.join()
    path.unlink()


@pytest.mark.parametrize(("answer", "version"), [(old_answer, 1), (next_answer, VERSION + 1)])
def test_another_daemon_is_told_of(
    answer: Any, version: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "_connect", lambda path: connect(tmp_path / "socket"))
    says = f"^MNT: {SAYS.format(version, VERSION)}$"
    with other_daemon(tmp_path / "socket", answer):
        for _ in range(2):
            with pytest.raises(VersionError, match=says):
                client.call("MNT", Ping())
        with pytest.raises(VersionError, match=says):
            next(client.stream("MNT", Freeze()))


@pytest.mark.fuse
def test_a_command_says_so_in_one_line(tmp_path: Path) -> None:
    with Mounted(16 << 20) as m:
        path = socket_of(m.path)
        path.unlink()
        with other_daemon(path, old_answer):
            says = f"pkernfs: {m.path}: {SAYS.format(1, VERSION)}\n"
            done = run_pkernfs("handover", "--force", str(m.path))
            assert (done.returncode, done.stdout) == (1, "")
            forced, refused = done.stderr.splitlines(keepends=True)
            assert forced.startswith("pkernfs: forced, although: ")
            assert refused == says
            assert run_pkernfs("iommu", "create", str(m.path)).stderr == says


def test_requests_of_this_version_have_no_op() -> None:
    """An old daemon would take one that has, and do half of it."""
    assert not any(b'"op"' in wire.request_line(kind()) for kind in (Ping, Freeze, FindRoot))
    assert old_answer(wire.request_line(Ping()))["errno"] == errno.EINVAL
    assert parse_request(wire.request_line(Ping()), {Ping.op: Ping}) == Ping()
