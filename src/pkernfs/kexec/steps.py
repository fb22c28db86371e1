"""A kexec that was prepared: load the next kernel, hand over, start it; undo what was done if not.

An orderly kexec stops devices. If devices depend on tables of a mounted file system, the next
kernel is started by a panic instead, which stops none (docs/dma.md).
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pkernfs.errors import NotFoundError, PkernfsError
from pkernfs.host.sysroot import HOST, Host
from pkernfs.kexec import loaded, systemd
from pkernfs.kexec.daemon import Daemon
from pkernfs.kexec.handover import hand_over_mount
from pkernfs.kexec.observer import SILENT, Observer
from pkernfs.kexec.plan import Plan
from pkernfs.kexec.prepare import Prepared
from pkernfs.kexec.signals import ended_by_exception, held
from pkernfs.kexec.spans import KexecError


def load(plan: Plan, host: Host = HOST) -> bool:
    """Load the next kernel; tell whether another one was loaded for a panic before.

    :raises PkernfsError: kexec(8) fails.
    """
    replaced = plan.crash and host.find("sys/kernel/kexec_crash_loaded") == "1"
    _run(plan.load)
    return replaced


def hand_over_and_start(
    prepared: Prepared,
    observer: Observer = SILENT,
    *,
    replaced: bool = False,
    host: Host = HOST,
) -> None:
    """Hand over every file system, and start the kernel that is loaded.

    Returns if an orderly start has begun (systemd goes on with it). If it fails, handovers are
    undone and the kernel is unloaded.

    :param replaced: as :func:`load` told.
    :raises PkernfsError: a handover or the start fails.
    :raises EndedBySignal: a signal asked this process to end.
    """
    plan = prepared.plan
    with ended_by_exception(), _undone_if_it_fails(plan, observer, replaced=replaced) as handed:
        _check_for_units(prepared, host)
        for point in prepared.mount_points:
            _hand_over(point, prepared, observer, handed)
        if plan.crash:
            _start_by_panic(prepared.with_devices, observer)
        else:
            _run(plan.start)


def _check_for_units(prepared: Prepared, host: Host) -> None:
    """Refuse the loaded kernel if systemd's units would: they do after all else was stopped.

    :raises KexecError: one would, whatever this command was told (``--initrd none``, ``--force``).
    """
    for mount in prepared.by_systemd:
        try:
            loaded.check(mount.source, host=host)
        except KexecError as e:
            if not systemd.is_told_of_kernel(mount.mount_point, host):
                file = systemd.options_file(mount.mount_point)
                raise KexecError(
                    f"{e}; systemd's unit would refuse that, unless {file} has HANDOVER=--force"
                ) from None


def _hand_over(point: str, prepared: Prepared, observer: Observer, handed: list[str]) -> None:
    plan = prepared.plan
    line = plan.append if plan.crash else None
    try:
        hand_over_mount(
            point,
            command_line=line,
            force=prepared.force,
            needs_initrd=plan.initrd is not None,  # it was decided that there is none
            observer=observer,
        )
    except PkernfsError:
        raise  # and it is not handed over
    except BaseException:
        handed.append(point)  # it may be
        raise
    handed.append(point)


@contextmanager
def _undone_if_it_fails(plan: Plan, observer: Observer, *, replaced: bool) -> Iterator[list[str]]:
    """Give a list for the mount points that are handed over."""
    handed: list[str] = []
    try:
        yield handed
    except BaseException:
        for point in handed:
            _undo(point, Daemon(point).abort, observer)
        unload = ["kexec", "-p", "-u"] if plan.crash else ["kexec", "-u"]
        subprocess.run(unload, check=False, capture_output=True)
        if replaced:
            observer.say("the kernel that was loaded for a panic before is gone: load it again")
        raise


def _undo(point: str, operation: Callable[[], object], observer: Observer) -> None:
    """Have a daemon undo something. If it does not, that is said: there may be others to ask."""
    try:
        operation()
    except PkernfsError as e:
        observer.say(f"{point}: not undone: {e}")


def _start_by_panic(mount_points: list[str], observer: Observer) -> None:
    """Have the daemons switch the units, and the last one start the next kernel.

    :raises PkernfsError: the machine goes on, and units are as they were.
    """
    os.sync()
    switched: list[str] = []
    # Nothing between two units: one that was switched has cut the kernel's own devices off.
    with held():
        try:
            for point in mount_points:
                Daemon(point).crash_jump(panic=point == mount_points[-1])
                switched.append(point)
            raise PkernfsError("kexec: the machine goes on: it has not panicked")
        except BaseException:
            for point in switched:
                _undo(point, Daemon(point).undo_crash_jump, observer)
            raise


def _run(words: list[str]) -> None:
    """:raises PkernfsError: the program fails; with what it has said."""
    if shutil.which(words[0]) is None:
        remedy = ": apt install kexec-tools" if words[0] == "kexec" else ""
        raise NotFoundError(f"{words[0]}: not found{remedy}")
    done = subprocess.run(words, check=False, capture_output=True, text=True)
    if done.returncode:
        said = " ".join((done.stderr or done.stdout).split())
        raise PkernfsError(f"{shlex.join(words[:3])}: failed with {done.returncode}: {said}")
