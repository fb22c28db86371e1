"""What keeps kmem from dax devices: parameters, modprobe.d, the kernel's configuration."""

from __future__ import annotations

from pathlib import Path

import pytest

from pkernfs.host import kmem
from pkernfs.host.kmem import Barrier
from support.made_up_host import Machine


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    machine = Machine(str(tmp_path))
    machine.write("proc/cmdline", "quiet")
    return machine


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("blacklist kmem", "blacklist kmem"),
        ("# blacklist kmem\n\n  blacklist   kmem  ", "blacklist kmem"),
        ("install kmem /bin/false", "install kmem /bin/false"),
        ("install kmem /usr/bin/true # never", "install kmem /usr/bin/true # never"),
        ("options dax_hmem region_idle=1", "options dax_hmem region_idle=1"),
        ("options dax-hmem x=2 region_idle", "options dax-hmem x=2 region_idle"),
        ("options dax_hmem \\\n region_idle=Y", "options dax_hmem region_idle=Y"),
    ],
)
@pytest.mark.parametrize("directory", ["etc", "run", "usr/local/lib", "usr/lib", "lib"])
def test_lines_of_modprobe_d_that_do(
    machine: Machine, directory: str, text: str, line: str
) -> None:
    machine.write(f"{directory}/modprobe.d/a.conf", "options kvm nested=1\n")
    machine.write(f"{directory}/modprobe.d/b.conf", text)
    said = f"/{directory}/modprobe.d/b.conf ({line})"
    assert kmem.barrier(machine) == Barrier(said, is_word=False)


@pytest.mark.parametrize(
    "text",
    ["blacklist kmem2", "#blacklist kmem", "install kmem /sbin/modprobe -i kmem", "install kmem",
     "options dax_hmem region_idle=0", "options dax_hmem", "options other region_idle=1",
     "alias kmem off"],
)  # fmt: skip
def test_lines_of_modprobe_d_that_do_not(machine: Machine, text: str) -> None:
    machine.write("etc/modprobe.d/a.conf", text)
    assert kmem.barrier(machine) is None


def test_files_of_modprobe_d_that_do_not_count(machine: Machine) -> None:
    machine.write("etc/modprobe.d/a.conf.old", "blacklist kmem")
    machine.write("etc/modprobe.d/b.conf", "")
    machine.write("usr/lib/modprobe.d/b.conf", "blacklist kmem")  # hidden by the other
    assert kmem.barrier(machine) is None


def test_a_parameter_comes_first(machine: Machine) -> None:
    machine.write("etc/modprobe.d/a.conf", "blacklist kmem")
    machine.write("proc/cmdline", "module_blacklist=kmem")
    assert kmem.barrier(machine) == Barrier("module_blacklist=kmem", is_word=True)


@pytest.mark.parametrize(
    ("line", "config", "kept"),
    [
        ("modprobe.blacklist=kmem", None, True),
        ("modprobe.blacklist=kmem", {"DEV_DAX_KMEM": "m"}, True),
        ("modprobe.blacklist=kmem", {"DEV_DAX_KMEM": "y"}, False),
        ("dax_hmem.region_idle=1", {"DEV_DAX_KMEM": "y"}, True),
        ("quiet", None, False),
        ("quiet", {}, True),
        ("quiet", {"DEV_DAX_KMEM": "m"}, False),
    ],
)
def test_kernels_that_have_no_use_for_it(
    line: str, config: dict[str, str] | None, kept: bool
) -> None:
    assert kmem.is_kept_away_by(line, config) == kept
    assert kmem.is_kept_away_by(kmem.word_for(config), config)


def test_devices_that_it_has(machine: Machine) -> None:
    assert kmem.devices_of(machine) == []
    for name in ("bind", "dax0.1", "new_id", "dax0.0"):
        machine.write(f"sys/bus/dax/drivers/kmem/{name}", "")
    assert kmem.devices_of(machine) == ["dax0.0", "dax0.1"]
