"""The plan of a kexec that loses no region: the kernel's files, its command line, the commands.

Nothing is loaded and nothing is started here. :mod:`pkernfs.kexec.crash` has what is special where
devices go on working meanwhile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from pkernfs.errors import RegionError
from pkernfs.host import cmdline, iomem, kernel_image, kmem, memmap, reserved
from pkernfs.host.iomem import Span
from pkernfs.host.memmap import Entry, Kaslr, Kind, Rules
from pkernfs.host.reserved import By, Kept
from pkernfs.host.sysroot import HOST, Host
from pkernfs.kexec import crash
from pkernfs.kexec.needs import Needs
from pkernfs.kexec.next_kernel import config_of, find_kernel, lacks
from pkernfs.region.physical import memmap_parameter

#: Words that a boot loader, or the kernel for a crash kernel, adds for the one that it starts.
_ADDED_BY_LOADERS = ("BOOT_IMAGE=", "initrd=", "initrdmem=", "elfcorehdr=")
_KEPT = ("memmap", "pkernfs")
_FREE = (Kind.REMOVED, Kind.RESERVED, Kind.SOFT, Kind.PMEM)
_MAX_COMMAND_LINE = 2047  # COMMAND_LINE_SIZE of x86, without its end
#: How the next kernel is started, as ``pkernfs kexec --dry-run`` has it behind its commands.
CRASH_JUMP = (
    "# then units that the kernel drives get the region's root table, and it panics on processor 0 "
    "(echo c > /proc/sysrq-trigger)"
)


@dataclass
class Plan:
    """The steps of ``pkernfs kexec``; commands are lists of words.

    :ivar crash: by a panic, for devices that must not be stopped
    :ivar problems: why it should not be done, by devices: an orderly kexec has none of these
    :ivar obstacles: why it should not be done, in either way
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
    obstacles: list[str] = field(default_factory=list)
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
    force: bool = False,
    host: Host = HOST,
) -> Plan:
    """Plan a kexec that keeps physical memory.

    :param spans: the physical memory of the regions, mounted or not; those mounted come first.
    :param mount_points: of all file systems that are to be handed over.
    :param append: the next kernel's command line; None: the running one's.
    :param needs: of the devices that must go on; None, or no devices: an orderly kexec.
    :param force: what could be refused is an obstacle of the plan.
    :raises NotFoundError: no such kernel.
    :raises RegionError: the next kernel would take a region for its own memory.
    """
    files = find_kernel(kernel, initrd, host)
    running = host.command_line()
    line = append if append is not None else without_boot_loader(running)
    plan = Plan(files.kernel, files.initrd, line)
    plan.obstacles += [files.doubt] if files.doubt else []
    kept = reserved.find_kept(spans, host)
    if append is not None:
        _keep_parameters(plan, running, kept)
    if needs is not None and needs.devices:
        _for_devices(plan, spans, mount_points, append or "", needs, host)
    rules = memmap.rules_for(files.release)
    config = config_of(files, host)
    firmware = [] if plan.crash else reserved.firmware_map(host)
    _keep_apart(plan, kept, firmware, rules, host)
    _keep_kmem_away(plan, kept, config, host)
    plan.obstacles += lacks(files, config, kept, host)
    try:
        _check_plan(plan, kept, firmware, rules)
    except RegionError as e:
        if not force:
            raise
        plan.obstacles.append(str(e))
    _check_length(plan.append, crash.ROOM_FOR_HEADER if plan.crash else 0)
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


def _check_plan(
    plan: Plan, kept: list[Kept], firmware: list[Entry] | None, rules: tuple[Rules, ...]
) -> None:
    """Have the next kernel not place itself into a region, and refuse one that would take it.

    :raises RegionError: it would.
    """
    words = [one for one in kept if one.by is not By.FIRMWARE]  # all else is no RAM to kaslr.c
    _keep_out_of(plan, [Span(one.start, one.end - one.start) for one in words], rules)
    check_command_line(
        plan.append,
        [Span(one.start, one.end - one.start) for one in kept],
        rules=rules,
        firmware=firmware,
    )


def without_boot_loader(line: str) -> str:
    """Return a command line without what was added for the running kernel alone."""
    return " ".join(w for w in cmdline.quoted_words(line) if not w.startswith(_ADDED_BY_LOADERS))


def _keep_parameters(plan: Plan, running: str, kept: list[Kept]) -> None:
    """Add the parameters of the running kernel that keep regions, and are missing."""
    present = set(cmdline.words(plan.append))
    keeping = set([] if cmdline.spares_dax(plan.append) else cmdline.spares_dax(running))
    keeping.update(one.word for one in kept if one.by is By.WORD)  # mem= as well
    for word in cmdline.words(running):
        if word not in present and (word.partition("=")[0] in _KEPT or word in keeping):
            plan.added.append(word)
    plan.append = cmdline.with_words(plan.append, plan.added)


def _keep_apart(
    plan: Plan,
    kept: list[Kept],
    firmware: list[Entry] | None,
    rules: tuple[Rules, ...],
    host: Host,
) -> None:
    """Add what keeps a range that no parameter of the running kernel does, or not in this way."""
    for one in kept:
        word = reserved.word_in_crash_kernel(one, host) if plan.crash else one.word
        if word and reserved.lost_by(plan.append, [one], firmware, rules):
            _add(plan, word)


def _keep_kmem_away(
    plan: Plan, kept: list[Kept], config: kernel_image.Config | None, host: Host
) -> None:
    """Keep soft-reserved memory from the module kmem, whatever does it in this kernel."""
    if not any(one.kind is Kind.SOFT for one in kept):
        return
    if cmdline.hides_dax(plan.append):
        plan.obstacles.append(
            f"the next kernel would have no dax device: its command line has "
            f"{cmdline.hides_dax(plan.append)}"
        )
    if kmem.is_kept_away_by(plan.append, config):
        return
    others = kmem.devices_of(host)
    if others:
        plan.obstacles.append(
            f"nothing keeps the module kmem from dax devices of the next kernel, and {others[0]} "
            f"is its: bind it to kmem by hand, and give --append {kmem.word_for(config)}"
        )
        return
    _add(plan, kmem.word_for(config))


def _add(plan: Plan, word: str) -> None:
    plan.append = cmdline.with_words(plan.append, [word])
    plan.added.append(word)


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


def check_command_line(
    line: str,
    spans: list[Span],
    rules: tuple[Rules, ...] = memmap.KNOWN,
    firmware: Sequence[Entry] | None = None,
) -> None:
    """Refuse a command line with which a kernel would not leave the regions alone, or not boot.

    :param rules: that the kernel may follow.
    :param firmware: the memory map that it is given; None: RAM where the regions are.
    :raises RegionError: it would take a part of one for its own memory; with the parameter.
    """
    _check_length(line)
    for one in rules:
        why = memmap.stops_boot(line, one)
        if why is not None:
            raise RegionError(f"command line: the next kernel would stop at boot: {why}")
        for span in spans:
            _check_reserved(line, span, one, firmware)


def _check_length(line: str, room: int = 0) -> None:
    """:param room: bytes that are going to be added."""
    if len(line.encode("utf-8", "surrogateescape")) > _MAX_COMMAND_LINE - room:
        raise RegionError(
            f"command line: too long: got {len(line)} bytes, "
            f"expected up to {_MAX_COMMAND_LINE - room}: leave something out (--append)"
        )


def _check_reserved(line: str, span: Span, rules: Rules, firmware: Sequence[Entry] | None) -> None:
    for piece in memmap.coverage(line, span.start, span.end, rules, firmware):
        changed = piece.reservation is not None and piece.kind not in _FREE
        if piece.kind is Kind.RAM or changed:
            raise RegionError(
                f"{span}: the next kernel would take {piece.start:#x}-{piece.end - 1:#x} for "
                f"{piece.kind.value}: its command line needs {memmap_parameter(span)}"
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
