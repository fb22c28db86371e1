"""Backings: memory without a descriptor, given addresses, and files that cannot be opened."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from pkernfs.errors import RegionError
from pkernfs.host.iomem import Span
from pkernfs.layout import BLOCK, PAGE
from pkernfs.quantities import PhysAddr, RegionOff
from pkernfs.region.backing import Backing, given_pieces, open_path


def test_anonymous_memory_is_known_by_nothing() -> None:
    backing = Backing("anonymous", BLOCK)
    assert (backing.fd, backing.pieces, backing.dax, backing.node) == (None, None, None, None)
    assert not backing.untouched
    assert backing.known_zero() == []
    assert list(backing.data_ranges(RegionOff(PAGE), RegionOff(BLOCK))) == [(PAGE, BLOCK)]
    assert backing.has_data(RegionOff(PAGE), RegionOff(BLOCK))
    assert backing.refused(errno.EPERM) == ""
    backing.verify_mapping(lambda: pytest.fail("nothing has to be read"))
    backing.serving(True)
    backing.close()


def test_given_addresses() -> None:
    assert given_pieces("r", BLOCK, None) is None
    assert given_pieces("r", BLOCK, PhysAddr(5 * PAGE)) == [Span(PhysAddr(5 * PAGE), BLOCK)]
    with pytest.raises(RegionError, match="r: bad phys_base: got 0x1001, expected a multiple of"):
        given_pieces("r", BLOCK, PhysAddr(0x1001))


def test_what_is_opened(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    reader = open_path(str(path), write=False)
    assert os.read(reader, 3) == b"abc"
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.write(reader, b"x")
    assert not os.get_inheritable(reader)
    os.close(reader)
    writer = open_path(str(path), write=True)
    os.write(writer, b"x")
    os.close(writer)
    with pytest.raises(RegionError, match="none: cannot open: No such file") as caught:
        open_path(str(tmp_path / "none"), write=True)
    assert caught.value.errno == errno.ENOENT
