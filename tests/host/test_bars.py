"""BARs: their names, and where sysfs says that each is."""

from __future__ import annotations

from pathlib import Path

import pytest

from pkernfs.errors import InvalidError, NotFoundError
from pkernfs.host.bars import Bar, all_bars, parse_bar, read_bar
from pkernfs.host.sysroot import Host
from pkernfs.quantities import PhysAddr, SourceId
from support.dmar_tables import add_device, config

MIB = 1 << 20
GIB = 1 << 30


def resource(root: Path, device: str, *lines: str) -> Host:
    """A fake of sysfs."""
    directory = root / "sys/bus/pci/devices" / device
    directory.mkdir(parents=True, exist_ok=True)
    rest = ["0x0000000000000000 0x0000000000000000 0x0000000000000000"] * (13 - len(lines))
    (directory / "resource").write_text("\n".join([*lines, *rest]) + "\n")
    return Host(str(root))


def test_read_bar(tmp_path: Path) -> None:
    host = resource(
        tmp_path,
        "0000:00:06.0",
        "0x00000000fc000000 0x00000000fcffffff 0x0000000000040200",
        "0x000000000000c000 0x000000000000c03f 0x0000000000040101",
        "0x0000008000000000 0x00000083ffffffff 0x000000000014220c",
        "0x0000000000000000 0x0000000000000000 0x0000000000000000",
        "0x00000000fd000000 0x00000000fd0000ff 0x0000000000040200",
        "0x0000000000000000 0x0000000000ffffff 0x0000000020040200",
    )
    device = SourceId(0x30)
    assert read_bar(device, 0, host) == Bar(device, 0, PhysAddr(0xFC00_0000), 16 * MIB)
    assert read_bar(device, 2, host) == Bar(device, 2, PhysAddr(1 << 39), 16 * GIB)
    for number, error, match in (
        (1, InvalidError, "BAR 1 of 0000:00:06.0: not memory"),
        (3, NotFoundError, "BAR 3 of 0000:00:06.0: there is none"),
        (4, InvalidError, "not whole pages: got 0xfd000000-0xfd0000ff"),
        (5, NotFoundError, "BAR 5 of 0000:00:06.0: it has no address"),
    ):
        with pytest.raises(error, match=match):
            read_bar(device, number, host)
    with pytest.raises(NotFoundError, match=r"device 0000:00:07\.0: no such device"):
        read_bar(SourceId(0x38), 0, host)


@pytest.mark.parametrize(
    "text", ["", "0000:00:06.0", "0000:00:06.0:6", "0000:00:06.0:", "0000:00:06.8:0", "x:0",
             "0001:00:06.0:0", "0000:00:06.0:-1", "0000:00:20.0:1", "0000:00:06.0:00"],
)  # fmt: skip
def test_bad_bar(text: str) -> None:
    with pytest.raises(InvalidError):
        parse_bar(text)


def test_parse_bar() -> None:
    assert parse_bar("0000:00:06.0:5") == (0x30, 5)
    assert parse_bar("ff:1f.7:0") == (0xFFFF, 0)


def test_the_bars_of_all_devices(tmp_path: Path) -> None:
    memory = "0x00000000fc000000 0x00000000fcffffff 0x0000000000040200"
    ports = "0x000000000000c000 0x000000000000c03f 0x0000000000040101"
    for name in ("0000:00:05.0", "0000:00:06.0", "0001:00:07.0"):
        add_device(tmp_path, name, config())
        resource(tmp_path, name, ports, memory)
    host = Host(str(tmp_path))
    assert all_bars(host) == [
        Bar(SourceId(s), 1, PhysAddr(0xFC00_0000), 16 * MIB) for s in (0x28, 0x30)
    ]
    (tmp_path / "sys/bus/pci/devices/0000:00:05.0/resource").unlink()
    assert [bar.name for bar in all_bars(host)] == ["BAR 1 of 0000:00:06.0"]
