"""What devices need of a kexec, put together from several mounts."""

from __future__ import annotations

import pytest

from pkernfs.control.mounts import Mount
from pkernfs.errors import InvalidError
from pkernfs.kexec.needs import MountNeeds, Needs

A = Needs(["0000:00:05.0"], [], False, ["dmar0"])


def test_a_unit_has_one_root_table() -> None:
    needs = {
        "/mnt/a": Needs(["0000:00:05.0"], [], False, ["dmar0"]),
        "/mnt/b": Needs(["0000:01:00.0"], ["0000:00:07.0"], False, ["dmar1"]),
    }
    assert MountNeeds([], needs).whole() == Needs(
        ["0000:00:05.0", "0000:01:00.0"], ["0000:00:07.0"], False, ["dmar0", "dmar1"]
    )
    needs["/mnt/b"] = needs["/mnt/b"]._replace(units=["dmar0"])
    with pytest.raises(InvalidError, match="dmar0: it can walk the tables of one file system"):
        MountNeeds([], needs).whole()


def test_a_kernel_has_one_mode() -> None:
    needs = {"/mnt/a": A, "/mnt/b": Needs(["0000:01:00.0"], [], True, ["dmar1"])}
    with pytest.raises(InvalidError, match="legacy and of scalable mode: no kernel adopts both"):
        MountNeeds([], needs).whole()
    needs["/mnt/b"] = needs["/mnt/b"]._replace(devices=[])
    assert not MountNeeds([], needs).whole().scalable


def test_whose_region_has_to_stay() -> None:
    mounts = [Mount(n, f"/mnt/{n}", "fuse.pkernfs", "x") for n in range(3)]
    needs = MountNeeds(mounts, {"/mnt/0": A, "/mnt/1": A._replace(devices=[])})
    assert [needs.has_devices(mount) for mount in mounts] == [True, False, False]
    assert MountNeeds([], {}).whole() == Needs([], [], False, [])
