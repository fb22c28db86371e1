"""pkernfs.vmm as a whole: it needs what its docstring says, and no more."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pkernfs.vmm

NEEDS = {
    "pkernfs",
    "pkernfs.errors",
    "pkernfs.host",
    "pkernfs.host.mappings",
    "pkernfs.host.mount_table",
    "pkernfs.host.pci_config",
    "pkernfs.host.sysroot",
    "pkernfs.quantities",
}


def test_needs_nothing_of_the_file_system() -> None:
    names = [p.stem for p in Path(pkernfs.vmm.__file__).parent.glob("*.py")]
    program = "import sys\n"
    program += "".join(f"import pkernfs.vmm.{name}\n" for name in names if name != "__init__")
    program += "print(*[name for name in sys.modules if name.startswith('pkernfs')])"
    said = subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.PIPE)
    loaded = {name for name in said.stdout.decode().split() if "vmm" not in name}
    assert loaded == NEEDS
