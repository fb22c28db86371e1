"""The files in which this machine is described: /proc, /sys, /dev, /run, /boot, under one root.

Tests make a root of their own; everything else uses :data:`HOST`.
"""

from __future__ import annotations

import os
import re
from typing import NamedTuple


class Host(NamedTuple):
    """A machine by its files; names are relative to ``root``: ``proc/iomem``."""

    root: str = "/"

    def path(self, name: str) -> str:
        """Return the whole path of a file."""
        return os.path.join(self.root, name)

    def read(self, name: str) -> str:
        """Return the text of a file, without white space at its end; carriage returns stay.

        :raises OSError: it cannot be read.
        """
        with open(self.path(name), "rb", buffering=0) as file:  # half the time of a text file
            return file.readall().decode("utf-8", "surrogateescape").rstrip()

    def find(self, name: str) -> str | None:
        """Return the text of a file, or None where it cannot be read."""
        try:
            return self.read(name)
        except OSError:
            return None

    def list(self, name: str) -> list[str]:
        """Return the names in a directory, sorted; none where there is no such directory."""
        try:
            return sorted(os.listdir(self.path(name)))
        except OSError:
            return []

    def lockdown(self) -> str | None:
        """Return ``integrity`` or ``confidentiality``; None if the kernel is not locked down."""
        found = re.search(r"\[(\w+)\]", self.find("sys/kernel/security/lockdown") or "")
        return found[1] if found and found[1] != "none" else None

    def command_line(self) -> str:
        """Return the kernel's command line; empty where there is no /proc."""
        return self.find("proc/cmdline") or ""

    def has_systemd(self) -> bool:
        """Tell whether systemd is process 1."""
        return os.path.isdir(self.path("run/systemd/system"))


HOST = Host()
