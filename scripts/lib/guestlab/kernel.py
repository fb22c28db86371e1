"""A Debian kernel image, taken from its package into a cache; the kernel is never installed."""

import os
import re
import shutil
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

import debfile
import programs
from guestlab import GuestLabError

META_PACKAGE = "linux-image-cloud-amd64"
_KERNEL_PACKAGE = re.compile(r"linux-(image|binary)-\S*amd64$")
_KERNEL_IMAGE = re.compile(r"(\./)?(boot/vmlinuz-[^/]+|(usr/)?lib/modules/[^/]+/vmlinuz)$")


@dataclass(frozen=True)
class Kernel:
    """A bootable kernel image and the package (name and version) that it came from."""

    package: str
    image: Path


def default_cache() -> Path:
    """Return the directory that keeps downloads from one run to the next: outside any checkout."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "pkernfs"


def fetch(cache: Path) -> Kernel:
    """Return the kernel that apt offers now, downloading it unless the cache has it.

    Without an answer from apt (no lists, old lists, no network) a kernel from an earlier run will
    do; if there is none, the lists are fetched first.

    :raises GuestLabError: there is none in the cache and none to be had.
    """
    try:
        return _fetch(cache)
    except GuestLabError:
        if earlier := cached(cache):
            return earlier
        _run("apt-get", "-q", "update")
        return _fetch(cache)


def cached(cache: Path) -> Kernel | None:
    """The kernel that was fetched last, if any."""
    images = sorted(cache.glob("kernels/*/vmlinuz"), key=lambda image: image.stat().st_mtime)
    return Kernel(images[-1].parent.name, images[-1]) if images else None


def _fetch(cache: Path) -> Kernel:
    package = _leaf_package(META_PACKAGE)
    kernel = Kernel(package, cache / "kernels" / package / "vmlinuz")
    if not kernel.image.exists():
        _download(kernel)
    return kernel


def _leaf_package(package: str) -> str:
    """Follow the meta package's dependencies to the package that holds the image: name=version."""
    for _ in range(4):
        record = _run("apt-cache", "show", "--no-all-versions", package)
        if not record:
            raise GuestLabError(f"{package}: apt knows no such package")
        inner = [n for n in debfile.dependencies(record) if _KERNEL_PACKAGE.match(n)]
        if not inner:
            return f"{package}={debfile.field(record, 'Version')}"
        package = inner[0]
    raise GuestLabError(f"{META_PACKAGE}: its dependencies do not end in a kernel")


def _download(kernel: Kernel) -> None:
    """Download the package and keep only its kernel image, which appears whole or not at all."""
    kernel.image.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=kernel.image.parent) as scratch:
        _run("apt-get", "-q", "-o", debfile.AS_CALLER, "download", kernel.package, cwd=scratch)
        packages = list(Path(scratch).glob("*.deb"))
        if not packages:
            raise GuestLabError(f"{kernel.package}: apt-get download left no package")
        partial = Path(scratch) / "vmlinuz"
        _extract_image(packages[0], partial)
        partial.replace(kernel.image)


def _extract_image(package: Path, target: Path) -> None:
    with debfile.content(package, GuestLabError) as archive:
        _copy_image(archive, target)


def _copy_image(archive: tarfile.TarFile, target: Path) -> None:
    for member in archive:
        if member.isreg() and _KERNEL_IMAGE.match(member.name):
            image = archive.extractfile(member)
            assert image is not None
            with target.open("wb") as out:
                shutil.copyfileobj(image, out)
            return
    raise GuestLabError(f"{target}: no kernel image in its package")


def _run(*command: str, cwd: str | None = None) -> str:
    advice = "this needs Debian's apt"
    return programs.output(*command, error=GuestLabError, advice=advice, seconds=900, cwd=cwd)
