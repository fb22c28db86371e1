"""The handlers of a mount: one for each request, with its types."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from typing import get_args, get_origin, get_type_hints

import trio

from pkernfs.control import protocol, segment_protocol, table_protocol
from pkernfs.control.handlers import handlers
from pkernfs.control.protocol import Ping, Pong
from pkernfs.control.wire import Call
from pkernfs.fs.filesystem import FileSystem
from support.made_up_session import MadeUpSession, reply_of


def test_each_request_has_a_handler_of_its_types(fs: FileSystem) -> None:
    found = handlers(fs, MadeUpSession(fs))
    known = (protocol, segment_protocol, table_protocol)
    assert set(found) == {request for module in known for request in module.REQUESTS}
    for kind, handler in found.items():
        hints = get_type_hints(handler)
        assert hints["request"] is kind
        answer = hints["return"]
        if issubclass(kind, Call):
            assert (answer,) == kind.answers
        else:
            assert get_origin(answer) is AsyncIterator
            (item,) = get_args(answer)
            assert (get_args(item) or (item,)) == kind.answers


def test_ping_says_who_serves(fs: FileSystem) -> None:
    found = handlers(fs, MadeUpSession(fs))
    assert trio.run(reply_of, found, Ping()) == Pong(os.getpid(), fs.region.name, False)
    fs.fail("test")
    assert trio.run(reply_of, found, Ping()).read_only
