"""The handlers of extended attributes: namespaces, who sees what, and what a file tells."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator

import pytest

from pkernfs.dma.mount import mount_filesystem
from pkernfs.fs.mkfs import make_filesystem
from pkernfs.fuse.extents_xattr import parse
from pkernfs.fuse.operations import Operations
from pkernfs.region.region import Region
from support.fuse_handlers import AS_ROOT, AS_USER, Waiting, do, fails, make, make_operations
from support.memory_pool import POOL, MemoryPool


@pytest.fixture
def ops() -> Iterator[Operations]:
    with MemoryPool() as pool, Region.anonymous(16 << 20) as region:
        make_filesystem(region, pool=POOL)
        yield make_operations(mount_filesystem(region, open_pool=pool.opener()))


@pytest.mark.parametrize("name", [b"system.x", b"pkernfs.x", b"x", b"system.pkernfs.segments"])
def test_other_namespaces_are_not_there(ops: Operations, name: bytes) -> None:
    ino = make(ops)
    assert fails(ops.getxattr(ino, name, AS_ROOT)) == errno.EOPNOTSUPP
    assert fails(ops.setxattr(ino, name, b"v", AS_ROOT)) == errno.EOPNOTSUPP
    assert fails(ops.removexattr(ino, name, AS_ROOT)) == errno.EOPNOTSUPP


def test_trusted_names_are_for_root(ops: Operations) -> None:
    ino = make(ops)
    do(ops.setxattr(ino, b"trusted.t", b"v", AS_ROOT))
    do(ops.setxattr(ino, b"user.u", b"v", AS_ROOT))
    assert sorted(do(ops.listxattr(ino, AS_ROOT))) == [b"trusted.t", b"user.u"]
    assert do(ops.listxattr(ino, AS_USER)) == [b"user.u"]
    do(ops.removexattr(ino, b"trusted.t", AS_ROOT))
    assert do(ops.listxattr(ino, AS_ROOT)) == [b"user.u"]


def test_a_file_tells_its_segment(ops: Operations) -> None:
    ino = make(ops)
    name = b"system.pkernfs.segment"
    assert fails(ops.getxattr(ino, name, AS_USER)) == errno.ENODATA
    ops.fs.run(lambda: ops.fs.setattr(ino, size=3 << 20))
    told = json.loads(do(ops.getxattr(ino, name, AS_USER)))
    assert (told["number"], told["kind"], told["length"]) == (1, "directory", 4 << 20)


def test_addresses_of_a_segment_are_looked_for_in_a_turn(ops: Operations) -> None:
    """It is mapped for that; nobody cuts it meanwhile, and finds it busy."""
    ino = make(ops)
    ops.fs.run(lambda: ops.fs.setattr(ino, size=3 << 20))
    waiting = ops.waiting
    assert isinstance(waiting, Waiting)
    waiting.asked.clear()
    value = do(ops.getxattr(ino, b"system.pkernfs.extents", AS_ROOT))
    assert waiting.asked == ["pool_turn", "work"]
    assert [e.length for e in parse(value)] == [3 << 20]
    assert do(ops.getxattr(ino, b"system.pkernfs.extents", AS_USER)) == value
    assert waiting.asked == ["pool_turn", "work"]
