"""Where the memory of a file is as a file or device of its own: its segment's native path."""

from __future__ import annotations

import errno
import os

from pkernfs.fuse.segment_xattr import NAME, parse

#: What a file without a segment answers, and one of a mount that has no such attribute.
_NONE = (errno.ENODATA, errno.EOPNOTSUPP)


def native_path_of(fd: int) -> str | None:
    """Return the native path of a file's segment; None if it has no segment, or none that we know.

    :param fd: of the file; O_PATH is enough
    :raises OSError: the file cannot be asked, as its mount is dead.
    """
    try:
        path = parse(os.getxattr(f"/proc/self/fd/{fd}", NAME)).path
    except OSError as error:
        if error.errno in _NONE:
            return None
        raise
    except (ValueError, TypeError):  # a daemon of another version
        return None
    return path if isinstance(path, str) and path.startswith("/") else None
