"""How to start the next kernel without losing regions: its files, its command line, the steps.

Planning only: nothing is loaded and nothing is started here.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from pkernfs.backing import cmdline, iomem
from pkernfs.backing.cmdline import Kind
from pkernfs.backing.host import HOST, Host
from pkernfs.backing.iomem import Span
from pkernfs.errors import NotFoundError, RegionError

#: Words that a boot loader adds for the kernel that it has started itself.
_BOOT_LOADER = ("BOOT_IMAGE=", "initrd=")
_KEPT = ("memmap", "pkernfs")
_FREE = (Kind.REMOVED, Kind.RESERVED, Kind.SOFT, Kind.PMEM)
_MAX_COMMAND_LINE = 2047  # COMMAND_LINE_SIZE of x86, without its end


@dataclass
class Plan:
    """What ``pkernfs kexec`` is going to do; ``commands`` in their order, as words."""

    kernel: str
    initrd: str | None
    append: str
    added: list[str] = field(default_factory=list)
    commands: list[list[str]] = field(default_factory=list)


def make_plan(
    spans: list[Span],
    mount_points: list[str],
    *,
    kernel: str | None = None,
    initrd: str | None = None,
    append: str | None = None,
    host: Host = HOST,
) -> Plan:
    """Plan an orderly kexec that keeps physical memory.

    :param spans: the physical memory of the regions that are mounted.
    :param mount_points: of all file systems that are to be handed over.
    :param append: the next kernel's command line; None: the running one's.
    :raises NotFoundError: no such kernel.
    :raises RegionError: the next kernel would take a region for its own memory.
    """
    kernel_path, initrd_path = find_kernel(kernel, initrd, host)
    running = host.command_line()
    line = append if append is not None else without_boot_loader(running)
    plan = Plan(kernel_path, initrd_path, line)
    if append is not None:
        _keep_parameters(plan, running)
    _keep_out_of(plan, spans)
    check_command_line(plan.append, spans)
    plan.commands.append(load_command(plan))
    plan.commands += [["pkernfs", "handover", point] for point in mount_points]
    plan.commands.append(_start(host))
    return plan


def find_kernel(kernel: str | None, initrd: str | None, host: Host) -> tuple[str, str | None]:
    """Paths of the kernel and its initrd; those of the running kernel if they are not given.

    :raises NotFoundError: there is none there.
    """
    release = host.find("proc/sys/kernel/osrelease") or ""
    if kernel is None:
        kernel = f"/boot/vmlinuz-{release}"
        if initrd is None and os.path.exists(host.path(f"boot/initrd.img-{release}")):
            initrd = f"/boot/initrd.img-{release}"
    for path in (kernel, initrd):
        if path is not None and not os.path.isfile(host.path(path.lstrip("/"))):
            raise NotFoundError(f"{path}: no such file: name one with --kernel and --initrd")
    return kernel, initrd


def without_boot_loader(line: str) -> str:
    """A command line without what the boot loader has put there for itself."""
    return " ".join(w for w in cmdline.quoted_words(line) if not w.startswith(_BOOT_LOADER))


def _keep_parameters(plan: Plan, running: str) -> None:
    """Add the parameters of the running kernel that keep regions, and are missing."""
    present = set(cmdline.words(plan.append))
    spares_dax = [] if cmdline.spares_dax(plan.append) else cmdline.spares_dax(running)
    for word in cmdline.words(running):
        if word not in present and (word.partition("=")[0] in _KEPT or word in spares_dax):
            plan.added.append(word)
    plan.append = " ".join([plan.append, *plan.added]).strip()


def _keep_out_of(plan: Plan, spans: list[Span]) -> None:
    """Have the next kernel not place itself into a region."""
    if spans and cmdline.kaslr_danger(plan.append) is not None:
        plan.append += " nokaslr"
        plan.added.append("nokaslr")


def check_command_line(line: str, spans: list[Span]) -> None:
    """Whether a kernel with this command line leaves the regions alone.

    :raises RegionError: it would take a part of one for its own memory; with the parameter.
    """
    if len(line) > _MAX_COMMAND_LINE:
        raise RegionError(
            f"command line: too long: got {len(line)} bytes, expected up to {_MAX_COMMAND_LINE}"
        )
    reserved = cmdline.reservations(line)
    for span in spans:
        pieces = cmdline.coverage(reserved, span.start, span.end)
        for start, end, holder in pieces:
            if holder is None or holder.kind not in _FREE:
                raise RegionError(
                    f"{span}: the next kernel would take {start:#x}-{end - 1:#x} for ordinary "
                    f"memory: its command line needs {iomem.memmap_parameter(span)}"
                )


def load_command(plan: Plan) -> list[str]:
    """The words that load the next kernel."""
    # kexec_file_load (-s): kexec-tools itself would take its memory map from the firmware's.
    words = ["kexec", "-s", "-l", plan.kernel]
    if plan.initrd is not None:
        words.append(f"--initrd={plan.initrd}")
    return [*words, f"--command-line={plan.append}"]


def _start(host: Host) -> list[str]:
    if os.path.isdir(host.path("run/systemd/system")):
        return ["systemctl", "kexec"]
    return ["kexec", "-e"]
