"""All that is decided before a kexec: what devices need, which mounts are handed over, the plan.

Daemons are asked and files of the host are read; nothing is changed.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from pkernfs.control.mounts import FSTYPE, Mount, read_mounts
from pkernfs.control.sockets import Server, servers
from pkernfs.errors import InvalidError, PkernfsError, RegionError
from pkernfs.host import cmdline, reserved
from pkernfs.host.iomem import Span
from pkernfs.host.sysroot import HOST, Host
from pkernfs.kexec import systemd
from pkernfs.kexec.daemon import Daemon
from pkernfs.kexec.needs import MountNeeds, Needs
from pkernfs.kexec.next_kernel import find_kernel
from pkernfs.kexec.plan import Plan, make_plan
from pkernfs.kexec.spans import (
    ends_message,
    ends_with_kernel,
    kept_spans,
    physical_spans,
    spans_of,
)
from pkernfs.kexec.users import Process


@dataclass(frozen=True)
class Request:
    """The kexec that somebody asks for; None stands for the running kernel's own.

    :ivar orderly: stop devices, although they depend on tables
    :ivar force: go on where something may be lost
    """

    kernel: str | None = None
    initrd: str | None = None
    append: str | None = None
    orderly: bool = False
    force: bool = False


@dataclass(frozen=True)
class Prepared:
    """A kexec that is decided.

    :ivar mount_points: of the file systems to hand over, in their order
    :ivar with_devices: of those with devices that must go on
    :ivar force: hand over regions that may be lost
    :ivar by_systemd: the file systems that units hand over
    """

    plan: Plan
    mount_points: list[str]
    with_devices: list[str]
    force: bool = False
    by_systemd: list[Mount] = field(default_factory=list)


def prepare(request: Request, host: Host = HOST) -> Prepared:
    """Decide on a kexec. Problems that can be forced are in the plan: :func:`refuse_problems`.

    :raises NotFoundError: no such kernel.
    :raises RegionError: the next kernel would take a region for its own memory.
    :raises InvalidError: no kernel can meet the needs of all devices.
    :raises PkernfsError: a daemon cannot be asked.
    """
    find_kernel(request.kernel, request.initrd, host)
    serving = list(servers(host))  # before the mounts: one that is made meanwhile is among these
    mounts = [m for m in read_mounts() if m.fstype == FSTYPE]
    elsewhere = list(served_elsewhere(serving, mounts, host))
    mount_needs = MountNeeds(mounts, {} if request.orderly else ask(mounts))
    needs = mount_needs.whole()
    for mount in mounts:
        if mount_needs.has_devices(mount) and not physical_spans(mount.source, host):
            raise InvalidError(
                f"kexec: {mount.source}: gone with this kernel, but devices depend on its tables: "
                "a region is needed that is SIZE!START or device-dax (--orderly stops the devices)"
            )
    by_systemd = []
    if not needs.devices:  # systemd has no part in a panic
        by_systemd = [m for m in mounts if systemd.hands_over(m.mount_point, host)]
    points = [m.mount_point for m in mounts if m not in by_systemd]
    sources = [m.source for m in mounts] + [e.source for e in elsewhere if e.source is not None]
    spans = [s for source in sources for s in kept_spans(source, host)]
    spans += [s for s in _spans_of_named(host) if s not in spans]
    plan = make_plan(
        spans,
        points,
        kernel=request.kernel,
        initrd=request.initrd,
        append=request.append,
        needs=needs,
        force=request.force,
        host=host,
    )
    plan.obstacles[:0] = [
        *(ends_message(m.source) for m in mounts if ends_with_kernel(m.source, host)),
        *(one.message for one in elsewhere),
    ]
    with_devices = [point for point, n in mount_needs.needs.items() if n.devices]
    return Prepared(plan, points, with_devices, request.force, by_systemd)


def _spans_of_named(host: Host) -> list[Span]:
    """Return what is kept apart of the regions that pkernfs= names; they need not be mounted."""
    try:
        named = cmdline.named_regions(host.command_line())
    except RegionError:
        return []  # `none` is no region of this kernel
    there = [one.spec for one in named if spans_of(one.spec, host)]
    spans = [s for spec in there for s in kept_spans(spec, host)]
    return [Span(k.start, k.end - k.start) for k in reserved.find_kept(spans, host)]


class Elsewhere(NamedTuple):
    """A file system that is mounted in other mount namespaces only; ``source`` if it is seen."""

    source: str | None
    message: str


def served_elsewhere(serving: list[Server], mounts: list[Mount], host: Host) -> Iterator[Elsewhere]:
    """Yield the file systems that daemons serve and that are in none of these mounts.

    They cannot be handed over from here: a handover opens the mount.
    """
    here = {m.device for m in mounts}
    for server in serving:
        if server.device in here:
            continue
        if not server.pid:
            who = "a daemon that is not seen from here"
        else:
            who = str(Process(server.pid, host.find(f"proc/{server.pid}/comm") or "?"))
        mount = _mount_of(server, host)
        if mount is None:
            yield Elsewhere(
                None,
                f"{server.path}: {who} serves a file system that is not mounted here, and is not "
                "handed over: umount it where it is mounted",
            )
        else:
            yield Elsewhere(
                mount.source,
                f"{mount.source}: mounted on {mount.mount_point} in the mount namespace of {who}, "
                f"and not here: it is not handed over: nsenter -t {server.pid} -m umount "
                f"{shlex.quote(mount.mount_point)}",
            )


def _mount_of(server: Server, host: Host) -> Mount | None:
    """Return the mount as the daemon itself sees it; None: it sees none."""
    try:
        found = read_mounts(host.path(f"proc/{server.pid}/mountinfo"))
    except OSError:
        return None
    return next((m for m in found if m.device == server.device and m.fstype == FSTYPE), None)


def ask(mounts: list[Mount]) -> dict[str, Needs]:
    """Ask the daemon of each mount for the needs of its devices; by mount point."""
    return {m.mount_point: Daemon(m.mount_point).needs() for m in mounts}


def refuse_problems(plan: Plan) -> None:
    """Refuse a plan that should not be carried out.

    :raises PkernfsError: with the problems.
    """
    remedies = ["--orderly stops the devices"] if plan.problems and not plan.obstacles else []
    if plan.problems or plan.obstacles:
        raise PkernfsError(
            f"kexec: {'; '.join([*plan.obstacles, *plan.problems])} "
            f"({', '.join([*remedies, '--force goes on'])})"
        )
