"""The exception tree: each expected failure has an errno, and a message of one line."""

from __future__ import annotations

import ast
import errno
import inspect

import pytest

from pkernfs import errors
from pkernfs.errors import (
    CorruptionError,
    LockedError,
    NoSpaceError,
    NoTablePagesError,
    PkernfsError,
    RegionError,
    ZeroingNeeded,
    one_line,
)

EXPECTED = [
    kind
    for _, kind in inspect.getmembers(errors, inspect.isclass)
    if issubclass(kind, PkernfsError)
]


@pytest.mark.parametrize("kind", EXPECTED)
def test_an_expected_failure_has_an_errno(kind: type[PkernfsError]) -> None:
    assert kind.errno in errno.errorcode
    assert inspect.getdoc(kind)


def test_zeroing_is_no_failure() -> None:
    assert not issubclass(ZeroingNeeded, PkernfsError)
    assert ZeroingNeeded([(5, 2)]).blocks == [(5, 2)]


@pytest.mark.parametrize(
    ("missing", "grow"), [(1, 2), (2 << 20, 2), ((2 << 20) + 1, 4), (5 << 20, 6)]
)
def test_a_table_file_grows_by_whole_blocks(missing: int, grow: int) -> None:
    error = NoTablePagesError("dom-0", missing)
    assert error.missing == missing
    assert isinstance(error, NoSpaceError)
    assert str(error) == (
        f"dom-0: no free page for tables: it must grow by {grow} MiB: truncate -s +{grow}M"
    )


def test_a_region_fails_with_the_kernels_errno() -> None:
    assert RegionError("region").errno == errno.EINVAL
    assert RegionError("region", errno.EPERM).errno == errno.EPERM
    assert LockedError("region").errno == errno.EBUSY
    assert CorruptionError("page").errno == errno.EUCLEAN


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("plain: got 1, expected 2", "plain: got 1, expected 2"),
        ("a\nb\x1b[2J", "a\\nb\\x1b[2J"),
        ("f\u00fcr \u4e2d", "f\u00fcr \u4e2d"),
        ("\u2028\udcff", "\\u2028\\udcff"),
    ],
)
def test_a_message_is_one_line(message: str, shown: str) -> None:
    assert one_line(message) == shown
    assert len(one_line(message).splitlines()) == 1


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (CorruptionError("page 5: bad magic"), "page 5: bad magic: run fsck.pkernfs -y"),
        (
            CorruptionError("a: unmount it and run fsck.pkernfs"),
            "a: unmount it and run fsck.pkernfs",
        ),
        (errors.BeyondRepairError("both copies"), "both copies"),
        (RegionError("cannot open"), "cannot open"),
    ],
)
def test_what_repairs_damage_is_said(error: errors.PkernfsError, said: str) -> None:
    assert errors.with_remedy(error) == said


def test_it_imports_nothing_of_ours() -> None:
    tree = ast.parse(inspect.getsource(errors))
    names = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert names == ["__future__"]
