"""Builds ``pkernfs.fuse._shim`` from shim.c, in cffi's API mode, against libfuse3."""

import shlex
import subprocess
import sys
from pathlib import Path

from cffi import FFI

_SOURCE = str(Path(__file__).resolve().parents[2])
sys.path.insert(0, _SOURCE)
try:
    from pkernfs.native import compiler
finally:
    sys.path.remove(_SOURCE)

_STATE = """
    struct pk_request {
        uint64_t nodeid, serial;
        uint32_t uid, opcode, kill, tmpfile;
    };
    struct pk_statx {
        uint64_t size, pages, timeout_seconds;
        int64_t atime_ns, btime_ns, ctime_ns, mtime_ns;
        uint32_t mode, nlink, uid, gid, major, minor;
    };
    struct pk_negotiated {
        uint64_t offered, granted;
        uint32_t major, minor, max_write, max_readahead, done;
    };
"""

ffibuilder = FFI()

ffibuilder.cdef(
    _STATE
    + """
    extern struct pk_request pk_request;
    extern struct pk_negotiated pk_negotiated;
    extern uint64_t pk_wanted, pk_unwanted, pk_spin_ns;
    extern uint64_t pk_backed_fh;
    extern int32_t pk_backing_id;
    extern int pk_idle, pk_tables, pk_take_writes;
    extern char *pk_mount_arg;
    extern char pk_message[256];

    int pk_attach(void);
    int pk_device(void);
    void pk_reset(void);
    void pk_reply_later(void *req, int64_t result, int counted);

    extern "Python" int64_t pk_on_write(void *req, uint64_t ino, char *data, uint64_t size,
                                        int64_t offset, int writeback);
    extern "Python" int64_t pk_on_fallocate(void *req, uint64_t ino, int mode, int64_t offset,
                                            int64_t length);
    extern "Python" int64_t pk_on_lseek(uint64_t ino, int64_t offset, int whence);
    extern "Python" int64_t pk_on_copy(void *req, uint64_t ino_in, int64_t off_in,
                                       uint64_t ino_out, int64_t off_out, uint64_t length);
    extern "Python" int64_t pk_on_statx(uint64_t ino, struct pk_statx *to);

    #define PK_LATER ...
    """
)

_PROLOGUE = f"""
#include <stdint.h>
#define PK_LATER INT64_MIN
{_STATE}
static int64_t pk_on_write(void *, uint64_t, char *, uint64_t, int64_t, int);
static int64_t pk_on_fallocate(void *, uint64_t, int, int64_t, int64_t);
static int64_t pk_on_lseek(uint64_t, int64_t, int);
static int64_t pk_on_copy(void *, uint64_t, int64_t, uint64_t, int64_t, uint64_t);
static int64_t pk_on_statx(uint64_t, struct pk_statx *);
"""


def _pkg_config(what: str) -> list[str]:
    """Ask pkg-config about fuse3; return Debian's default if there is no pkg-config."""
    try:
        answer = subprocess.run(
            ["pkg-config", what, "fuse3"], check=True, capture_output=True, text=True
        )
    except (OSError, subprocess.CalledProcessError):
        return ["-I/usr/include/fuse3"] if what == "--cflags" else ["-lfuse3"]
    return shlex.split(answer.stdout)


ffibuilder.set_source(
    "pkernfs.fuse._shim",
    _PROLOGUE + Path(__file__).with_name("shim.c").read_text(),
    extra_compile_args=[
        *compiler.COMPILE,
        "-D_FILE_OFFSET_BITS=64",
        *_pkg_config("--cflags"),
    ],
    extra_link_args=[*_pkg_config("--libs"), "-ldl", *compiler.LINK],
)

if __name__ == "__main__":
    ffibuilder.compile(tmpdir=_SOURCE, verbose=True)
