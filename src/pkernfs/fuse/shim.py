"""The part of FUSE that pyfuse3 and libfuse leave out: all cffi for it is here.

Import it before pyfuse3: the extension is loaded with its symbols global, so that pyfuse3's session
is made by our ``fuse_session_new`` (shim.c). Then::

    shim.prepare(server, fsname=..., direct=True)
    pyfuse3.init(...)
    shim.attach()

File-system semantics are not here: a :class:`ExtraOperations` gets the added operations.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from pkernfs.errors import NotSupportedError
from pkernfs.quantities import Ino

_flags = sys.getdlopenflags()
sys.setdlopenflags(os.RTLD_NOW | os.RTLD_GLOBAL)
try:
    from pkernfs.fuse._shim import ffi, lib
finally:
    sys.setdlopenflags(_flags)

log = logging.getLogger(__name__)

#: What a :class:`ExtraOperations` method returns when :func:`reply_later` will follow.
LATER: int = lib.PK_LATER

#: The request being handled: ``uid``, ``nodeid``; ``kill``: the kernel wants set-id bits gone;
#: ``tmpfile``: what comes as CREATE is a file without a name.
request: Any = lib.pk_request

_CACHE_SYMLINKS = 1 << 23
_AUTO_INVAL_DATA = 1 << 12
_EXPLICIT_INVAL_DATA = 1 << 25
_PARALLEL_DIROPS = 1 << 18
_HANDLE_KILLPRIV_V2 = 1 << 28
_DIRECT_IO_ALLOW_MMAP = 1 << 36
_PASSTHROUGH = 1 << 37

_CAP_SYS_ADMIN = 1 << 21


class ExtraOperations(Protocol):
    """The operations that pyfuse3 has no slot for. Each returns a result or a negative errno."""

    def on_write(self, req: Any, ino: Ino, data: memoryview, offset: int, writeback: bool) -> int:
        """Bytes written, or :data:`LATER`. ``data`` is valid until the return only.

        ``writeback``: the kernel writes a page that a shared mapping made dirty.
        """

    def on_fallocate(self, req: Any, ino: Ino, mode: int, offset: int, length: int) -> int:
        """0, or :data:`LATER`."""

    def on_lseek(self, ino: Ino, offset: int, whence: int) -> int:
        """The offset found; ``whence`` is SEEK_DATA or SEEK_HOLE."""

    def on_copy(
        self, req: Any, ino_in: Ino, off_in: int, ino_out: Ino, off_out: int, length: int
    ) -> int:
        """Bytes copied, or :data:`LATER`."""

    def on_statx(self, ino: Ino, to: Any) -> int:
        """0; the attributes are in ``to``, a ``struct pk_statx``."""


class Note(NamedTuple):
    """What :data:`request` says of how a request is meant, for one that is handled later."""

    kill: int
    tmpfile: int

    @classmethod
    def take(cls) -> Note:
        """Take the note on the request being handled."""
        return cls(request.kill, request.tmpfile)

    @contextlib.contextmanager
    def in_force(self) -> Iterator[None]:
        """Let :data:`request` say so meanwhile; nothing may wait in the block."""
        before = self.take()
        request.kill, request.tmpfile = self
        try:
            yield
        finally:
            request.kill, request.tmpfile = before


class ProtocolVersion(NamedTuple):
    """A version of the FUSE protocol."""

    major: int
    minor: int


@dataclass(frozen=True)
class Capabilities:
    """The capabilities of a FUSE connection.

    ``added_operations``: fallocate, lseek and copy_file_range are served. ``killpriv``: the daemon
    clears set-id bits and is told when. ``direct_mmap``: MAP_SHARED works on direct_io files.
    ``passthrough``: mappings of a file can be those of another one.
    """

    added_operations: bool
    attached: bool
    killpriv: bool
    direct_mmap: bool
    passthrough: bool
    explicit_invalidation: bool
    max_write: int
    protocol: ProtocolVersion


_server: ExtraOperations | None = None
_keep: list[Any] = []  # memory that C holds a pointer to
_attached = False


def prepare(
    server: ExtraOperations,
    *,
    fsname: bytes,
    direct: bool,
    passthrough: bool = False,
    killpriv: bool = True,
    spin_us: float = 0,
) -> None:
    """Set up what the next session is to be; call it before ``pyfuse3.init``.

    ``fsname`` is the mount's source as it shall show in mount tables, any bytes. ``direct`` asks
    for shared mappings of direct_io files. ``passthrough`` asks for :func:`pass_through`; overlayfs
    can then be stacked on the mount only once. ``spin_us`` is how long (microseconds) a read of the
    device looks for the next request before the event loop is entered.
    """
    global _server, _attached
    lib.pk_reset()
    _attached = False
    _server = server
    argument = ffi.new(
        "char[]", b"-ofsname=" + fsname.replace(b"\\", b"\\\\").replace(b",", b"\\,")
    )
    _keep[:] = [argument]
    lib.pk_mount_arg = argument
    lib.pk_take_writes = 1
    lib.pk_spin_ns = int(spin_us * 1000)
    wanted = _EXPLICIT_INVAL_DATA | _CACHE_SYMLINKS | _PARALLEL_DIROPS
    if killpriv:
        wanted |= _HANDLE_KILLPRIV_V2
    if direct:
        wanted |= _DIRECT_IO_ALLOW_MMAP
    if passthrough:
        wanted |= _PASSTHROUGH
    lib.pk_wanted = wanted
    lib.pk_unwanted = _AUTO_INVAL_DATA


def attach() -> None:
    """Go between libfuse and the kernel; call it right after ``pyfuse3.init``.

    Without it (libfuse before 3.13) the mount works, with fewer capabilities: a warning says so.

    :raises NotSupportedError: pyfuse3 did not use our ``fuse_session_new``, so that even fallocate
        would be missing.
    """
    global _attached
    if not lib.pk_tables:
        raise NotSupportedError(
            "libfuse: operations cannot be added: pyfuse3 was loaded before pkernfs.fuse.shim, "
            "or is linked statically"
        )
    result = lib.pk_attach()
    if result:
        log.warning("libfuse: capabilities cannot be added: %s", os.strerror(-result))
    _attached = not result


def last_message() -> str:
    """Return the last complaint of libfuse before :func:`attach`, without its prefix."""
    text = bytes(ffi.string(lib.pk_message)).decode(errors="replace").strip()
    return text.removeprefix("fuse: ")


def capabilities() -> Capabilities:
    """Return what was negotiated; complete once the first request has been answered."""
    granted = lib.pk_negotiated.granted
    return Capabilities(
        added_operations=bool(lib.pk_tables),
        attached=_attached,
        killpriv=bool(granted & _HANDLE_KILLPRIV_V2),
        direct_mmap=bool(granted & _DIRECT_IO_ALLOW_MMAP),
        passthrough=bool(granted & _PASSTHROUGH),
        explicit_invalidation=bool(granted & _EXPLICIT_INVAL_DATA),
        max_write=lib.pk_negotiated.max_write,
        protocol=ProtocolVersion(lib.pk_negotiated.major, lib.pk_negotiated.minor),
    )


def may_map_direct() -> bool:
    """Tell in ``init()`` whether shared mappings of direct_io files are being negotiated."""
    return _attached and bool(lib.pk_wanted & lib.pk_negotiated.offered & _DIRECT_IO_ALLOW_MMAP)


def why_no_passthrough() -> str | None:
    """Tell why this session passes nothing through; None: it can, as ``init()`` may already ask."""
    if not lib.pk_wanted & _PASSTHROUGH:
        return "the region has no pool on tmpfs"
    if not _attached:
        return "libfuse 3.13 or newer is needed"
    if not lib.pk_negotiated.offered & _PASSTHROUGH:
        release = os.uname().release
        return f"kernel {release} does not offer it: 6.9 or newer has it (CONFIG_FUSE_PASSTHROUGH)"
    if not _effective_capabilities() & _CAP_SYS_ADMIN:
        return "the daemon lacks CAP_SYS_ADMIN"
    return None


def _effective_capabilities() -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1], 16) for line in status if line.startswith("CapEff:"))


def device() -> int:
    """Return the descriptor of /dev/fuse that the mounted session has."""
    return int(lib.pk_device())


def pass_through(fh: int, backing_id: int) -> None:
    """Have the reply that opens ``fh`` pass its mappings through to a backing file; 0: to none.

    Reads and writes keep coming to the daemon. Call it for each handle that is opened.
    """
    lib.pk_backed_fh = fh
    lib.pk_backing_id = backing_id


def attached() -> bool:
    """Tell whether reads of the device go through us, and do not block."""
    return _attached


def found_no_request() -> bool:
    """Tell whether the last read of the device found no request; asking clears the answer."""
    if lib.pk_idle:
        lib.pk_idle = 0
        return True
    return False


def reply_later(req: Any, result: int, *, counted: bool) -> None:
    """Answer a request for which :data:`LATER` was returned.

    ``result`` is a negative errno or, if ``counted``, a number of bytes (write, copy), else 0.
    """
    lib.pk_reply_later(req, result, counted)


def _on_write(req: Any, ino: Ino, data: Any, size: int, offset: int, writeback: int) -> int:
    assert _server is not None
    return _server.on_write(req, ino, memoryview(ffi.buffer(data, size)), offset, bool(writeback))


def _on_fallocate(req: Any, ino: Ino, mode: int, offset: int, length: int) -> int:
    assert _server is not None
    return _server.on_fallocate(req, ino, mode, offset, length)


def _on_lseek(ino: Ino, offset: int, whence: int) -> int:
    assert _server is not None
    return _server.on_lseek(ino, offset, whence)


def _on_copy(req: Any, ino_in: Ino, off_in: int, ino_out: Ino, off_out: int, length: int) -> int:
    assert _server is not None
    return _server.on_copy(req, ino_in, off_in, ino_out, off_out, length)


def _on_statx(ino: Ino, to: Any) -> int:
    assert _server is not None
    return _server.on_statx(ino, to)


for _function in (_on_write, _on_fallocate, _on_lseek, _on_copy, _on_statx):
    ffi.def_extern(name=f"pk{_function.__name__}", error=-errno.EIO)(_function)
