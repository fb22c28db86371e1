"""Names: looking them up, making and removing them, renaming, listing directories.

A whiteout, which a rename may leave under the old name, is a device node 0:0: overlayfs keeps it
in an upper layer for a name of the lower layer that was removed.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator

from pkernfs.errors import (
    BusyError,
    CorruptionError,
    ExistsError,
    InvalidError,
    IsDirError,
    NotDirError,
    NotEmptyError,
    NotFoundError,
    PermissionDeniedError,
    TooManyLinksError,
)
from pkernfs.fs.inode import InodeLife
from pkernfs.fs.inodes import Inode
from pkernfs.fs.names import DirectoryEntry, Entry, Names, check_name, is_table_name
from pkernfs.fs.pins import PinGuard
from pkernfs.fs.super import Super
from pkernfs.fs.xattrs import Overflow, check_target
from pkernfs.layout import (
    INODE_FLAG_BODY,
    INODE_FLAG_TABLE,
    INODE_INLINE_BYTES,
    IOMMU_INO,
    MAX_LINKS,
    ROOT_INO,
)
from pkernfs.quantities import Ino

RENAME_NOREPLACE = 1
RENAME_EXCHANGE = 2
RENAME_WHITEOUT = 4

_RENAME_FLAGS = (
    0,
    RENAME_NOREPLACE,
    RENAME_EXCHANGE,
    RENAME_WHITEOUT,
    RENAME_WHITEOUT | RENAME_NOREPLACE,
)
_PERMISSIONS = 0o7777
_DEVICES = (stat.S_IFCHR, stat.S_IFBLK)
_CREATED = (stat.S_IFREG, stat.S_IFIFO, stat.S_IFSOCK, *_DEVICES)


class Namei:
    """The names of one file system."""

    def __init__(self, state: Super, overflow: Overflow, life: InodeLife, pins: PinGuard) -> None:
        self._super = state
        self._store = state.store
        self._inodes = state.inodes
        self._names = Names(state.store, state.pages, state.superblock.fields.hash_key)
        self._overflow = overflow
        self._life = life
        self._pins = pins

    # ------------------------------------------------------------------ looking up

    def lookup(self, parent: Ino, name: bytes) -> Inode:
        """The inode that a name in a directory means.

        :raises NotFoundError: there is no such name.
        :raises NotDirError: ``parent`` is not a directory.
        """
        ino = self.find(parent, name)
        if not ino:
            raise NotFoundError("no such name")
        return self._named(self._inodes.get(parent), ino)

    def find(self, parent: Ino, name: bytes) -> Ino:
        """The inode number that a name in a directory means; 0 if there is no such name.

        ``.`` means the inode itself, of any type: so the kernel finds what a file handle is of.

        :raises NotDirError: ``parent`` is not a directory.
        """
        self._inodes.trim()
        if name == b".":
            return self._inodes.get(parent).ino
        directory = self._directory(parent)
        if name == b"..":
            return directory.parent
        return self._names.find(directory, name)

    def _named(self, directory: Inode, ino: Ino) -> Inode:
        try:
            return self._inodes.get(ino)
        except NotFoundError:
            raise CorruptionError(
                f"directory {directory.ino}: a name for inode {ino}, which is free"
            ) from None

    def _directory(self, ino: Ino) -> Inode:
        inode = self._inodes.get(ino)
        if not inode.is_dir:
            raise NotDirError(f"inode {ino}: not a directory")
        return inode

    def _linked_directory(self, ino: Ino) -> Inode:
        inode = self._directory(ino)
        if not inode.nlink:
            raise NotFoundError(f"inode {ino}: the directory was removed")
        return inode

    def opendir(self, ino: Ino) -> Inode:
        """Count an open handle of a directory; see :meth:`InodeLife.open`.

        :raises NotDirError: it is none.
        """
        self._directory(ino)
        return self._life.open(ino)

    def readdir(self, ino: Ino, cookie: int) -> Iterator[DirectoryEntry]:
        """The entries behind ``cookie`` (0: all); the cookie of each is its key.

        ``.`` and ``..`` are not among them. A cookie stays good while entries come and go: an
        entry that is there all the time is returned once. The iterator itself must not be used
        across a change.
        """
        self._inodes.trim()
        directory = self._directory(ino)
        if directory.flags & INODE_FLAG_BODY:
            yield from self._names.entries(directory, cookie + 1 if cookie else 0)

    # ------------------------------------------------------------------ new names

    def create(
        self, parent: Ino, name: bytes, mode: int, uid: int, gid: int, rdev: int = 0
    ) -> Inode:
        """Make a file, fifo, socket or device node; ``mode`` includes the type.

        A set-gid directory passes its group on.

        :raises ExistsError: the name is taken.
        """
        kind = stat.S_IFMT(mode)
        if kind not in _CREATED:
            raise InvalidError(f"file type {kind:#o}: cannot be made")
        directory = self._check_new(parent, name, kind)
        if directory.mode & stat.S_ISGID:
            gid = directory.gid
        with self._store:
            inode = self._life.new(mode, uid, gid)
            inode.nlink = 1
            if kind in _DEVICES:
                inode.rdev = rdev
            if directory.ino == IOMMU_INO:
                inode.flags |= INODE_FLAG_TABLE
                inode.mode = stat.S_IFREG | 0o400
            self._inodes.save(inode)
            self._enter(directory, name, inode)
        self._pins.directory_changed(directory)
        return inode

    def tmpfile(self, parent: Ino, mode: int, uid: int, gid: int) -> Inode:
        """Make a file without a name, as O_TMPFILE; it goes with its last user, or is linked.

        A set-gid directory passes its group on.

        :raises PermissionDeniedError: in /iommu, where every file has a name.
        """
        self._super.check_writable()
        directory = self._linked_directory(parent)
        if directory.ino == IOMMU_INO:
            raise PermissionDeniedError("iommu: only root-pgtables and dom-N live here")
        if directory.mode & stat.S_ISGID:
            gid = directory.gid
        with self._store:
            inode = self._life.new(stat.S_IFREG | mode & _PERMISSIONS, uid, gid)
            self._inodes.save(inode)
            self._super.leave_reserve()
        self._life.expect_name(inode.ino)
        return inode

    def mkdir(self, parent: Ino, name: bytes, mode: int, uid: int, gid: int) -> Inode:
        """Make a directory; a set-gid parent passes group and set-gid bit on.

        :raises ExistsError: the name is taken.
        """
        directory = self._check_new(parent, name, stat.S_IFDIR)
        mode = stat.S_IFDIR | mode & _PERMISSIONS
        if directory.mode & stat.S_ISGID:
            gid = directory.gid
            mode |= stat.S_ISGID
        if directory.nlink >= MAX_LINKS:
            raise TooManyLinksError("too many subdirectories")
        with self._store:
            inode = self._life.new(mode, uid, gid)
            inode.nlink = 2
            inode.parent = directory.ino
            self._inodes.save(inode)
            self._enter(directory, name, inode, links=1)
        return inode

    def symlink(self, parent: Ino, name: bytes, target: bytes, uid: int, gid: int) -> Inode:
        """Make a symbolic link.

        :raises ExistsError: the name is taken.
        :raises NameTooLongError: the target has more than 4095 bytes.
        """
        directory = self._check_new(parent, name, stat.S_IFLNK)
        check_target(target)
        if directory.mode & stat.S_ISGID:
            gid = directory.gid
        with self._store:
            inode = self._life.new(stat.S_IFLNK | 0o777, uid, gid)
            inode.nlink = 1
            inode.size = len(target)
            if len(target) <= INODE_INLINE_BYTES:
                inode.target = target
            else:
                inode.body = self._overflow.write(inode.ino, target)
                inode.flags |= INODE_FLAG_BODY
            self._inodes.save(inode)
            self._enter(directory, name, inode)
        return inode

    def readlink(self, ino: Ino) -> bytes:
        """A symbolic link's target.

        :raises InvalidError: not a symbolic link.
        """
        inode = self._inodes.get(ino)
        if not stat.S_ISLNK(inode.mode):
            raise InvalidError(f"inode {ino}: not a symbolic link")
        if inode.flags & INODE_FLAG_BODY:
            return self._overflow.read(ino, inode.body, inode.size)
        return inode.target

    def link(self, ino: Ino, parent: Ino, name: bytes) -> Inode:
        """Give an inode another name; or its first one, if :meth:`tmpfile` has made it.

        :raises ExistsError: the name is taken.
        :raises PermissionDeniedError: a directory, a file of /iommu, or a name in it.
        """
        inode = self._inodes.get(ino)
        if inode.is_dir or inode.flags & INODE_FLAG_TABLE:
            raise PermissionDeniedError(f"inode {ino}: cannot have a second name")
        directory = self._check_new(parent, name, stat.S_IFMT(inode.mode))
        if parent == IOMMU_INO:  # a table file is one from the start
            raise PermissionDeniedError("iommu: files do not move in or out")
        if not inode.nlink and not self._life.expects_name(ino):
            raise NotFoundError(f"inode {ino}: was removed")
        if inode.nlink >= MAX_LINKS:
            raise TooManyLinksError(f"inode {ino}: too many names")
        with self._store:
            self._inodes.touch(inode)
            inode.nlink += 1
            inode.ctime = self._super.clock()
            self._inodes.save(inode)
            self._enter(directory, name, inode)
        self._life.has_name(ino)
        return inode

    def _check_new(self, parent: Ino, name: bytes, kind: int) -> Inode:
        self._super.check_writable()
        directory = self._linked_directory(parent)
        check_name(name)
        if parent == IOMMU_INO and not (kind == stat.S_IFREG and is_table_name(name)):
            raise PermissionDeniedError("iommu: only root-pgtables and dom-N live here")
        if self._names.find(directory, name):
            raise ExistsError("name exists")
        return directory

    def _enter(self, directory: Inode, name: bytes, inode: Inode, links: int = 0) -> None:
        self._inodes.touch(directory)
        self._names.add(directory, name, inode.ino, inode.mode >> 12)
        directory.nlink += links
        directory.mtime = directory.ctime = self._super.clock()
        self._inodes.save(directory)
        self._super.leave_reserve()

    # ------------------------------------------------------------------ removing names

    def unlink(self, parent: Ino, name: bytes) -> None:
        """Take a name away; the inode goes with its last name, last handle and last look-up.

        :raises NotFoundError, IsDirError: not a name, or a directory's.
        """
        directory, found, inode = self._to_remove(parent, name)
        if inode.is_dir:
            raise IsDirError("is a directory")
        if inode.nlink == 1:
            self._pins.check_unpinned(inode)
        with self._store:
            self._leave(directory, name, found.key)
            done = self._life.drop_link(inode)
        self._pins.directory_changed(directory)
        if not done:
            self._life.evict(inode)

    def rmdir(self, parent: Ino, name: bytes) -> None:
        """Remove an empty directory.

        :raises NotDirError, NotEmptyError, BusyError: not one, not empty, or /iommu.
        """
        directory, found, inode = self._to_remove(parent, name)
        self._check_removable_dir(inode)
        with self._store:
            self._leave(directory, name, found.key, links=1)
            self._life.drop_directory(inode)

    def _to_remove(self, parent: Ino, name: bytes) -> tuple[Inode, Entry, Inode]:
        """The directory, the entry in it and the inode of a name that may be removed."""
        self._super.check_writable()
        directory = self._linked_directory(parent)
        found = self._names.locate(directory, name)
        if found is None:
            raise NotFoundError("no such name")
        return directory, found, self._named(directory, found.ino)

    def _check_removable_dir(self, inode: Inode) -> None:
        if not inode.is_dir:
            raise NotDirError("not a directory")
        if inode.ino in (ROOT_INO, IOMMU_INO):
            raise BusyError("iommu: always there")
        if inode.size:
            raise NotEmptyError("directory not empty")

    def _leave(self, directory: Inode, name: bytes, key: int, links: int = 0) -> None:
        self._inodes.touch(directory)
        self._names.remove(directory, name, key)
        directory.nlink -= links
        directory.mtime = directory.ctime = self._super.clock()
        self._inodes.save(directory)

    # ------------------------------------------------------------------ rename

    def rename(
        self,
        parent: Ino,
        name: bytes,
        new_parent: Ino,
        new_name: bytes,
        flags: int = 0,
        uid: int = 0,
        gid: int = 0,
    ) -> None:
        """Rename, replace or exchange, as renameat2(2).

        :param uid: who owns the whiteout that RENAME_WHITEOUT leaves; ``gid`` likewise.
        :raises InvalidError: unknown flags, or a directory into itself.
        """
        self._super.check_writable()
        if flags not in _RENAME_FLAGS:
            raise InvalidError(f"rename flags {flags:#x}: not supported")
        source = self._linked_directory(parent)
        target = self._linked_directory(new_parent)
        found = self._names.locate(source, name)
        if found is None:
            raise NotFoundError("no such name")
        if new_name in (b".", b"..") or name in (b".", b".."):
            raise BusyError("name is . or ..")
        check_name(new_name)
        inode = self._named(source, found.ino)
        taken = self._names.locate(target, new_name)
        if flags & RENAME_EXCHANGE:
            if taken is None:
                raise NotFoundError("no such name")
            self._exchange(source, name, found.key, inode, target, new_name, taken)
            return
        if taken is not None and flags & RENAME_NOREPLACE:
            raise ExistsError("name exists")
        if taken is not None and taken.ino == inode.ino:
            return
        self._check_move(inode, source, name, target, new_name)
        if flags & RENAME_WHITEOUT and source.ino == IOMMU_INO:
            raise PermissionDeniedError("iommu: only root-pgtables and dom-N live here")
        old = self._named(target, taken.ino) if taken is not None else None
        if old is not None:
            self._check_replace(inode, old)
        done = True
        with self._store:
            self._inodes.touch(source)
            self._inodes.touch(target)
            self._inodes.touch(inode)
            if flags & RENAME_WHITEOUT:
                self._leave_whiteout(source, name, found.key, uid, gid)
            else:
                self._names.remove(source, name, found.key)
            if taken is not None:
                self._names.replace(target, new_name, taken.key, inode.ino, inode.mode >> 12)
            else:
                self._names.add(target, new_name, inode.ino, inode.mode >> 12)
            if inode.is_dir:
                source.nlink -= 1
                target.nlink += 1
                inode.parent = target.ino
            now = self._super.clock()
            inode.ctime = now
            source.mtime = source.ctime = target.mtime = target.ctime = now
            if old is not None and old.is_dir:
                target.nlink -= 1
            self._inodes.save(inode)
            self._inodes.save(source)
            if target is not source:
                self._inodes.save(target)
            if old is not None:
                if old.is_dir:
                    self._life.drop_directory(old)
                else:
                    done = self._life.drop_link(old)
        self._pins.directory_changed(target)
        if not done and old is not None:
            self._life.evict(old)

    def _leave_whiteout(self, directory: Inode, name: bytes, key: int, uid: int, gid: int) -> None:
        """Inside a transaction: let the name mean a new whiteout."""
        if directory.mode & stat.S_ISGID:
            gid = directory.gid
        whiteout = self._life.new(stat.S_IFCHR, uid, gid)
        whiteout.nlink = 1
        self._inodes.save(whiteout)
        self._names.replace(directory, name, key, whiteout.ino, whiteout.mode >> 12)
        self._super.leave_reserve()

    def _check_move(
        self, inode: Inode, source: Inode, name: bytes, target: Inode, new_name: bytes
    ) -> None:
        if inode.ino == IOMMU_INO:
            raise BusyError("iommu: always there")
        if (source.ino == IOMMU_INO) != (target.ino == IOMMU_INO):
            raise PermissionDeniedError("iommu: files do not move in or out")
        if target.ino == IOMMU_INO:
            self._check_table_move(inode, name, new_name)
        if inode.is_dir and source is not target:
            self._check_not_below(inode, target)
            if target.nlink >= MAX_LINKS:
                raise TooManyLinksError("too many subdirectories")

    def _check_table_move(self, inode: Inode, name: bytes, new_name: bytes) -> None:
        """A domain that nothing uses may get another number."""
        if not is_table_name(new_name):
            raise PermissionDeniedError("iommu: only root-pgtables and dom-N live here")
        if not (name.startswith(b"dom-") and new_name.startswith(b"dom-")):
            raise PermissionDeniedError("iommu: root-pgtables has no other name")
        self._pins.check_unpinned(inode)

    def _check_not_below(self, inode: Inode, directory: Inode) -> None:
        """:raises InvalidError: ``directory`` is ``inode`` or below it."""
        at = directory
        for _ in range(self._inodes.used + 1):
            if at.ino == inode.ino:
                raise InvalidError("a directory cannot move into itself")
            if at.ino == ROOT_INO:
                return
            at = self._inodes.get(at.parent)
        raise CorruptionError(f"directory {directory.ino}: its parents are a loop")

    def _check_replace(self, inode: Inode, old: Inode) -> None:
        if inode.is_dir:
            self._check_removable_dir(old)
        elif old.is_dir:
            raise IsDirError("is a directory")
        elif old.nlink == 1:
            self._pins.check_unpinned(old)

    def _exchange(
        self,
        source: Inode,
        name: bytes,
        key: int,
        inode: Inode,
        target: Inode,
        new_name: bytes,
        taken: Entry,
    ) -> None:
        other = self._named(target, taken.ino)
        if inode.ino == other.ino:
            return
        for one, to in ((inode, target), (other, source)):
            if one.ino == IOMMU_INO:
                raise BusyError("iommu: always there")
            if one.is_dir and source is not target:
                self._check_not_below(one, to)
        if IOMMU_INO in (source.ino, target.ino) and source is not target:
            raise PermissionDeniedError("iommu: files do not move in or out")
        if source.ino == IOMMU_INO:
            self._check_table_move(inode, name, new_name)
            self._check_table_move(other, new_name, name)
        with self._store:
            for touched in (source, target, inode, other):
                self._inodes.touch(touched)
            self._names.replace(source, name, key, other.ino, other.mode >> 12)
            self._names.replace(target, new_name, taken.key, inode.ino, inode.mode >> 12)
            if source is not target:
                moved = inode.is_dir - other.is_dir
                source.nlink -= moved
                target.nlink += moved
                if inode.is_dir:
                    inode.parent = target.ino
                if other.is_dir:
                    other.parent = source.ino
            now = self._super.clock()
            inode.ctime = other.ctime = now
            source.mtime = source.ctime = target.mtime = target.ctime = now
            for touched in (source, target, inode, other):
                self._inodes.save(touched)
        self._pins.directory_changed(target)
