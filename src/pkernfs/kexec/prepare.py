"""All that is decided before a kexec: what devices need, which mounts are handed over, the plan.

Daemons are asked and files of the host are read; nothing is changed.
"""

from __future__ import annotations

from dataclasses import dataclass

from pkernfs.control.mounts import FSTYPE, Mount, read_mounts
from pkernfs.errors import InvalidError, PkernfsError
from pkernfs.host.sysroot import HOST, Host
from pkernfs.kexec import loaded, systemd
from pkernfs.kexec.daemon import Daemon
from pkernfs.kexec.needs import MountNeeds, Needs
from pkernfs.kexec.next_kernel import find_kernel
from pkernfs.kexec.plan import Plan, make_plan


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
    """

    plan: Plan
    mount_points: list[str]
    with_devices: list[str]
    force: bool = False


def prepare(request: Request, host: Host = HOST) -> Prepared:
    """Decide on a kexec. Problems that can be forced are in the plan: :func:`refuse_problems`.

    :raises NotFoundError: no such kernel.
    :raises RegionError: the next kernel would take a region for its own memory.
    :raises InvalidError: no kernel can meet the needs of all devices.
    :raises PkernfsError: a daemon cannot be asked.
    """
    find_kernel(request.kernel, request.initrd, host)
    mounts = [m for m in read_mounts() if m.fstype == FSTYPE]
    mount_needs = MountNeeds(mounts, {} if request.orderly else ask(mounts))
    needs = mount_needs.whole()
    for mount in mounts:
        if mount_needs.has_devices(mount) and not loaded.physical_spans(mount.source, host):
            raise InvalidError(
                f"kexec: {mount.source}: gone with this kernel, but devices depend on its tables: "
                "a region is needed that is SIZE!START or device-dax (--orderly stops the devices)"
            )
    points = [m.mount_point for m in mounts]
    if not needs.devices:
        points = [p for p in points if not systemd.hands_over(p, host)]
    plan = make_plan(
        [span for m in mounts for span in loaded.physical_spans(m.source, host)],
        points,
        kernel=request.kernel,
        initrd=request.initrd,
        append=request.append,
        needs=needs,
        force=request.force,
        host=host,
    )
    plan.obstacles[:0] = [
        loaded.ends_message(m.source) for m in mounts if loaded.ends_with_kernel(m.source, host)
    ]
    with_devices = [point for point, n in mount_needs.needs.items() if n.devices]
    return Prepared(plan, points, with_devices, request.force)


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
