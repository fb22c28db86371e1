"""SIGKILL at random moments: of a daemon under load, of who maps its files, of mkfs, of fsck.

Clients log each operation before and after it; the checker applies the log to a model. Whatever
was acknowledged must be there: operations on names and attributes and writes when they return,
stores through a mapping when msync returns. The one operation that a client was in the middle of
has happened, or not.

Environment: ``PKERNFS_SEED`` repeats the choices of a run (not the moments), ``PKERNFS_KILLS`` is
the number of kills, ``PKERNFS_ROUNDS`` of those with segments.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import mmap
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from guestlab import counter
from pkernfs.cli import fsck_main, mkfs_main
from pkernfs.dma.mount import mount_filesystem
from pkernfs.errors import CorruptionError, FormatError
from pkernfs.fs import fsck
from pkernfs.fs.filesystem import FileSystem
from pkernfs.host.sysroot import HOST
from pkernfs.layout import FIRST_MAP_PAGE, PAGE, ROOT_INO, STATE_PAGE
from pkernfs.plain.launch import NAME
from pkernfs.quantities import RegionOff
from pkernfs.region.region import Region
from support.counting_guests import count_at
from support.crash import (
    check_structure,
    check_zero_blocks,
    content,
    formatted,
    say,
    snapshot,
    walk,
)
from support.forked_daemon import ForkedPool
from support.mounted_pool import MountedPool, native_of, tmpfs
from support.mounting import MIB, Mounted, libc, wait_until
from support.passthrough import is_offered
from support.stampers import SIZE, Stamper

SEED = int(os.environ.get("PKERNFS_SEED") or random.randrange(1 << 32))
KILLS = int(os.environ.get("PKERNFS_KILLS") or 100)
ROUNDS = int(os.environ.get("PKERNFS_ROUNDS") or 300)
CLIENTS = 3
MAPPED = "mapped"
MAPPED_BYTES = 64 * 1024
MOST_FILES = 10
PUNCH = 3
_STEP = 512  # bytes that are compared at once
GONE = (errno.ENOTCONN, errno.ECONNABORTED, errno.EIO, errno.ENODEV)


@pytest.fixture(scope="module", autouse=True)
def figures(request: pytest.FixtureRequest) -> Iterator[Counter[str]]:
    """What was done, printed behind the last test."""
    counted: Counter[str] = Counter()
    yield counted
    text = ", ".join(f"{counted[key]} {key}" for key in sorted(counted))
    say(request.config, f"SIGKILL: {text}, seed {SEED}")


# ---------------------------------------------------------------------- the model

Op = dict[str, Any]


@dataclass
class Node:
    """A name in a client's directory. A file's bytes are each from one of :attr:`versions`."""

    kind: str
    versions: list[bytes] = field(default_factory=lambda: [b""])
    mode: int = 0o600
    xattr: bytes | None = None
    target: str = ""

    @property
    def data(self) -> bytes:
        return self.versions[-1]

    def copy(self) -> Node:
        return Node(self.kind, list(self.versions), self.mode, self.xattr, self.target)


Model = dict[str, Node]


def payload(op: Op) -> bytes:
    """The bytes that an operation writes: none of them zero."""
    return random.Random(op["key"]).randbytes(op["length"]).replace(b"\0", b"\1")


def patched(data: bytes, offset: int, new: bytes) -> bytes:
    """``data`` with ``new`` at ``offset``."""
    data = data.ljust(offset, b"\0")
    return data[:offset] + new + data[offset + len(new) :]


def resized(data: bytes, size: int) -> bytes:
    """``data`` cut or extended by zeros."""
    return data[:size].ljust(size, b"\0")


def apply(model: Model, op: Op) -> None:
    """What an operation does when it has been acknowledged."""
    name = op["name"]
    match op["do"]:
        case "create":
            model[name] = Node("file")
        case "mkdir":
            model[name] = Node("dir", mode=0o700)
        case "symlink":
            model[name] = Node("link", target=op["target"])
        case "unlink" | "rmdir":
            del model[name]
        case "rename":
            model[op["to"]] = model.pop(name)
        case "exchange":
            model[name], model[op["to"]] = model[op["to"]], model[name]
        case "write":
            model[name].versions = [patched(model[name].data, op["offset"], payload(op))]
        case "dirty":
            model[name].versions.append(patched(model[name].data, op["offset"], payload(op)))
        case "msync":
            model[name].versions = [patched(model[name].data, op["offset"], payload(op))]
        case "truncate":
            model[name].versions = [resized(model[name].data, op["size"])]
        case "punch":
            size = len(model[name].data)
            end = min(op["offset"] + op["length"], size)
            hole = bytes(max(0, end - op["offset"]))
            model[name].versions = [
                patched(model[name].data, op["offset"], hole)[: len(model[name].data)]
            ]
        case "chmod":
            model[name].mode = op["mode"]
        case "setxattr":
            model[name].xattr = payload(op)
        case "fsync":
            pass
        case other:
            raise ValueError(other)


def choose(model: Model, rng: random.Random) -> Op:
    """The next operation of a client."""
    files = [n for n, node in model.items() if node.kind == "file" and n != MAPPED]
    fresh = f"n{rng.randrange(40)}"
    name = rng.choice(files) if files else ""
    op: Op = {"name": name, "key": rng.randrange(1 << 40), "length": 0}
    if len(files) < 3 or (len(model) < MOST_FILES and rng.random() < 0.15 and fresh not in model):
        if fresh in model:
            return {**op, "do": "unlink" if model[fresh].kind != "dir" else "rmdir", "name": fresh}
        do = rng.choices(("create", "mkdir", "symlink"), (6, 1, 1))[0]
        return {**op, "do": do, "name": fresh, "target": "x" * rng.choice((5, 3000))}
    size = len(model[name].data)
    match rng.randrange(16):
        case 0 | 1:
            gone = rng.choice([n for n in model if n != MAPPED])
            return {**op, "do": "rmdir" if model[gone].kind == "dir" else "unlink", "name": gone}
        case 2:
            return {**op, "do": "rename", "to": fresh if fresh not in model else name + "x"}
        case 3:
            return {**op, "do": "rename", "to": rng.choice(files)} if len(files) > 3 else {
                **op, "do": "fsync"}  # fmt: skip
        case 4:
            return {**op, "do": "exchange", "to": rng.choice(files)}
        case 5:
            return {
                **op,
                "do": "truncate",
                "size": rng.choice((0, 100, size // 2, size + 5000, 2 * MIB + 9)),
            }
        case 6:
            return {
                **op,
                "do": "punch",
                "offset": rng.randrange(size + 1),
                "length": 1 + rng.randrange(70000),
            }
        case 7:
            return {**op, "do": "chmod", "mode": rng.randrange(0o600, 0o1000)}
        case 8:
            return {**op, "do": "setxattr", "length": rng.choice((5, 400, 5000))}
        case 9 | 10:
            offset = rng.randrange(MAPPED_BYTES - 9000)
            do = rng.choice(("msync", "dirty"))
            return {
                **op,
                "do": do,
                "name": MAPPED,
                "offset": offset,
                "length": rng.randrange(1, 9000),
            }
        case 11:
            return {**op, "do": "fsync"}
    offset = rng.choice((size, size, 0, rng.randrange(size + 1), size + 3000))
    length = rng.choice((10, 700, 4096, 60000))
    return {**op, "do": "write", "offset": offset, "length": length, "sync": rng.random() < 0.3}


# ---------------------------------------------------------------------- the clients


class Client:
    """Works in one directory of the mount until the daemon is gone."""

    def __init__(self, root: Path, log: int) -> None:
        os.chdir(root)  # names keep leading there when the mount has been taken away
        self.root = Path()
        self.log = log
        fd = os.open(MAPPED, os.O_RDWR)
        self.memory = mmap.mmap(fd, MAPPED_BYTES)

    def work(self, model: Model, rng: random.Random) -> None:
        """Never returns."""
        while True:
            op = choose(model, rng)
            os.write(self.log, json.dumps(op).encode() + b"\n")
            try:
                self.perform(op)
            except OSError as e:
                os.write(self.log, json.dumps({"errno": e.errno}).encode() + b"\n")
                os._exit(0)
            os.write(self.log, b"{}\n")
            apply(model, op)

    def perform(self, op: Op) -> None:
        """Carry an operation out through the mount."""
        path = self.root / op["name"]
        match op["do"]:
            case "create":
                os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
            case "mkdir":
                os.mkdir(path, 0o700)
            case "symlink":
                os.symlink(op["target"], path)
            case "unlink":
                os.unlink(path)
            case "rmdir":
                os.rmdir(path)
            case "rename":
                os.rename(path, self.root / op["to"])
            case "exchange":
                exchange(path, self.root / op["to"])
            case "truncate":
                os.truncate(path, op["size"])
            case "chmod":
                os.chmod(path, op["mode"])
            case "setxattr":
                os.setxattr(path, "user.x", payload(op))
            case "msync" | "dirty":
                new = payload(op)
                self.memory[op["offset"] : op["offset"] + len(new)] = new
                if op["do"] == "msync":
                    self.memory.flush()
            case _:
                self.with_descriptor(path, op)

    @staticmethod
    def with_descriptor(path: Path, op: Op) -> None:
        """Writes, punches, and fsync."""
        fd = os.open(path, os.O_RDWR)
        try:
            if op["do"] == "write":
                data = payload(op)
                if os.pwrite(fd, data, op["offset"]) != len(data):  # cut between two requests
                    raise OSError(errno.ENOTCONN, "a part was written")
            elif op["do"] == "punch":
                punch(fd, op["offset"], op["length"])
            if op["do"] == "fsync" or op.get("sync"):
                os.fsync(fd)
        finally:
            os.close(fd)


def exchange(one: Path, other: Path) -> None:
    """renameat2 with RENAME_EXCHANGE."""
    if libc.renameat2(-100, os.fsencode(one), -100, os.fsencode(other), 2):
        raise OSError(ctypes.get_errno(), "renameat2")


def punch(fd: int, offset: int, length: int) -> None:
    """fallocate with PUNCH_HOLE."""
    if libc.fallocate(fd, PUNCH, ctypes.c_long(offset), ctypes.c_long(length)):
        raise OSError(ctypes.get_errno(), "fallocate")


def run_client(root: Path, log: Path, model: Model, seed: str) -> None:
    """Main function of a client process."""
    signal.signal(signal.SIGBUS, signal.SIG_DFL)
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600)
    try:
        client = Client(root, fd)
    except OSError:
        os._exit(0)
    client.work(model, random.Random(seed))


# ---------------------------------------------------------------------- the checker


@dataclass
class Found:
    """What is really there under a name."""

    kind: str
    mode: int
    data: bytes = b""
    xattr: bytes | None = None
    target: str = ""


def by_mount(root: Path) -> dict[str, Found]:
    """A client's directory, through the mount."""
    found = {}
    for entry in os.scandir(root):
        info = entry.stat(follow_symlinks=False)
        mode = info.st_mode & 0o7777
        if entry.is_symlink():
            found[entry.name] = Found("link", 0, target=os.readlink(entry.path))
        elif entry.is_dir():
            found[entry.name] = Found("dir", mode)
        else:
            names = os.listxattr(entry.path)
            value = os.getxattr(entry.path, "user.x") if names else None
            found[entry.name] = Found("file", mode, Path(entry.path).read_bytes(), value)
    return found


def by_core(fs: FileSystem, number: int) -> dict[str, Found]:
    """A client's directory, from the region."""
    found = {}
    for path, ino in walk(fs):
        top, _, name = path.decode()[1:].partition("/")
        if top != f"c{number}" or not name:
            continue
        inode = fs.inode(ino)
        kind = {4: "dir", 8: "file", 10: "link"}[inode.mode >> 12]
        entry = found[name] = Found(kind, inode.mode & 0o7777)
        if kind == "link":
            entry.mode, entry.target = 0, fs.readlink(ino).decode()
        elif kind == "file":
            entry.data = content(fs, ino)
            entry.xattr = fs.getxattr(ino, b"user.x") if fs.listxattr(ino) else None
    return found


def matches(model: Model, found: dict[str, Found]) -> str:
    """Empty, or what is not as the model says."""
    if model.keys() != found.keys():
        return f"names: lost {model.keys() - found.keys()}, new {found.keys() - model.keys()}"
    for name, node in model.items():
        got = found[name]
        if got.kind != node.kind:
            return f"{name}: a {got.kind}, not a {node.kind}"
        if node.kind == "link" and got.target != node.target:
            return f"{name}: another target"
        if node.kind != "link" and got.mode != node.mode:
            return f"{name}: mode {got.mode:o}, not {node.mode:o}"
        if got.xattr != node.xattr:
            return f"{name}: another attribute"
        if node.kind == "file" and (wrong := wrong_bytes(node.versions, got.data)):
            return f"{name}: {wrong}"
    return ""


def wrong_bytes(versions: list[bytes], got: bytes) -> str:
    """Empty, or where a file's bytes come from none of the versions."""
    if got == versions[-1]:
        return ""
    if len(got) not in {len(v) for v in versions}:
        return f"size {len(got)}, not {[len(v) for v in versions]}"
    same = [v for v in versions if len(v) == len(got)]
    for start in range(0, len(got), _STEP):
        if any(v[start : start + _STEP] == got[start : start + _STEP] for v in same):
            continue
        for at in range(start, min(start + _STEP, len(got))):
            if all(v[at] != got[at] for v in same):
                return f"byte {at} of {len(got)} is {got[at]:#x}, not {[hex(v[at]) for v in same]}"
    return ""


def torn(model: Model, op: Op, size: int) -> Model:
    """The model with the bytes of a cut write each old or new.

    A ``size`` that is not that of the old file is that of a write in several requests, cut.
    """
    maybe = {name: node.copy() for name, node in model.items()}
    node = maybe[op["name"]]
    if op["do"] == "write":
        new = patched(node.data, op["offset"], payload(op))
        size = min(max(size, len(node.data)), len(new))
        node.versions = [resized(node.data, size), new[:size]]
    else:
        node.versions.append(patched(node.data, op["offset"], payload(op)))
    return maybe


class Checker:
    """What each client's directory should hold, from its log."""

    def __init__(self, directory: Path, counted: Counter[str], *, one_request: bool) -> None:
        self.directory = directory
        self.one_request = one_request  # a write comes in one request, not page by page
        self.counted = counted
        zeros = Node("file", [bytes(MAPPED_BYTES)], 0o600)
        self.models: list[Model] = [{MAPPED: zeros.copy()} for _ in range(CLIENTS)]
        self.cut: list[Op | None] = [None] * CLIENTS

    def log(self, number: int) -> Path:
        return self.directory / f"log{number}"

    def take_logs(self) -> None:
        """Bring the models to the last acknowledged operation."""
        for number, model in enumerate(self.models):
            self.cut[number] = None
            if not self.log(number).exists():
                continue
            for line in self.log(number).read_bytes().splitlines():
                record = json.loads(line)
                if "do" in record:
                    self.cut[number] = record
                    continue
                op = self.cut[number]
                assert op is not None
                if record:
                    assert record["errno"] in GONE, (
                        f"{os.strerror(record['errno'])}: {self.story(number, op)}"
                    )
                    continue
                apply(model, op)
                self.counted["operations"] += 1
                self.counted["promises of fsync and msync"] += op["do"] in (
                    "fsync", "msync") or bool(op.get("sync"))  # fmt: skip
                self.cut[number] = None

    def story(self, number: int, op: Op | None) -> str:
        """The last operations of a client, for a message."""
        lines = self.log(number).read_text().splitlines()
        done = [line for line in lines if '"do"' in line]
        return f"cut: {op}; before that: {' '.join(done[-9:-1])}"

    def check(self, look: Callable[[int], dict[str, Found]]) -> None:
        """:raises AssertionError: something acknowledged is missing, or something else is there."""
        for number, model in enumerate(self.models):
            found = look(number)
            op = self.cut[number]
            allowed = [model]
            if op is not None:
                after = {name: node.copy() for name, node in model.items()}
                apply(after, op)
                allowed.append(after)
                if op["do"] in ("write", "msync", "dirty") and op["name"] in found:
                    size = len(model[op["name"]].data)
                    if not self.one_request:
                        size = len(found[op["name"]].data)
                    allowed.append(torn(model, op, size))
            reasons = [matches(m, found) for m in allowed]
            assert "" in reasons, f"client {number}: {reasons}; {self.story(number, op)}"
            if op is not None:
                self.counted[
                    "cut operations not done" if not reasons[0] else "cut operations done"
                ] += 1
            self.adopt(allowed[reasons.index("")], number, found)

    def adopt(self, model: Model, number: int, found: dict[str, Found]) -> None:
        """What was open is decided now."""
        for name, node in model.items():
            node.versions = [found[name].data]
        self.models[number] = model


# ---------------------------------------------------------------------- the tests


def kill_round(
    mounted: Mounted,
    checker: Checker,
    rng: random.Random,
    round_: int,
    others: Sequence[Callable[[], object]] = (),
    longest: float = 0.4,
) -> None:
    """Load, SIGKILL at a random moment, and the dead mount taken away.

    ``others`` kill what else is to be killed; the order is a random one. ``longest`` is in seconds.
    """
    context = multiprocessing.get_context("fork")
    clients = []
    for number, model in enumerate(checker.models):
        checker.log(number).unlink(missing_ok=True)
        clients.append(
            context.Process(
                target=run_client,
                args=(
                    mounted.path / f"c{number}",
                    checker.log(number),
                    model,
                    f"{SEED} {round_} {number}",
                ),
                daemon=True,
            )
        )
    for client in clients:
        client.start()
    time.sleep(rng.uniform(0.01, longest))  # the moment of the kill
    kills = [mounted.kill, *others]
    rng.shuffle(kills)
    for kill in kills:
        kill()
        if others:
            time.sleep(rng.uniform(0, 0.005))  # what is left goes on in what is left
    for client in clients:
        client.join(20)
        if client.is_alive():
            client.kill()
            client.join()
            raise AssertionError("a client hangs on a dead mount")
        assert client.exitcode in (0, -signal.SIGBUS), client.exitcode


def check_region(mounted: Mounted, checker: Checker, *, clean: bool) -> None:
    """Recover without a daemon, compare and check."""
    with Region.open(str(mounted.region), write=True) as region:
        fs = mount_filesystem(region)
        checker.check(lambda number: by_core(fs, number))
        check_structure(region)
        if clean or not isinstance(mounted, ForkedPool):
            check_zero_blocks(region)
        rows = fs.segments.table.rows
        if clean:
            fs.unmount()
            check_structure(region)
        else:
            fs.segments.close()
    if isinstance(mounted, MountedPool):
        assert {f"segment-{n}" for n in rows} == {path.name for path in mounted.segments()}


@pytest.mark.slow("daemons are killed for half a minute")
@pytest.mark.crash
@pytest.mark.fuse
@pytest.mark.parametrize("options", ["", "cache=page"])
def test_daemon_killed_under_load(options: str, figures: Counter[str]) -> None:
    rng = random.Random(SEED)
    with Mounted(64 * MIB, options) as mounted:
        for number in range(CLIENTS):
            (mounted.path / f"c{number}").mkdir()
            with open(mounted.path / f"c{number}" / MAPPED, "wb") as f:
                f.write(bytes(MAPPED_BYTES))
                os.fchmod(f.fileno(), 0o600)
        checker = Checker(mounted.directory, figures, one_request=not options)
        for round_ in range(KILLS // 2):
            kill_round(mounted, checker, rng, round_)
            figures["kills of the daemon"] += 1
            checker.take_logs()
            if round_ % 2:
                check_region(mounted, checker, clean=round_ % 4 == 1)
            mounted.start()
            if not round_ % 2:
                checker.check(lambda number: by_mount(mounted.path / f"c{number}"))
        mounted.unmount()
        check_region(mounted, checker, clean=True)


# ---------------------------------------------------------------------- segments

GUEST_BYTES = 4 * MIB
HOLDERS = 3
#: Counts in the first bytes of a file that it maps by name, and logs each number after that.
GUEST = """
import mmap, os, sys, time
path, log = sys.argv[1:]
out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
def mapped():
    fd = os.open(path, os.O_RDWR)
    try:
        return mmap.mmap(fd, os.fstat(fd).st_size)
    finally:
        os.close(fd)
kept = mapped()
n = int.from_bytes(kept[:8], "little")
while True:
    n += 1
    kept[:8] = n.to_bytes(8, "little")
    os.write(out, b"%d\\n" % n)
    if n % 20 == 0:
        try:
            mapped().close()
        except OSError:  # the daemon is gone, or the file
            pass
    time.sleep(0.0005)
"""


class Guest:
    """A program below `pkernfs exec` that has the memory of a file, as a VMM does."""

    def __init__(self, mounted: MountedPool, figures: Counter[str]) -> None:
        self._mounted = mounted
        self._figures = figures
        self._log = mounted.directory / "guest-log"
        self._name = f"PKERNFS_GUEST={mounted.directory.name}"
        self._process: subprocess.Popen[bytes] | None = None
        self.path = mounted.path / "guest"

    def __enter__(self) -> Guest:
        return self

    def __exit__(self, *exc: object) -> None:
        self.kill()

    def is_alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def run(self) -> None:
        """Start it if it is not there, and the file too; wait until it counts."""
        if self.is_alive():
            return
        if not self.path.exists():
            self._mounted.file("guest", GUEST_BYTES)
            assert self.path.read_bytes() == bytes(GUEST_BYTES), "memory of a removed file"
        self._log.unlink(missing_ok=True)
        command = [*self._mounted.program, "exec", "--", *self._command()]
        self._process = subprocess.Popen(
            [sys.executable, *command],
            stdin=subprocess.DEVNULL,
            env=os.environ | dict([self._name.split("=")]),
        )
        wait_until(lambda: self._last() > 0 or not self.is_alive(), "the guest")
        assert self.is_alive()

    def _command(self) -> list[str]:
        """What runs in it."""
        return [sys.executable, "-c", GUEST, str(self.path), str(self._log)]

    def _count(self) -> int:
        """The last number that it has stored."""
        with open(self.path, "rb", buffering=0) as file:
            return int.from_bytes(file.read(8), "little")

    def _last(self) -> int:
        """The last number that it has logged; 0: none."""
        lines = self._log.read_bytes().split(b"\n") if self._log.exists() else []
        return int(lines[-2]) if len(lines) > 1 else 0

    def check(self, *, cut: bool) -> None:
        """:raises AssertionError: the file has lost a store, or can be ``cut``."""
        if not self.path.exists():
            return
        least = self._last()
        found = self._count()
        assert least <= found <= self._last() + 1, "a store is lost"
        if cut and self.is_alive():
            with pytest.raises(OSError, match=os.strerror(errno.EBUSY)):
                os.truncate(self.path, MIB)

    def kill(self) -> None:
        """SIGKILL, if it is there."""
        if self._process is not None:
            self._figures["kills of who maps a segment"] += self.is_alive()
            self._process.kill()
            self._process.wait()

    def kill_supervisors(self) -> None:
        """SIGKILL to what answers its opens; another one is started for it."""
        for pid in HOST.list("proc"):
            comm, environment = (HOST.find(f"proc/{pid}/{name}") for name in ("comm", "environ"))
            if pid.isdigit() and comm == NAME and self._name in (environment or "").split("\0"):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
                    self._figures["kills of a supervisor, or its keeper"] += 1


class Machine(Guest):
    """A guest of QEMU below `pkernfs exec`: it counts in its memory, and says each number."""

    def _command(self) -> list[str]:
        disk = self._mounted.directory / "disk"
        disk.write_bytes(counter.floppy())
        ram = f"memory-backend-file,id=ram,size={GUEST_BYTES},mem-path={self.path},share=on"
        return [
            "qemu-system-x86_64", "-nodefaults", "-display", "none", "-object", ram,
            "-M", "q35,memory-backend=ram", "-m", f"{GUEST_BYTES // MIB}M",
            "-drive", f"if=ide,format=raw,snapshot=on,file={disk}", "-serial", f"file:{self._log}",
        ]  # fmt: skip

    def _last(self) -> int:
        numbers = counter.numbers(self._log.read_text()) if self._log.exists() else []
        return numbers[-1] if numbers else 0

    def _count(self) -> int:
        return count_at(self.path)


class Holder:
    """A file, the process that has it mapped, and whether it still has its name."""

    def __init__(self, mounted: ForkedPool, name: str) -> None:
        self._mounted = mounted
        self._path = mounted.path / name
        self._stamper: Stamper | None = None
        self._pin = -1  # of the memory of a removed file, which counts as nobody's handle

    def run(self, seed: str) -> None:
        """Start the process if it is not there, and make the file if it was removed."""
        if self._stamper is None:
            self._mounted.file(self._path.name, SIZE)
            assert self._path.read_bytes() == bytes(SIZE), "memory of a removed file"
            self._stamper = Stamper(self._mapped(), seed)
        elif not self._stamper.is_alive():
            self._stamper.run(self._mapped(), seed)

    def _mapped(self) -> Path:
        return self._path if is_offered() else native_of(self._path)

    def unlink(self) -> None:
        """Remove the file; the process goes on in memory that nobody can reach by a name."""
        if self._pin < 0:
            self._pin = os.open(native_of(self._path), os.O_PATH)
            self._path.unlink()

    def kill(self) -> None:
        """SIGKILL; nobody has the memory of a removed file after that."""
        if self._stamper is not None:
            self._stamper.kill()
            if self._pin >= 0:
                os.close(self._pin)
                self._pin = -1
                self._stamper = None

    def stopped(self) -> contextlib.AbstractContextManager[None]:
        """Nothing is stored meanwhile."""
        return contextlib.nullcontext() if self._stamper is None else self._stamper.stopped()

    def unlisted(self) -> int:
        """The bytes that it has of the pool, and no file there."""
        return os.fstat(self._pin).st_blocks * 512 if self._pin >= 0 else 0

    def check(self, *, cut: bool) -> None:
        """:raises AssertionError: the file is not as it was stored, or can be ``cut``."""
        if self._stamper is None:
            return
        path = self._path if self._pin < 0 else Path(f"/proc/self/fd/{self._pin}")
        self._stamper.check(path.read_bytes())
        if cut and self._pin < 0 and self._stamper.is_alive():
            with pytest.raises(OSError, match=os.strerror(errno.EBUSY)):
                os.truncate(self._path, MIB)


class Killed:
    """All that maps segments of one mount, and who is killed in a round."""

    def __init__(self, mounted: ForkedPool, guest: Guest, figures: Counter[str]) -> None:
        self._mounted = mounted
        self._figures = figures
        self.guest = guest
        self.holders = [Holder(mounted, f"holder{number}") for number in range(HOLDERS)]

    def run(self, seed: str) -> None:
        """Have all of them."""
        self.guest.run()
        for number, holder in enumerate(self.holders):
            holder.run(f"{seed} {number}")

    def chosen(self, rng: random.Random, *, every: bool) -> list[Callable[[], object]]:
        """What kills those that go in this round. Some files go before that, mapped as they are.

        :param every: all that map files of the mount go
        """
        guest = self.guest
        both: list[Callable[[], object]] = [guest.kill, guest.kill_supervisors]
        kills = [kill for kill in both if rng.random() < 0.3]
        if rng.random() < 0.1:
            guest.path.unlink()
            kills.append(guest.kill)
        for holder in self.holders:
            if rng.random() < 0.2:
                holder.unlink()
            if every or rng.random() < 0.3:
                kills.append(holder.kill)
                self._figures["kills of who maps a segment"] += 1
        return kills

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """No holder stores anything meanwhile."""
        with contextlib.ExitStack() as stack:
            for holder in self.holders:
                stack.enter_context(holder.stopped())
            yield

    def check_space(self, *, exactly: bool) -> None:
        """:raises AssertionError: memory is free that somebody has, or is kept that nobody has.

        The kernel keeps what was open when a daemon was killed, as long as any process maps
        something of that daemon's mount: ``exactly`` is for when there is none.
        """
        listed = sum(path.stat().st_blocks * 512 for path in self._mounted.pool.iterdir())
        had = listed + sum(holder.unlisted() for holder in self.holders)
        assert self._used() >= had
        if exactly:  # killed processes have it for a moment
            wait_until(lambda: self._used() == had, f"no memory but {had} bytes that are known")

    def _used(self) -> int:
        found = os.statvfs(self._mounted.pool)
        return (found.f_blocks - found.f_bfree) * found.f_frsize

    def end(self) -> None:
        """Kill all."""
        self.guest.kill()
        for holder in self.holders:
            holder.kill()


def kill_all(guest_type: type[Guest], rounds: int, figures: Counter[str]) -> None:
    """The daemon, who maps a segment, and the supervisor of its opens, in any order.

    :raises AssertionError: memory that somebody maps went or changed, or some was lost, or some
        stayed that nobody has.
    """
    rng = random.Random(SEED)
    with contextlib.ExitStack() as stack:
        place = stack.enter_context(tmpfs("size=512m"))
        mounted = stack.enter_context(ForkedPool(64 * MIB, place=place))
        guest = stack.enter_context(guest_type(mounted, figures))
        killed = Killed(mounted, guest, figures)
        stack.callback(killed.end)
        for number in range(CLIENTS):
            (mounted.path / f"c{number}").mkdir()
            with open(mounted.path / f"c{number}" / MAPPED, "wb") as f:
                f.write(bytes(MAPPED_BYTES))
                os.fchmod(f.fileno(), 0o600)
        checker = Checker(mounted.directory, figures, one_request=True)
        for round_ in range(rounds):
            killed.run(f"{SEED} {round_}")
            every = round_ % 10 == 9
            kills = killed.chosen(rng, every=every)
            kill_round(mounted, checker, rng, round_, kills, longest=0.1)
            figures["kills with segments"] += 1
            checker.take_logs()
            with killed.stopped():
                if round_ % 2:
                    check_region(mounted, checker, clean=round_ % 4 == 1)
                    killed.check_space(exactly=every)
                mounted.start()
                guest.check(cut=round_ % 4 == 2)
                for holder in killed.holders:
                    holder.check(cut=round_ % 4 == 0)
                if not round_ % 2:
                    checker.check(lambda number: by_mount(mounted.path / f"c{number}"))
        killed.end()
        mounted.unmount()
        check_region(mounted, checker, clean=True)
        killed.check_space(exactly=True)


@pytest.mark.slow("daemons are killed for two minutes")
@pytest.mark.crash
@pytest.mark.fuse
def test_all_killed_under_load_with_segments(figures: Counter[str]) -> None:
    """No memory goes or changes that somebody maps, none is lost, none stays that nobody has."""
    kill_all(Guest, ROUNDS, figures)


@pytest.mark.vm
@pytest.mark.fuse
def test_all_killed_with_a_machine(figures: Counter[str]) -> None:
    """The same, with a guest of QEMU as the one below a supervisor."""
    kill_all(Machine, ROUNDS // 10, figures)


def run_and_kill(work: Callable[[], object], seconds: float) -> bool:
    """Fork ``work`` and kill it; whether it had not ended by itself."""
    pid = os.fork()
    if not pid:
        with contextlib.suppress(BaseException), open(os.devnull, "w") as null:
            os.dup2(null.fileno(), 1)
            os.dup2(null.fileno(), 2)
            work()
        os._exit(0)
    time.sleep(seconds)
    os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


def endlessly(work: Callable[[], object]) -> Callable[[], object]:
    """For what is over too fast to be killed at work."""

    def run() -> None:
        while True:
            work()

    return run


def timed(work: Callable[[], object]) -> float:
    """Seconds that ``work`` takes."""
    start = time.monotonic()
    work()
    return time.monotonic() - start


@pytest.mark.crash
def test_mkfs_killed(tmp_path: Path, figures: Counter[str]) -> None:
    """A killed mkfs leaves no file system, or a whole one; and mkfs again makes one."""
    rng = random.Random(SEED)
    path = tmp_path / "region"
    path.write_bytes(b"\xdb" * 8 * MIB)
    for _ in range(40):
        work = endlessly(lambda: mkfs_main(["-f", str(path)]))
        assert run_and_kill(work, rng.uniform(0.01, 0.06))
        figures["kills of mkfs"] += 1
        with Region.open(str(path), write=True) as region:
            try:
                fs = mount_filesystem(region)
            except (FormatError, CorruptionError):
                figures["without a file system after that"] += 1
                continue
            assert list(snapshot(fs)) == [b"/", b"/iommu"]
            fs.unmount()
            fsck.check(region, repair=True)  # perhaps the first superblock is not there yet
            check_structure(region)
    assert mkfs_main(["-f", str(path)]) == 0
    assert fsck_main([str(path)]) == 0


def populate(fs: FileSystem) -> None:
    """Some files in some directories."""
    for d in range(4):
        directory = fs.mkdir(ROOT_INO, b"d%d" % d, 0o755, 0, 0).ino
        for i in range(40):
            ino = fs.create(directory, b"f%d" % i, 0o100644, 0, 0).ino
            fs.write(ino, 0, b"%d" % i * 3000)


@pytest.mark.crash
def test_fsck_killed(tmp_path: Path, figures: Counter[str]) -> None:
    """A killed fsck -y: another one ends what it began, and nothing is lost."""
    rng = random.Random(SEED)
    image = formatted(16 * MIB, populate)
    path = tmp_path / "region"
    path.write_bytes(image)
    with Region.open(str(path), write=True) as region:
        before = snapshot(mount_filesystem(region, read_only=True))
    for number in range(40):
        path.write_bytes(image)
        with Region.open(str(path), write=True) as region:
            # What can be rebuilt: the free space, the state, a superblock.
            for page in (FIRST_MAP_PAGE, STATE_PAGE, 0, 1024)[: 1 + number % 4]:
                at = RegionOff(page * PAGE + rng.randrange(64, PAGE))
                region.copy_in(at, bytes([region.read(at, 1)[0] ^ 1 << rng.randrange(8)]))
        damaged = path.read_bytes()
        if not number:
            seconds = timed(lambda: fsck_main(["-y", str(path)]))
            path.write_bytes(damaged)
        run_and_kill(lambda: fsck_main(["-y", str(path)]), rng.uniform(0.0, seconds * 1.1))
        figures["kills of fsck"] += 1
        assert fsck_main(["-y", str(path)]) in (0, 1)
        assert fsck_main([str(path)]) == 0
        with Region.open(str(path), write=True) as region:
            fs = mount_filesystem(region)
            assert snapshot(fs) == before
            fs.unmount()
            check_structure(region)
