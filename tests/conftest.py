"""What every test gets: tests that this machine cannot run are skipped, or fail where asked.

``PKERNFS_REQUIRE=fuse,vm`` (set by scripts/test as root) turns a missing capability into a failure,
so that a machine that lost its /dev/fuse does not look like a passing one.
"""

from __future__ import annotations

import os
import shutil

import pytest


def _missing_fuse() -> str | None:
    if os.geteuid() != 0:
        return "not root"
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR))
    except OSError as error:
        return f"/dev/fuse: {error.strerror}"
    return None


def _missing_vm() -> str | None:
    return None if shutil.which("qemu-system-x86_64") else "no qemu-system-x86_64"


_CAPABILITIES = {"fuse": _missing_fuse, "vm": _missing_vm}


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip, or fail, a test whose marker names something that is not to be had here."""
    required = os.environ.get("PKERNFS_REQUIRE", "").split(",")
    for name, missing in _CAPABILITIES.items():
        if item.get_closest_marker(name) is None or (reason := missing()) is None:
            continue
        if name in required:
            pytest.fail(f"{name} is required (PKERNFS_REQUIRE) and missing: {reason}")
        pytest.skip(f"needs {name}: {reason}")
