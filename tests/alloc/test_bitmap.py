"""Bitmaps against lists of bits and strings of ones and zeros."""

from __future__ import annotations

import ast
import inspect
import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pkernfs.alloc import bitmap


@given(
    first=st.integers(0, 100), count=st.integers(0, 100), value=st.booleans(), seed=st.integers()
)
def test_set_run(first: int, count: int, value: bool, seed: int) -> None:
    buffer = bytearray(random.Random(seed).randbytes(32))
    expected = bitmap.expand(bytes(buffer), 256)
    expected[first : first + count] = bytes([value]) * count
    bitmap.set_run(buffer, first, count, value)
    assert bitmap.expand(bytes(buffer), 256) == expected


@given(mask=st.integers(0, (1 << 200) - 1), count=st.integers(1, 20))
def test_find_run_and_runs(mask: int, count: int) -> None:
    text = format(mask, "b")[::-1]
    assert bitmap.find_run(mask, count) == text.find("1" * count)
    found = bitmap.runs(mask)
    assert sum(((1 << n) - 1) << at for at, n in found) == mask
    assert all(a + n < b for (a, n), (b, _) in pairwise(found))


def test_find_run_finds_nothing_in_nothing() -> None:
    assert bitmap.find_run(0, 1) == -1
    assert bitmap.runs(0) == []


def test_it_knows_nothing_of_file_systems() -> None:
    tree = ast.parse(inspect.getsource(bitmap))
    names = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert names == {"__future__", "typing"}


@pytest.mark.parametrize("bit", range(20))
def test_bit_b_is_bit_b_mod_8_of_byte_b_div_8(bit: int) -> None:
    buffer = bytearray(3)
    bitmap.set_run(buffer, bit, 1, True)
    assert buffer[bit // 8] == 1 << bit % 8
    assert sum(buffer) == buffer[bit // 8]
