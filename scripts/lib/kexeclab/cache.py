"""The lab's downloads and disks: kept outside any checkout, whole or not at all."""

import fcntl
import hashlib
import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from guestlab.kernel import default_cache
from kexeclab import LabError
from kexeclab.debian import run

_MANIFEST = "manifest.json"
_checked: set[Path] = set()


def directory() -> Path:
    """The lab's part of the cache."""
    return default_cache() / "lab"


@contextmanager
def locked() -> Iterator[None]:
    """One builder at a time, for one user."""
    directory().mkdir(parents=True, exist_ok=True)
    with (directory() / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def key(*parts: str | bytes) -> str:
    """A short name for what something is built from."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()[:16]


def entry(kind: str, name: str, build: Callable[[Path], None], keep: int = 2) -> Path:
    """The directory ``kind``/``name`` of the cache, made by ``build`` unless it is there and whole.

    Its regular files are recorded with their checksums, and checked once in each process. Of the
    kind's other entries all but the ``keep`` - 1 used last are removed.

    :raises LabError: ``build`` failed; nothing of it is left.
    """
    place = directory() / kind / name
    if not _whole(place):
        if place.exists():
            _remove(place)
        place.parent.mkdir(parents=True, exist_ok=True)
        for remnant in place.parent.glob(".*"):  # of a builder that was killed: we have the lock
            _remove(remnant)
        scratch = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=place.parent))
        try:
            scratch.chmod(0o755)
            build(scratch)
            _record(scratch)
            scratch.rename(place)
        except BaseException:
            _remove(scratch)
            raise
        _checked.add(place)
    os.utime(place)
    _drop_old(place.parent, keep)
    return place


def make_image(tree: Path, image: Path, label: str, spare_bytes: int = 8 << 20) -> None:
    """Make an ext4 file system of the directory ``tree``; ``spare_bytes`` of it stay free."""
    used = int(run("du", "-s", "-B1", "--apparent-size", str(tree)).split()[0])
    files = int(run("du", "-s", "--inodes", str(tree)).split()[0])
    # Each file wastes up to a block, and so does the map of inodes.
    size = used + used // 16 + files * 4096 + spare_bytes
    features = "^has_journal,^resize_inode,^metadata_csum"
    run(
        "mke2fs", "-q", "-t", "ext4", "-O", features, "-m", "0", "-L", label, "-N",
        str(files + 64), "-E", "hash_seed=4c696b65-0000-4000-8000-706b65726e66",
        "-d", str(tree), str(image), str(-(-size // 4096) * 4) + "k",
    )  # fmt: skip


def _files(place: Path) -> list[Path]:
    return [path for path in sorted(place.iterdir()) if path.is_file() and path.name != _MANIFEST]


def _record(place: Path) -> None:
    sums = {path.name: _sha256(path) for path in _files(place)}
    (place / _MANIFEST).write_text(json.dumps(sums, indent=1) + "\n")


def _whole(place: Path) -> bool:
    if place in _checked and place.exists():
        return True
    try:
        sums = json.loads((place / _MANIFEST).read_text())
        whole = bool(sums == {path.name: _sha256(path) for path in _files(place)})
    except (OSError, ValueError):
        return False
    if whole:
        _checked.add(place)
    return whole


def _sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _remove(tree: Path) -> None:
    """Remove a tree, but nothing of another file system that is mounted in it."""
    subprocess.run(["rm", "-rf", "--one-file-system", str(tree)], check=False, capture_output=True)


def _drop_old(kind: Path, keep: int) -> None:
    entries = sorted(
        (path for path in kind.iterdir() if not path.name.startswith(".")),
        key=lambda path: path.stat().st_mtime,
        reverse=True,
    )
    for path in entries[keep:]:
        _remove(path)


def require_root() -> None:
    """Refuse to build disks for anybody but root.

    :raises LabError: the caller is somebody else.
    """
    if os.geteuid() != 0:
        raise LabError("the lab's disks are built with chroot: run this as root")
