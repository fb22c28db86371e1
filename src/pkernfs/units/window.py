"""A unit's registers as whoever uses them sees them: see :class:`Window`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from pkernfs.region.region import Region
from pkernfs.vtd.registers import Step


class Window(Protocol):
    """A unit's registers. Loads and stores are of 4 or 8 aligned bytes, and never twice (11.2)."""

    def read32(self, offset: int) -> int:
        """Load a register of 32 bits."""

    def read64(self, offset: int) -> int:
        """Load a register of 64 bits."""

    def run(
        self,
        steps: Sequence[Step],
        last: Sequence[Step] = (),
        *,
        memory: Region | None = None,
        seconds: float = 1.0,
    ) -> bool:
        """Do ``steps``, then ``last``, without a break.

        A wait that is longer than ``seconds`` ends ``steps``, but not ``last``; False: there was
        one. Offsets of memory are those of ``memory``.
        """
