"""``pkernfs kexec``: load the next kernel, hand over every file system, start the kernel.

An orderly kexec stops devices. If devices depend on tables of a mounted file system, a panic
starts the next kernel instead; it stops no device (docs/dma.md).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import NamedTuple, NoReturn

from pkernfs.commands.handover import hand_over
from pkernfs.control.client import call
from pkernfs.control.mounts import FSTYPE, Mount, read_mounts
from pkernfs.errors import InvalidError, NotFoundError, PkernfsError
from pkernfs.host.sysroot import HOST
from pkernfs.kexec import loaded
from pkernfs.kexec.crash import Needs
from pkernfs.kexec.plan import JUMP, Plan, find_kernel, make_plan

_ENDING = (signal.SIGTERM, signal.SIGHUP)
_ALL_ENDING = (*_ENDING, signal.SIGINT)


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``pkernfs kexec``."""
    parser.add_argument(
        "--kernel", metavar="K", help="the kernel to load; the running one's file if not given."
    )
    parser.add_argument(
        "--initrd",
        metavar="I",
        help="its initrd; the running kernel's if neither is given.",
    )
    parser.add_argument(
        "--append",
        metavar="A",
        help="its command line; the running one's if not given. pkernfs adds the memmap= and "
        "pkernfs= parameters of the running kernel that it lacks.",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the commands; change nothing."
    )
    parser.add_argument(
        "--orderly",
        action="store_true",
        help="stop the devices that depend on the tables, and do an orderly kexec.",
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="go on although the next kernel is not suitable; print why it is not.",
    )


class Standing(NamedTuple):
    """The mounts, and what the devices that depend on each need, by mount point."""

    mounts: list[Mount]
    needs: dict[str, Needs]

    def needs_memory_of(self, mount: Mount) -> bool:
        """Whether devices depend on a mount's region."""
        needs = self.needs.get(mount.mount_point)
        return needs is not None and bool(needs.devices)

    def whole(self) -> Needs:
        """What all of them need.

        :raises InvalidError: they cannot all have it.
        """
        kept = [n for n in self.needs.values() if n.devices]
        walked: dict[str, str] = {}
        for point, needs in self.needs.items():
            for unit in needs.units:
                other = walked.setdefault(unit, point)
                if other != point:
                    raise InvalidError(
                        f"kexec: {unit}: it can walk the tables of one file system, but devices "
                        f"of {other} and of {point} are below it: attach them all in one, or "
                        "detach those of the other"
                    )
        if len({n.scalable for n in kept}) > 1:
            raise InvalidError(
                "kexec: tables of legacy and of scalable mode: no kernel adopts both"
            )
        return Needs(
            [d for n in kept for d in n.devices],
            [d for n in self.needs.values() for d in n.cut],
            any(n.scalable for n in kept),
            list(walked),
        )


def run(args: argparse.Namespace) -> int:
    """Check, load, hand over and start. Returns only if that failed, or with --dry-run."""
    find_kernel(args.kernel, args.initrd, HOST)
    mounts = [m for m in read_mounts() if m.fstype == FSTYPE]
    standing = Standing(mounts, {} if args.orderly else _ask(mounts))
    needs = standing.whole()
    for mount in mounts:
        if standing.needs_memory_of(mount) and not loaded.physical_spans(mount.source):
            raise InvalidError(
                f"kexec: {mount.source}: gone with this kernel, but devices depend on its tables: "
                "a region is needed that is SIZE!START or device-dax (--orderly stops the devices)"
            )
    points = [m.mount_point for m in mounts]
    if not needs.devices:
        points = [p for p in points if not handed_over_by_systemd(p)]
    plan = make_plan(
        [span for m in mounts for span in loaded.physical_spans(m.source)],
        points,
        kernel=args.kernel,
        initrd=args.initrd,
        append=args.append,
        needs=needs,
    )
    _tell(plan, forced=args.force)
    if args.dry_run:
        for words in plan.commands:
            print(shlex.join(words))
        if plan.crash:
            print(JUMP)
        return 0
    replaced = plan.crash and HOST.find("sys/kernel/kexec_crash_loaded") == "1"
    _run(plan.commands[0])
    with _ended_by_exception(), _undone_if_it_fails(plan, replaced=replaced) as handed:
        for point in points:
            _hand_over(point, plan, handed)
        if plan.crash:
            _jump([p for p, n in standing.needs.items() if n.devices])
        _run(plan.commands[-1])
    return 0


def _ask(mounts: list[Mount]) -> dict[str, Needs]:
    found = {}
    for mount in mounts:
        told = call(mount.mount_point, "kexec_needs")
        found[mount.mount_point] = Needs(
            told["devices"], told["cut"], told["scalable"], told["units"]
        )
    return found


def _tell(plan: Plan, *, forced: bool) -> None:
    """Say what is added and what is lost.

    :raises PkernfsError: there are problems.
    """
    if plan.problems and not forced:
        raise PkernfsError(
            f"kexec: {'; '.join(plan.problems)} (--orderly stops the devices, --force goes on)"
        )
    for text in plan.problems:
        _say(f"forced, although: {text}")
    for word in plan.added:
        _say(f"added to the command line: {word}")
    for text in plan.losses:
        _say(f"lost with this kernel: {text}")


def _say(text: str) -> None:
    print(f"pkernfs: {text}", file=sys.stderr)


def handed_over_by_systemd(mount_point: str) -> bool:
    """Whether a unit hands this file system over at ``systemctl kexec``."""
    if not os.path.isdir(HOST.path("run/systemd/system")):
        return False
    escaped = subprocess.run(
        ["systemd-escape", "-p", mount_point], capture_output=True, text=True, check=False
    ).stdout.strip()
    unit = f"pkernfs-handover@{escaped}.service"
    return subprocess.run(["systemctl", "is-active", "-q", unit], check=False).returncode == 0


def _hand_over(point: str, plan: Plan, handed: list[str]) -> None:
    try:
        hand_over(point, False, plan.append if plan.crash else None)
    except PkernfsError:
        raise  # and it is not handed over
    except BaseException:
        handed.append(point)  # it may be
        raise
    handed.append(point)


@contextlib.contextmanager
def _undone_if_it_fails(plan: Plan, *, replaced: bool) -> Iterator[list[str]]:
    """Gives a list for the mount points that are handed over.

    :param replaced: another kernel was loaded for a panic before.
    """
    handed: list[str] = []
    try:
        yield handed
    except BaseException:
        for point in handed:
            _undo(point, "handover_abort")
        unload = ["kexec", "-p", "-u"] if plan.crash else ["kexec", "-u"]
        subprocess.run(unload, check=False, capture_output=True)
        if replaced:
            _say("the kernel that was loaded for a panic before is gone: load it again")
        raise


def _undo(point: str, operation: str) -> None:
    """Have a daemon undo something. If it does not, that is said: there may be others to ask."""
    try:
        call(point, operation)
    except PkernfsError as e:
        _say(f"{point}: not undone: {e}")


@contextlib.contextmanager
def _ended_by_exception() -> Iterator[None]:
    """A signal that ends this process, as a terminal does that goes away, has things undone."""

    def end(number: int, _frame: object) -> NoReturn:
        raise SystemExit(128 + number)

    before = {n: signal.signal(n, end) for n in _ENDING if signal.getsignal(n) is signal.SIG_DFL}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _held() -> Iterator[None]:
    """Signals that end this process do so afterwards only.

    By handlers, not by a mask: a signal to the process goes to any thread of it that takes it.
    """
    came: list[int] = []
    kept = (None, signal.SIG_IGN)
    before = {
        n: signal.signal(n, lambda number, _frame: came.append(number))
        for n in _ALL_ENDING
        if signal.getsignal(n) not in kept
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if came:
            raise SystemExit(128 + came[0])


def _jump(mount_points: list[str]) -> None:
    """Have the daemons switch the units, and the last one start the next kernel."""
    os.sync()
    switched: list[str] = []
    # Nothing between two units: one that was switched has cut the kernel's own devices off.
    with _held():
        try:
            for point in mount_points:
                call(point, "kexec_jump", panic=point == mount_points[-1])
                switched.append(point)
        except BaseException:
            for point in switched:
                _undo(point, "kexec_undo")
            raise


def _run(words: list[str]) -> None:
    """:raises PkernfsError: the program fails; with what it has said."""
    if shutil.which(words[0]) is None:
        raise NotFoundError(f"{words[0]}: not found: apt install kexec-tools")
    done = subprocess.run(words, check=False, capture_output=True, text=True)
    if done.returncode:
        said = " ".join((done.stderr or done.stdout).split())
        raise PkernfsError(f"{shlex.join(words[:3])}: failed with {done.returncode}: {said}")
