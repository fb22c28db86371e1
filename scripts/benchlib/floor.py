"""The floor: a pyfuse3 file system with next to nothing behind it.

Shows what one request costs through the kernel, libfuse, pyfuse3 and trio, and what each switch
buys; every Python file system is slower.  Metadata are dicts, data are 2 MiB pieces of one
anonymous mapping in huge pages.  There are no permissions, hard links, locks, extended
attributes, times or persistence, so it is a yardstick and nothing to build on.

    floor.py MOUNTPOINT                                              the plain floor
    floor.py MOUNTPOINT --timeout 3600 --tasks 1 --poll-us 0 --bdi   the tuned floor

Runs in the foreground until it is unmounted.
"""

import argparse
import errno
import functools
import mmap
import os
import select
import stat
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pyfuse3
import trio

PIECE_BYTES = 2 << 20
#: Every so many requests trio gets to run even when another request is already waiting.
TURN = 256
_HOLE = memoryview(bytes(1 << 20))
_BDI_SETTINGS = {"read_ahead_kb": 1024, "strict_limit": 0, "max_ratio": 100}


def _error(number: int) -> pyfuse3.FUSEError:
    return pyfuse3.FUSEError(number)


class Node:
    """A file or directory: its ready-made attributes, and names or pieces of memory."""

    __slots__ = ("attr", "names", "pieces")

    def __init__(self, ino: int, mode: int, timeout: float) -> None:
        attr = pyfuse3.EntryAttributes()
        attr.st_ino = pyfuse3.InodeT(ino)
        attr.st_mode = pyfuse3.ModeT(mode)
        attr.st_nlink = 1
        attr.st_blksize = 4096
        attr.entry_timeout = attr.attr_timeout = timeout
        attr.st_atime_ns = attr.st_mtime_ns = attr.st_ctime_ns = time.time_ns()
        self.attr = attr
        self.names: dict[bytes, Node] = {}
        self.pieces: dict[int, int] = {}


class Memory:
    """One anonymous mapping, handed out in pieces of 2 MiB."""

    def __init__(self, size: int) -> None:
        mapping = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        mapping.madvise(mmap.MADV_HUGEPAGE)
        self.view = memoryview(mapping)
        self.free = list(range(0, size - size % PIECE_BYTES, PIECE_BYTES))

    def take(self) -> int:
        """Offset of a free piece; ENOSPC if there is none.  Its old bytes are not cleared."""
        if not self.free:
            raise _error(errno.ENOSPC)
        return self.free.pop()


class Floor(pyfuse3.Operations):
    """The handlers; a file handle is the inode number."""

    def __init__(self, timeout: float, size: int) -> None:
        super().__init__()
        self.timeout = timeout
        self.memory = Memory(size)
        self.nodes: dict[int, Node] = {}
        self.listings: dict[int, list[tuple[bytes, Node]]] = {}
        self.last_ino = 0
        self._add(stat.S_IFDIR | 0o755)

    def _add(self, mode: int) -> Node:
        self.last_ino += 1
        node = self.nodes[self.last_ino] = Node(self.last_ino, mode, self.timeout)
        return node

    async def lookup(
        self, parent_inode: pyfuse3.InodeT, name: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        node = self.nodes[parent_inode].names.get(name)
        if node is None:
            raise _error(errno.ENOENT)
        return node.attr

    async def getattr(
        self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        return self.nodes[inode].attr

    async def setattr(
        self,
        inode: pyfuse3.InodeT,
        attr: pyfuse3.EntryAttributes,
        fields: pyfuse3.SetattrFields,
        fh: pyfuse3.FileHandleT | None,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        node = self.nodes[inode]
        if fields.update_size:
            self._cut(node, attr.st_size)
        if fields.update_mode:
            node.attr.st_mode = attr.st_mode
        return node.attr

    def _cut(self, node: Node, size: int) -> None:
        node.attr.st_size = size
        for index in [i for i in node.pieces if i * PIECE_BYTES >= size]:
            self.memory.free.append(node.pieces.pop(index))

    async def mkdir(
        self,
        parent_inode: pyfuse3.InodeT,
        name: bytes,
        mode: pyfuse3.ModeT,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        node = self.nodes[parent_inode].names[name] = self._add(stat.S_IFDIR | mode)
        return node.attr

    async def create(
        self,
        parent_inode: pyfuse3.InodeT,
        name: bytes,
        mode: pyfuse3.ModeT,
        flags: pyfuse3.FlagT,
        ctx: pyfuse3.RequestContext,
    ) -> tuple[pyfuse3.FileInfo, pyfuse3.EntryAttributes]:
        node = self.nodes[parent_inode].names[name] = self._add(stat.S_IFREG | mode)
        return pyfuse3.FileInfo(fh=pyfuse3.FileHandleT(node.attr.st_ino)), node.attr

    async def unlink(
        self, parent_inode: pyfuse3.InodeT, name: bytes, ctx: pyfuse3.RequestContext
    ) -> None:
        self.nodes[parent_inode].names.pop(name).attr.st_nlink = 0

    async def rmdir(
        self, parent_inode: pyfuse3.InodeT, name: bytes, ctx: pyfuse3.RequestContext
    ) -> None:
        names = self.nodes[parent_inode].names
        if names[name].names:
            raise _error(errno.ENOTEMPTY)
        names.pop(name).attr.st_nlink = 0

    async def rename(
        self,
        parent_inode_old: pyfuse3.InodeT,
        name_old: bytes,
        parent_inode_new: pyfuse3.InodeT,
        name_new: bytes,
        flags: int,
        ctx: pyfuse3.RequestContext,
    ) -> None:
        node = self.nodes[parent_inode_old].names.pop(name_old)
        self.nodes[parent_inode_new].names[name_new] = node

    async def forget(self, inode_list: Sequence[tuple[pyfuse3.InodeT, int]]) -> None:
        for ino, _count in inode_list:  # an unlinked node is never looked up a second time here
            node = self.nodes.get(ino)
            if node is not None and not node.attr.st_nlink:
                self.memory.free.extend(node.pieces.values())
                del self.nodes[ino]

    async def opendir(
        self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.FileHandleT:
        self.listings[inode] = list(self.nodes[inode].names.items())
        return pyfuse3.FileHandleT(inode)

    async def readdir(
        self, fh: pyfuse3.FileHandleT, start_id: int, token: pyfuse3.ReaddirToken
    ) -> None:
        items = self.listings[fh]
        for position in range(start_id, len(items)):
            name, node = items[position]
            if not pyfuse3.readdir_reply(token, name, node.attr, position + 1):
                return

    async def open(
        self, inode: pyfuse3.InodeT, flags: pyfuse3.FlagT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.FileInfo:
        return pyfuse3.FileInfo(fh=pyfuse3.FileHandleT(inode))

    async def releasedir(self, fh: pyfuse3.FileHandleT) -> None:
        pass

    async def release(self, fh: pyfuse3.FileHandleT) -> None:
        pass

    async def fsync(self, fh: pyfuse3.FileHandleT, datasync: bool) -> None:
        pass

    async def read(self, fh: pyfuse3.FileHandleT, off: int, size: int) -> bytes:
        node = self.nodes[fh]
        end = min(off + size, node.attr.st_size)
        parts: list[memoryview] = []
        while off < end:
            index, within = divmod(off, PIECE_BYTES)
            at = node.pieces.get(index)
            length = min(end - off, PIECE_BYTES - within)
            if at is None:
                parts.append(_HOLE[:length])
            else:
                parts.append(self.memory.view[at + within : at + within + length])
            off += len(parts[-1])
        if len(parts) == 1:  # hand out the memory itself: no copy in Python
            return parts[0]  # type: ignore[return-value]
        return b"".join(parts)

    async def write(self, fh: pyfuse3.FileHandleT, off: int, buf: bytes) -> int:
        node = self.nodes[fh]
        source = memoryview(buf)
        done = 0
        while done < len(buf):
            index, within = divmod(off + done, PIECE_BYTES)
            if index not in node.pieces:
                node.pieces[index] = self.memory.take()
            at = node.pieces[index] + within
            length = min(len(buf) - done, PIECE_BYTES - within)
            self.memory.view[at : at + length] = source[done : done + length]
            done += length
        node.attr.st_size = max(node.attr.st_size, off + done)
        return done

    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        data = pyfuse3.StatvfsData()
        data.f_bsize = data.f_frsize = 4096
        data.f_blocks = len(self.memory.view) // 4096
        data.f_bfree = data.f_bavail = len(self.memory.free) * (PIECE_BYTES // 4096)
        data.f_files = data.f_ffree = data.f_favail = 1 << 20
        data.f_namemax = 255
        return data


def tune_backing_device(mountpoint: str) -> None:
    """Raise the read-ahead and lift the strict dirty limit of the mount (root only)."""
    device = os.stat(mountpoint).st_dev
    directory = Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}")
    for name, value in _BDI_SETTINGS.items():
        (directory / name).write_text(str(value))


def poll_before_waiting(seconds: float) -> None:
    """Make pyfuse3 look at the descriptor with poll() before it goes through trio's event loop."""
    wait = trio.lowlevel.wait_readable
    poller = select.poll()
    served = 0

    async def wait_readable(descriptor: int) -> None:
        nonlocal served
        if served == 0:
            poller.register(descriptor, select.POLLIN)
        served += 1
        deadline = time.perf_counter() + seconds
        while served % TURN:
            if poller.poll(0):
                return
            if time.perf_counter() > deadline:
                break
        await wait(descriptor)

    trio.lowlevel.wait_readable = wait_readable  # type: ignore[assignment]


async def serve(mountpoint: str, tasks: int, bdi: bool) -> None:
    """Answer requests until the file system is unmounted."""
    async with trio.open_nursery() as nursery:
        if bdi:  # in a thread, for its stat() is answered by this very process
            nursery.start_soon(trio.to_thread.run_sync, tune_backing_device, mountpoint)
        await pyfuse3.main(max_tasks=tasks)


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="an empty pyfuse3 file system, for scripts/bench")
    parser.add_argument("mountpoint")
    parser.add_argument("--timeout", type=float, default=0, help="of entries and attributes, s")
    parser.add_argument("--tasks", type=int, default=99, help="max_tasks of pyfuse3.main")
    parser.add_argument("--poll-us", type=float, help="poll for so long before waiting in trio")
    parser.add_argument("--bdi", action="store_true", help="set the mount's backing device")
    parser.add_argument("--size", type=int, default=3 << 30, help="bytes of memory for data")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> None:
    options = parse_arguments(arguments)
    operations = Floor(options.timeout, options.size)
    pyfuse3.init(operations, options.mountpoint, {*pyfuse3.default_options, "fsname=floor"})
    if options.poll_us is not None:
        poll_before_waiting(options.poll_us / 1e6)
    try:
        trio.run(functools.partial(serve, options.mountpoint, options.tasks, options.bdi))
    finally:
        pyfuse3.close(unmount=False)


if __name__ == "__main__":
    main(sys.argv[1:])
