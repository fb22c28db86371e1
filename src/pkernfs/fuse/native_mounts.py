"""The names of native files in a mount: each is covered by a bind mount of its file's segment.

So whoever opens the name opens the segment itself, a device or a file of the pool's directory. A
character device in its place would do without a bind mount, but Linux with CONFIG_FUSE_DAX panics
when it drops the inode of such a device (docs/coherence.md).

Users choose what the directories on the way are. So each step is taken without following a link,
and what is covered is the file itself, by a descriptor. All here may take long: a worker thread
calls it, while the mount is served.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import stat
from collections.abc import Iterable, Iterator

from pkernfs.control.mounts import Mount, read_mounts
from pkernfs.errors import RegionError
from pkernfs.quantities import Ino

_MS_BIND = 4096
_MNT_DETACH = 2
_STEP = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC


class NativeMounts:
    """The bind mounts over the names of one mount; ``device`` is the ``st_dev`` of that."""

    def __init__(self, mountpoint: str, device: int) -> None:
        self._mountpoint = mountpoint
        self._device = device

    def cover(self, path: str, ino: Ino, segment: str) -> None:
        """Have ``path`` lead to the file or device ``segment``; it is no error if it does.

        :param path: a name of file ``ino``, from the root of the mount.
        :raises RegionError: that is not there, or the kernel refuses.
        """
        try:
            source = os.open(segment, _STEP)
        except OSError as e:
            raise RegionError(f"{segment}: {e.strerror}", e.errno or 0) from e
        try:
            with self._opened(path) as target:
                found, wanted = os.fstat(target), os.fstat(source)
                if os.path.samestat(found, wanted):
                    return
                if (found.st_dev, found.st_ino) != (self._device, ino):
                    raise RegionError(f"{path}: something else is there, or mounted over it")
                self._bind(source, target, path)
        finally:
            os.close(source)

    def _bind(self, source: int, target: int, path: str) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        places = [f"/proc/self/fd/{fd}".encode() for fd in (source, target)]
        if libc.mount(*places, None, ctypes.c_ulong(_MS_BIND), None):
            reason = os.strerror(ctypes.get_errno())
            raise RegionError(f"{path}: cannot mount its segment: {reason}", ctypes.get_errno())

    @contextlib.contextmanager
    def _opened(self, path: str) -> Iterator[int]:
        """Open what is at a path of the mount, whatever its directories are changed to meanwhile.

        :raises RegionError: it is not in this mount.
        """
        *directories, name = path.strip("/").split("/")
        try:
            fd = os.open(self._mountpoint, _STEP | os.O_DIRECTORY)
        except OSError as e:
            raise RegionError(f"{self._mountpoint}: {e.strerror}", e.errno or 0) from e
        try:
            for flags, part in [*((os.O_DIRECTORY, d) for d in directories), (0, name)]:
                if os.fstat(fd).st_dev != self._device:
                    raise RegionError(f"{path}: another file system is mounted over it")
                above, fd = fd, os.open(part, _STEP | flags, dir_fd=fd)
                os.close(above)
            yield fd
        except OSError as e:
            raise RegionError(f"{path}: {e.strerror}", e.errno or 0) from e
        finally:
            os.close(fd)

    def uncover(self, segments: Iterable[str]) -> None:
        """Have names lead to the files of the mount again that lead to any of these segments."""
        covers = self._covers()
        if not covers:
            return
        wanted = set()
        for path in segments:
            with contextlib.suppress(OSError):
                info = os.stat(path)
                if not stat.S_ISDIR(info.st_mode):  # such as /dev, for one that has no name yet
                    wanted.add((info.st_dev, info.st_ino))
        libc = ctypes.CDLL(None, use_errno=True)
        for place in covers:
            with contextlib.suppress(OSError):
                fd = os.open(place.mount_point, _STEP)
                try:
                    info = os.fstat(fd)
                    if (info.st_dev, info.st_ino) in wanted:
                        libc.umount2(f"/proc/self/fd/{fd}".encode(), _MNT_DETACH)
                finally:
                    os.close(fd)

    def _covers(self) -> list[Mount]:
        """What is mounted over a file or directory of this mount, the last first."""
        mounts = read_mounts()
        bases = {m.mount_id for m in mounts if m.device == self._device}
        return [m for m in reversed(mounts) if m.parent_id in bases and m.device != self._device]
