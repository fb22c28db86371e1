"""Whether this kernel passes mappings of a mount through to a segment."""

from __future__ import annotations

import pytest

from pkernfs.host import kernel_image, plain_paths
from pkernfs.host.sysroot import HOST


def needs_passthrough() -> None:
    """Skip the test where it does not."""
    way = plain_paths.passthrough(HOST, kernel_image.running_config(HOST))
    if way.offered is False:
        pytest.skip(f"{way.name}: {way.why}")
