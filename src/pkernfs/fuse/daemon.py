"""The daemon of one mount, from its start to its end: open, mount, serve, clean up.

trio and pyfuse3 are imported when a mount is served, not before. What runs while it is served is in
:mod:`pkernfs.fuse.session`; how a daemon gets to the background, in :mod:`pkernfs.fuse.background`.
"""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pkernfs.control.mounts import Mount, own_mount
from pkernfs.control.sockets import Listener
from pkernfs.errors import FormatError, PkernfsError, RegionError
from pkernfs.fuse import mounting
from pkernfs.fuse.mounting import Options

if TYPE_CHECKING:
    from pkernfs.fs.filesystem import FileSystem
    from pkernfs.fuse.operations import Operations
    from pkernfs.pool.pool import Segment
    from pkernfs.region.region import Region

log = logging.getLogger(__name__)

_SPIN_MICROSECONDS = 100.0  # about as much as falling asleep and waking up would cost


def run_mount(
    spec: str,
    mountpoint: str,
    options: Options,
    *,
    ready: Callable[[], None],
    tell: Callable[[str], None],
) -> None:
    """Open the region ``spec``, mount it, serve until it is unmounted, clean up.

    ``options`` is what :func:`pkernfs.options.parse_mount_options` made of ``-o``; ``mountpoint``
    is a directory that no pkernfs is mounted on. ``ready`` is called once when the mount answers;
    ``tell`` gets each line about a handover before this mount.

    :raises PkernfsError: the region cannot be opened, or was not mounted.
    """
    try:
        with _open_region(spec, options) as region:
            fs = _open_filesystem(region, options)
            try:
                _report_mount(fs, options, tell)
                serve(fs, region, mountpoint, options, ready)
            finally:
                region.serving(False)
                fs.unmount()
    except PkernfsError:
        log.debug("mount failed", exc_info=True)
        raise


def _open_region(spec: str, options: Options) -> Region:
    from pkernfs.fs.placement import open_region

    return open_region(spec, write="ro" not in options, phys_base=options.get("phys_base"))


def _open_filesystem(region: Region, options: Options) -> FileSystem:
    from pkernfs.dma.mount import mount_filesystem
    from pkernfs.fs import placement

    if "mkfs" in options:
        from pkernfs.fs import mkfs

        found = mkfs.probe(region)
        if found.content is mkfs.Content.EMPTY:
            mkfs.make_filesystem(region)
        elif found.content is not mkfs.Content.PKERNFS:
            raise FormatError(f"{region.name}: not formatted: it holds {found.what}")
    segments = options.get("segments") != "no"
    fs = mount_filesystem(
        region,
        segments=segments,
        park="verify" not in options,  # which reads all of them
        read_only="ro" in options,
    )
    placement.record(fs.super)
    _resume_units(fs)
    return fs


def _resume_units(fs: FileSystem) -> None:
    """Units may be walking the tables: before anything changes, they are told to forget."""
    from pkernfs.fs.names import ROOT_PGTABLES
    from pkernfs.layout import IOMMU_INO

    if os.geteuid() or not fs.find(IOMMU_INO, ROOT_PGTABLES):
        return
    from pkernfs.dma.activation import Activation

    try:
        Activation(fs).resume_units()
    except PkernfsError as e:
        fs.fail(f"units walk the tables: {e}")


def _report_mount(fs: FileSystem, options: Options, tell: Callable[[str], None]) -> None:
    """After a handover: how long ago it was, and what has changed since."""
    mount_report = fs.mount_report
    if mount_report is None or mount_report.record is None:
        return
    from pkernfs.control import verification

    if "verify" in options:
        verification.verify_now(fs)
    for line in verification.lines(fs):
        tell(line)


def serve(
    fs: FileSystem, region: Region, mountpoint: str, options: Options, ready: Callable[[], Any]
) -> None:
    """Mount ``fs`` at ``mountpoint`` and handle requests until it is unmounted.

    ``ready`` is called once when the mount answers. The file system itself is left for the caller
    to unmount; nothing is mounted any more after the return, whatever the reason.

    :raises RegionError: the mount was refused.
    """
    import trio

    from pkernfs.fuse import operations, shim
    from pkernfs.fuse.event_loop import FastTrio
    from pkernfs.fuse.session import Session

    import pyfuse3  # isort: skip

    module: Any = pyfuse3
    cache = options.get("cache", "auto")
    server = operations.Operations(fs, cache=cache)
    if fs.segments.pool is not None and fs.segments.pool.passes:
        server.native = fs.segments.descriptor
    shim.prepare(
        server.data,
        fsname=os.fsencode(region.name),
        direct=cache != "page",
        passthrough=server.native is not None,
        spin_us=options.get("spin", _SPIN_MICROSECONDS),
    )
    try:
        pyfuse3.init(server, mountpoint, mounting.fuse_options(options))
    except RuntimeError as e:
        reason = shim.last_message() or str(e)
        raise RegionError(f"{mountpoint}: cannot mount: {reason}") from e
    listener = None
    try:
        shim.attach()
        mount = own_mount(os.path.abspath(mountpoint), region.name)
        session = Session(fs, region, mountpoint, server, mount.device if mount else None)
        if mount is not None:
            _tell_pool(fs, server, mount.device)
        listener = session.listener = _listen(mountpoint, mount)
        server.waiting = session
        server.freed = session.freed
        module.trio = FastTrio(session.idle)
        region.serving(True)
        _tune_garbage_collector()
        trio.run(session.run, ready)
    finally:
        region.serving(False)
        if listener is not None:
            listener.close()
        module.trio = trio
        pyfuse3.close(unmount=False)
        mounting.detach_what_is_left(mountpoint, region.name)


def _tell_pool(fs: FileSystem, server: Operations, device: int) -> None:
    """Have the pool know by which files of the mount mappings are passed through."""
    from pkernfs.host.holders import Target

    def passed(segment: Segment) -> Target | None:
        passes = server.passthrough is not None and server.passthrough.passes(segment.ino)
        return Target(device, segment.ino) if passes else None

    if fs.segments.pool is not None:
        fs.segments.pool.passed = passed


def _listen(mountpoint: str, mount: Mount | None) -> Listener | None:
    """Open the control socket; without one the mount works all the same."""
    try:
        if mount is None:
            raise OSError("the mount is not in /proc/self/mountinfo")
        return Listener(mount.device)
    except OSError as e:
        log.warning("%s: no control socket, so no commands but reading: %s", mountpoint, e)
        return None


def _tune_garbage_collector() -> None:
    """Look for cycles rarely: it takes long, all that is here stays, and handlers make none."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 100)
