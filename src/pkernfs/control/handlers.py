"""Every handler of the control socket of a mount, by the class of its request."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from pkernfs.control import protocol
from pkernfs.control.freezing import HandoverLease
from pkernfs.control.native_requests import NativeRequests
from pkernfs.control.segment_requests import SegmentRequests
from pkernfs.control.server import Handlers
from pkernfs.control.session import Session
from pkernfs.control.table_requests import TableRequests

if TYPE_CHECKING:
    from pkernfs.fs.filesystem import FileSystem


def handlers(fs: FileSystem, session: Session) -> Handlers:
    """The handlers of one mount, for all requests that there are."""

    async def ping(request: protocol.Ping) -> protocol.Pong:
        return protocol.Pong(os.getpid(), fs.region.name, fs.read_only)

    return {
        protocol.Ping: ping,
        **HandoverLease(fs, session).handlers(),
        **NativeRequests(fs, session).handlers(),
        **SegmentRequests(fs, session).handlers(),
        **TableRequests(fs, session).handlers(),
    }
