"""Pass 10: every inode has a name, every directory hangs from the root once, links are counted.

Also here: the root and ``/iommu``, which must be there, orphans, and ``/lost+found``, which is made
when something has to go there.
"""

from __future__ import annotations

from pkernfs import layout
from pkernfs.fs.fsck import superblocks
from pkernfs.fs.fsck.context import Context, NewName
from pkernfs.fs.fsck.names import entries_of, fix_of, uncount_name
from pkernfs.fs.fsck.problems import Code
from pkernfs.fs.fsck.scavenge import free_ino, make_inode
from pkernfs.fs.fsck.structures import T_DIR, T_LNK, T_REG, link_count, parse_inode
from pkernfs.fs.fsck.trees import Allocator
from pkernfs.layout import (
    INODE_FLAG_BODY,
    IOMMU_INO,
    NO_INO,
    ROOT_INO,
    SLOTS_PER_INODE_PAGE,
    inos_of,
)
from pkernfs.quantities import Ino

_IOMMU = b"iommu"
_LOST = b"lost+found"
_UNSEEN, _ON_PATH, _REACHED, _ORPHAN = range(4)


class Connector:
    """One run of the pass."""

    def __init__(self, ctx: Context, space: Allocator) -> None:
        self._ctx = ctx
        self._inodes = ctx.inodes
        self._space = space
        self._lost_found = NO_INO
        self._status = bytearray()
        self._taken: set[bytes] = set()

    def run(self) -> None:
        """Put the tree of directories in order."""
        self._root()
        self._iommu()
        self._reach()
        self._orphans()
        self._count()

    # ------------------------------------------------------------------ what must be there

    def _root(self) -> None:
        ctx = self._ctx
        if not self._inodes.type_of(ROOT_INO):
            ctx.report.add(Code.ROOT_MISSING, "inode 1")
            make_inode(ctx, ROOT_INO, 0o040755)
        self._inodes.parent[self._inodes.row(ROOT_INO)] = ROOT_INO

    def _iommu(self) -> None:
        ctx = self._ctx
        there = False
        for entry in entries_of(ctx, ROOT_INO):
            if entry.name != _IOMMU:
                continue
            there = entry.target == IOMMU_INO and self._inodes.type_of(IOMMU_INO) == T_DIR
            if not there:
                fix_of(ctx, ROOT_INO).drop.add(entry.slot)
                uncount_name(ctx, ROOT_INO, entry.target)
        if there:
            return
        ctx.report.add(Code.IOMMU_MISSING, "root directory")
        if not self._inodes.type_of(IOMMU_INO):
            make_inode(ctx, IOMMU_INO, 0o040755)
        elif self._inodes.names[self._inodes.row(IOMMU_INO)]:
            self._unname(IOMMU_INO)
        self._name(ROOT_INO, _IOMMU, IOMMU_INO)

    # ------------------------------------------------------------------ reachability

    def _reach(self) -> None:
        """Walk up from each directory; what does not get to the root goes to lost+found."""
        self._status = bytearray(len(self._inodes.type))
        self._status[self._inodes.row(ROOT_INO)] = _REACHED
        for ino in list(self._inodes.of_type(T_DIR)):
            self._climb(ino)

    def _climb(self, ino: Ino) -> None:
        inodes, status = self._inodes, self._status
        path: list[Ino] = []
        while True:
            row = inodes.row(ino)
            state = status[row]
            if state == _ON_PATH:
                loop = path[path.index(ino) :]
                self._ctx.report.add(Code.DIRECTORY_LOOP, self._ctx.file(min(loop)))
                self._unname(min(loop))
                self._to_lost_found(min(loop))
                state = _REACHED
            if state != _UNSEEN:
                break
            status[row] = _ON_PATH
            path.append(ino)
            parent = Ino(inodes.parent[row])
            if not parent:
                state = self._top(ino)
                break
            ino = parent
        for done in path:
            status[inodes.row(done)] = state

    def _top(self, ino: Ino) -> int:
        """A directory without a name: an orphan if it is empty and says so."""
        ctx = self._ctx
        if self._is_orphan(ino):
            ctx.orphans.append(ino)
            return _ORPHAN
        self._unreachable(ino)
        return _REACHED

    def _is_orphan(self, ino: Ino) -> bool:
        row = self._inodes.row(ino)
        return (
            ino not in self._ctx.made
            and not self._ctx.fields(ino).nlink
            and not self._inodes.entries[row]
        )

    def _unreachable(self, ino: Ino) -> None:
        words = {T_DIR: "directory", T_REG: "file", T_LNK: "symlink"}
        kind = self._inodes.type_of(ino)
        self._ctx.report.add(
            Code.UNREACHABLE, self._ctx.file(ino), what=words.get(kind, "special file")
        )
        self._to_lost_found(ino)

    def _orphans(self) -> None:
        inodes = self._inodes
        for index in sorted(inodes.page_of):
            row = inodes.row_of[index]
            inos = inos_of(index)
            for slot in range(1, SLOTS_PER_INODE_PAGE):
                kind = inodes.type[row + slot]
                if not kind or kind == T_DIR or inodes.names[row + slot]:
                    continue
                ino = inos[slot]
                if ino == self._ctx.list_ino:
                    continue
                if self._is_orphan(ino):
                    self._ctx.orphans.append(ino)
                else:
                    self._unreachable(ino)
        clean = superblocks.is_clean(self._ctx)
        for ino in self._ctx.orphans:
            self._ctx.report.add(Code.ORPHAN_LEFT if clean else Code.ORPHAN, self._ctx.file(ino))

    # ------------------------------------------------------------------ names

    def _name(self, directory: Ino, name: bytes, ino: Ino) -> None:
        inodes = self._inodes
        kind = inodes.type_of(ino)
        fix_of(self._ctx, directory).add.append(NewName(name, ino, kind))
        row, above = inodes.row(ino), inodes.row(directory)
        inodes.names[row] += 1
        inodes.entries[above] += 1
        if kind == T_DIR:
            inodes.parent[row] = directory
            inodes.subdirs[above] += 1

    def _unname(self, ino: Ino) -> None:
        """Take a directory's one name away."""
        ctx = self._ctx
        parent = self._inodes.parent_of(ino)
        for entry in entries_of(ctx, parent):
            if entry.target == ino:
                fix_of(ctx, parent).drop.add(entry.slot)
                uncount_name(ctx, parent, ino)
                return
        fix = fix_of(ctx, parent)  # a name that this run has given it
        fix.add = [new for new in fix.add if new.target != ino]
        uncount_name(ctx, parent, ino)

    def _to_lost_found(self, ino: Ino) -> None:
        directory = self._lost_found or self._find_lost_found()
        name = b"#%d" % ino
        taken = self._taken
        if name in taken:
            name = next(n for i in range(1, 1 << 32) if (n := b"#%d.%d" % (ino, i)) not in taken)
        taken.add(name)
        self._name(directory, name, ino)

    def _find_lost_found(self) -> Ino:
        ctx, inodes = self._ctx, self._inodes
        entries = entries_of(ctx, ROOT_INO)
        names = {entry.name: entry.target for entry in entries if entry.name.startswith(_LOST)}
        for target in names.values():
            row = inodes.row(target)
            if inodes.type_of(target) == T_DIR and inodes.parent[row] == ROOT_INO:
                self._lost_found = target
                self._taken = {entry.name for entry in entries_of(ctx, target)}
                # It is on no path: it hangs from the root.
                self._status[row] = _REACHED
                return target
        self._lost_found = free_ino(ctx, self._space)
        make_inode(ctx, self._lost_found, 0o040700)
        self._status.extend(bytes(len(inodes.type) - len(self._status)))
        self._status[inodes.row(self._lost_found)] = _REACHED
        name = _LOST
        while name in names:
            name += b"+"
        self._name(ROOT_INO, name, self._lost_found)
        return self._lost_found

    # ------------------------------------------------------------------ counting

    def _count(self) -> None:
        """Links, parents and directory sizes; of what this run has changed, silently."""
        ctx, inodes = self._ctx, self._inodes
        orphans = set(ctx.orphans)
        for index, page in ctx.load_inode_pages():
            row = inodes.row_of[index]
            inos = inos_of(index)
            for slot in range(1, SLOTS_PER_INODE_PAGE):
                kind = inodes.type[row + slot]
                ino = inos[slot]
                if not kind or ino in orphans:
                    continue
                nlink = link_count(page, slot)
                links = inodes.names[row + slot]
                if kind == T_DIR:
                    links = 2 + inodes.subdirs[row + slot]
                    self._directory(ino, row + slot, parse_inode(page, slot))
                if nlink != links:
                    self._set(ino, Code.INODE_LINKS, "nlink", nlink, links)

    def _directory(self, ino: Ino, row: int, f: layout.InodeFields) -> None:
        parent = self._inodes.parent[row]
        entries = self._inodes.entries[row]
        if f.parent != parent:
            self._set(ino, Code.INODE_PARENT, "parent", f.parent, parent)
        if f.size != entries:
            self._set(ino, Code.DIRECTORY_SIZE, "size", f.size, entries)
        if not entries and f.flags & INODE_FLAG_BODY:
            fix_of(self._ctx, ino)

    def _set(self, ino: Ino, code: Code, field: str, got: int, expected: int) -> None:
        ctx = self._ctx
        if ino not in ctx.directories and ino not in ctx.made:
            ctx.report.add(code, ctx.file(ino), got=got, expected=expected)
        ctx.set_fields(ino, **{field: expected})
