"""pkernfs.vmm.uapi: its structures and numbers are those of the kernel's headers."""

from __future__ import annotations

from pathlib import Path

from pkernfs.vmm.uapi import VFIO_SET_IOMMU, request_name
from support import uapi


def test_headers(tmp_path: Path) -> None:
    # Debian 12's have no iommufd; tests/lab/test_take_over.py compares all with Debian 13's.
    expected = {name: value for name, value in uapi.ours().items() if not uapi.missing(name)}
    assert len(expected) > 30
    assert uapi.theirs(list(expected), tmp_path) == expected


def test_ioctls_are_told_apart() -> None:
    numbers = [n for name, n in uapi.constants().items() if n > 0x3B00]
    assert len(numbers) == len(set(numbers)) > 10


def test_names_of_ioctls() -> None:
    assert request_name(VFIO_SET_IOMMU) == "VFIO_SET_IOMMU"
    assert request_name(0x1234) == "0x1234"
