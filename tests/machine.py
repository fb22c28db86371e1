"""A made-up machine for tests: /proc, /sys, /dev and /run under a directory."""

from __future__ import annotations

from pathlib import Path

from pkernfs.backing.host import Host

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
