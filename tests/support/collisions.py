"""Names and attributes whose hashes are few, so that they collide."""

from __future__ import annotations

import pytest

from pkernfs.fs import names as names_module
from pkernfs.fs import xattrs as xattrs_module


def collide(monkeypatch: pytest.MonkeyPatch, keys: int) -> None:
    """Let there be no more than so many hashes from now on; a name's length decides."""

    def key(name: bytes, _hash_key: bytes) -> int:
        return (len(name) % keys + 1) << 11

    monkeypatch.setattr(names_module, "name_key", key)
    monkeypatch.setattr(xattrs_module, "name_key", key)
