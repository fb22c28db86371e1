"""Backings that have addresses of their own in this machine: their locks, their memory type."""

from __future__ import annotations

from collections.abc import Callable

from pkernfs.host.iomem import Span
from pkernfs.host.sysroot import Host
from pkernfs.region.backing import Backing
from pkernfs.region.locks import lock_physical
from pkernfs.region.memtype import check_cached


class PhysicalBacking(Backing):
    """Ranges of physical memory, locked against everything that overlaps them.

    :param spec: for messages about the lock
    :raises LockedError: a part of the memory is in use.
    """

    real_addresses = True

    def __init__(
        self, name: str, spec: str, spans: list[Span], *, write: bool, lock: bool, host: Host
    ) -> None:
        super().__init__(name, sum(span.size for span in spans), spans)
        self._spans = spans
        self._host = host
        if lock:
            held = lock_physical(spec, spans, host, exclusive=write)
            self._fds.append(held.fd)
            self._lock = held if write else None

    def verify_mapping(self, read: Callable[[], object]) -> None:
        """Refuse a mapping that goes round the processor's caches.

        :raises RegionError: it does, with the remedy.
        """
        check_cached(self.name, self._spans, read, self._host)
