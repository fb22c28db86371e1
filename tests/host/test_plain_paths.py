"""Ways to segments on made-up machines: which are offered, and why not the others."""

from __future__ import annotations

from pathlib import Path

import pytest

from pkernfs.host import plain_paths
from support.made_up_host import Machine, make_machine

CONFIG = {"FUSE_PASSTHROUGH": "y", "DEV_DAX": "m"}
RELEASE = "proc/sys/kernel/osrelease"
ACTIONS = "proc/sys/kernel/seccomp/actions_avail"
PAGES = "sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages"


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """A machine that offers everything."""
    machine = make_machine(tmp_path)
    machine.write(RELEASE, "7.3.4-cloud-amd64")
    machine.write(ACTIONS, "kill_process trap user_notif allow")
    machine.write("sys/bus/dax/drivers/device_dax/new_id", "")
    machine.write(PAGES, "64")
    return machine


def test_everything_is_offered(machine: Machine) -> None:
    found = [way(machine, CONFIG) for way in plain_paths.ALL]
    assert [way.offered for way in found] == [True] * 5
    assert not any(way.remedy for way in found)
    assert all(way.why for way in found)


@pytest.mark.parametrize(
    ("release", "config", "offered", "why"),
    [
        ("6.8.0-31", CONFIG, False, "kernel 6.8.0-31 has none"),
        ("6.12.1", {}, False, "not in this kernel"),
        ("6.12.1", None, None, "nowhere to be found"),
        ("6.9.0", CONFIG, True, "kernel 6.9.0 has it"),
    ],
)
def test_passthrough(
    machine: Machine, release: str, config: dict[str, str] | None, offered: bool | None, why: str
) -> None:
    machine.write(RELEASE, release)
    found = plain_paths.passthrough(machine, config)
    assert found.offered is offered
    assert why in found.why


@pytest.mark.parametrize(
    ("release", "actions", "why"),
    [
        ("5.10.0", "user_notif", "cannot answer opens"),
        ("6.1.0", "kill allow", "no seccomp user notification"),
    ],
)
def test_no_answers_to_opens(machine: Machine, release: str, actions: str, why: str) -> None:
    machine.write(RELEASE, release)
    machine.write(ACTIONS, actions)
    found = plain_paths.exec_(machine, None)
    assert found.offered is False
    assert why in found.why
    assert found.remedy


def test_a_kernel_without_seccomp(machine: Machine) -> None:
    Path(machine.path(ACTIONS)).unlink()
    assert plain_paths.exec_(machine, CONFIG).offered is False


@pytest.mark.parametrize(
    ("config", "offered", "remedy"),
    [(CONFIG, False, "modprobe"), ({}, False, "CONFIG_DEV_DAX"), (None, None, "modprobe")],
)
def test_no_driver_of_dax_devices(
    machine: Machine, config: dict[str, str] | None, offered: bool | None, remedy: str
) -> None:
    Path(machine.path("sys/bus/dax/drivers/device_dax/new_id")).unlink()
    Path(machine.path("sys/bus/dax/drivers/device_dax")).rmdir()
    found = plain_paths.device_dax(machine, config)
    assert found.offered is offered
    assert remedy in found.remedy


def test_no_huge_pages(machine: Machine) -> None:
    machine.write(PAGES, "0")
    assert plain_paths.huge_pages(machine, CONFIG).offered is False
    machine.write(PAGES.replace("nr_", "nr_overcommit_"), "5")
    assert plain_paths.huge_pages(machine, CONFIG).offered


@pytest.mark.parametrize(
    ("dax", "huge", "offered", "why"),
    [
        (False, False, [True, True, True, True], "has it"),
        (False, True, [False, True, True, True], "hugetlbfs"),
        (True, False, [False, True, True, True], "no regular file"),
    ],
)
def test_what_a_pool_offers(
    machine: Machine, dax: bool, huge: bool, offered: list[bool], why: str
) -> None:
    found = plain_paths.of_pool(machine, CONFIG, dax=dax, huge=huge)
    assert [way.name for way in found] == [
        "FUSE passthrough", "pkernfs native", "pkernfs exec", "pkernfs path",
    ]  # fmt: skip
    assert [way.offered for way in found] == offered
    assert why in found[0].why
