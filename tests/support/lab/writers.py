"""Processes that write, fsync and say so until the machine panics; what must be there afterwards.

Runs inside the machine. Each writer's steps follow from its number alone: after step N everything
of steps 0 to N is fsynced. It may be some steps ahead of what it has been able to tell.
"""

from __future__ import annotations

import os
import select
import struct
import threading
import time
from pathlib import Path

from kexeclab.guest import Guest

WRITERS = 4
_SIZES = (10, 5000, 70_000, 400_000, 2 << 20)
_STEP = struct.Struct("<ii")
_KEPT = 12  # of each writer's files; older ones are removed


def work_until_panic(guest: Guest, root: Path, seconds: float) -> None:
    """Start the writers, have the machine panic after ``seconds``; never returns.

    What is done is in the note ``promised``: for each writer its last step.
    """
    read_end, write_end = os.pipe()
    for writer in range(WRITERS):
        (root / f"{writer}").mkdir()
        if os.fork() == 0:
            _write_on(root / f"{writer}", writer, write_end)
    promised = [-1] * WRITERS
    guest.note("promised", promised)
    guest.leaving("panic")
    threading.Timer(seconds, Path("/proc/sysrq-trigger").write_text, ["c"]).start()
    deadline = time.monotonic() + seconds + 30
    while time.monotonic() < deadline:
        if select.select([read_end], [], [], 1.0)[0]:
            data = os.read(read_end, 512 * _STEP.size)
            for writer, step in _STEP.iter_unpack(data):
                promised[writer] = step
            guest.note("promised", promised)
    raise AssertionError("the machine has not panicked")


def _write_on(root: Path, writer: int, report: int) -> None:
    """One writer; ends with the machine."""
    step = 0
    while True:
        _do_step(root, writer, step)
        os.write(report, _STEP.pack(writer, step))
        step += 1


def _do_step(root: Path, writer: int, step: int) -> None:
    """A new file, fsynced; the one before it gets its final name; an old one goes."""
    with (root / f"{step}.new").open("wb", buffering=0) as file:
        file.write(_content(writer, step))
        os.fsync(file.fileno())
    if step:
        (root / f"{step - 1}.new").rename(root / f"{step - 1}")
    if step > _KEPT:
        (root / f"{step - 1 - _KEPT}").unlink()
    directory = os.open(root, os.O_RDONLY)
    os.fsync(directory)
    os.close(directory)


def _content(writer: int, step: int) -> bytes:
    size = _SIZES[(writer + step) % len(_SIZES)]
    line = b"writer %d, step %08d\n" % (writer, step)
    return (line * (size // len(line) + 1))[:size]


def broken_promises(root: Path, promised: list[int]) -> list[str]:
    """List what is not as the writers' last promises have it."""
    wrong = []
    for writer, last in enumerate(promised):
        directory = root / f"{writer}"
        there = {path.name for path in directory.iterdir()}
        newest = max((int(name.removesuffix(".new")) for name in there), default=-1)
        # Step N may be gone only if step N + 1 + _KEPT has begun, and so has made its own file.
        for step in range(max(0, newest - _KEPT), last + 1):
            names = {f"{step}", f"{step}.new"} & there
            content = _content(writer, step)
            if len(names) != 1:
                wrong.append(f"{writer}/{step}: {sorted(names) or 'missing'}")
            elif (directory / names.pop()).read_bytes() != content:
                wrong.append(f"{writer}/{step}: other bytes")
    return wrong
