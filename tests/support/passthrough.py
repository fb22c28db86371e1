"""Whether this kernel passes mappings of a mount through to a segment."""

from __future__ import annotations

import pytest

from pkernfs.host import kernel_image, plain_paths
from pkernfs.host.plain_paths import PlainPath
from pkernfs.host.sysroot import HOST


def _way() -> PlainPath:
    return plain_paths.passthrough(HOST, kernel_image.running_config(HOST))


def is_offered() -> bool:
    """Tell whether it does, as far as is known."""
    return _way().offered is not False


def needs_passthrough() -> None:
    """Skip the test where it does not."""
    if not is_offered():
        pytest.skip(f"{_way().name}: {_way().why}")
