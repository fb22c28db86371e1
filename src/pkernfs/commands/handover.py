"""``pkernfs handover``: the step before a kexec.

The daemon freezes the file system and writes the record; the checks and digests in between are made
here, on this process's own mapping of the region, so that a fault in them cannot hurt the daemon
and its requests are served meanwhile. When this process ends early, the file system thaws.
"""

from __future__ import annotations

import argparse
import base64
import ctypes
import json
import os
import sys
import time
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pkernfs.commands.progress import Progress
from pkernfs.control import client
from pkernfs.control.mounts import Mount
from pkernfs.errors import BusyError, CorruptionError, NoSpaceError, PkernfsError, RegionError
from pkernfs.kexec import loaded
from pkernfs.options import format_size

if TYPE_CHECKING:
    from pkernfs.fs.fsck import Survey
    from pkernfs.region.digest import Part
    from pkernfs.region.region import Region

_PIECE = 512 << 10  # of the list, in one request
_SHOWN = 8


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``pkernfs handover``."""
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--digest",
        action="store_true",
        help="also take digests of the data of all files, at the speed of memory; the next mount "
        "compares them.",
    )
    what.add_argument(
        "--abort", action="store_true", help="undo a handover; the mount accepts changes again."
    )
    parser.add_argument(
        "--cmdline",
        metavar="TEXT",
        help="the next kernel's command line, if no kernel is loaded for kexec or its command line "
        "cannot be read. It must reserve the region as the running kernel's does.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON.")
    parser.add_argument("mnt", metavar="MNT", help="the mount point of the file system.")


@dataclass
class Outcome:
    """What ``--json`` prints; durations in seconds."""

    number: int = 0
    inodes: int = 0
    metadata_pages: int = 0
    digest_bytes: int = 0
    digest_seconds: float = 0.0
    check_seconds: float = 0.0
    seconds: float = 0.0


def run(args: argparse.Namespace) -> int:
    """Hand over, or undo it."""
    if args.abort:
        client.call(args.mnt, "handover_abort")
        if args.json:
            print(json.dumps({"aborted": True}))
        else:
            print(f"{args.mnt}: thawed: there is no handover any more")
        return 0
    outcome = hand_over(args.mnt, args.digest, args.cmdline)
    if args.json:
        print(json.dumps(outcome.__dict__, indent=2))
    else:
        _print(args.mnt, outcome)
    return 0


def _print(mnt: str, outcome: Outcome) -> None:
    print(
        f"{mnt}: handed over (number {outcome.number}) in {outcome.seconds * 1e3:.0f} ms: "
        f"{outcome.inodes} inodes, {outcome.metadata_pages} pages of metadata checked"
    )
    if outcome.digest_bytes:
        rate = int(outcome.digest_bytes / max(outcome.digest_seconds, 1e-9))
        print(
            f"{mnt}: digests of {format_size(outcome.digest_bytes)} in "
            f"{outcome.digest_seconds:.2f} s ({format_size(rate)}/s)"
        )
    print(f"{mnt}: every change is refused now; kexec, or pkernfs handover --abort {mnt}")


def hand_over(mnt: str, digests: bool, command_line: str | None = None) -> Outcome:
    """Freeze, check, record.

    :raises KexecError: the next kernel would take the region for ordinary memory.
    :raises BusyError: files are open for writing, or it was handed over already.
    :raises CorruptionError: the check found something wrong; the file system is thawed.
    """
    from pkernfs.fs import fsck, manifest  # noqa: F401 - loaded before anything is frozen

    start = time.monotonic()
    mount = client.find_mount(mnt)
    loaded.check(mount.source, command_line)
    write_back(mount.mount_point)
    outcome = Outcome()
    lease = client.stream(mnt, "handover_freeze")
    try:
        frozen = next(lease)
        if "writers" in frozen:
            raise _busy(mnt, mount, {int(ino) for ino in frozen["writers"]})
        _check_and_record(mnt, mount, frozen, digests, outcome)
        for _ in lease:  # its end: the daemon has let go
            pass
    finally:
        lease.close()
    outcome.seconds = time.monotonic() - start
    return outcome


def write_back(mount_point: str) -> None:
    """Have the kernel send what mappings have written, as far as it has it.

    :raises PkernfsError: some of it could not be written.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    fd = os.open(mount_point, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if libc.syncfs(fd):
            reason = os.strerror(ctypes.get_errno())
            raise PkernfsError(f"{mount_point}: cannot write back: {reason}")
    finally:
        os.close(fd)


def _check_and_record(
    mnt: str, mount: Mount, frozen: dict[str, Any], digests: bool, outcome: Outcome
) -> None:
    from pkernfs.fs.fsck import survey
    from pkernfs.fs.manifest import FileDigests, build_list, room_for_list
    from pkernfs.layout import HANDOVER_FLAG_DIGESTS, STATE_PAGE
    from pkernfs.region.region import Region

    with Region.open(mount.source, write=False, lock=False) as region:
        start = time.monotonic()
        with Progress(f"{mnt}: checking") as progress:
            found = survey(region, progress=progress)
        if found.uuid.hex() != frozen["uuid"]:
            raise RegionError(f"{mount.source}: not the region that is mounted on {mnt}")
        _refuse_damage(mnt, found)
        outcome.check_seconds = time.monotonic() - start
        outcome.inodes = found.report.summary["inodes"]
        files: list[FileDigests] = []
        if digests:
            start = time.monotonic()
            _warn_of_mappings(mount)
            files = take_digests(mnt, region, found, outcome)
            outcome.digest_seconds = time.monotonic() - start
        pages = set(found.metadata_pages())
        outcome.metadata_pages = len(pages)
        number = frozen["number"]
        data = build_list(region, found.uuid, number, pages, files)
        room = room_for_list(len(data))
        try:
            made = client.call(mnt, "handover_make_list", bytes=room)
        except NoSpaceError:
            _warn(f"{mnt}: no space for the list: the next mount cannot compare")
            outcome.number = client.call(mnt, "handover_commit", ino=0, digest=0, flags=0)
            return
        pages = (pages | set(made["pages"])) - {STATE_PAGE}
        data = build_list(region, found.uuid, number, pages, files)
        data += bytes(room - len(data))
    _send_list(mnt, made["ino"], data)
    from pkernfs.region.digest import crc64

    outcome.number = client.call(
        mnt,
        "handover_commit",
        ino=made["ino"],
        digest=crc64(data),
        flags=HANDOVER_FLAG_DIGESTS if digests else 0,
    )


def _send_list(mnt: str, ino: int, data: bytes) -> None:
    for at in range(0, len(data), _PIECE):
        piece = base64.b64encode(data[at : at + _PIECE]).decode()
        client.call(mnt, "handover_write_list", ino=ino, offset=at, data=piece)


def _refuse_damage(mnt: str, found: Survey) -> None:
    problems = found.report.problems
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise CorruptionError(
            f"{mnt}: not handed over: {problems[0].message}{more}: unmount it and run fsck.pkernfs"
        )


# ---------------------------------------------------------------------- digests


def take_digests(mnt: str, region: Region, found: Survey, outcome: Outcome) -> list[Any]:
    """Digests of all files, by all cores."""
    from pkernfs.fs.manifest import FileDigests, chunks_of
    from pkernfs.region.digest import digest_all

    files: list[FileDigests] = []
    todo: list[tuple[list[tuple[int, int, int]], FileDigests]] = []
    total = 0
    for ino, extents in found.files():
        files.append(FileDigests(ino, {}))
        todo.append((extents, files[-1]))
        total += sum(length for _, length, _ in extents)
    where: list[dict[int, int]] = []
    numbers: array[int] = array("Q")

    def chunks() -> Iterator[list[Part]]:
        for extents, file in todo:
            for number, parts in chunks_of(region, extents):
                where.append(file.chunks)
                numbers.append(number)
                yield parts

    with Progress(f"{mnt}: digests") as progress:

        def tell(done: int) -> None:
            outcome.digest_bytes += done
            progress(outcome.digest_bytes, total)

        results = digest_all(region, chunks(), tell=tell)
    for digests, number, result in zip(where, numbers, results, strict=True):
        digests[number] = result
    return files


def _warn_of_mappings(mount: Mount) -> None:
    """Somebody who maps the region itself can change files after their digests were taken."""
    try:
        region = os.stat(mount.source)
    except OSError:
        return  # an address, not a path: /dev/mem tells nothing about ranges here
    device = f"{os.major(region.st_dev):02x}:{os.minor(region.st_dev):02x}"
    for pid in _processes():
        if pid == os.getpid():
            continue
        for line in _lines(f"/proc/{pid}/maps"):
            fields = line.split(None, 5)
            if fields[3] == device and int(fields[4]) == region.st_ino and fields[1][1] == "w":
                if _is_daemon(pid, mount):
                    break
                _warn(
                    f"{mount.mount_point}: {_name(pid)} maps the region itself: what it changes "
                    "from now on differs from the digests"
                )
                break


def _is_daemon(pid: int, mount: Mount) -> bool:
    return bool(client.call(mount.mount_point, "ping")["pid"] == pid)


# ---------------------------------------------------------------------- who is in the way


def _busy(mnt: str, mount: Mount, inos: set[int]) -> BusyError:
    who = list(users_of(mount, inos))
    if not who:
        where = ", ".join(f"inode {ino}" for ino in sorted(inos)[:_SHOWN])
        who = [f"{where} by a process that cannot be seen from here"]
    more = f" and {len(who) - _SHOWN} more" if len(who) > _SHOWN else ""
    return BusyError(f"{mnt}: open for writing: {'; '.join(who[:_SHOWN])}{more}")


def users_of(mount: Mount, inos: set[int]) -> Iterator[str]:
    """Who has inodes of a mount open for writing or mapped: ``PATH by PID (COMMAND)``.

    No file is looked at, only what /proc tells of it: some other file system may not answer.
    """
    number = f"{os.major(mount.device):02x}:{os.minor(mount.device):02x}"
    ids: dict[str, set[str]] = {}
    for pid in _processes():
        opened = _open_files(pid, _mount_ids(pid, mount, ids), inos)
        for path in dict.fromkeys([*opened, *_mapped(pid, number, inos)]):
            yield f"{path} by {_name(pid)}"
    yield from _loop_devices(mount)


def _mount_ids(pid: int, mount: Mount, known: dict[str, set[str]]) -> set[str]:
    """Numbers of the mounts of this file system that a process sees; by mount namespace."""
    try:
        namespace = os.readlink(f"/proc/{pid}/ns/mnt")
    except OSError:
        return set()
    if namespace not in known:
        device = f"{os.major(mount.device)}:{os.minor(mount.device)}"
        fields = [line.split(" ", 3) for line in _lines(f"/proc/{pid}/mountinfo")]
        known[namespace] = {field[0] for field in fields if field[2] == device}
    return known[namespace]


def _open_files(pid: int, mounts: set[str], inos: set[int]) -> Iterator[str]:
    directory = f"/proc/{pid}/fdinfo"
    try:
        names = os.listdir(directory) if mounts else []
    except OSError:
        return
    for name in names:
        told = dict(line.split(None, 1) for line in _lines(f"{directory}/{name}") if ":\t" in line)
        try:
            if told["mnt_id:"].strip() not in mounts or int(told["ino:"]) not in inos:
                continue
            if int(told["flags:"], 8) & os.O_ACCMODE:
                yield os.readlink(f"/proc/{pid}/fd/{name}")
        except (OSError, KeyError, ValueError):
            continue


def _mapped(pid: int, number: str, inos: set[int]) -> Iterator[str]:
    for line in _lines(f"/proc/{pid}/maps"):
        fields = line.rstrip("\n").split(None, 5)
        if len(fields) == 6 and fields[3] == number and int(fields[4]) in inos:
            yield fields[5]


def _loop_devices(mount: Mount) -> Iterator[str]:
    try:
        names = [name for name in os.listdir("/sys/block") if name.startswith("loop")]
    except OSError:
        return
    for name in names:
        for line in _lines(f"/sys/block/{name}/loop/backing_file"):
            if line.startswith(mount.mount_point + "/"):
                yield f"{line.strip()} by /dev/{name}"


def _processes() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _name(pid: int) -> str:
    command = next(iter(_lines(f"/proc/{pid}/comm")), "?").strip()
    return f"process {pid} ({command})"


def _lines(path: str) -> list[str]:
    """The lines of a file in /proc; none if it has gone or is not for us."""
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            return file.readlines()
    except OSError:
        return []


def _warn(message: str) -> None:
    print(f"pkernfs: {message}", file=sys.stderr)
