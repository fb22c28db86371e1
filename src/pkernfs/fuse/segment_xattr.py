"""The virtual attribute with the segment of a file: its format, written and read."""

from __future__ import annotations

import errno
import json
import os
from typing import TYPE_CHECKING, NamedTuple

from pkernfs.errors import NoDataError, NotSupportedError, RegionError
from pkernfs.layout import POOL_DAX

if TYPE_CHECKING:
    from pkernfs.fs.filesystem import FileSystem
    from pkernfs.quantities import Ino

NAME = "system.pkernfs.segment"


class SegmentInfo(NamedTuple):
    """The segment of a file: its number, ``directory`` or ``dax``, path, bytes, its unit.

    ``native``: the names of the file lead to it.
    """

    number: int
    kind: str
    path: str
    length: int
    granule: int
    native: bool = False


def value(fs: FileSystem, ino: Ino) -> bytes:
    """The value of the attribute.

    :raises NoDataError: the file has no segment.
    :raises RegionError: it is lost: what has its name now may be another file's.
    :raises WorkNeeded: the pool has to restore it.
    """
    row, pool = fs.segments.there(ino), fs.segments.pool
    if row is None or pool is None:
        raise NoDataError("no segment")
    path = fs.segments.native_path(row)
    if path is None:
        reason = fs.segments.lost.get(row.number, f"segment {row.number}: it is not there")
        raise RegionError(reason, errno.EIO)
    kind = "dax" if row.kind == POOL_DAX else "directory"
    native = fs.natives.is_native(ino)
    info = SegmentInfo(row.number, kind, path, row.length, pool.granule, native)
    return json.dumps(info._asdict()).encode()


def parse(text: bytes) -> SegmentInfo:
    """Decode a value.

    :raises ValueError: it is none.
    """
    found = json.loads(text)
    if not isinstance(found, dict):
        raise ValueError("not an object")
    return SegmentInfo(**{name: found[name] for name in SegmentInfo._fields if name in found})


def read(file: str) -> SegmentInfo | None:
    """Ask a mount for the segment of a file; None: it has none.

    :raises NotSupportedError: it cannot be told.
    """
    try:
        return parse(os.getxattr(file, NAME))
    except OSError as e:
        if e.errno in (errno.ENODATA, errno.EOPNOTSUPP):
            return None
        if e.errno == errno.EIO:
            raise NotSupportedError(f"{file}: its segment is lost: the mount's log says why") from e
        raise NotSupportedError(f"{file}: cannot read its segment: {e.strerror}") from e
    except (ValueError, TypeError) as e:
        raise NotSupportedError(f"{file}: the daemon is of another version: {e}") from e
