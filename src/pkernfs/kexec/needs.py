"""Needs of a kexec: those of devices that must go on, by mount, and put together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from pkernfs.control.mounts import Mount
from pkernfs.errors import InvalidError


class Needs(NamedTuple):
    """The needs of one mount's devices; from its daemon.

    ``devices`` must go on, ``cleared`` are those that a handover detaches: names as ``lspci -D``
    has them. ``units`` are above the former. ``scalable`` is the mode of their tables.
    """

    devices: Sequence[str]
    cleared: Sequence[str]
    scalable: bool
    units: Sequence[str] = ()


class MountNeeds(NamedTuple):
    """The mounts, and the needs of each by mount point; none of those that were not asked."""

    mounts: list[Mount]
    needs: dict[str, Needs]

    def has_devices(self, mount: Mount) -> bool:
        """Tell whether devices that must go on depend on a mount's region."""
        needs = self.needs.get(mount.mount_point)
        return needs is not None and bool(needs.devices)

    def whole(self) -> Needs:
        """Put the needs of all mounts together.

        :raises InvalidError: no kernel can meet them all.
        """
        kept = [n for n in self.needs.values() if n.devices]
        units = self._units()
        if len({n.scalable for n in kept}) > 1:
            raise InvalidError(
                "kexec: tables of legacy and of scalable mode: no kernel adopts both"
            )
        return Needs(
            [d for n in kept for d in n.devices],
            [d for n in self.needs.values() for d in n.cleared],
            any(n.scalable for n in kept),
            units,
        )

    def _units(self) -> list[str]:
        """Return all units.

        :raises InvalidError: one is above devices of two mounts, and it has one root table.
        """
        walked: dict[str, str] = {}
        for point, needs in self.needs.items():
            for unit in needs.units:
                other = walked.setdefault(unit, point)
                if other != point:
                    raise InvalidError(
                        f"kexec: {unit}: it can walk the tables of one file system, but devices "
                        f"of {other} and of {point} are below it: attach them all in one, or "
                        "detach those of the other"
                    )
        return list(walked)
