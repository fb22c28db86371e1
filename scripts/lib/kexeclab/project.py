"""This checkout as a disk: a copy of its files, and a virtual environment with it installed by pip.

The installation is made inside the root file system, with Debian's own Python packages and no
network.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path

from kexeclab import LabError, cache, rootfs

CHECKOUT = Path(__file__).resolve().parents[3]
_BUILT_FROM = ("pyproject.toml", "setup.py", "README.md", "src")
_COPIED = (*_BUILT_FROM, "scripts", "tests", "docs", "CHANGELOG.md")
_GENERATED = ("__pycache__", ".hypothesis", "_native.c", "_shim.c", "_declared.h")
_INSTALL = f"""
set -e
cp -r {rootfs.PROJECT} /tmp/source
rm -rf {rootfs.PROJECT}/*
python3 -m venv --system-site-packages {rootfs.PROJECT}/.venv
{rootfs.PROJECT}/.venv/bin/python -m pip install -q --no-index --no-build-isolation /tmp/source
"""


def fetch() -> Path:
    """The disk of the checkout as it is now, mounted by machines at rootfs.PROJECT.

    :raises LabError: the project cannot be installed.
    """
    root = rootfs.fetch()
    installed = _installed(root)
    name = cache.key(installed.name, *_fingerprint(_COPIED))
    return cache.entry("project", name, lambda place: _make(place, installed), 3) / "disk.ext4"


def _installed(root: rootfs.Root) -> Path:
    name = cache.key(root.tree.parent.name, _INSTALL, *_fingerprint(_BUILT_FROM))
    return cache.entry("installed", name, lambda place: _install(place, root), 3)


def _install(place: Path, root: rootfs.Root) -> None:
    cache.require_root()
    target = place / "pkernfs"
    _copy(_BUILT_FROM, target)
    rootfs.chroot(root.tree, {rootfs.PROJECT: target}, "sh", "-c", _INSTALL)
    if not (target / ".venv/bin/pkernfs").exists():
        raise LabError("pip: installed the project, but left no command pkernfs")


def _make(place: Path, installed: Path) -> None:
    content = place / "content"
    shutil.copytree(installed / "pkernfs", content, symlinks=True)
    _copy(_COPIED, content)
    cache.make_image(content, place / "disk.ext4", "lab-project")
    shutil.rmtree(content)


def _files(names: tuple[str, ...]) -> Iterator[Path]:
    for name in names:
        path = CHECKOUT / name
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            relative = file.relative_to(CHECKOUT)
            generated = file.suffix in (".so", ".pyc") or ".egg-info" in str(relative)
            if file.is_file() and not generated and not set(relative.parts) & set(_GENERATED):
                yield relative


def _fingerprint(names: tuple[str, ...]) -> Iterator[str | bytes]:
    for path in _files(names):
        yield str(path)
        yield (CHECKOUT / path).read_bytes()


def _copy(names: tuple[str, ...], target: Path) -> None:
    for path in _files(names):
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(CHECKOUT / path, target / path)
