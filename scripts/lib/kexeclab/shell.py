"""An interactive machine: its serial console is the caller's terminal."""

import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from guestlab.machine import accelerators
from kexeclab.machine import Machine, command, prepare

RESERVE = "memmap=512M%1G pkernfs=512M!1G"


def run(kernel: str, more: Sequence[str], memory: int, append: str) -> int:
    """Run a shell in a machine; return QEMU's exit status.

    :param memory: MiB
    :param append: kernel parameters
    :raises LabError: the machine cannot be set up.
    """
    machine = Machine(kernel=kernel, kernels=more, memory=memory, cmdline=append.split())
    parts = prepare(machine)
    print(
        "\nThe machine's console; exit or Ctrl-D switches it off, Ctrl-A X ends QEMU at once.\n"
        "`lab-kexec` starts the same kernel again, `lab-kexec NAME` another of /lab/kernels.\n",
        flush=True,
    )
    with tempfile.TemporaryDirectory(prefix="pkernfs-lab.") as scratch:
        words = command(machine, parts, Path(scratch), ("lab.shell", "quiet"), accelerators()[0])
        return subprocess.run([*words, "-serial", "mon:stdio"], check=False).returncode
