"""``pkernfs kexec``: load the next kernel, hand over every file system, start it."""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys

from pkernfs import kexec, loaded
from pkernfs.backing.host import HOST
from pkernfs.commands.handover import hand_over
from pkernfs.control import call
from pkernfs.errors import NotFoundError, PkernfsError
from pkernfs.mounts import FSTYPE, read_mounts

_UNLOAD = ["kexec", "-u"]


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``pkernfs kexec``."""
    parser.add_argument("--kernel", metavar="K", help="the kernel; the running one's file if not.")
    parser.add_argument("--initrd", metavar="I", help="its initrd.")
    parser.add_argument(
        "--append",
        metavar="A",
        help="its command line; the running one's if not given. The memmap= and pkernfs= "
        "parameters of the running kernel are added if they are missing.",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the commands, and change nothing."
    )


def run(args: argparse.Namespace) -> int:
    """Check, load, hand over and start. Returns only if that failed, or with --dry-run."""
    mounts = [m for m in read_mounts() if m.fstype == FSTYPE]
    ours = [m.mount_point for m in mounts if not handed_over_by_systemd(m.mount_point)]
    plan = kexec.make_plan(
        [span for m in mounts for span in loaded.physical_spans(m.source)],
        ours,
        kernel=args.kernel,
        initrd=args.initrd,
        append=args.append,
    )
    for word in plan.added:
        print(f"pkernfs: added to the command line: {word}", file=sys.stderr)
    if args.dry_run:
        for words in plan.commands:
            print(shlex.join(words))
        return 0
    _carry_out(plan, ours)
    return 0


def handed_over_by_systemd(mount_point: str) -> bool:
    """Whether a unit hands this file system over at ``systemctl kexec``."""
    if not os.path.isdir(HOST.path("run/systemd/system")):
        return False
    escaped = subprocess.run(
        ["systemd-escape", "-p", mount_point], capture_output=True, text=True, check=False
    ).stdout.strip()
    unit = f"pkernfs-handover@{escaped}.service"
    return subprocess.run(["systemctl", "is-active", "-q", unit], check=False).returncode == 0


def _carry_out(plan: kexec.Plan, mount_points: list[str]) -> None:
    load, *_, start = plan.commands
    if shutil.which(load[0]) is None:
        raise NotFoundError("kexec: not found: apt install kexec-tools")
    _run(load)
    handed: list[str] = []
    try:
        for point in mount_points:
            hand_over(point, digests=False)
            handed.append(point)
        _run(start)
    except BaseException:
        for point in handed:
            call(point, "handover_abort")
        subprocess.run(_UNLOAD, check=False, capture_output=True)
        raise


def _run(words: list[str]) -> None:
    """:raises PkernfsError: the program fails; with what it has said."""
    done = subprocess.run(words, check=False, capture_output=True, text=True)
    if done.returncode:
        said = " ".join((done.stderr or done.stdout).split())
        raise PkernfsError(f"{shlex.join(words[:3])}: failed with {done.returncode}: {said}")
