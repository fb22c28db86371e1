"""Units that are found: what ACPI and sysfs say of each."""

from __future__ import annotations

from pathlib import Path

from pkernfs.host.dmar import read_dmar
from pkernfs.host.sysroot import Host
from pkernfs.units.discovery import find_units, is_driven, unit_lines, unit_record
from support.dmar_tables import QEMU_TABLE


def test_units_that_the_kernels_driver_has(tmp_path: Path) -> None:
    """What sysfs tells of them is shown, without access to their registers."""
    host = Host(str(tmp_path))
    there = tmp_path / "sys/firmware/acpi/tables"
    there.mkdir(parents=True)
    (there / "DMAR").write_bytes(QEMU_TABLE)
    shown = tmp_path / "sys/class/iommu/dmar0/intel-iommu"
    shown.mkdir(parents=True)
    for name, text in (("version", "1:0"), ("cap", "d2008c222f0606"), ("ecap", "f42")):
        (shown / name).write_text(text + "\n")
    assert is_driven(host, "dmar0")
    [found] = find_units(host, read_dmar(host), write=True)
    record = unit_record(host, found, {})
    assert (record["state"], record["base"]) == ("driver", 0xFED9_0000)
    assert record["capabilities"][:4] == [
        "modes legacy", "levels 3, 4", "pages of 4 KiB, 2 MiB, 1 GiB", "addresses of 48 bits",
    ]  # fmt: skip
    text = "\n".join(unit_lines(record))
    assert "state: this kernel's driver has it" in text
    assert "endpoint 00:05.0" in text
