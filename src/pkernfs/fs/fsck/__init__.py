"""fsck: finds every inconsistency of the format, and repairs what can be repaired without guessing.

Nothing is shared with the code that serves the file system but the layout, the region and the
journal: own walk, own bitmaps. A check and a repair are the same work on an overlay of the region's
pages (:mod:`~pkernfs.fs.fsck.image`). A repair stores it at the end, through the journal, so that
fsck may be stopped at any instant and be run again.

The passes are modules, numbered in the order in which :func:`_run` comes to them: superblocks,
table, names, segments, data, handover, scavenge, maps, counts, connect, repair, tables. The others
are what they work with: structures (one page each), rows, trees, claims, context, image, problems.
"""

from __future__ import annotations

from collections.abc import Callable

from pkernfs.errors import ReadOnlyError
from pkernfs.fs.fsck import (
    connect,
    counts,
    data,
    handover,
    maps,
    names,
    scavenge,
    segments,
    superblocks,
    table,
    tables,
)
from pkernfs.fs.fsck import repair as repairs
from pkernfs.fs.fsck.context import Context
from pkernfs.fs.fsck.problems import Code, Problem, Report
from pkernfs.fs.fsck.survey import Survey
from pkernfs.fs.fsck.trees import Allocator, NoRoomError
from pkernfs.layout import STATE_FROZEN
from pkernfs.region.region import Region

__all__ = ["Code", "Problem", "Report", "Survey", "check", "survey"]

_TOTAL = 1000
# Where on the way of the progress each stage starts; a stage without an entry stays where it was.
_STAGES = {"block maps": (0, 50), "inodes": (50, 700), "searching": (700, 750)}
_STAGES |= {"page maps": (750, 800), "free blocks": (800, 950)}


def check(
    region: Region,
    *,
    repair: bool,
    verify_zero: bool | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Check a region that nobody else has open, and repair it if asked to.

    ``verify_zero``: whether blocks marked as zero are read to see that they are. None reads those
    that are not holes of the region's file, if it can tell holes; True reads them all; False none.
    ``progress`` is called with what is done of how much.

    :raises FormatError: no pkernfs, one of another version or with unknown features, a region
        that was truncated, or neither superblock left; nothing was changed.
    :raises ReadOnlyError: a repair of a region that is not writable.
    """
    if repair and not region.writable:
        raise ReadOnlyError(f"{region.name}: cannot repair a region that was opened read-only")
    ctx = _examine(region, repair=repair, verify_zero=verify_zero, progress=progress)
    report = ctx.report
    if repair and not report.counts[Code.NO_ROOM]:
        # What is only noted is for the mount after a handover, which compares before it mends.
        frozen = ctx.state is not None and ctx.state.state == STATE_FROZEN
        if report.problems or (report.notes and not frozen):
            ctx.image.store()
            report.set_fixed()
        report.repaired = True
    return report


def survey(region: Region, *, progress: Callable[[int, int], None] | None = None) -> Survey:
    """Check a region that is mounted and frozen, and tell what is in it.

    Contents of files and of free blocks are not read.

    :raises FormatError: as :func:`check`.
    """
    return Survey(_examine(region, repair=None, verify_zero=False, progress=progress))


def _examine(
    region: Region,
    *,
    repair: bool | None,
    verify_zero: bool | None,
    progress: Callable[[int, int], None] | None,
) -> Context:
    """Run all passes. ``repair`` None: nothing of a repair is worked out where nothing is wrong."""
    report = Report()
    told = 0

    def tell(stage: str, fraction: float) -> None:
        nonlocal told
        start, end = _STAGES[stage]
        told = max(told, start + int((end - start) * fraction))
        if progress is not None:
            progress(told, _TOTAL)

    ctx = superblocks.open_image(region, report, tell, repair=bool(repair))
    ctx.only_look = repair is None
    ctx.verify_zero = verify_zero
    try:
        try:
            _run(ctx)
        except NoRoomError:
            ctx = _without_copies(ctx)
            _run(ctx)
    except NoRoomError:
        ctx.report.add(Code.NO_ROOM, "file system", fixable=False)
        return ctx
    ctx.report.summary = counts.summarize(ctx)
    return ctx


def _without_copies(before: Context) -> Context:
    """Start over: copies of data took the space that metadata needs."""
    report = Report()
    ctx = superblocks.open_image(before.image.region, report, before.progress, repair=False)
    report.notes += [
        note
        for note in before.report.notes
        if note.code is Code.JOURNAL_PENDING and not report.counts[note.code]
    ]
    ctx.verify_zero = before.verify_zero
    ctx.may_copy = False
    return ctx


def _run(ctx: Context) -> None:
    """Run all passes on the image; the order of their first calls is that of their numbers."""
    superblocks.load_state(ctx)
    superblocks.load_block_maps(ctx)
    table.load_table(ctx)
    table.check_inodes(ctx)
    names.check_trees(ctx)
    segments.load_rows(ctx)
    data.check_data(ctx)
    handover.check_record(ctx)
    scavenge.find_leaves(ctx)
    data.bound_sizes(ctx)
    maps.compare(ctx)
    counts.compare(ctx)
    space = Allocator(ctx)
    scavenge.fill_gaps(ctx, space)
    segments.match(ctx)
    scavenge.put_back(ctx)
    segments.make_files(ctx, space)
    connect.Connector(ctx, space).run()
    if not ctx.only_look or ctx.report.problems:
        repairs.rebuild(ctx, space)
        segments.write(ctx, space)
        counts.write(ctx)
        maps.write(ctx)
    tables.check_tables(ctx)
