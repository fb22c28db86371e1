"""Debian's cloud kernels, each a disk with its modules, its image and the lab's initramfs.

The disk is there in the machine too, so that kexec finds any kernel that a machine was given.
"""

import lzma
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from guestlab import initramfs
from kexeclab import LabError, cache, rootfs
from kexeclab.debian import Suite, unpack

SUITES = {"6.1": "bookworm", "6.12": "trixie", "7": "trixie-backports"}
DEFAULT = "6.12"
_META_PACKAGE = "linux-image-cloud-amd64"
_PART = re.compile(r"linux-(image|binary|modules|base)-[0-9]\S*-amd64$")
_WANTED = re.compile(r"(boot/(vmlinuz|config)-|(usr/)?lib/modules/)")
# What the initramfs needs to find the disks; most of it is built into newer kernels.
_MODULES = ["virtio_pci", "virtio_blk", "overlay", "virtio_console"]
_INIT = Path(__file__).with_name("initramfs-init")
_REVISION = "2"


@dataclass(frozen=True)
class Kernel:
    """A kernel that can be booted and kexec'd."""

    name: str
    release: str
    image: Path
    initramfs: Path
    disk: Path


def fetch(name: str, update: bool = False) -> Kernel:
    """The kernel of the series ``name``, a key of SUITES, from the cache or downloaded now.

    :param update: ask the mirror for a newer one
    :raises LabError: it is not to be had.
    """
    if name not in SUITES:
        raise LabError(f"kernel {name}: unknown; there are {', '.join(SUITES)}")
    root = rootfs.fetch()
    packages = _packages(name, update)
    recipe = cache.key(_REVISION, _INIT.read_bytes(), *_MODULES, str(packages))
    place = cache.entry(f"kernel-{name}", recipe, lambda scratch: _build(scratch, packages, root))
    release = (place / "release").read_text().strip()
    return Kernel(name, release, place / "vmlinuz", place / "initrd", place / "disk.ext4")


def _packages(name: str, update: bool) -> Path:
    """The unpacked packages: what is downloaded is kept, however the disk is made of it."""
    kind = cache.directory() / f"packages-{name}"
    newest = max(kind.glob("[!.]*"), key=lambda path: path.stat().st_mtime, default=None)
    if newest is not None and not update:
        version = newest.name
    else:
        version = Suite(SUITES[name], cache.directory()).version(_META_PACKAGE)
    return cache.entry(kind.name, version, lambda scratch: _download(scratch, name))


def _download(scratch: Path, name: str) -> None:
    suite = Suite(SUITES[name], cache.directory())
    for package in _parts(suite, _META_PACKAGE):
        suite.download(package, scratch)


def _parts(suite: Suite, package: str) -> Iterator[str]:
    """The packages that hold files, following the dependencies of the meta package."""
    todo, seen = [package], {package}
    while todo:
        for name in suite.depends(todo.pop()):
            if _PART.match(name) and name not in seen:
                seen.add(name)
                todo.append(name)
                yield name


def _build(scratch: Path, packages: Path, root: rootfs.Root) -> None:
    unpacked = scratch / "unpacked"
    unpacked.mkdir()
    for package in sorted(packages.glob("*.deb")):
        unpack(package, unpacked, _WANTED)
    content = scratch / "content"
    content.mkdir()
    modules = _only(unpacked, "lib/modules/*", "usr/lib/modules/*")
    release = modules.name
    image = _only(unpacked, "boot/vmlinuz-*", "lib/modules/*/vmlinuz", "usr/lib/modules/*/vmlinuz")
    shutil.copyfile(image, scratch / "vmlinuz")
    base = content / "lib/modules"
    base.mkdir(parents=True)
    modules.rename(base / release)
    for config in unpacked.glob("boot/config-*"):  # newer packages have it beside the modules
        shutil.copyfile(config, base / release / "config")
    for link in ("build", "source", "vmlinuz"):
        (base / release / link).unlink(missing_ok=True)
    rootfs.chroot(root.tree, {"/mnt": content}, "depmod", "-b", "/mnt", release)
    _make_initramfs(base / release, root.tree, scratch / "initrd")
    for name in ("vmlinuz", "initrd"):
        shutil.copyfile(scratch / name, content / name)
    cache.make_image(content, scratch / "disk.ext4", "lab-kernel")
    (scratch / "release").write_text(release + "\n")
    shutil.rmtree(unpacked)
    shutil.rmtree(content)


def _only(directory: Path, *patterns: str) -> Path:
    found = [path for pattern in patterns for path in directory.glob(pattern)]
    if len(found) != 1:
        raise LabError(f"kernel package: {len(found)} files match {patterns[0]}, expected 1")
    return found[0]


def _make_initramfs(modules: Path, tree: Path, target: Path) -> None:
    """busybox, the modules that the disks need, in the order to load them, and the init script."""
    members = [
        initramfs.Member("init", initramfs.EXECUTABLE, _INIT.read_bytes()),
        initramfs.Member("bin", initramfs.DIRECTORY, b""),
        initramfs.Member(
            "bin/busybox", initramfs.EXECUTABLE, (tree / "usr/bin/busybox").read_bytes()
        ),
        initramfs.Member("modules", initramfs.DIRECTORY, b""),
    ]
    order = []
    for path in _load_order(modules):
        name = path.name.split(".")[0] + ".ko"
        content = path.read_bytes()
        if path.suffix == ".xz":
            content = lzma.decompress(content)
        members.append(initramfs.Member(f"modules/{name}", initramfs.FILE, content))
        order.append(name)
    text = "".join(f"{name}\n" for name in order)
    members.append(initramfs.Member("modules/order", initramfs.FILE, text.encode()))
    target.write_bytes(initramfs.pack(members))


def _load_order(modules: Path) -> list[Path]:
    """The files of the modules that are wanted and not built in, each after what it depends on."""
    needs: dict[str, list[str]] = {}
    names: dict[str, str] = {}
    for line in (modules / "modules.dep").read_text().splitlines():
        file, _, after = line.partition(":")
        needs[file] = after.split()
        names[Path(file).name.split(".")[0].replace("-", "_")] = file
    built_in = (modules / "modules.builtin").read_text()
    order: list[str] = []

    def add(file: str) -> None:
        for other in needs[file]:
            add(other)
        if file not in order:
            order.append(file)

    for name in _MODULES:
        if name in names:
            add(names[name])
        elif f"/{name}.ko" not in built_in:
            raise LabError(f"kernel {modules.name}: has no module {name}")
    return [modules / file for file in order]
