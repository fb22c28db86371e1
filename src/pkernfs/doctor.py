"""The checks of a host: each thing that pkernfs needs, and the remedy for what is missing.

A check looks at the host (:class:`pkernfs.host.sysroot.Host`) and says what it has found; nothing
is changed, loaded or opened for writing.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import NamedTuple

from pkernfs.errors import NotFoundError, PermissionDeniedError, PkernfsError, RegionError
from pkernfs.host import boot, cmdline, kernel_image, kmem, memmap, plain_paths, qemu, reserved
from pkernfs.host.dmar import Dmar, read_table
from pkernfs.host.memmap import Kaslr, Kind, Reservation
from pkernfs.host.mount_table import FSTYPE, own_mounts
from pkernfs.host.reserved import By, Kept
from pkernfs.host.sysroot import HOST, Host
from pkernfs.iommu.config import Config as IommuConfig
from pkernfs.kexec import systemd
from pkernfs.kexec.spans import physical_spans
from pkernfs.options import format_size
from pkernfs.quantities import Iova, PhysAddr
from pkernfs.region import dax, physical
from pkernfs.region.spec import looks_physical, parse_span
from pkernfs.units import discovery
from pkernfs.units.requirements import Requirements, unmet_requirements

OK, WARNING, MISSING, UNKNOWN = "ok", "warning", "missing", "unknown"

_OLDEST_KERNEL = (6, 1)
_OLDEST_LIBFUSE = (3, 13)  # shim.attach()
_SHARED_DIRECT_KERNEL = (6, 6)  # FUSE_DIRECT_IO_ALLOW_MMAP
_HUGE_LEAF = 2  # level of the 2 MiB leaves that guest memory is mapped with
_HUGE = "sys/kernel/mm/hugepages"
_HUGE_PAGES = re.compile(r"hugepages-(\d+)kB")
_NO_CONFIG = "this kernel's configuration is nowhere to be found"
_CONFIG_REMEDY = "put it into /boot as config-RELEASE, or use a kernel with CONFIG_IKCONFIG_PROC"
_UNITS = f"{systemd.DIRECTORY}/pkernfs.target"


class Result(NamedTuple):
    """The outcome of a check: ``area`` says what it is needed for."""

    area: str
    name: str
    status: str
    detail: str
    remedy: str = ""


def examine(host: Host = HOST) -> Iterator[Result]:
    """Make all checks, in the order in which one sets a host up."""
    config = kernel_image.running_config(host)
    for check in _CHECKS:
        yield from check(host, config)


def able(results: list[Result], area: str) -> bool | None:
    """Tell whether all is there for ``area``; None: what is missing is not known."""
    found = {r.status for r in results if r.area == area}
    if MISSING in found:
        return False
    return None if UNKNOWN in found else True


Config = kernel_image.Config | None


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", text)[:2])


# ---------------------------------------------------------------------- mount


def _check_kernel(host: Host, config: Config) -> Iterator[Result]:
    release = host.find("proc/sys/kernel/osrelease") or "unknown"
    version = _version(release)
    if version < _OLDEST_KERNEL:
        yield Result("mount", "kernel", MISSING, release, "a kernel of 6.1 or newer")
    elif version < _SHARED_DIRECT_KERNEL:
        detail = f"{release}: files go through the page cache (docs/coherence.md)"
        yield Result("mount", "kernel", WARNING, detail, "6.6 or newer maps files without it")
    else:
        yield Result("mount", "kernel", OK, release)


def _check_fuse(host: Host, config: Config) -> Iterator[Result]:
    if os.path.exists(host.path("dev/fuse")):
        yield Result("mount", "/dev/fuse", OK, "there")
    else:
        yield Result("mount", "/dev/fuse", MISSING, "not there", "modprobe fuse")
    library = libfuse_version()
    if library is None:
        yield Result("mount", "libfuse", MISSING, "libfuse3 not found", "apt install libfuse3-3")
    elif _version(library) < _OLDEST_LIBFUSE:
        detail = f"{library}: fewer capabilities of the kernel are used (docs/coherence.md)"
        yield Result("mount", "libfuse", WARNING, detail, "3.13 or newer")
    else:
        yield Result("mount", "libfuse", OK, library)
    for name in ("pyfuse3", "trio", "cffi"):
        try:
            yield Result("mount", name, OK, metadata.version(name))
        except metadata.PackageNotFoundError:
            yield Result("mount", name, MISSING, "not installed", "scripts/setup")


def libfuse_version() -> str | None:
    """Return the version of the libfuse3 that would be loaded; None: there is none."""
    for name in ("libfuse3.so.4", "libfuse3.so.3"):
        try:
            library = ctypes.CDLL(name)
        except OSError:
            continue
        try:
            library.fuse_pkgversion.restype = ctypes.c_char_p
            return str(library.fuse_pkgversion().decode())
        except AttributeError:
            return str(library.fuse_version())
    return None


def _check_mount8(host: Host, config: Config) -> Iterator[Result]:
    places = ("usr/local/sbin", "usr/local/bin", "usr/sbin", "usr/bin", "sbin", "bin")
    found = [p for p in places if os.path.exists(host.path(f"{p}/pkernfs"))]
    if found:
        yield Result("mount", "mount -t fuse.pkernfs", OK, f"/{found[0]}/pkernfs")
    else:
        yield Result(
            "mount", "mount -t fuse.pkernfs", WARNING,
            "pkernfs is in no standard place, where mount(8) looks for it",
            "scripts/setup; `pkernfs mount` works without",
        )  # fmt: skip


# ---------------------------------------------------------------------- region


def _check_huge_pages(host: Host, config: Config) -> Iterator[Result]:
    found = [
        f"{count} of {format_size(size)}{on_demand}"
        for size, directory in _huge_page_sizes(host)
        for name, on_demand in (("nr_hugepages", ""), ("nr_overcommit_hugepages", " on demand"))
        if (count := int(host.find(f"{directory}/{name}") or 0))
    ]
    if found:
        yield Result("region", "huge pages", OK, ", ".join(found))
    else:
        yield Result(
            "region", "huge pages", WARNING, "none are reserved: no region on hugetlbfs",
            "hugepages=N on the kernel command line, or vm.nr_hugepages",
        )  # fmt: skip


def _huge_page_sizes(host: Host) -> Iterator[tuple[int, str]]:
    """Yield each size of huge pages in bytes, ascending, and its directory in sysfs."""
    names = (_HUGE_PAGES.fullmatch(name) for name in host.list(_HUGE))
    for size, name in sorted((int(m[1]) << 10, m[0]) for m in names if m):
        yield size, f"{_HUGE}/{name}"


def _check_dev_mem(host: Host, config: Config) -> Iterator[Result]:
    lockdown = host.lockdown()
    without = WARNING if dax.device_names(host) else MISSING  # one of the two will do
    if lockdown is not None:
        yield Result(
            "region", "/dev/mem", without, f"lockdown: {lockdown}",
            "boot without lockdown=, secure boot off; or use device-dax",
        )  # fmt: skip
    elif not os.path.exists(host.path("dev/mem")):
        yield Result(
            "region", "/dev/mem", without, "not there",
            "a kernel with CONFIG_DEVMEM=y; or use device-dax",
        )  # fmt: skip
    else:
        yield Result("region", "/dev/mem", OK, "there")


def _check_reservation(host: Host, config: Config) -> Iterator[Result]:
    line = host.command_line()
    reserved = memmap.reservations(line)
    misspelt = list(_misspelt(line))
    limits = [w for w in memmap.e820_words(line) if w.limit is not None and w.trouble is None]
    if not reserved and not misspelt and not limits:
        yield Result(
            "region", "reserved memory", WARNING, "no memmap= on the kernel command line",
            "memmap=1G%4G pkernfs=1G!4G, or what docs/operations.md says of device-dax",
        )  # fmt: skip
    elif reserved or limits:
        texts = [f"{r.end - r.start:#x} at {r.start:#x}, {r.kind.value}" for r in reserved]
        texts += [f"all from {w.limit:#x} on, by {w.text}" for w in limits]
        yield Result("region", "reserved memory", OK, ", ".join(texts))
    yield from misspelt
    yield from _named_regions(host, line, bool(reserved))
    if (config or {}).get("RANDOMIZE_BASE", "y") == "y":
        kept = [r for r in reserved if r.kind is not Kind.RAM]
        stub = list(_efi_stub(host)) if kept and "nokaslr" not in cmdline.words(line) else []
        yield from stub
        yield from (r for r in _kaslr(line, kept) if r.status == WARNING or not stub)


def _misspelt(line: str) -> Iterator[Result]:
    """Show each memmap= that is not what it seems as written, with what the kernel makes of it."""
    remedy = "memmap=SIZE%START (docs/operations.md says how GRUB takes memmap=SIZE$START)"
    for text in memmap.lost_words(line):
        yield Result(
            "region", "memmap=", WARNING, f"{text}: to the kernel this is no memmap=", remedy
        )
    for word in memmap.e820_words(line):
        if word.trouble is not None:
            yield Result("region", "memmap=", WARNING, f"{word.text}: {word.trouble}", remedy)


def _efi_stub(host: Host) -> Iterator[Result]:
    """The stub places a kernel that EFI starts; some ignore memmap=."""
    if boot.by_efi(host) and boot.efi_stub_ignores_memmap(host):
        yield Result(
            "region", "KASLR", WARNING,
            "the EFI stub of kernels before June 2024 ignores memmap=, and may put this kernel "
            "into a region at the next boot",
            "nokaslr, or a newer kernel",
        )  # fmt: skip


def _named_regions(host: Host, line: str, has_memory: bool) -> Iterator[Result]:
    try:
        named = cmdline.named_regions(line)
    except RegionError as e:
        yield Result("region", "pkernfs=", MISSING, str(e), "pkernfs=SIZE!START")
        return
    if has_memory and not named:
        yield Result(
            "region", "pkernfs=", WARNING, "the kernel command line names no region for `none`",
            "pkernfs=SIZE!START beside memmap=",
        )  # fmt: skip
    for region in named:
        if not looks_physical(region.spec):
            continue
        try:
            physical.check(region.spec, parse_span(region.spec), host)
        except RegionError as e:
            what, _, why = str(e).partition(": ")
            yield Result("region", f"pkernfs={what}", MISSING, why, "docs/operations.md")
        else:
            yield Result("region", f"pkernfs={region.spec}", OK, "reserved, and nobody else's")


def _kaslr(line: str, reserved: list[Reservation]) -> Iterator[Result]:
    """Say what the next kernel's KASLR does about the ranges of memmap=, if its line is this one.

    Any kernel may be next.
    """
    verdicts = [(r, memmap.kaslr(line, r.start, r.end)) for r in reserved]
    for reservation, verdict in verdicts:
        if verdict.kaslr is Kaslr.NOT_AVOIDED:
            is_late = "comes after" in verdict.why
            yield Result(
                "region", "KASLR", WARNING,
                f"the next kernel may be put into {reservation.parameter}: {verdict.why}",
                "nokaslr (pkernfs kexec adds it), or "
                + ("that word before the others" if is_late else "memmap=SIZE$START"),
            )  # fmt: skip
            return
    if verdicts:
        _, verdict = verdicts[0]
        is_off = verdict.kaslr is Kaslr.OFF
        yield Result(
            "region", "KASLR", OK, f"off: {verdict.why}" if is_off else "it avoids the ranges"
        )


def _check_next_kernel(host: Host, config: Config) -> Iterator[Result]:
    """Tell of each region that has a name or is mounted what keeps it from this kernel."""
    try:
        specs = [region.spec for region in cmdline.named_regions(host.command_line())]
    except RegionError:
        specs = []  # said already
    specs += [mount.source for mount in own_mounts(host) if mount.fstype == FSTYPE]
    for spec in dict.fromkeys(specs):
        try:
            kept = reserved.find_kept(physical_spans(spec, host), host)
        except (PkernfsError, OSError):
            continue  # said already, or no region of this machine yet
        yield from _kept_from_the_next_kernel(spec, kept)
        if any(one.kind is Kind.SOFT for one in kept):
            yield from _kmem(spec, host, config)


def _kept_from_the_next_kernel(spec: str, kept: list[Kept]) -> Iterator[Result]:
    for one in kept:
        if one.by in (By.FAKE_MEM, By.UNKNOWN):
            yield Result(
                "region", f"{spec}, next kernel", WARNING,
                f"{one.by.value} keeps it from this kernel, and a kexec does not pass that on",
                f"{one.word} (pkernfs kexec adds it)",
            )  # fmt: skip
        elif one.by is By.FIRMWARE:
            detail = f"{one.kind.value} by {one.by.value}, which a kexec passes on"
            yield Result("region", f"{spec}, next kernel", OK, detail)


def _kmem(spec: str, host: Host, config: Config) -> Iterator[Result]:
    if kmem.is_kept_away_by(host.command_line(), config):
        return
    barrier = kmem.barrier(host)
    if barrier is None:
        detail = "nothing keeps the module kmem from it, which makes ordinary memory of it"
    elif barrier.is_word:
        detail = f"{barrier.text} keeps no kmem away that is built in"
    else:
        detail = f"{barrier.text} keeps kmem from it; the next kernel's initrd may lack that"
    yield Result("region", f"{spec}, kmem", WARNING, detail, kmem.word_for(config))


def _check_dax(host: Host, config: Config) -> Iterator[Result]:
    devices = dax.device_names(host)
    if devices:
        yield Result("region", "device-dax", OK, ", ".join(devices))
    elif config is not None and "DEV_DAX" not in config:
        yield Result("region", "device-dax", WARNING, "not in this kernel", "CONFIG_DEV_DAX")
    else:
        yield Result(
            "region", "device-dax", WARNING, "no device",
            "memmap=SIZE%START-1+0xefffffff, modprobe dax_hmem (docs/operations.md)",
        )  # fmt: skip


# ---------------------------------------------------------------------- guests


def _check_qemu(host: Host, config: Config) -> Iterator[Result]:
    path = shutil.which("qemu-system-x86_64")
    if path is None:
        yield Result(
            "guest", "QEMU", MISSING, "qemu-system-x86_64 not found",
            "apt install qemu-system-x86",
        )  # fmt: skip
        return
    said = qemu.version_line(path)
    version = qemu.parse_version(said)
    if version is None:
        detail = f"{path} does not tell its version: got {said!r}"
        yield Result("guest", "QEMU", UNKNOWN, detail, f"see {path} --version")
    elif _version(version) < qemu.OLDEST:
        yield Result(
            "guest", "QEMU", WARNING, f"{version} maps segments, but no file at an offset",
            "8.1 or newer; 8.2 for live update (Debian 12: from backports)",
        )  # fmt: skip
    elif _version(version) < qemu.OLDEST_CPR:
        yield Result("guest", "QEMU", WARNING, f"{version} has no cpr-reboot", "8.2 or newer")
    else:
        yield Result("guest", "QEMU", OK, version)


def _check_plain_paths(host: Host, config: Config) -> Iterator[Result]:
    """One way is enough: what is not offered is no lack."""
    for way in (find(host, config) for find in plain_paths.ALL):
        status = {True: OK, False: WARNING, None: UNKNOWN}[way.offered]
        remedy = way.remedy or ("" if way.offered else _CONFIG_REMEDY)
        yield Result("segments", way.name, status, way.why, remedy)


# ---------------------------------------------------------------------- kexec


def _check_kexec(host: Host, config: Config) -> Iterator[Result]:
    if shutil.which("kexec") is None and not os.path.exists("/sbin/kexec"):
        yield Result("kexec", "kexec-tools", MISSING, "no kexec", "apt install kexec-tools")
    else:
        yield Result("kexec", "kexec-tools", OK, "there")
    if host.find("proc/sys/kernel/kexec_load_disabled") == "1":
        yield Result(
            "kexec", "kexec_load", MISSING, "disabled until the next boot",
            "remove kernel.kexec_load_disabled=1 from sysctl's configuration, and boot",
        )  # fmt: skip
    elif config is not None and "KEXEC" not in config and "KEXEC_FILE" not in config:
        yield Result("kexec", "kexec_load", MISSING, "not in this kernel", "CONFIG_KEXEC=y")
    elif config is None and host.find("sys/kernel/kexec_loaded") is None:
        yield Result("kexec", "kexec_load", UNKNOWN, _NO_CONFIG, _CONFIG_REMEDY)
    else:
        yield Result("kexec", "kexec_load", OK, "allowed")


def _check_crash_kernel(host: Host, config: Config) -> Iterator[Result]:
    size = int(host.find("sys/kernel/kexec_crash_size") or 0)
    if size:
        yield Result("dma", "crashkernel", OK, f"{size >> 20} MiB reserved")
    else:
        yield Result(
            "dma", "crashkernel", MISSING,
            "none: no kexec that leaves devices running",
            "crashkernel=256M on the kernel command line",
        )  # fmt: skip


# ---------------------------------------------------------------------- DMA


def _check_dmar(host: Host) -> Iterator[Result]:
    """Tell what Linux does with the table, and whether it has taken the units."""
    try:
        dmar: Dmar | None = read_table(host)
    except NotFoundError:
        yield Result(
            "dma", "DMAR", MISSING, "the firmware describes no VT-d unit",
            "switch VT-d on in the firmware's set-up; AMD's IOMMU is not supported",
        )  # fmt: skip
        return
    except PkernfsError:
        dmar = None  # _check_capabilities says why
    if dmar is not None and dmar.refused:
        yield Result(
            "dma", "DMAR", MISSING, f"{dmar.refused}: Linux drives no unit of such a table",
            "a newer firmware",
        )  # fmt: skip
        return
    if dmar is not None and not dmar.units:  # Linux: "No DMAR devices found"
        yield Result("dma", "DMAR", MISSING, "the table has no unit", "a newer firmware")
        return
    if dmar is None:
        yield Result("dma", "DMAR", UNKNOWN, "there; what is in it is not known", "see `units`")
        return
    taken = "".join(f"; {remark}: Linux takes it" for remark in dmar.remarks)
    owned = [n for n in host.list("sys/class/iommu") if n.startswith("dmar")]
    if owned:
        detail = f"{', '.join(owned)}: driven by this kernel{taken}"
        remedy = "intel_iommu=off to put the region's tables in force now"
        yield Result("dma", "DMAR", WARNING, detail, remedy)
    else:
        yield Result("dma", "DMAR", OK, f"there, and no driver has the units{taken}")


def _check_iommu(host: Host, config: Config) -> Iterator[Result]:
    yield from _check_dmar(host)
    if config is None:
        yield Result("dma", "configuration", UNKNOWN, _NO_CONFIG, _CONFIG_REMEDY)
        return
    for option, why in (
        ("INTEL_IOMMU", "no kernel without it adopts the tables"),
        ("CRASH_DUMP", "only a kdump kernel adopts tables that are in force"),
        ("VFIO_PCI", "a VMM takes devices over through it"),
    ):
        status = OK if option in config else MISSING
        remedy = "" if option in config else f"a kernel with CONFIG_{option}"
        yield Result("dma", option, status, "in this kernel" if not remedy else why, remedy)
    if "IOMMUFD" not in config:
        yield Result(
            "dma", "IOMMUFD", WARNING, "not in this kernel: VFIO containers only",
            "a kernel with CONFIG_IOMMUFD",
        )  # fmt: skip
    if "STRICT_DEVMEM" in config and "iomem=relaxed" not in host.command_line().split():
        yield Result(
            "dma", "iomem=", WARNING, "registers that a driver has claimed cannot be reached",
            "iomem=relaxed on the kernel command line",
        )  # fmt: skip


def _check_capabilities(host: Host, config: Config) -> Iterator[Result]:
    """Tell of each unit whether it is able to walk tables as they are made by default."""
    try:
        dmar = read_table(host)
    except NotFoundError:
        return  # said already
    except PermissionDeniedError as e:
        yield Result("dma", "units", UNKNOWN, str(e), "as root")
        return
    except PkernfsError as e:
        yield Result("dma", "units", UNKNOWN, str(e), "a newer firmware")
        return
    if dmar.refused or not dmar.units:
        return  # said already
    wanted = Requirements(IommuConfig(), [], _HUGE_LEAF, Iova(0), PhysAddr(0))
    for found in discovery.find_units(host, dmar, write=False):
        name = found.structure.name
        able_to = discovery.capabilities(host, found)
        if able_to is None:
            yield Result("dma", name, UNKNOWN, found.why_not, _reach(host))
            continue
        lacks = list(unmet_requirements(able_to, wanted, dmar.host_bits))
        if lacks:
            remedy = "other tables, if it walks any: pkernfs iommu create --mode, --levels"
            yield Result("dma", name, MISSING, "; ".join(lacks), remedy)
        else:
            yield Result("dma", name, OK, ", ".join(able_to.words()))


def _reach(host: Host) -> str:
    """Return how to reach the registers of a unit that cannot be."""
    if os.geteuid():
        return "as root"
    if host.lockdown() is not None:
        return "boot without lockdown=, secure boot off"
    is_relaxed = "iomem=relaxed" in cmdline.words(host.command_line())
    return "a kernel with CONFIG_DEVMEM=y" if is_relaxed else "iomem=relaxed"


def _check_systemd(host: Host, config: Config) -> Iterator[Result]:
    if not host.has_systemd():
        yield Result("units", "systemd", MISSING, "not running here", "boot with systemd")
    elif os.path.exists(host.path(_UNITS)):
        yield Result("units", "systemd", OK, f"/{_UNITS}")
    else:
        yield Result("units", "systemd", WARNING, "no units", "pkernfs install-units")


_CHECKS: tuple[Callable[[Host, Config], Iterator[Result]], ...] = (
    _check_kernel,
    _check_fuse,
    _check_mount8,
    _check_huge_pages,
    _check_dev_mem,
    _check_reservation,
    _check_next_kernel,
    _check_dax,
    _check_qemu,
    _check_plain_paths,
    _check_kexec,
    _check_crash_kernel,
    _check_iommu,
    _check_capabilities,
    _check_systemd,
)
