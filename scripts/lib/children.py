"""Work for several at once, a forked process each, heard in their order. Standard library only."""

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

T = TypeVar("T")
#: Is called with each line that there is to say.
Say = Callable[[str], object]


class _Child(NamedTuple):
    pid: int
    said: int


def run_each(those: Sequence[T], work: Callable[[T, Say], int], say: Say) -> list[int]:
    """Have ``work`` done for all of them at once; return the exit statuses that it returns.

    What each says comes in their order. The calling process has no other thread.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    children = [_start(one, work) for one in those]
    return [_finish(child, say) for child in children]


def _start(one: T, work: Callable[[T, Say], int]) -> _Child:
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid:
        os.close(write_end)
        return _Child(pid, read_end)
    status = 1
    try:
        os.close(read_end)
        with open(write_end, "w", encoding="utf-8", errors="surrogateescape") as lines:
            status = work(one, lambda line: print(line, file=lines, flush=True))
    except BaseException:  # what is above this line is the parent's
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def _finish(child: _Child, say: Say) -> int:
    with open(child.said, encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            say(line.rstrip("\n"))
    return os.waitstatus_to_exitcode(os.waitpid(child.pid, 0)[1])
