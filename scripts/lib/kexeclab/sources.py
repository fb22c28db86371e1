"""Files of Debian's kernel sources, for tests that compare with the kernel's own code.

Only the files that are asked for are kept, in the lab's cache; nothing of them is in a checkout.
"""

import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import debfile
from kexeclab import LabError, cache
from kexeclab.debian import Suite
from kexeclab.kernels import SUITES

_META_PACKAGE = "linux-source"
_PREFIX = "linux-source-"


@dataclass(frozen=True)
class Sources:
    """Files of one kernel's source.

    :ivar name: the series, a key of SUITES
    :ivar version: of the package
    """

    name: str
    version: str
    directory: Path

    def text(self, file: str) -> str:
        """Return a file by its name in the kernel's tree."""
        return (self.directory / _flat(file)).read_text(encoding="utf-8", errors="replace")


def fetch(name: str, files: Sequence[str]) -> Sources:
    """The files of the kernel of the series ``name``, from the cache or downloaded now (150 MB).

    :raises LabError: they are not to be had.
    """
    if name not in SUITES:
        raise LabError(f"kernel {name}: unknown; there are {', '.join(SUITES)}")
    with cache.locked():
        place = cache.entry(
            f"source-{name}", cache.key(*sorted(files)), lambda to: _build(to, name, files)
        )
    return Sources(name, (place / "version").read_text().strip(), place)


def _build(scratch: Path, name: str, files: Sequence[str]) -> None:
    suite = Suite(SUITES[name], cache.directory())
    package = next((p for p in suite.depends(_META_PACKAGE) if p.startswith(_PREFIX)), None)
    if package is None:
        raise LabError(f"{_META_PACKAGE}: {suite.name} has no such package")
    archive = suite.download(package, scratch)
    (scratch / "version").write_text(suite.version(package) + "\n")
    with debfile.content(archive, LabError) as content:
        _unpack(scratch, content, files)
    archive.unlink()


def _unpack(scratch: Path, content: tarfile.TarFile, files: Sequence[str]) -> None:
    """Unpack files of the archive in the package, which has them below a directory of its own."""
    for member in content:
        inner = content.extractfile(member) if member.name.endswith(".tar.xz") else None
        if inner is None:
            continue
        left = set(files)
        with tarfile.open(fileobj=inner, mode="r|xz") as tree:
            for one in tree:
                name = one.name.partition("/")[2]
                text = tree.extractfile(one) if name in left else None
                if text is not None:
                    (scratch / _flat(name)).write_bytes(text.read())
                    left.remove(name)
                if not left:
                    return
        raise LabError(f"{member.name}: has no {', '.join(sorted(left))}")
    raise LabError("kernel source: no archive in its package")


def _flat(name: str) -> str:
    return name.replace("/", "+")
