"""A made-up machine for tests: /proc, /sys, /dev and /run under a directory."""

from __future__ import annotations

from pathlib import Path

from pkernfs.host.sysroot import Host

#: /proc/iomem of a q35 guest of 4 GiB with memmap=512M%1G, and its firmware's map.
IOMEM = """\
00000000-00000fff : Reserved
00001000-0009fbff : System RAM
000a0000-000bffff : PCI Bus 0000:00
000f0000-000fffff : Reserved
  000f0000-000fffff : System ROM
00100000-3fffffff : System RAM
  18800000-19601ef1 : Kernel code
  1aab1000-1affffff : Kernel bss
60000000-7ffdffff : System RAM
7ffe0000-7fffffff : Reserved
80000000-afffffff : PCI Bus 0000:00
b0000000-bfffffff : PCI MMCONFIG 0000 [bus 00-ff]
  b0000000-bfffffff : Reserved
100000000-17fffffff : System RAM
"""
FIRMWARE = (
    (0x0, 0x9FBFF, "System RAM"),
    (0x100000, 0x7FFDFFFF, "System RAM"),
    (0x7FFE0000, 0x7FFFFFFF, "Reserved"),
    (0xB0000000, 0xBFFFFFFF, "Reserved"),
    (0x100000000, 0x17FFFFFFF, "System RAM"),
)
COMMAND_LINE = "console=ttyS0 memmap=512M%1G pkernfs=512M!1G quiet"


class Machine(Host):
    """Write files of the made-up machine; use it where a Host is asked for."""

    def write(self, name: str, text: str | bytes) -> Path:
        """Make a file, with its directories."""
        path = Path(self.path(name))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path


def make_machine(
    root: Path,
    *,
    command_line: str = COMMAND_LINE,
    iomem: str = IOMEM,
    firmware: tuple[tuple[int, int, str], ...] = FIRMWARE,
) -> Machine:
    """A machine with 4 GiB of memory, 512 MiB of it reserved at 1 GiB."""
    machine = Machine(str(root))
    machine.write("proc/cmdline", command_line + "\n")
    machine.write("proc/iomem", iomem)
    for number, (start, end, kind) in enumerate(firmware):
        base = f"sys/firmware/memmap/{number}"
        machine.write(f"{base}/start", f"{start:#x}\n")
        machine.write(f"{base}/end", f"{end:#x}\n")
        machine.write(f"{base}/type", f"{kind}\n")
    (root / "run").mkdir()
    return machine


def add_dax(
    machine: Machine,
    name: str,
    *pieces: tuple[int, int],
    driver: str | None = "device_dax",
    size: int | None = None,
    align: int = 2 << 20,
) -> Path:
    """A dax device of these ``(start, size)``, as sysfs shows it; the file that stands for it."""
    number = name[3:].split(".")[0]
    home = f"sys/devices/platform/hmem.{number}"
    base = f"{home}/{name}"
    total = sum(length for _, length in pieces) if size is None else size
    machine.write(f"{base}/size", f"{total}\n")
    machine.write(f"{base}/align", f"{align}\n")
    machine.write(f"{base}/numa_node", "1\n")
    machine.write(f"{base}/resource", f"{pieces[0][0] if pieces else 0:#x}\n")
    machine.write(f"{home}/dax_region/id", f"{number}\n")
    offset = 0
    # The kernel numbers mappings as they were made; after some have gone, in any order.
    for i, (start, length) in enumerate(pieces):
        mapping = f"{base}/mapping{len(pieces) - 1 - i}"
        machine.write(f"{mapping}/start", f"{start:#x}\n")
        machine.write(f"{mapping}/end", f"{start + length - 1:#x}\n")
        machine.write(f"{mapping}/page_offset", f"{offset // 4096:#x}\n")
        offset += length
    drivers = Path(machine.path("sys/bus/dax/drivers"))
    for each in {"device_dax", driver or "device_dax"}:
        (drivers / each).mkdir(parents=True, exist_ok=True)
    if driver is not None:
        Path(machine.path(base), "driver").symlink_to(drivers / driver)
    devices = Path(machine.path("sys/bus/dax/devices"))
    devices.mkdir(parents=True, exist_ok=True)
    (devices / name).symlink_to(machine.path(base))
    node = machine.write(f"dev/{name}", b"")
    with node.open("r+b") as file:
        file.truncate(total)
    return node


def bzimage(release: str) -> bytes:
    """The begin of a bzImage that says its release."""
    head = bytearray(0x300)
    head[0x202:0x206] = b"HdrS"
    head[0x20E:0x210] = (0x80).to_bytes(2, "little")
    text = f"{release} (somebody@somewhere) #1 SMP\0".encode()
    head[0x280 : 0x280 + len(text)] = text
    return bytes(head)
