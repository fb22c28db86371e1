"""A file system with tables, for tests of pkernfs.dma."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pkernfs.quantities import Iova
from support.checking import assert_clean
from support.memory_pool import PiecedPool
from support.table_files import GIB, MIB, Host, ino_of


@pytest.fixture
def host(request: pytest.FixtureRequest) -> Iterator[Host]:
    made = Host(getattr(request, "param", 64 * MIB))
    yield made
    assert_clean(made.region)
    made.fs.unmount()
    assert_clean(made.region)
    made.close()


@pytest.fixture
def pooled() -> Iterator[Host]:
    """One with a pool of segments, of 64 MiB, that have physical pieces."""
    made = Host(pool=PiecedPool(dirty=True))
    yield made
    assert_clean(made.region)
    made.fs.unmount()
    assert_clean(made.region)
    made.close()


@pytest.fixture
def mapped(host: Host) -> Host:
    """guest, 4 MiB, is mapped at 1 GiB in dom-0; other, 4 MiB, is not."""
    return map_guest(host)


@pytest.fixture(params=["host", "pooled"], ids=["", "segment"])
def mapped_either(request: pytest.FixtureRequest) -> Host:
    """The same; or both files have segments."""
    return map_guest(request.getfixturevalue(request.param))


def map_guest(host: Host) -> Host:
    host.file_of("guest", 4 * MIB)
    host.file_of("other", 4 * MIB)
    host.dom(0)
    host.map(0, Iova(GIB), ino_of(host, "guest"))
    return host
