"""The handlers of extended attributes: stored ones, and those that tell what a file is made of."""

from __future__ import annotations

from typing import Any

from pkernfs.errors import NotSupportedError, WorkNeeded
from pkernfs.fuse import extents_xattr, segment_xattr, shim  # noqa: F401 - the shim comes first
from pkernfs.fuse.data import CAPABILITY
from pkernfs.fuse.waiting import Handlers, Waiting, errno_of, handler, until_worked
from pkernfs.quantities import Ino

from pyfuse3 import FUSEError  # isort: skip

_NAMESPACES = (b"user.", b"trusted.", b"security.")
_EXTENTS = extents_xattr.NAME.encode()
_SEGMENT = segment_xattr.NAME.encode()


class XattrHandlers(Handlers):
    """The handlers of extended attributes of one mount."""

    #: The inodes that are known to have no ``security.capability``.
    _without_capability: set[Ino]

    async def getxattr(self, ino: Any, name: bytes, ctx: Any) -> bytes:
        if name.startswith(_EXTENTS):
            return await self._extents(ino, name, ctx.uid == 0)
        if name == _SEGMENT:
            return await self._segment(ino)
        return await self._stored_xattr(ino, name)

    @handler
    def _stored_xattr(self, ino: Ino, name: bytes) -> bytes:
        _check_namespace(name)
        return self.fs.getxattr(ino, name)

    async def _extents(self, ino: Ino, name: bytes, with_addresses: bool) -> bytes:
        """The addresses of huge pages are the kernel's to tell, one by one: in a thread."""
        try:
            waiting = self.waiting if with_addresses else None
            if waiting is not None and self.fs.segments.find(ino) is not None:
                return await self._segment_extents(waiting, ino, name)
            make = extents_xattr.page(self.fs, ino, name, with_addresses)
            if waiting is not None and self.fs.region.asks_for_addresses:
                return await waiting.aside(make)
            return make()
        except Exception as e:
            raise FUSEError(errno_of(self.fs, e)) from None

    async def _segment_extents(self, waiting: Waiting, ino: Ino, name: bytes) -> bytes:
        """In a turn at the pool, for the segment is mapped for it: a cut would find it busy."""
        found: list[bytes] = []
        async with waiting.pool_turn():
            await until_worked(self.fs, waiting, lambda: self.fs.segments.there(ino))
            make = extents_xattr.page(self.fs, ino, name, with_addresses=True)
            await waiting.work(WorkNeeded(lambda: found.append(make())))
        return found[0]

    @handler
    def _segment(self, ino: Ino) -> bytes:
        return segment_xattr.value(self.fs, ino)

    @handler
    def setxattr(self, ino: Ino, name: bytes, value: bytes, ctx: Any) -> None:
        """XATTR_CREATE and XATTR_REPLACE: pyfuse3 has looked already, and nothing runs between."""
        _check_namespace(name)
        if name == CAPABILITY:
            self._without_capability.discard(ino)
        self.fs.setxattr(ino, name, value, 0)

    @handler
    def removexattr(self, ino: Ino, name: bytes, ctx: Any) -> None:
        _check_namespace(name)
        self.fs.removexattr(ino, name)

    @handler
    def listxattr(self, ino: Ino, ctx: Any) -> list[bytes]:
        names = self.fs.listxattr(ino)
        if ctx.uid:
            names = [name for name in names if not name.startswith(b"trusted.")]
        return names


def _check_namespace(name: bytes) -> None:
    if not name.startswith(_NAMESPACES):
        raise NotSupportedError("extended attributes: no such namespace")
