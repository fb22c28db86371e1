"""Strategies that the models of the file system draw from."""

from __future__ import annotations

import random

from hypothesis import strategies as st

BLOCK = 2 << 20
MIB = 1 << 20
PICK = st.integers(0, 1 << 16)
OFFSETS = st.one_of(
    st.sampled_from([0, 1, 4095, 4096, MIB - 1, MIB, BLOCK - 1, BLOCK, BLOCK + 4096, 2 * BLOCK]),
    st.integers(0, 5 * MIB),
)
LENGTHS = st.one_of(
    st.sampled_from([1, 4096, 4097, 65536, MIB, MIB + 1, BLOCK]), st.integers(1, 3 * MIB)
)


def noise(seed: int, length: int) -> bytes:
    """Bytes without a zero among them, so that lost ones show."""
    return random.Random(seed).randbytes(min(length, 4096)).replace(b"\0", b"\1") * (
        -(-length // 4096)
    )
