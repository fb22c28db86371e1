"""Going to the background: the fork, the way from the terminal, and where the daemon logs.

Nothing here knows what is served. The first process learns through a pipe whether the daemon is
ready or why it failed, and raises that; its caller says it.
"""

from __future__ import annotations

import contextlib
import logging
import logging.handlers
import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

from pkernfs.errors import PkernfsError

log = logging.getLogger(__name__)

_LAST_STREAM = 2

_READY = b"r"
_FAILED = b"f"  # an expected failure; its message follows
_BUG = b"b"  # another exception; its repr follows

#: To be called once when the daemon serves.
Ready = Callable[[], None]


class DaemonError(PkernfsError):
    """The daemon ended before it was ready, and neither its region nor its mount is why."""


def in_background(serve: Callable[[Ready], None], failed_status: int) -> None:
    """Run ``serve`` in a child; return when it calls its argument.

    The fork comes first, so that locks and memory belong to the daemon from the start. A child that
    fails exits with ``failed_status``.

    :raises PkernfsError: what ``serve`` failed with, by its message.
    :raises DaemonError: the child died, failed otherwise, or ended without being ready.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    read_end, write_end = os.pipe()
    child = os.fork()
    if not child:
        os.close(read_end)
        _run_daemon(serve, write_end, failed_status)
    os.close(write_end)
    with open(read_end, "rb") as answer:
        word = answer.read(1)
        if word == _READY:
            return
        told = answer.read().decode("utf-8", "surrogatepass")
    _, status = os.waitpid(child, 0)
    if word == _FAILED:
        raise PkernfsError(told)
    if word == _BUG:
        raise DaemonError(f"the daemon failed: {told}")
    if os.WIFSIGNALED(status):
        raise DaemonError(f"the daemon died: {signal.strsignal(os.WTERMSIG(status))}")
    raise DaemonError("the daemon ended before the mount answered")


def _run_daemon(serve: Callable[[Ready], None], write_end: int, failed_status: int) -> NoReturn:
    status = failed_status
    pipe = open(write_end, "wb", buffering=0)  # noqa: SIM115 - until it is ready, or ends
    inherited = inherited_descriptors()

    def tell(word: bytes, message: str = "") -> None:
        if not pipe.closed:
            with contextlib.suppress(BrokenPipeError), pipe:
                pipe.write(word + message.encode("utf-8", "surrogatepass"))

    def ready() -> None:
        os.chdir("/")
        _leave_the_terminal()
        close_all(inherited)
        tell(_READY)

    try:
        os.setsid()
        _log_to_journal()
        serve(ready)
        status = 0
    except PkernfsError as e:
        tell(_FAILED, str(e))
    except BaseException as e:
        log.critical("the daemon failed", exc_info=e)
        tell(_BUG, repr(e))
    finally:
        os._exit(status)


def inherited_descriptors() -> list[int]:
    """Return what came with the caller, beside the standard streams: a lock, a pipe, a directory.

    What has outlived an exec is not closed on exec, and all that Python opens is (PEP 446). Ask
    before a library opens anything. A close_range() would end what the daemon itself has open.
    The daemon has these until it serves: the region may be /proc/self/fd/N.
    """
    found = []
    for fd in sorted(int(name) for name in os.listdir("/proc/self/fd")):
        with contextlib.suppress(OSError):  # that of the directory itself
            if fd > _LAST_STREAM and os.get_inheritable(fd):
                found.append(fd)
    return found


def close_all(descriptors: list[int]) -> None:
    """Close what :func:`inherited_descriptors` has returned."""
    for fd in descriptors:
        os.close(fd)


def _leave_the_terminal() -> None:
    null = os.open(os.devnull, os.O_RDWR)
    for fd in range(_LAST_STREAM + 1):
        os.dup2(null, fd)
    os.close(null)


def log_to_stderr() -> None:
    """The log of a daemon that stays in the foreground."""
    logging.basicConfig(format="pkernfs: %(message)s", level=_log_level())


def _log_to_journal() -> None:
    """The system log for a daemon without a terminal."""
    if os.path.exists("/dev/log"):
        with contextlib.suppress(OSError):
            to_log = logging.handlers.SysLogHandler(
                "/dev/log", logging.handlers.SysLogHandler.LOG_DAEMON
            )
            to_log.setFormatter(logging.Formatter(f"pkernfs[{os.getpid()}]: %(message)s"))
            logging.basicConfig(handlers=[to_log], level=_log_level())
            return
    logging.basicConfig(handlers=[logging.NullHandler()])


def _log_level() -> int:
    return logging.DEBUG if os.environ.get("PKERNFS_DEBUG") else logging.WARNING
