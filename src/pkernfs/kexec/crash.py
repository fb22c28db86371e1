"""The kexec that leaves devices at work: a kdump kernel, which gets all of the old one's memory.

An orderly kexec ends bus mastering and translation. A panic ends neither, and a kernel that was
started by one, which it knows from ``elfcorehdr=``, adopts the root and context tables that are in
force (Linux, drivers/iommu/intel/iommu.c: init_dmars(), copy_translation_tables()). Planning only:
nothing is loaded and nothing is started here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from pkernfs.errors import NotFoundError, RegionError
from pkernfs.host import cmdline, kernel_image, memmap, pci
from pkernfs.host.iomem import Resource, Span
from pkernfs.host.mount_table import own_mounts
from pkernfs.host.sysroot import Host
from pkernfs.iommu.memory import merge_ranges, without_ranges
from pkernfs.kexec.needs import Needs
from pkernfs.layout import PAGE
from pkernfs.quantities import PhysAddr, PhysRange

#: What the running kernel puts in front: ``elfcorehdr=0x...`` and a space.
ROOM_FOR_HEADER = 32
#: ``-OLD`` where ``+NEW`` is behind it; a number may be hexadecimal.
_OLD_TYPE = re.compile(r"(%[^-+]*)-[^-+]*(\+.*)")
#: vfio-pci puts a device that is bound, for one by vfio-pci.ids=, and not open to sleep otherwise.
AWAKE = "vfio_pci.disable_idle_d3=1"
_NEVER = ("elfcorehdr", "reset_devices", "vfio_pci.disable_idle_d3")


class Rewritten(NamedTuple):
    """A command line that was changed, and the parameter that was added."""

    line: str
    added: str


class DriverCheck(NamedTuple):
    """Modules that the next kernel must not load, and problems that remain."""

    blocked: list[str]
    problems: list[str]


# ---------------------------------------------------------------------- the command line


def memory_parameter(resources: Sequence[Resource], spans: Sequence[Span]) -> str:
    """Return the memmap= that gives a crash kernel the running kernel's memory.

    With what is reserved for the crash kernel: it has that anyway, but for the header of a dump.
    Without what the firmware keeps for itself in the middle of memory.

    :raises RegionError: /proc/iomem shows no memory, or shows a region as memory.
    """
    # The kernel has boot parameters in pieces of their own: merged, no page is lost to them.
    memory = merge_ranges(PhysRange(r.start, r.end) for r in resources if r.name == "System RAM")
    holes = merge_ranges(PhysRange(r.start, r.end) for r in resources if r.name == "Reserved")
    ranges = list(_whole_pages(without_ranges(memory, holes)))
    if not ranges:
        raise RegionError("/proc/iomem: no System RAM: there is nothing to give the next kernel")
    for span in spans:
        if any(start < span.end and span.start < end for start, end in ranges):
            raise RegionError(f"{span}: /proc/iomem has it as System RAM")
    return "memmap=" + ",".join(f"{end - start:#x}@{start:#x}" for start, end in ranges)


def _whole_pages(ranges: Sequence[PhysRange]) -> Iterator[PhysRange]:
    for start, end in ranges:
        low, high = -(-start // PAGE) * PAGE, end // PAGE * PAGE
        if low < high:
            yield PhysRange(PhysAddr(low), PhysAddr(high))


def no_dump(spans: Sequence[Span]) -> str:
    """Return an elfcorehdr= that makes a kdump kernel, and one that finds nothing to dump.

    The old kernel's memory is in use, so /proc/vmcore must not be there: the kernel would warn of
    each piece that it looks at, and a distribution's kdump service save it and reboot. The last
    elfcorehdr= counts; at the begin of a region there is memory that is not RAM, and no ELF header.
    """
    return f"elfcorehdr={spans[0].start:#x}"


def for_crash(line: str, memory: str, header: str) -> str:
    """Return a command line for the crash kernel: with ``memory``, and nothing of an older one.

    The firmware's map is not what such a kernel starts from, so memory that is to get another type
    has none there before: ``-1`` (from RAM), or any other old type, would match nothing.
    """
    kept = []
    for word in cmdline.quoted_words(line):
        name, _, value = word.replace('"', "").partition("=")
        if name.replace("-", "_") in _NEVER:
            continue
        if name == "memmap":
            parts = [_OLD_TYPE.sub(r"\1\2", part) for part in value.split(",")]
            parts = [part for part in parts if not _gives_memory(part)]
            if not parts:
                continue
            word = "memmap=" + ",".join(parts)
        kept.append(word)
    return cmdline.with_words(" ".join(kept), [memory, header, AWAKE])


def _gives_memory(part: str) -> bool:
    change = memmap.parse_memmap_one(part).change
    return change is not None and change.new == memmap.RAM


def without_modules(line: str, names: Sequence[str]) -> Rewritten:
    """Have the kernel load none of these modules.

    Of several ``module_blacklist=`` only the last one counts.
    """
    before = [n for v in cmdline.values(line, "module_blacklist") for n in v.split(",")]
    kept = [w for w in cmdline.quoted_words(line) if not w.startswith("module_blacklist=")]
    wanted = f"module_blacklist={','.join(dict.fromkeys([*before, *names]))}"
    return Rewritten(cmdline.with_words(" ".join(kept), [wanted]), wanted)


def with_iommu(line: str, *, scalable: bool) -> Rewritten:
    """Have the kernel drive the units in the tables' own mode."""
    wanted = "intel_iommu=on," + ("sm_on" if scalable else "sm_off")
    kept = [w for w in cmdline.quoted_words(line) if not w.startswith("intel_iommu=")]
    return Rewritten(cmdline.with_words(" ".join(kept), [wanted]), wanted)


# ---------------------------------------------------------------------- will it adopt


def host_problems(host: Host) -> Iterator[str]:
    """Yield the reasons why this kernel cannot start another one by a panic."""
    if not int(host.find("sys/kernel/kexec_crash_size") or 0):
        yield "no memory is reserved for a crash kernel: boot with crashkernel=256M"
    if host.find("proc/sys/kernel/kexec_load_disabled") == "1":
        yield "kexec is disabled until the next boot (kernel.kexec_load_disabled)"
    if not os.path.exists(host.path("proc/sysrq-trigger")):
        yield "no /proc/sysrq-trigger: a kernel with CONFIG_MAGIC_SYSRQ is needed"


def adoption_problems(host: Host, image: str, line: str, needs: Needs) -> Iterator[str]:
    """Yield the reasons why the kernel ``image`` with that command line adopts no tables."""
    release = kernel_image.release_of(host, image)
    config = None if release is None else kernel_image.config_of(host, release, image)
    if config is None:
        yield (
            f"{image}: cannot see its configuration ({release or 'not a bzImage'}): it may not "
            "adopt the tables: put its config beside it"
        )
    else:
        for option, why in (
            ("INTEL_IOMMU", "it does not drive the units"),
            ("CRASH_DUMP", "it does not know that it was started by a panic"),
        ):
            if option not in config:
                yield f"{image}: no CONFIG_{option}: {why}"
    yield from _mode_problems(line, config or {}, needs)


def _mode_problems(line: str, config: kernel_image.Config, needs: Needs) -> Iterator[str]:
    options = [o for value in cmdline.values(line, "intel_iommu") for o in value.split(",")]
    if any("off" in value.split(",") for value in cmdline.values(line, "iommu")):
        yield "the next kernel's command line has iommu=off: it would end translation"
    on = "INTEL_IOMMU_DEFAULT_ON" in config
    for option in options:
        on = {"on": True, "off": False}.get(option, on)
    if not on:
        yield "the next kernel would not drive the units: it needs intel_iommu=on"
        return
    scalable = "INTEL_IOMMU_SCALABLE_MODE_DEFAULT_ON" in config
    for option in options:
        scalable = {"sm_on": True, "sm_off": False}.get(option, scalable)
    if scalable != needs.scalable:
        has, wants = ("scalable", "sm_on") if needs.scalable else ("legacy", "sm_off")
        yield (
            f"the tables are of {has} mode, and the next kernel would use the other one and drop "
            f"them: it needs intel_iommu=on,{wants}"
        )


def keep_drivers_away(host: Host, image: str, devices: Sequence[str]) -> DriverCheck:
    """Find the modules that the next kernel must not load, for they would reset a device.

    :raises NotFoundError: there is no such device.
    """
    release = kernel_image.release_of(host, image) or ""
    blocked: dict[str, str] = {}
    problems = []
    for device in devices:
        modalias = pci.modalias_of(host, device)
        if modalias is None:
            raise NotFoundError(f"device {device}: there is none")
        found = kernel_image.claiming_modules(host, release, image, modalias)
        if found is None:
            problems.append(
                f"{image}: cannot see which of its drivers takes {device} and resets it"
            )
        for module, built_in in (found or {}).items():
            if built_in:
                problems.append(
                    f"{image}: has {module} built in, which takes {device} and resets it"
                )
            else:
                blocked[module] = device
    problems += _also_needed(host, blocked, devices)
    return DriverCheck(sorted(blocked), problems)


def _also_needed(host: Host, blocked: dict[str, str], devices: Sequence[str]) -> Iterator[str]:
    """Yield drivers that would reset a device, and that another one cannot do without."""
    normal = {m.replace("-", "_") for m in blocked}
    for other in host.list(pci.DEVICES):
        name = None if other in devices else pci.driver_module_of(host, other)
        if name is not None and name.replace("-", "_") in normal:
            yield (
                f"driver {name} is kept from the next kernel, for it would reset "
                f"{blocked.get(name, 'a device')}; but {other} needs it"
            )


# ---------------------------------------------------------------------- what is lost


def losses(host: Host, needs: Needs, mount_points: Sequence[str]) -> Iterator[str]:
    """Yield what does not outlive this kernel, beside its processes."""
    for device in needs.cleared:
        yield f"{device}: cut off, for it is not to persist"
    for device in needs.devices:
        yield f"{device}: its interrupts reach nobody until it is taken over"
    for source, where, _, options in own_mounts(host):
        if source.startswith("/dev/") and "rw" in options and where not in mount_points:
            yield f"{where}: left as by a loss of power, after a sync"
