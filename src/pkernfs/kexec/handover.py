"""The handover, the step before a kexec: freeze, check, take digests, record.

The file system only freezes, stores and records (:mod:`pkernfs.kexec.mounted`). The checks and
digests in between are made here, in the process that hands over.
"""

from __future__ import annotations

import os
import time
from typing import NamedTuple

from pkernfs.errors import CorruptionError, NoSpaceError, PkernfsError, RegionError
from pkernfs.fs.fsck import Survey, survey
from pkernfs.fs.manifest import FileDigests, build_manifest, room_for_manifest
from pkernfs.kexec.daemon import Daemon
from pkernfs.kexec.file_digests import Digests, take_digests
from pkernfs.kexec.mounted import Frozen, MountedFileSystem
from pkernfs.kexec.observer import SILENT, Observer
from pkernfs.kexec.spans import KexecError, ends_with_kernel, refuse_if_it_ends
from pkernfs.layout import HANDOVER_FLAG_DIGESTS, NO_INO, STATE_PAGE
from pkernfs.quantities import Ino, PageNo
from pkernfs.region.digest import crc64
from pkernfs.region.files import sync_file_system
from pkernfs.region.region import Region


class Handover(NamedTuple):
    """A handover that was made; durations in seconds.

    ``not_digested`` counts the files whose segments could not be read for digests.
    """

    number: int
    inodes: int
    metadata_pages: int
    digest_bytes: int
    digest_seconds: float
    check_seconds: float
    seconds: float
    not_digested: int = 0


class _Checked(NamedTuple):
    """A file system that was found to be whole."""

    survey: Survey
    pages: frozenset[PageNo]
    seconds: float


class _Manifest(NamedTuple):
    """A manifest, and its inode; NO_INO: there was no space for it."""

    ino: Ino
    data: bytes


def load_for(path: str) -> None:
    """Have ready what the handover of a mount needs.

    A command calls it first: later, it would take time while the file system is frozen.

    :raises InvalidError: the path is on no mount.
    """
    Daemon.prepare_handover()
    if not ends_with_kernel(Daemon(path).mount.source):
        _import_for_kept_memory()


def _import_for_kept_memory() -> None:
    """Import what checks and opens memory that a kexec can keep.

    That takes 6 ms, for which a file need not wait. Opening would import it as well, but with the
    file system frozen.
    """
    from pkernfs.kexec import loaded  # noqa: F401
    from pkernfs.region import dax_backing, devmem  # noqa: F401


def hand_over_mount(
    path: str,
    *,
    digests: bool = False,
    command_line: str | None = None,
    force: bool = False,
    needs_initrd: bool = True,
    observer: Observer = SILENT,
) -> Handover:
    """Hand over the file system of the mount that ``path`` is in.

    :param digests: take digests of the data of all files as well.
    :param command_line: the next kernel's; None: that of the kernel loaded for kexec.
    :param force: go on although the region does not outlive a kexec, and say why it does not.
    :param needs_initrd: the loaded kernel must have an initrd if this one had one.
    :raises KexecError: it does not; the next kernel would take it for ordinary memory, say.
    :raises BusyError: files are open for writing, or it was handed over already.
    :raises CorruptionError: the check found something wrong; the file system is thawed.
    """
    start = time.monotonic()
    daemon = Daemon(path)
    try:
        _check_next_kernel(daemon.mount.source, command_line, needs_initrd)
    except KexecError as e:
        if not force:
            raise
        observer.say(f"forced, although: {e}")
    write_back(daemon.mount.mount_point)
    done = hand_over(daemon, digests=digests, observer=observer)
    return done._replace(seconds=time.monotonic() - start)


def _check_next_kernel(source: str, command_line: str | None, needs_initrd: bool) -> None:
    """Refuse a region that the next kernel would lose.

    :raises KexecError: it would.
    """
    refuse_if_it_ends(source)
    _import_for_kept_memory()
    from pkernfs.kexec import loaded

    loaded.check(source, command_line, needs_initrd=needs_initrd)


def write_back(mount_point: str) -> None:
    """Have the kernel send what mappings have written, as far as it has it.

    :raises PkernfsError: some of it could not be written.
    """
    fd = os.open(mount_point, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        sync_file_system(fd)
    except OSError as e:
        raise PkernfsError(f"{mount_point}: cannot write back: {e.strerror}") from None
    finally:
        os.close(fd)


def hand_over(
    mounted: MountedFileSystem,
    *,
    digests: bool = False,
    observer: Observer = SILENT,
    threads: int | None = None,
) -> Handover:
    """Freeze, check and record. If that fails, the file system is thawed.

    :param threads: for digests; None: as many as there are processors.
    :raises BusyError: files are open for writing, or it was handed over already.
    :raises CorruptionError: the check found something wrong.
    """
    start = time.monotonic()
    with mounted.frozen() as frozen:
        with mounted.open_region() as region:
            checked = _check(mounted, region, frozen, observer)
            taken = Digests([], 0, 0.0)
            if digests:
                taken = take_digests(mounted, region, checked.survey, observer, threads)
            manifest = _make_manifest(mounted, region, frozen, checked, taken.files, observer)
        flags = HANDOVER_FLAG_DIGESTS if digests and manifest.ino else 0
        digest = crc64(manifest.data) if manifest.ino else 0
        number = mounted.commit(manifest.ino, digest, flags)
    return Handover(
        number=number,
        inodes=checked.survey.report.summary["inodes"],
        metadata_pages=len(checked.pages),
        digest_bytes=taken.bytes,
        digest_seconds=taken.seconds,
        check_seconds=checked.seconds,
        seconds=time.monotonic() - start,
        not_digested=taken.left_out,
    )


def _check(
    mounted: MountedFileSystem, region: Region, frozen: Frozen, observer: Observer
) -> _Checked:
    """Check the frozen file system.

    :raises CorruptionError: something is wrong.
    :raises RegionError: the region is not the one that was frozen.
    """
    start = time.monotonic()
    with observer.progress(f"{mounted.name}: checking") as progress:
        found = survey(region, progress=progress)
    if found.uuid != frozen.uuid:
        raise RegionError(f"{region.name}: not the region that is mounted on {mounted.name}")
    problems = found.report.problems
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise CorruptionError(
            f"{mounted.name}: not handed over: {problems[0].message}{more}: "
            "unmount it and run fsck.pkernfs"
        )
    seconds = time.monotonic() - start
    return _Checked(found, frozenset(found.metadata_pages()), seconds)


def _make_manifest(
    mounted: MountedFileSystem,
    region: Region,
    frozen: Frozen,
    checked: _Checked,
    files: list[FileDigests],
    observer: Observer,
) -> _Manifest:
    """Have the file system keep a manifest of what was checked."""
    data = build_manifest(region, frozen.uuid, frozen.number, checked.pages, files)
    room = room_for_manifest(len(data))
    try:
        made = mounted.make_manifest(room)
    except NoSpaceError:
        observer.say(f"{mounted.name}: no space for the list: the next mount cannot compare")
        return _Manifest(NO_INO, b"")
    pages = (checked.pages | made.pages) - {STATE_PAGE}
    data = build_manifest(region, frozen.uuid, frozen.number, pages, files)
    data += bytes(room - len(data))
    mounted.write_manifest(made.ino, data)
    return _Manifest(made.ino, data)
