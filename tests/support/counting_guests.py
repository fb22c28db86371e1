"""Guests that count in their memory (guestlab.counter), below a QEMU that a test names."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from guestlab import counter


@contextmanager
def counting(
    qemu: Path, machine: Sequence[str], disk: Path, user: int | None = None,
    below: Sequence[str] = (),
) -> Iterator[subprocess.Popen[bytes]]:  # fmt: skip
    """A guest that counts while the block runs; no QEMU is left after it.

    :param machine: QEMU's options that make the machine and its memory
    :param disk: a file to be made, from which it boots
    :param user: who runs it, if it is somebody else
    :param below: a command that becomes the QEMU in the end, as ``pkernfs exec --``
    """
    disk.write_bytes(counter.floppy())
    command = [
        *below, str(qemu), "-nodefaults", "-display", "none", *machine,
        "-drive", f"if=ide,format=raw,snapshot=on,file={disk}", "-serial", f"file:{disk}.serial",
    ]  # fmt: skip
    groups: list[int] | None = None if user is None else []
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, user=user, group=user, extra_groups=groups
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def count_at(file: Path, offset: int = 0) -> int:
    """The guest's count, in a file that has its memory at ``offset``."""
    with file.open("rb", buffering=0) as raw:
        raw.seek(offset + counter.COUNT_ADDRESS)
        return int.from_bytes(raw.read(4), "little")


def ring_in(memory: bytes) -> list[int]:
    """The numbers that the guest has stored, each in its own word."""
    ring = memory[counter.RING_ADDRESS :][: 4 * counter.RING_WORDS]
    return [int.from_bytes(ring[n : n + 4], "little") for n in range(0, len(ring), 4)]
