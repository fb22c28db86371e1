"""Each region spec is opened as what it names."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pkernfs.errors import UsageError
from pkernfs.quantities import PhysAddr
from pkernfs.region import files
from pkernfs.region.dax_backing import DaxBacking
from pkernfs.region.devmem import DevMemBacking
from pkernfs.region.files import FileBacking
from pkernfs.region.opening import open_backing
from support.made_up_host import Machine, add_dax, make_machine

M = 1 << 20
G = 1 << 30


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """A region in /dev/mem, and one that is a dax device."""
    line = "memmap=512M%1G memmap=512M%2G-1+0xefffffff pkernfs=512M!1G"
    made = make_machine(tmp_path, command_line=line)
    with made.write("dev/mem", b"").open("r+b") as memory:
        memory.truncate(2 * G)
    add_dax(made, "dax0.0", (2 * G, 8 * M))
    return made


def test_each_spec_has_its_kind(machine: Machine, tmp_path: Path) -> None:
    files.create(str(tmp_path / "file"), 8 * M)
    (tmp_path / "link").symlink_to("dev/dax0.0")
    (tmp_path / "pool").mkdir()
    files.create(str(tmp_path / "pool/base"), 8 * M)
    for spec, kind, name in (
        ("none", DevMemBacking, "512M!1G"),
        ("0x200000!0x40000000", DevMemBacking, "2M!1G"),
        (str(tmp_path / "file"), FileBacking, str(tmp_path / "file")),
        (str(tmp_path / "pool"), FileBacking, str(tmp_path / "pool/base")),
        (f"{tmp_path}/pool/", FileBacking, str(tmp_path / "pool/base")),
        (machine.path("dev/dax0.0"), DaxBacking, machine.path("dev/dax0.0")),
        (str(tmp_path / "link"), DaxBacking, machine.path("dev/dax0.0")),
    ):
        backing = open_backing(spec, write=True, phys_base=None, lock=True, host=machine)
        assert (type(backing), backing.name) == (kind, name)
        backing.close()


_IMPORTS = """
import sys
from pkernfs.region.region import Region
with Region.open(sys.argv[1], write=False) as region:
    print([name for name in sys.argv[2:] if f"pkernfs.{name}" in sys.modules])
"""


def test_a_file_waits_for_no_other_kind(tmp_path: Path) -> None:
    files.create(str(tmp_path / "file"), 8 * M)
    others = ["region.devmem", "region.dax_backing", "region.physical", "host.memmap"]
    words = [sys.executable, "-c", _IMPORTS, str(tmp_path / "file"), *others]
    assert subprocess.check_output(words, text=True) == "[]\n"


@pytest.mark.parametrize("spec", ["512M!1G", "dev/dax0.0"])
def test_an_address_of_ones_own_is_for_files(machine: Machine, spec: str) -> None:
    spec = spec if "!" in spec else machine.path(spec)
    with pytest.raises(UsageError, match="phys_base= is for files"):
        open_backing(spec, write=True, phys_base=PhysAddr(0), lock=True, host=machine)
