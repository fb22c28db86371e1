"""The ways to a segment by the plain path of its file that this kernel offers, and why not others.

Nothing is loaded, opened or tried: this reads versions, the configuration, /proc and /sys.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from pkernfs.host.kernel_image import Config
from pkernfs.host.sysroot import Host

#: FUSE passthrough; answers of seccomp user notification that hand over a descriptor at once.
PASSTHROUGH_KERNEL = (6, 9)
ADDFD_SEND_KERNEL = (5, 14)

_SIZES = "sys/kernel/mm/hugepages"


class PlainPath(NamedTuple):
    """A way; ``offered`` is None if that is not known, and ``why`` says why not, or what there is.

    ``remedy`` is what has it offered; "": nothing needs to be done, or nothing can be.
    """

    name: str
    offered: bool | None
    why: str
    remedy: str = ""


def passthrough(host: Host, config: Config | None) -> PlainPath:
    """FUSE passes mappings through to a segment on tmpfs."""
    name = "tmpfs, FUSE passthrough"
    release = _release(host)
    if _version(release) < PASSTHROUGH_KERNEL:
        return PlainPath(name, False, f"kernel {release} has none", "kernel 6.9 or newer")
    if config is None:
        return PlainPath(name, None, "this kernel's configuration is nowhere to be found")
    if "FUSE_PASSTHROUGH" not in config:
        return PlainPath(name, False, "not in this kernel", "CONFIG_FUSE_PASSTHROUGH=y")
    return PlainPath(name, True, f"kernel {release} has it")


def exec_(host: Host, config: Config | None) -> PlainPath:
    """A program below ``pkernfs exec`` opens segments of every kind."""
    name = "any segment, pkernfs exec"
    release = _release(host)
    if _version(release) < ADDFD_SEND_KERNEL:
        why = f"kernel {release} cannot answer opens with a descriptor"
        return PlainPath(name, False, why, "kernel 5.14 or newer")
    actions = host.find("proc/sys/kernel/seccomp/actions_avail")
    if actions is None or "user_notif" not in actions.split():
        return PlainPath(name, False, "no seccomp user notification", "CONFIG_SECCOMP_FILTER=y")
    return PlainPath(name, True, "seccomp user notification")


def native(host: Host, config: Config | None) -> PlainPath:
    """The names of a native file lead to its segment, of whatever kind."""
    return PlainPath("any segment, pkernfs native", True, "bind mounts over the names of a file")


def device_dax(host: Host, config: Config | None) -> PlainPath:
    """Segments are dax devices."""
    name = "device-dax, its device node"
    if "device_dax" in host.list("sys/bus/dax/drivers"):
        return PlainPath(name, True, "the module device_dax is there")
    if config is not None and "DEV_DAX" not in config:
        return PlainPath(name, False, "not in this kernel", "CONFIG_DEV_DAX=m")
    return PlainPath(name, None if config is None else False, "not loaded", "modprobe device_dax")


def huge_pages(host: Host, config: Config | None) -> PlainPath:
    """Segments are files on hugetlbfs, which FUSE cannot pass through to."""
    name = "hugetlbfs, its own file"
    free = sum(
        int(host.find(f"{_SIZES}/{size}/{count}") or 0)
        for size in host.list(_SIZES)
        for count in ("nr_hugepages", "nr_overcommit_hugepages")
    )
    if not free:
        return PlainPath(name, False, "no huge pages are reserved", "vm.nr_hugepages")
    return PlainPath(name, True, "by pkernfs path, and below pkernfs exec")


#: Every way that there is.
ALL = (passthrough, native, exec_, device_dax, huge_pages)


def of_pool(host: Host, config: Config | None, *, dax: bool, huge: bool) -> list[PlainPath]:
    """The ways to the segments of a pool of dax devices, or of a directory on hugetlbfs or tmpfs.

    Where FUSE passthrough cannot be had whatever the kernel, that is why.
    """
    through = passthrough(host, config)
    if dax or huge:
        why = "a device is no regular file" if dax else "the kernel does not stack hugetlbfs"
        through = through._replace(offered=False, why=why, remedy="")
    own = device_dax(host, config) if dax else huge_pages(host, config)
    below_exec = exec_(host, config)
    return [
        through._replace(name="FUSE passthrough"),
        native(host, config)._replace(name="pkernfs native"),
        below_exec._replace(name="pkernfs exec"),
        own._replace(name="pkernfs path") if dax else PlainPath("pkernfs path", True, "a file"),
    ]


def _release(host: Host) -> str:
    return host.find("proc/sys/kernel/osrelease") or "unknown"


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", text)[:2])
