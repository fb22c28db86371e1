"""The plan of a kexec that loses no region: the kernel's files, its command line, the commands.

Nothing is loaded and nothing is started here. :mod:`pkernfs.kexec.crash` has what is special where
devices go on working meanwhile.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import NamedTuple

from pkernfs.errors import NotFoundError, RegionError
from pkernfs.host import cmdline, iomem, kernel_image, memmap
from pkernfs.host.iomem import Span
from pkernfs.host.memmap import Kaslr, Kind, Rules
from pkernfs.host.sysroot import HOST, Host
from pkernfs.kexec import crash
from pkernfs.kexec.needs import Needs
from pkernfs.region.physical import memmap_parameter

#: Words that a boot loader, or the kernel for a crash kernel, adds for the one that it starts.
_ADDED_BY_LOADERS = ("BOOT_IMAGE=", "initrd=", "elfcorehdr=")
_KEPT = ("memmap", "pkernfs")
_FREE = (Kind.REMOVED, Kind.RESERVED, Kind.SOFT, Kind.PMEM)
_MAX_COMMAND_LINE = 2047  # COMMAND_LINE_SIZE of x86, without its end
#: How the next kernel is started, as ``pkernfs kexec --dry-run`` has it behind its commands.
CRASH_JUMP = (
    "# then units that the kernel drives get the region's root table, and it panics on processor 0 "
    "(echo c > /proc/sysrq-trigger)"
)


class KernelFiles(NamedTuple):
    """Absolute paths of a kernel and its initrd, if it has one."""

    kernel: str
    initrd: str | None


@dataclass
class Plan:
    """The steps of ``pkernfs kexec``; commands are lists of words.

    :ivar crash: by a panic, for devices that must not be stopped
    :ivar problems: why it should not be done
    :ivar losses: what does not outlive the running kernel, beside its processes
    :ivar load: loads the next kernel, before anything is handed over
    :ivar handovers: are what is done for each file system
    :ivar start: starts the next kernel; empty where a panic does
    """

    kernel: str
    initrd: str | None
    append: str
    crash: bool = False
    added: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    losses: list[str] = field(default_factory=list)
    load: list[str] = field(default_factory=list)
    handovers: list[list[str]] = field(default_factory=list)
    start: list[str] = field(default_factory=list)

    @property
    def commands(self) -> list[list[str]]:
        """All commands, in their order."""
        return [self.load, *self.handovers, *([self.start] if self.start else [])]


def make_plan(
    spans: list[Span],
    mount_points: list[str],
    *,
    kernel: str | None = None,
    initrd: str | None = None,
    append: str | None = None,
    needs: Needs | None = None,
    host: Host = HOST,
) -> Plan:
    """Plan a kexec that keeps physical memory.

    :param spans: the physical memory of the regions that are mounted.
    :param mount_points: of all file systems that are to be handed over.
    :param append: the next kernel's command line; None: the running one's.
    :param needs: of the devices that must go on; None, or no devices: an orderly kexec.
    :raises NotFoundError: no such kernel.
    :raises RegionError: the next kernel would take a region for its own memory.
    """
    kernel_path, initrd_path = find_kernel(kernel, initrd, host)
    running = host.command_line()
    line = append if append is not None else without_boot_loader(running)
    plan = Plan(kernel_path, initrd_path, line)
    if append is not None:
        _keep_parameters(plan, running, spans)
    if needs is not None and needs.devices:
        _for_devices(plan, spans, mount_points, append or "", needs, host)
    rules = memmap.rules_for(kernel_image.release_of(host, plan.kernel))
    reserved = _reserved(spans, running)
    _keep_out_of(plan, reserved, rules)
    room = crash.ROOM_FOR_HEADER if plan.crash else 0
    check_command_line(plan.append, reserved, room, rules)
    plan.load = load_command(plan)
    told = ["--cmdline", plan.append] if plan.crash else []
    plan.handovers = [["pkernfs", "handover", point, *told] for point in mount_points]
    if not plan.crash:
        plan.start = _start_command(host)
    return plan


def _for_devices(
    plan: Plan, spans: list[Span], mount_points: list[str], given: str, needs: Needs, host: Host
) -> None:
    """Turn the plan into one that leaves devices alone."""
    plan.crash = True
    memory = crash.memory_parameter(iomem.read_iomem("pkernfs kexec", host), spans)
    header = crash.no_dump(spans)
    plan.append = crash.for_crash(plan.append, memory, header)
    plan.added += [memory, header, crash.AWAKE]
    if not cmdline.values(given, "intel_iommu"):
        plan.append, added = crash.with_iommu(plan.append, scalable=needs.scalable)
        plan.added.append(added)
    blocked, problems = crash.keep_drivers_away(host, plan.kernel, needs.devices)
    if blocked:
        plan.append, added = crash.without_modules(plan.append, blocked)
        plan.added.append(added)
    plan.problems += crash.host_problems(host)
    plan.problems += crash.adoption_problems(host, plan.kernel, plan.append, needs)
    plan.problems += problems
    plan.losses += crash.losses(host, needs, mount_points)


def find_kernel(kernel: str | None, initrd: str | None, host: Host) -> KernelFiles:
    """Return paths of the kernel and its initrd; the running kernel's if they are not given.

    :raises NotFoundError: there is none there.
    """
    release = host.find("proc/sys/kernel/osrelease") or ""
    hint = ""
    if kernel is None:
        hint = ": name one with --kernel and --initrd"
        kernel = f"/boot/vmlinuz-{release}"
        if initrd is None and os.path.exists(host.path(f"boot/initrd.img-{release}")):
            initrd = f"/boot/initrd.img-{release}"
    kernel, initrd = os.path.abspath(kernel), None if initrd is None else os.path.abspath(initrd)
    for path in (kernel, initrd):
        if path is not None and not os.path.isfile(host.path(path.lstrip("/"))):
            raise NotFoundError(f"{path}: no such file{hint}")
    return KernelFiles(kernel, initrd)


def without_boot_loader(line: str) -> str:
    """Return a command line without what was added for the running kernel alone."""
    return " ".join(w for w in cmdline.quoted_words(line) if not w.startswith(_ADDED_BY_LOADERS))


def _keep_parameters(plan: Plan, running: str, spans: list[Span]) -> None:
    """Add the parameters of the running kernel that keep regions, and are missing."""
    present = set(cmdline.words(plan.append))
    keeping = set([] if cmdline.spares_dax(plan.append) else cmdline.spares_dax(running))
    for span in spans:
        pieces = memmap.coverage(running, span.start, span.end)
        keeping.update(p.reservation.parameter for p in pieces if p.reservation)  # mem= as well
    for word in cmdline.words(running):
        if word not in present and (word.partition("=")[0] in _KEPT or word in keeping):
            plan.added.append(word)
    plan.append = cmdline.with_words(plan.append, plan.added)


def _keep_out_of(plan: Plan, spans: list[Span], rules: tuple[Rules, ...]) -> None:
    """Have the next kernel not place itself into a region.

    :raises RegionError: it would even with ``nokaslr``.
    """
    if _not_avoided(plan.append, spans, rules) is None:
        return
    plan.append = cmdline.with_words(plan.append, ["nokaslr"])
    plan.added.append("nokaslr")
    why = _not_avoided(plan.append, spans, rules)
    if why is not None:
        raise RegionError(
            f"{why}; and nokaslr does not count where the command line has it: "
            "put it first (--append)"
        )


def _not_avoided(line: str, spans: list[Span], rules: tuple[Rules, ...]) -> str | None:
    """Say where KASLR may put the next kernel into a region; None: nowhere."""
    for span in spans:
        verdict = memmap.kaslr(line, span.start, span.end, rules)
        if verdict.kaslr is Kaslr.NOT_AVOIDED:
            return f"{span}: the next kernel may put itself into it ({verdict.why})"
    return None


def _reserved(spans: list[Span], running: str) -> list[Span]:
    """Return what memmap= keeps apart of them now.

    The firmware does it for a dax device of its own.
    """
    return [
        Span(start, end - start)
        for span in spans
        for start, end, reservation in memmap.coverage(running, span.start, span.end)
        if reservation is not None
    ]


def check_command_line(
    line: str, spans: list[Span], room: int = 0, rules: tuple[Rules, ...] = memmap.KNOWN
) -> None:
    """Refuse a command line with which a kernel would not leave the regions alone, or not boot.

    :param room: bytes that are going to be added.
    :param rules: that the kernel may follow.
    :raises RegionError: it would take a part of one for its own memory; with the parameter.
    """
    if len(line) > _MAX_COMMAND_LINE - room:
        raise RegionError(
            f"command line: too long: got {len(line)} bytes, "
            f"expected up to {_MAX_COMMAND_LINE - room}: leave something out (--append)"
        )
    for one in rules:
        why = memmap.stops_boot(line, one)
        if why is not None:
            raise RegionError(f"command line: the next kernel would stop at boot: {why}")
        for span in spans:
            _check_reserved(line, span, one)


def _check_reserved(line: str, span: Span, rules: Rules) -> None:
    for start, end, reservation in memmap.coverage(line, span.start, span.end, rules):
        if reservation is None or reservation.kind not in _FREE:
            raise RegionError(
                f"{span}: the next kernel would take {start:#x}-{end - 1:#x} for ordinary "
                f"memory: its command line needs {memmap_parameter(span)}"
            )


def load_command(plan: Plan) -> list[str]:
    """Return the words that load the next kernel."""
    # kexec_file_load (-s): kexec-tools itself would take its memory map from the firmware's.
    words = ["kexec", "-s", "-p" if plan.crash else "-l", plan.kernel]
    if plan.initrd is not None:
        words.append(f"--initrd={plan.initrd}")
    return [*words, f"--command-line={plan.append}"]


def _start_command(host: Host) -> list[str]:
    return ["systemctl", "kexec"] if host.has_systemd() else ["kexec", "-e"]
