"""Entries of directories against a dict: collisions, changes given up, names that cannot be."""

from __future__ import annotations

import hashlib
import random
import struct
from collections.abc import Iterator
from functools import partial
from itertools import product
from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pkernfs.dma.mount import mount_filesystem
from pkernfs.errors import (
    CorruptionError,
    ExistsError,
    InvalidError,
    NameTooLongError,
    NoSpaceError,
    PkernfsError,
)
from pkernfs.fs import names as names_module
from pkernfs.fs.filesystem import FileSystem
from pkernfs.fs.inodes import Inode
from pkernfs.fs.mkfs import make_filesystem
from pkernfs.fs.names import Entry, Names, check_name, is_table_name
from pkernfs.layout import (
    INODE_FLAG_BODY,
    ITEM_SLOT,
    MAGIC_TREE,
    MAX_COLLISIONS,
    PAGE,
    TREE_SLOTS_OFFSET,
)
from pkernfs.quantities import Ino
from support.checking import MemoryFile
from support.collisions import collide
from support.files import ROOT, make
from support.space import Space, space

SIZE = 16 << 20
HASH_KEY = b"key of the hash."
DIRECTORY = Ino(77)


def directory_of(ino: int = DIRECTORY) -> Inode:
    """An empty directory that is in no inode table."""
    made = Inode()
    made.ino = Ino(ino)
    return made


def format_key(name: bytes, hash_key: bytes = HASH_KEY) -> int:
    """The first key of a name, by docs/format.md, section 8."""
    digest = hashlib.blake2b(name, key=hash_key, digest_size=8).digest()
    return (int.from_bytes(digest, "little") % (1 << 52) or 1) << 11


class Entries:
    """A directory in a space of its own, and the dict that it should be."""

    def __init__(self, space: Space) -> None:
        self.space = space
        self.directory = directory_of()
        self.names = self.open()
        self.model: dict[bytes, tuple[int, int]] = {}

    def open(self) -> Names:
        """Names of which nothing is known yet, as after a mount."""
        return Names(self.space.store, self.space.pages, HASH_KEY)

    def add(self, name: bytes, ino: int, kind: int = 8) -> None:
        self.names.add(self.directory, name, Ino(ino), kind)
        self.model[name] = ino, kind

    def add_now(self, *names: bytes) -> None:
        """Each in a transaction of its own, for inodes 100, 101..."""
        for number, name in enumerate(names, 100):
            self.space.change(self.directory, partial(self.add, name, number))

    def located(self, name: bytes) -> Entry:
        found = self.names.locate(self.directory, name)
        assert found is not None
        return found

    def remove(self, *names: bytes) -> None:
        for name in names:
            self.names.remove(self.directory, name, self.located(name).key)
            del self.model[name]

    def replace(self, name: bytes, ino: int, kind: int) -> None:
        key = self.located(name).key
        self.names.replace(self.directory, name, key, Ino(ino), kind)
        self.model[name] = ino, kind

    def positions(self) -> dict[bytes, int]:
        return {name: key for name, _, _, key in self.names.entries(self.directory, 0)}

    def leaf(self) -> memoryview:
        """The page of a directory that is one leaf."""
        return self.space.store.read(self.directory.body, MAGIC_TREE)

    def check(self, absent: list[bytes]) -> None:
        for names in (self.names, self.open()):
            listed = list(names.entries(self.directory, 0))
            assert {name: (ino, kind) for name, ino, kind, _ in listed} == self.model
            keys = [key for *_, key in listed]
            assert keys == sorted(set(keys))
            for at, key in enumerate(keys):
                assert list(names.entries(self.directory, key)) == listed[at:]
                assert list(names.entries(self.directory, key + 1)) == listed[at + 1 :]
            for name, ino, kind, key in listed:
                assert names.locate(self.directory, name) == (key, ino, kind)
                assert names.find(self.directory, name) == ino
            for name in absent:
                if name not in self.model:
                    assert names.locate(self.directory, name) is None
                    assert names.find(self.directory, name) == 0
        assert self.directory.size == len(self.model)
        assert bool(self.directory.flags & INODE_FLAG_BODY) == bool(self.model)
        assert bool(self.directory.body) == bool(self.model)


@pytest.fixture
def entries() -> Iterator[Entries]:
    with space(SIZE) as made:
        yield Entries(made)


# ------------------------------------------------------------------------------ against a dict


NAMES = [letter * length for letter, length in product((b"a", b"b", b"c", b"d"), (1, 2, 200, 255))]
STEPS = st.tuples(
    st.sampled_from(["make", "make", "remove", "find"]), st.sampled_from(NAMES), st.integers(1, 99)
)


@given(
    batches=st.lists(st.tuples(st.lists(STEPS, max_size=12), st.booleans()), max_size=12),
    hashes=st.sampled_from([1, 2, 5]),
    most_known=st.sampled_from([2, 1 << 17]),
)
def test_changes_against_a_dict(
    batches: list[tuple[list[tuple[str, bytes, int]], bool]], hashes: int, most_known: int
) -> None:
    """Whatever is known from before a change, or from one that came to nothing."""

    def key(name: bytes, _hash_key: bytes) -> int:
        return (sum(name) % hashes + 1) << 11

    with (
        space(SIZE) as made,
        patch.object(names_module, "name_key", key),
        patch.object(names_module, "_MAX_KNOWN", most_known),
    ):
        entries = Entries(made)
        free = made.free_bytes()
        for steps, give_up in batches:
            before, positions = dict(entries.model), entries.positions()

            def work(steps: list[tuple[str, bytes, int]] = steps) -> None:
                for what, name, number in steps:
                    if what == "find":
                        expected = entries.model.get(name, (0, 0))[0]
                        assert entries.names.find(entries.directory, name) == expected
                    elif what == "remove" and name in entries.model:
                        entries.remove(name)
                    elif what == "make" and name in entries.model:
                        entries.replace(name, number, 4)
                    elif what == "make":
                        assert entries.names.locate(entries.directory, name) is None
                        entries.add(name, number)

            if not made.change(entries.directory, work, give_up=give_up):
                entries.model = before
            entries.check(NAMES)
            if not give_up:
                for what, name, _ in steps:
                    if what == "remove":
                        positions.pop(name, None)
            now = entries.positions()
            assert positions == {name: now[name] for name in positions}, "as long as they are there"
        made.change(entries.directory, lambda: entries.remove(*entries.model))
        assert made.free_bytes() == free


def test_many_names_and_back(entries: Entries) -> None:
    """Several levels of nodes; what has been looked up just now need not be there any more."""
    rnd = random.Random(6)
    free = entries.space.free_bytes()
    every = [b"name of some length %d" % i * 10 for i in range(250)]
    entries.add_now(*every)
    assert entries.positions() == {name: format_key(name) for name in every}
    entries.check([b"another"])
    rnd.shuffle(every)
    for name in every:
        entries.space.change(entries.directory, partial(entries.remove, name))
    entries.check(every)
    assert entries.space.free_bytes() == free


# ------------------------------------------------------------------------------ the format


def test_an_item_is_as_the_format_has_it(entries: Entries) -> None:
    entries.space.change(entries.directory, lambda: entries.add(b"n\xff", 0x1122334455, 4))
    leaf = entries.leaf()
    key, at, length, zero = struct.unpack_from("<QHHI", leaf, 64)
    assert (key, zero) == (format_key(b"n\xff"), 0)
    assert bytes(leaf[at : at + length]) == struct.pack("<QB", 0x1122334455, 4) + b"n\xff"


def test_the_key_of_the_hash_decides(entries: Entries) -> None:
    entries.add_now(b"name")
    other = Names(entries.space.store, entries.space.pages, b"x" * 16)
    assert other.find(entries.directory, b"name") == 0
    entries.space.change(entries.directory, lambda: other.add(entries.directory, b"m", Ino(5), 8))
    assert entries.positions() == {b"name": format_key(b"name"), b"m": format_key(b"m", b"x" * 16)}


def test_names_of_one_hash_take_the_lowest_free_number(
    entries: Entries, monkeypatch: pytest.MonkeyPatch
) -> None:
    collide(monkeypatch, 1)
    entries.add_now(b"a", b"b", b"c")
    assert entries.positions() == {b"a": 2048, b"b": 2049, b"c": 2050}
    entries.space.change(entries.directory, lambda: entries.remove(b"b"))
    entries.add_now(b"d")
    assert entries.positions() == {b"a": 2048, b"d": 2049, b"c": 2050}
    entries.check([b"b"])


def test_a_neighbouring_hash_is_another_one(
    entries: Entries, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last key of one group and the first of the next are one apart."""
    monkeypatch.setattr(names_module, "MAX_COLLISIONS", 2)
    monkeypatch.setattr(names_module, "COLLISION_BITS", 1)
    monkeypatch.setattr(names_module, "name_key", lambda name, _key: 2 * name[0])
    entries.add_now(b"\x05a", b"\x05b", b"\x06a", b"\x06b", b"\x04a")
    assert sorted(entries.positions().values()) == [8, 10, 11, 12, 13]
    entries.check([b"\x04b", b"\x05c", b"\x06c", b"\x07a"])
    with pytest.raises(NoSpaceError, match="too many names with the same hash"):
        entries.add_now(b"\x05c")
    entries.check([b"\x05c"])


# ------------------------------------------------------------------------------ collisions


@pytest.mark.parametrize("keys", [1, 3])
def test_names_that_collide(monkeypatch: pytest.MonkeyPatch, keys: int) -> None:
    with MemoryFile(32 << 20) as memory, memory.open() as region:
        make_filesystem(region)
        fs = mount_filesystem(region)
        directory = fs.mkdir(ROOT, b"d", 0o755, 0, 0).ino  # before: its key is the real one
        collide(monkeypatch, keys)
        rnd = random.Random(keys)
        model: dict[bytes, int] = {}
        for step in range(1_500):
            name = b"n%d" % rnd.randrange(400)
            if name in model and rnd.random() < 0.6:
                fs.unlink(directory, name)
                del model[name]
            elif name not in model:
                model[name] = fs.create(directory, name, 0o100644, 0, 0).ino
            else:
                with pytest.raises(ExistsError):
                    fs.create(directory, name, 0o100644, 0, 0)
            if step % 100 == 0:
                found = list(fs.readdir(directory, 0))
                assert {name: ino for name, ino, _, _ in found} == model
                cookies = [cookie for *_, cookie in found]
                assert cookies == sorted(set(cookies))
                for name, ino in model.items():
                    assert fs.lookup(directory, name).ino == ino
        for name in list(model):
            fs.rename(directory, name, directory, name + b"'")
        assert {n for n, *_ in fs.readdir(directory, 0)} == {n + b"'" for n in model}


def test_a_hash_has_room_for_so_many_names(monkeypatch: pytest.MonkeyPatch) -> None:
    assert MAX_COLLISIONS == 2048
    monkeypatch.setattr(names_module, "MAX_COLLISIONS", 300)
    with MemoryFile(64 << 20) as memory, memory.open() as region:
        make_filesystem(region)
        fs = mount_filesystem(region)
        directory = fs.mkdir(ROOT, b"d", 0o755, 0, 0).ino
        target = fs.create(ROOT, b"t", 0o100644, 0, 0).ino
        collide(monkeypatch, 1)
        for i in range(300):
            fs.link(target, directory, b"%04d" % i)
        before = list(fs.readdir(directory, 0))
        with pytest.raises(NoSpaceError):
            fs.link(target, directory, b"more")
        assert list(fs.readdir(directory, 0)) == before
        fs.unlink(directory, b"0100")
        fs.link(target, directory, b"more")
        assert fs.lookup(directory, b"more").ino == target
        assert fs.inode(target).nlink == 301


# ------------------------------------------------------------------------------ what is known


def test_what_is_known_is_not_read_again(entries: Entries) -> None:
    entries.add_now(b"there")
    names = entries.names
    assert names.find(entries.directory, b"there") == 100
    assert names.find(entries.directory, b"not") == 0
    with patch.object(entries.space.store, "read", side_effect=AssertionError("read again")):
        assert names.find(entries.directory, b"there") == 100
        assert names.find(entries.directory, b"not") == 0
        assert names.locate(entries.directory, b"not") is None
        with pytest.raises(AssertionError, match="read again"):
            names.find(directory_of(78), b"x") or names.locate(entries.directory, b"there")


def test_not_more_is_known_than_so_many(entries: Entries, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(names_module, "_MAX_KNOWN", 4)
    most = 0
    for number in range(3):
        for name in (b"a", b"b", b"c", b"a"):
            entries.names.find(directory_of(100 + number), name)
            most = max(most, sum(map(len, entries.names._known.values())))
    assert most == 4


def test_a_place_that_a_transaction_has_shown(entries: Entries) -> None:
    """It came to nothing: the leaf in which a name would have been is not there."""
    every = [b"%d" % i * 100 for i in range(30)]
    entries.add_now(*every[:5])

    def work() -> None:
        for name in every[5:]:
            entries.names.add(entries.directory, name, Ino(5), 8)
        assert entries.names.locate(entries.directory, b"x") is None

    assert not entries.space.change(entries.directory, work, give_up=True)
    entries.add_now(b"x")
    entries.check(every)


def test_a_place_from_before_another_change(entries: Entries) -> None:
    """The leaf in which the name would have been has been split since."""
    every = [b"%d" % i * 100 for i in range(30)]
    entries.add_now(*every[:5])
    assert entries.names.locate(entries.directory, b"x") is None
    names, entries.names = entries.names, entries.open()
    entries.add_now(*every[5:])
    entries.names = names
    entries.add_now(b"x")
    entries.check([b"y"])


def test_a_place_in_another_directory(entries: Entries) -> None:
    """The same name was looked up there last."""
    other = directory_of(78)
    entries.add_now(b"a")
    entries.space.change(other, lambda: entries.names.add(other, b"b", Ino(7), 8))
    assert entries.names.locate(other, b"x") is None
    entries.add_now(b"x")
    entries.check([b"b"])
    assert [name for name, *_ in entries.names.entries(other, 0)] == [b"b"]


def test_a_number_that_another_directory_gets(fs: FileSystem) -> None:
    """What was known of the old one's names is no longer so."""
    old = fs.mkdir(ROOT, b"old", 0o755, 0, 0).ino
    make(fs, b"name", parent=old)
    fs.unlink(old, b"name")
    fs.rmdir(ROOT, b"old")
    new = fs.mkdir(ROOT, b"new", 0o755, 0, 0).ino
    assert new == old
    ino = make(fs, b"name", b"abc", new)
    assert fs.lookup(new, b"name").ino == ino
    assert [name for name, *_ in fs.readdir(new, 0)] == [b"name"]


# ------------------------------------------------------------------------------ damage


def test_a_name_for_no_inode(entries: Entries) -> None:
    entries.space.change(entries.directory, lambda: entries.add(b"x", 0))
    with pytest.raises(CorruptionError, match="directory 77: a name for inode 0"):
        entries.open().find(entries.directory, b"x")


def test_more_names_than_its_size(entries: Entries) -> None:
    entries.add_now(b"x")
    entries.directory.size = 0
    key = entries.located(b"x").key
    with pytest.raises(CorruptionError, match="directory 77: more names than its size"):
        entries.space.change(
            entries.directory, lambda: entries.names.remove(entries.directory, b"x", key)
        )
    assert entries.positions() == {b"x": key}


@pytest.mark.parametrize(("at", "length"), [(PAGE - 11, 12), (PAGE - 11, 9), (PAGE - 11, 0)])
def test_items_that_cannot_be(entries: Entries, at: int, length: int) -> None:
    """Beyond the page, or without a byte of a name."""
    entries.add_now(b"xx")

    def damage() -> None:
        leaf = entries.space.store.edit(entries.directory.body, MAGIC_TREE)
        key, was, long, _ = ITEM_SLOT.unpack_from(leaf, TREE_SLOTS_OFFSET)
        assert (was, long) == (PAGE - 11, 11)
        ITEM_SLOT.pack_into(leaf, TREE_SLOTS_OFFSET, key, at, length, 0)

    entries.space.change(entries.directory, damage)
    with pytest.raises(CorruptionError, match="directory 77: bad item at slot 0"):
        list(entries.names.entries(entries.directory, 0))
    with pytest.raises(CorruptionError, match="inode 77: bad item at slot 0"):
        entries.open().find(entries.directory, b"xx")


def test_a_tree_of_another_directory(entries: Entries) -> None:
    entries.add_now(b"x")
    entries.directory.ino = Ino(78)
    with pytest.raises(CorruptionError, match="wrong owner or kind"):
        entries.names.find(entries.directory, b"x")
    with pytest.raises(CorruptionError, match="wrong owner or kind"):
        list(entries.names.entries(entries.directory, 0))


# ------------------------------------------------------------------------------ which names may be


@pytest.mark.parametrize(
    ("name", "error"),
    [
        (b"", InvalidError),
        (b"/", InvalidError),
        (b"a/b", InvalidError),
        (b"\0", InvalidError),
        (b"a\0", InvalidError),
        (b"x" * 256, NameTooLongError),
        (b"/" * 300, NameTooLongError),
        (b".", ExistsError),
        (b"..", ExistsError),
    ],
)
def test_names_that_cannot_be_made(name: bytes, error: type[PkernfsError]) -> None:
    with pytest.raises(error):
        check_name(name)


@pytest.mark.parametrize("name", [b"a", b"...", b".a", b"..a", b"\n", b"\xff", b"\x01" * 255])
def test_names_that_can_be_made(name: bytes) -> None:
    check_name(name)


def test_names_that_are_too_long_are_not_looked_up(entries: Entries) -> None:
    """Not even where nothing could be found."""
    for look in (entries.names.find, entries.names.locate):
        with pytest.raises(NameTooLongError, match="name of 256 bytes: expected at most 255"):
            look(entries.directory, b"x" * 256)
        assert not look(entries.directory, b"x" * 255)


@pytest.mark.parametrize(
    ("name", "may_be"),
    [
        (b"root-pgtables", True),
        (b"dom-0", True),
        (b"dom-7", True),
        (b"dom-10", True),
        (b"dom-65535", True),
        (b"dom-65536", False),
        (b"dom-99999", False),
        (b"dom-100000", False),
        (b"dom-", False),
        (b"dom-00", False),
        (b"dom-01", False),
        (b"dom--1", False),
        (b"dom-+1", False),
        (b"dom-1_0", False),
        (b"dom-1 ", False),
        (b"dom- 1", False),
        (b"dom-1\n", False),
        (b"dom-\xd9\xa1", False),
        (b"dom_1", False),
        (b"Dom-1", False),
        (b"xdom-1", False),
        (b"1234", False),
        (b"root-pgtables~", False),
        (b"root-pgtable", False),
        (b"", False),
    ],
)
def test_names_of_table_files(name: bytes, may_be: bool) -> None:
    assert is_table_name(name) is may_be
