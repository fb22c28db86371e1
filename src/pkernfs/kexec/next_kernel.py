"""The kernel that is to be started: its image, its initrd, its configuration; what it lacks.

Distributions have names of their own for these files. Where a file that the running kernel had is
not found, or cannot be told, that is said: it is not taken for one that is not needed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from pkernfs.errors import NotFoundError
from pkernfs.host import boot, cmdline, kernel_image
from pkernfs.host.memmap import Kind
from pkernfs.host.reserved import By, Kept
from pkernfs.host.sysroot import Host

#: ``--initrd none``: the kernel needs none.
NO_INITRD = "none"
#: {0}: the release. Debian, Fedora, Arch, openSUSE; Gentoo; /boot/efi and /efi: systemd-boot.
_KERNELS = (
    "boot/vmlinuz-{0}", "lib/modules/{0}/vmlinuz", "usr/lib/modules/{0}/vmlinuz",
    "boot/kernel-{0}", "boot/kernel-genkernel-x86_64-{0}", "boot/bzImage-{0}",
)  # fmt: skip
#: {0}: the release, or what is behind ``vmlinuz-`` (Arch: linux; Alpine: lts).
_INITRDS = (
    "initrd.img-{0}", "initramfs-{0}.img", "initrd-{0}", "initrd-{0}.img", "initramfs-{0}",
    "initramfs-genkernel-x86_64-{0}",
)  # fmt: skip
_LOADER_ROOTS = ("boot", "efi", "boot/efi")
_IMAGE_NAMES = ("vmlinuz", "kernel", "bzImage", "linux")

#: Options without which a kernel has no such memory: what is lost, and one of them is enough.
_DAX_OPTIONS = {
    Kind.SOFT: ("DEV_DAX", "DEV_DAX_HMEM"),
    Kind.PMEM: ("DEV_DAX", "DEV_DAX_PMEM", "LIBNVDIMM"),
}


class KernelFiles(NamedTuple):
    """Absolute paths of a kernel and its initrd, if it has one.

    :ivar release: of the kernel; None: not known
    :ivar doubt: why there may have to be an initrd; "": there is one, or it needs none
    """

    kernel: str
    initrd: str | None
    release: str | None
    doubt: str


def find_kernel(kernel: str | None, initrd: str | None, host: Host) -> KernelFiles:
    """Return paths of the kernel and its initrd; the running kernel's if they are not given.

    :raises NotFoundError: there is none there.
    """
    running = host.find("proc/sys/kernel/osrelease") or ""
    release: str | None = running
    is_given = kernel is not None
    if kernel is None:
        found = _find_image(running, host)
        if found is None:
            raise NotFoundError(
                f"/boot/vmlinuz-{running}: no such file: name one with --kernel and --initrd"
            )
        if initrd is None:
            initrd = _find_initrd(found, running, host)
        kernel = f"/{found}"
    else:
        kernel = os.path.abspath(kernel)
        _check_file(kernel, host)
        release = kernel_image.release_of(host, kernel)
    if initrd is None:
        return KernelFiles(kernel, None, release, _doubt(kernel, is_given, host))
    if initrd in ("", NO_INITRD):
        return KernelFiles(kernel, None, release, "")
    initrd = os.path.abspath(initrd)
    _check_file(initrd, host)
    return KernelFiles(kernel, initrd, release, "")


def _check_file(path: str, host: Host) -> None:
    if not os.path.isfile(host.path(path.lstrip("/"))):
        raise NotFoundError(f"{path}: no such file")


def _doubt(kernel: str, is_given: bool, host: Host) -> str:
    had_one = boot.had_initrd(host)
    if had_one is False:
        return ""
    start = (
        "this kernel was started with an initrd"
        if had_one
        else "it cannot be seen whether this kernel was started with an initrd"
    )
    found = "is given" if is_given else "is found"
    return (
        f"{start}, and none {found} for {kernel}: name one with --initrd, or say "
        f"--initrd {NO_INITRD}"
    )


def _find_image(release: str, host: Host) -> str | None:
    """Return the running kernel's image, relative to the root: by its name, or by what it says."""
    for name in (pattern.format(release) for pattern in _KERNELS):
        if _is_file(name, host) and kernel_image.release_of(host, name) in (None, release):
            return name
    for name in _images(release, host):
        if kernel_image.release_of(host, name) == release:
            return name
    return None


def _images(release: str, host: Host) -> Iterator[str]:
    """Yield images whose names do not tell a release."""
    for value in cmdline.values(host.command_line(), "BOOT_IMAGE"):
        path = value.rpartition(")")[2].lstrip("/")  # GRUB: (hd0,gpt2)/vmlinuz-linux
        yield from (path, f"boot/{path}")
    for root in _LOADER_ROOTS:
        for name in host.list(root):
            if name.startswith(_IMAGE_NAMES):
                yield f"{root}/{name}"
            yield f"{root}/{name}/{release}/linux"  # name: the machine's id


def _find_initrd(image: str, release: str, host: Host) -> str | None:
    """Return the absolute path of the initrd of the running kernel; None: it is not found."""
    directory, _, name = image.rpartition("/")
    words = [release]
    if "-" in name:
        words.append(name.partition("-")[2])
    names = [f"{place}/{pattern.format(word)}" for word in words for pattern in _INITRDS
             for place in dict.fromkeys((directory, "boot"))]  # fmt: skip
    if name == "linux":
        names += [f"{directory}/initrd", f"{directory}/initrd.img"]
    names += [f"{directory}/initrd", f"{directory}/initramfs.img"] if "modules" in directory else []
    given = cmdline.values(host.command_line(), "initrd")  # of a boot loader, or the stub
    if len(given) == 1:  # of several, one may be for the processor only: all or none
        path = given[0].replace("\\", "/").lstrip("/")
        names += [f"{root}/{path}" for root in _LOADER_ROOTS] + [path]
    found = next((one for one in names if _is_file(one, host)), None)
    return None if found is None else f"/{found}"


def _is_file(name: str, host: Host) -> bool:
    return os.path.isfile(host.path(name))


# ---------------------------------------------------------------------- its configuration


def config_of(files: KernelFiles, host: Host) -> kernel_image.Config | None:
    """Return the configuration of the kernel; None: it cannot be seen."""
    if files.release is None:
        return None
    found = kernel_image.config_of(host, files.release, files.kernel)
    if found is None and files.release == host.find("proc/sys/kernel/osrelease"):
        return kernel_image.running_config(host)
    return found


def lacks(
    files: KernelFiles, config: kernel_image.Config | None, kept: Sequence[Kept], host: Host
) -> Iterator[str]:
    """Yield what the next kernel does not have that it needs for regions, or may not have."""
    if not kept:
        return
    if config is None:
        if files.release != host.find("proc/sys/kernel/osrelease"):
            yield (
                f"{files.kernel}: cannot see its configuration ({files.release or 'no bzImage'}): "
                "it may lack the drivers of a region: put its config beside it"
            )
        return
    yield from _own_command_line(files, config)
    for option in dict.fromkeys(option for one in kept for option in _options(one)):
        if option not in config:
            yield f"{files.kernel}: no CONFIG_{option}: it could not mount a region again"


def _own_command_line(files: KernelFiles, config: kernel_image.Config) -> Iterator[str]:
    """Yield what a command line in the configuration does (arch/x86/kernel/setup.c, setup_arch()).

    It takes the place of the one that is given, or is put in front of it; the decompressor knows
    nothing of it.
    """
    if config.get("CMDLINE_BOOL") != "y":
        return
    own = config.get("CMDLINE", "").strip('"')
    if "CMDLINE_OVERRIDE" in config:
        yield f"{files.kernel}: CONFIG_CMDLINE_OVERRIDE: it looks at its own command line only"
    elif any(cmdline.values(own, name) for name in ("memmap", "mem")):
        yield (
            f"{files.kernel}: CONFIG_CMDLINE has {own!r}: with that in front, the command line "
            "means something else than was checked"
        )


def _options(one: Kept) -> tuple[str, ...]:
    if one.kind is Kind.PMEM and one.by is By.WORD:
        return (*_DAX_OPTIONS[Kind.PMEM], "X86_PMEM_LEGACY")
    if one.kind in (Kind.REMOVED, Kind.RESERVED):
        # What a map does not have is a dax device of CXL, or was given up in an older kernel.
        return () if one.by is By.FIRMWARE else ("DEVMEM",)
    return _DAX_OPTIONS.get(one.kind, ())
