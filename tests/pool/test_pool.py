"""What all pools have in common."""

from __future__ import annotations

import pytest

from pkernfs.pool.pool import Holder


@pytest.mark.parametrize(
    ("holder", "text"),
    [
        (Holder(7, "qemu", "maps"), "process 7 (qemu) maps it"),
        (Holder(0, "a virtual machine", "holds"), "a virtual machine holds it"),
    ],
)
def test_who_holds_a_segment_is_said_in_one_way(holder: Holder, text: str) -> None:
    assert str(holder) == text
