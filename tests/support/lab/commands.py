"""The project inside a lab machine: its commands, in this process or another, and where it is."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import NamedTuple

from kexeclab.guest import Guest
from pkernfs import cli

PROJECT = Path("/opt/pkernfs")
PYTHON = str(PROJECT / ".venv/bin/python")


class Said(NamedTuple):
    """A command's exit status, and what it wrote to both outputs."""

    status: int
    text: str


def ask(*words: str) -> Said:
    """Run a pkernfs command in this process, for to start one takes seconds here."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        status = cli.main(list(words))
    return Said(status, said.getvalue())


def pkernfs(*words: str, status: int = 0) -> str:
    """Run a pkernfs command in this process that ends with ``status``; what it wrote."""
    said = ask(*words)
    assert said.status == status, f"pkernfs {' '.join(words)}: {said.status}: {said.text}"
    return said.text


def iommu(*words: str, status: int = 0) -> str:
    """``pkernfs iommu ...``, in this process."""
    return pkernfs("iommu", *words, status=status)


def run_iommu(guest: Guest, *words: str, status: int = 0) -> str:
    """``pkernfs iommu ...``, in a process of its own."""
    return guest.run("pkernfs", "iommu", *words, status=status)


def extents(path: Path) -> list[dict[str, int]]:
    """The pieces of a file: where each is in it, in the region and in physical memory."""
    found: list[dict[str, int]] = json.loads(pkernfs("extents", str(path), "--json"))["extents"]
    return found
