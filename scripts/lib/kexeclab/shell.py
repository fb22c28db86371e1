"""An interactive machine: its serial console is the caller's terminal."""

import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from guestlab.machine import accelerators
from kexeclab.machine import Machine, command, prepare

RESERVE = "memmap=512M%1G pkernfs=512M!1G"
#: With a VT-d unit: what `pkernfs iommu activate` needs, and a kexec by a panic.
FOR_UNITS = "intel_iommu=off iomem=relaxed crashkernel=256M"
_UNIT = ("-device", "intel-iommu,aw-bits=48,intremap=off", "-device", "edu,addr=10.0")


def run(
    kernel: str, more: Sequence[str], memory: int, append: str | None, units: bool = False
) -> int:
    """Run a shell in a machine; return QEMU's exit status.

    :param memory: MiB
    :param append: kernel parameters; None for those that reserve a region, and that units need
    :param units: with a VT-d unit, and below it an edu device, 0000:00:10.0
    :raises LabError: the machine cannot be set up.
    """
    if append is None:
        append = f"{RESERVE} {FOR_UNITS}" if units else RESERVE
    machine = Machine(
        kernel=kernel,
        kernels=more,
        memory=memory,
        cmdline=append.split(),
        devices=_UNIT if units else (),
    )
    parts = prepare(machine)
    print(
        "\nThe machine's console; exit or Ctrl-D switches it off, Ctrl-A X ends QEMU at once.\n"
        "`lab-kexec` starts the same kernel again, `lab-kexec NAME` another of /lab/kernels.\n",
        flush=True,
    )
    with tempfile.TemporaryDirectory(prefix="pkernfs-lab.") as scratch:
        words = command(machine, parts, Path(scratch), ("lab.shell", "quiet"), accelerators()[0])
        return subprocess.run([*words, "-serial", "mon:stdio"], check=False).returncode
