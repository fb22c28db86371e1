"""The session of a mount, as handlers of the control socket need it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Protocol, TypeVar

from pkernfs.host.holders import Holding
from pkernfs.quantities import Ino

_Result = TypeVar("_Result")


class Session(Protocol):
    """The session of a mount, in which its FUSE requests are served."""

    def hold_zeroing(self) -> AbstractAsyncContextManager[object]:
        """Keep everybody else from zeroing memory, and so no request waits for it."""

    async def drain(self) -> None:
        """Wait until the requests that are there already have been handled."""

    async def pause(self) -> None:
        """Let other requests be served before the caller goes on."""

    async def with_zeroing(self, operation: Callable[[], _Result]) -> _Result:
        """Run an operation, again if it needs memory that must be zeroed first."""

    async def invalidate(self, ino: Ino, *, data: bool = False) -> None:
        """Have the kernel ask for an inode's attributes, and ``data``, again."""

    async def invalidate_name(self, directory: Ino, name: bytes) -> None:
        """Have the kernel look a name up again, and read its directory again."""

    def writers(self) -> dict[Ino, int]:
        """Count by inode how often each is open for writing."""

    async def users(self, ino: Ino, *, segment: bool) -> list[Holding]:
        """Ask the kernel which processes have a file, or else its segment, open or mapped."""

    async def cover(self, path: str, ino: Ino) -> None:
        """Have a path of the mount lead to the segment of its file.

        :raises RegionError: the kernel refuses.
        """

    async def uncover(self, ino: Ino) -> None:
        """Have all paths lead to a file again that lead to its segment."""

    def freed(self) -> None:
        """Be told that memory may have become free."""
