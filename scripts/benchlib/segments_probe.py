"""Times the parts of a mount that grow with the number of segments; one JSON object per mount.

Run by benchlib.segments with pkernfs's own Python; by hand: ``python segments_probe.py DIRECTORY
[ROUNDS]``. The directory is a pool that nobody has mounted; no daemon is started. Times are in
milliseconds, those of the parts summed over all segments.
"""

import functools
import json
import sys
import time
from collections.abc import Callable
from typing import Any

from pkernfs.dma.mount import mount_filesystem
from pkernfs.fs.segment_table import SegmentTable
from pkernfs.pool.directory import DirectoryPool
from pkernfs.region.region import Region

#: Whose method is which part of a mount.
_PARTS: list[tuple[type, str, str]] = [
    (SegmentTable, "__init__", "table"),
    (DirectoryPool, "restore", "restore"),
    (DirectoryPool, "set_owner", "set_owner"),
    (DirectoryPool, "strays", "strays"),
]


def _timed(function: Callable[..., Any], found: dict[str, float], key: str) -> Callable[..., Any]:
    """Return the function, which adds the time that it takes."""

    @functools.wraps(function)
    def timed(*arguments: Any) -> Any:
        began = time.perf_counter()
        try:
            return function(*arguments)
        finally:
            found[key] = found.get(key, 0.0) + (time.perf_counter() - began) * 1e3

    return timed


def main() -> int:
    directory = sys.argv[1]
    found: dict[str, float] = {}
    for owner, name, part in _PARTS:
        setattr(owner, name, _timed(getattr(owner, name), found, part))
    with Region.open(directory, write=True) as region:
        for _ in range(int(sys.argv[2]) if len(sys.argv) > 2 else 5):
            found.clear()
            began = time.perf_counter()
            fs = mount_filesystem(region)
            all_of_it = (time.perf_counter() - began) * 1e3
            found["rest"] = all_of_it - sum(found.values())
            print(json.dumps(found), flush=True)
            fs.unmount()
    return 0


if __name__ == "__main__":
    sys.exit(main())
