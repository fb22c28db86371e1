"""Problems as data: a code, a message and a remedy for each; and the report of a check.

Passes report a :class:`Code` with the words for its message; they never print and never decide how
serious it is.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from enum import Enum, unique
from typing import Any, NamedTuple

# A region of garbage has millions of faults; so many of one kind are told one by one.
MAX_PER_CODE = 1000


class Rule(NamedTuple):
    """Message of a code (after ``<where>: ``), and what a repair does about it.

    A note is normal after a crash: it is completed, and does not make the file system unclean.
    """

    message: str
    remedy: str
    note: bool = False


@unique  # two with the same words would be one
class Code(Enum):
    """Every inconsistency that fsck knows. The names are part of the --json output."""

    # superblocks, journal, state
    SUPERBLOCK_DAMAGED = Rule("{reason}", "restored from the other copy")
    SUPERBLOCKS_DIFFER = Rule("differs from the one at page 0", "replaced by the one at page 0")
    JOURNAL_PENDING = Rule("a transaction was under way", "carried out", note=True)
    JOURNAL_DAMAGED = Rule("damaged record", "dropped")
    STATE_DAMAGED = Rule("{reason}", "made anew from the inode pages found")
    STATE_ERROR_FLAG = Rule("an error was found while mounted", "flag cleared", note=True)
    NOT_UNMOUNTED = Rule("was not unmounted", "marked clean", note=True)
    HANDOVER_STRAY = Rule("there is one, but nothing was handed over", "cleared")
    HANDOVER_LIST = Rule("{reason}", "list dropped: the next mount cannot compare")
    BIT_FLIPPED = Rule("a bit is flipped: byte {byte}, bit {bit}", "flipped back")

    # block maps
    BLOCK_MAP_DAMAGED = Rule("{reason}", "made anew from the blocks in use")
    BLOCK_MAP_UNTIDY = Rule("bits set beyond the last block", "cleared")

    # the inode table and inode pages
    TABLE_ENTRY = Rule("bad entry: {reason}", "entry dropped")
    TABLE_GAP = Rule("{count} inode pages are missing from {index} on", "empty ones put there")
    INODE_PAGE_DAMAGED = Rule(
        "{reason}: {kept} of its inodes look intact", "those kept as root's, mode 0600"
    )
    INODE_PAGE_FOUND = Rule("not reached through the inode table", "entered there")
    INODE_PAGE_MASKS = Rule("bad {field}: got {got:#06x}, expected {expected:#06x}", "set")
    INODE_FREE_LIST = Rule("bad list of pages with free slots: {reason}", "made anew")
    INODE_PAGE_COUNT = Rule("bad inode_pages: got {got}, expected {expected}", "set")
    INODES_USED = Rule("bad inodes_used: got {got}, expected {expected}", "set")

    # inodes
    INODE_BAD = Rule("{reason}", "inode dropped")
    INODE_FIELD = Rule("bad {field}: got {got:#x}, expected {expected:#x}", "set")
    INODE_PENDING = Rule("bad pending range: got {start:#x}..{end:#x}", "flag cleared")
    INODE_LINKS = Rule("bad nlink: got {got}, expected {expected}", "set")
    INODE_PARENT = Rule("bad parent: got {got}, expected {expected}", "set")
    INODE_DATA_PAGES = Rule("bad data_pages: got {got}, expected {expected}", "set")
    INODE_RECOVERED = Rule("its inode was lost, its {what} found", "put together again")
    DIRECTORY_SIZE = Rule("bad number of entries: got {got}, expected {expected}", "set")
    SYMLINK_TARGET = Rule("target lost: {reason}", "symlink dropped")
    ORPHAN = Rule("no name left, to be freed", "freed", note=True)
    ORPHAN_LEFT = Rule("no name left, although all was unmounted", "freed")
    PENDING_RANGE = Rule("truncation under way: {start:#x}..{end:#x}", "completed", note=True)
    PENDING_LEFT = Rule(
        "truncation under way, although all was unmounted: {start:#x}..{end:#x}", "completed"
    )

    # trees
    TREE_NODE = Rule("{reason}", "tree built anew; what was below is lost unless found")
    TREE_SHAPE = Rule("{reason}", "tree built anew")
    TREE_ITEMS = Rule("{reason}", "tree built anew from the items that are whole")
    TREE_LEAF_FOUND = Rule("leaf of a damaged tree, found by itself", "its {count} slots kept")

    # extents
    EXTENT_RANGE = Rule("extent out of range: {extent}", "dropped, reads as zeros")
    EXTENT_ORDER = Rule("extents overlap or are out of order: {extent}", "dropped, or put in order")
    EXTENT_SPLIT = Rule("neighbours could be one extent: {extent}", "merged")
    EXTENT_SHAPE = Rule("{reason}: {extent}", "{remedy}")
    EXTENT_METADATA = Rule("extent covers metadata: {extent}", "dropped, reads as zeros")
    DOUBLE_CLAIM = Rule("pages in use elsewhere too: {extent}", "{remedy}")
    TAIL_NOT_ZERO = Rule("bytes behind the end of the file: {start:#x}..{end:#x}", "zeroed")
    TAIL_AFTER_CRASH = Rule(
        "bytes of an unfinished write behind the end of the file: {start:#x}..{end:#x}",
        "zeroed",
        note=True,
    )

    # segments
    SEGMENTS_STRAY = Rule("segments without a pool: root {root:#x}, last {last}", "cleared")
    SEGMENT_ROW = Rule("bad row: {reason}", "row dropped")
    SEGMENT_FIELD = Rule("bad {field} in its row: got {got}, expected {expected}", "set")
    SEGMENT_PIECES = Rule("bad pieces: {reason}", "cut before them, to {length:#x} bytes")
    SEGMENT_LAST = Rule("bad last_segment: got {got}, expected {expected} or more", "set")
    SEGMENT_UNOWNED = Rule(
        "in use, but no file has it: got inode {ino}", "made a file, root's, mode 0600"
    )
    SEGMENT_LOST = Rule("its segment {number} is lost", "reads as zeros: its data is lost")
    SEGMENT_REMADE = Rule("its segment {number} has no row", "made from the file {path}")
    SEGMENT_SHARED = Rule("has segment {number}, as inode {other} has", "reads as zeros")
    SEGMENT_SIZE = Rule("larger than its segment: got {got:#x}, expected {expected:#x}", "cut")

    # names
    NAME_BAD = Rule("bad name {name}: {reason}", "dropped")
    NAME_KEY = Rule("name {name} has a wrong key: got {got:#x}, expected {expected:#x}", "moved")
    NAME_DUPLICATE = Rule("two entries {name}", "one dropped")
    NAME_DANGLING = Rule("name {name} of no inode: got {got}", "dropped")
    NAME_TYPE = Rule("name {name} has a wrong type: got {got}, expected {expected}", "set")
    NAME_SECOND = Rule("second name {name} of directory {got}", "dropped")

    # extended attributes
    XATTR_BAD = Rule("bad attribute: {reason}", "dropped")
    XATTR_KEY = Rule("attribute {name} has a wrong key: got {got:#x}", "moved")
    XATTR_DUPLICATE = Rule("two attributes {name}", "one dropped")
    XATTR_VALUE = Rule("value of {name} lost: {reason}", "attribute dropped")

    # the tree of directories
    ROOT_MISSING = Rule("root directory missing", "made anew")
    IOMMU_MISSING = Rule("/iommu missing", "made anew")
    DIRECTORY_LOOP = Rule("directory inside itself", "moved to /lost+found")
    UNREACHABLE = Rule("{what} without a name", "moved to /lost+found")

    # what is in use against what is marked
    BLOCK_LOST = Rule("block marked as in use, used by nothing", "freed")
    BLOCK_UNMARKED = Rule("block in use, not marked so", "marked")
    BLOCK_CARVED = Rule("bad carved bit: got {got}, expected {expected}", "set")
    ZERO_IN_USE = Rule("in use, marked as zero", "mark cleared")
    ZERO_NOT_ZERO = Rule("marked as zero, but it is not", "mark cleared")
    PAGE_MAP_DAMAGED = Rule("{reason}", "made anew from the pages in use")
    PAGE_MAP_CLASS = Rule("bad class: got {got}, expected 1 or 2", "set")
    NO_ROOM = Rule("no space left for what a repair needs", "nothing was changed")
    PAGE_LOST = Rule("page marked as in use, used by nothing", "freed")
    PAGE_UNMARKED = Rule("page in use, not marked so", "marked")

    # the IOMMU's tables
    TABLES_BAD = Rule("{reason}", "left as it is: detach, unmap, or remove the domain's file")
    TABLES_UNCHECKED = Rule("tables not checked: {reason}", "left as it is", note=True)


@dataclass
class Problem:
    """One finding; ``message`` is a whole line, ``fixed`` once its repair is in the region."""

    code: Code
    where: str
    message: str
    remedy: str
    fixed: bool = False
    fixable: bool = True

    def __str__(self) -> str:
        return self.message


class Report:
    """The findings of a check. :attr:`notes` are normal after a crash: it is :attr:`clean`."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []
        self.notes: list[Problem] = []
        self.summary: dict[str, int] = {}
        self.counts: Counter[Code] = Counter()
        self.repaired = False

    def add(self, code: Code, where: str, /, *, fixable: bool = True, **words: Any) -> None:
        """Record a finding; ``words`` fill its message and remedy."""
        self.counts[code] += 1
        if self.counts[code] > MAX_PER_CODE:
            return
        rule: Rule = code.value
        problem = Problem(
            code,
            where,
            f"{where}: {rule.message.format(**words)}",
            rule.remedy.format(**words),
            fixable=fixable,
        )
        (self.notes if rule.note else self.problems).append(problem)

    def set_fixed(self) -> None:
        """The repairs are in the region."""
        self.repaired = True
        for problem in self.problems + self.notes:
            problem.fixed = problem.fixable

    @property
    def clean(self) -> bool:
        """Nothing was wrong (also not before a repair)."""
        return not self.problems

    @property
    def left(self) -> int:
        """Problems that are still there."""
        return sum(not p.fixed for p in self.problems)

    @property
    def suppressed(self) -> int:
        """Findings that were counted but are not listed."""
        return sum(max(0, n - MAX_PER_CODE) for n in self.counts.values())

    def to_json(self) -> str:
        """The report as a JSON object, for ``fsck.pkernfs --json``."""

        def plain(found: list[Problem]) -> list[dict[str, object]]:
            return [
                {
                    "code": p.code.name,
                    "where": p.where,
                    "message": p.message,
                    "remedy": p.remedy,
                    "fixed": p.fixed,
                }
                for p in found
            ]

        return json.dumps(
            {
                "clean": self.clean,
                "repaired": self.repaired,
                "left": self.left,
                "problems": plain(self.problems),
                "notes": plain(self.notes),
                "suppressed": self.suppressed,
                "summary": self.summary,
            },
            indent=2,
        )
