"""What several of these modules need."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pkernfs.iommu.context_walk import Mode
from support.table_host import TableHost


@pytest.fixture(params=[Mode.LEGACY, Mode.SCALABLE], ids=["legacy", "scalable"])
def host(request: pytest.FixtureRequest) -> Iterator[TableHost]:
    made = TableHost(request.param)
    yield made
    made.region.close()
