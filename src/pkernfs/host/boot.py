"""The start of the running kernel: how it came about, and the tables that it found in force."""

from __future__ import annotations

import enum
import os
import re
from collections.abc import Iterator
from typing import NamedTuple

from pkernfs.host import cmdline
from pkernfs.host.sysroot import Host

BOOT_PARAMS_BYTES = 4096
_RECORD_BYTES = 8192  # of /dev/kmsg at most (Documentation/ABI/testing/dev-kmsg)
_MAX_RECORDS = 100_000
#: By series, a patch level that has it for certain.
_STUB_HEEDS_MEMMAP = {(6, 1): 95, (6, 6): 35, (6, 9): 6}
_PLACE = re.compile(r"[0-9]\w*,", re.ASCII)
_KEXEC = 0xD  # upper half of the type of loader
#: Linux, drivers/iommu/intel/iommu.c, init_dmars(): whether the tables were adopted.
_SAID = (
    (re.compile(r"DMAR: Copied translation tables from previous kernel for (\w+)"), True),
    (re.compile(r"DMAR: Failed to copy translation tables from previous kernel for (\w+)"), False),
    (re.compile(r"DMAR: Translation was enabled for (\w+) but we are not in kdump mode"), False),
)


class Adoption(NamedTuple):
    """The kernel's own line about the tables of a unit; ``adopted`` if it goes on with them."""

    unit: str
    adopted: bool
    log: str


class Loader(enum.Enum):
    """What started the running kernel."""

    KEXEC = "kexec"
    FIRMWARE = "a boot loader, or the firmware itself"
    UNKNOWN = "nobody knows"


def loader(host: Host) -> Loader:
    """Return what started this kernel, by the type that its loader gave itself.

    kexec-tools and kexec_file_load() give 0xd (Documentation/arch/x86/boot.rst, type_of_loader).
    """
    text = host.find("proc/sys/kernel/bootloader_type") or ""
    if not text.isdecimal():
        return Loader.UNKNOWN
    return Loader.KEXEC if int(text) >> 4 == _KEXEC else Loader.FIRMWARE


def by_efi(host: Host) -> bool:
    """Tell whether the firmware is EFI: its stub places the kernel, unless kexec started it."""
    return os.path.isdir(host.path("sys/firmware/efi"))


def efi_stub_ignores_memmap(host: Host) -> bool | None:
    """Tell whether the EFI stub of this kernel's release may; None: the release is not known.

    Since a1b87d54f4e4 (6.6, and 6.1 by a later one of its series) the stub chooses a place at
    random, whatever the command line says. Since 15aa8fb852f9 (6.10, and the series of
    :data:`_STUB_HEEDS_MEMMAP` in June 2024) it takes the lowest one if there is a memmap=.
    A distribution's own release may tell its series only; then it may.
    """
    release = host.find("proc/sys/kernel/osrelease") or ""
    series = re.match(r"(\d+)\.(\d+)", release)
    if series is None:
        return None
    version = (int(series[1]), int(series[2]))
    if version != (6, 1) and not (6, 6) <= version < (6, 10):
        return False
    # Debian: 6.1.0-42-amd64, and 6.1.159-1 in the version.
    text = f"{release} {host.find('proc/sys/kernel/version') or ''}"
    levels = re.findall(rf"\b{series[1]}\.{series[2]}\.(\d+)", text)
    least = _STUB_HEEDS_MEMMAP.get(version)
    return least is None or max(map(int, levels), default=0) < least


def had_initrd(host: Host) -> bool | None:
    """Tell whether this kernel was started with an initrd; None: that cannot be seen.

    Boot loaders and the EFI stub (drivers/firmware/efi/libstub/x86-stub.c) note it in struct
    boot_params. Who says ``initrdmem=START,SIZE`` need not (arch/x86/kernel/setup.c,
    get_ramdisk_image(); init/do_mounts_initrd.c); ``initrd=`` is the same, unless it is a name.
    """
    line = host.command_line()
    told = [*cmdline.values(line, "initrdmem"), *cmdline.values(line, "initrd")]
    if any(_PLACE.match(value) for value in told):
        return True
    try:
        with open(host.path("sys/kernel/boot_params/data"), "rb") as file:
            return boot_params_have_initrd(file.read(BOOT_PARAMS_BYTES))
    except OSError:
        return None


def boot_params_have_initrd(data: bytes) -> bool | None:
    """Tell whether struct boot_params names an initrd; None: it is cut short.

    ramdisk_size, ext_ramdisk_size: Documentation/arch/x86/boot.rst, zero-page.rst.
    """
    if len(data) < BOOT_PARAMS_BYTES:
        return None
    return any(int.from_bytes(data[at : at + 4], "little") for at in (0x21C, 0xC4))


def by_panic(host: Host) -> bool:
    """Tell whether the panic of another kernel started this one, as it knows itself."""
    return bool(cmdline.values(host.command_line(), "elfcorehdr"))


def adoptions(host: Host) -> list[Adoption]:
    """Return the fate of the tables that were in force when the kernel started, by unit.

    A unit of which nothing is said was off, or the kernel's log does not go back that far, or is
    not for this user.
    """
    found: dict[str, Adoption] = {}
    for line in _log(host):
        for pattern, adopted in _SAID:
            match = pattern.search(line)
            if match is not None:
                found.setdefault(match[1], Adoption(match[1], adopted, line))
    return list(found.values())


def _log(host: Host) -> Iterator[str]:
    """Yield the messages of the kernel's log, oldest first."""
    try:
        log = os.open(host.path("dev/kmsg"), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return
    try:
        for _ in range(_MAX_RECORDS):
            try:
                data = os.read(log, _RECORD_BYTES)
            except BrokenPipeError:
                continue  # records were overwritten; the next read is of those that are there
            except OSError:
                return  # the end
            if not data:
                return
            for line in data.decode("utf-8", "replace").splitlines():
                yield line.partition(";")[2]
    finally:
        os.close(log)
