"""Somebody who types at a shell of this host, which has the machine for itself.

The shell is in namespaces of its own: its /usr/local, /mnt, /run and /dev are private,
and its processes end with it. So a document's words can be typed as they stand.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

_END = "\x01end\x01"
_SECONDS = 300.0
#: The interpreter that this checkout was set up with.
PYTHON = os.path.realpath(os.path.join(sys.base_prefix, "bin/python3"))
_DEVICES = "null zero full random urandom tty fuse"
# A /dev as containers have it: what is mounted or made in it is not the host's.
_PRIVATE = f"""
set -e
mount -t tmpfs scratch "$SCRATCH"
mkdir "$SCRATCH"/upper "$SCRATCH"/work "$SCRATCH"/dev
mount -t overlay -o "lowerdir=/usr/local,upperdir=$SCRATCH/upper,workdir=$SCRATCH/work" \
    overlay /usr/local
rm -f /usr/local/bin/pkernfs /usr/local/sbin/*.pkernfs /usr/local/share/man/man8/*pkernfs*.8
for name in {_DEVICES}; do cp -a /dev/$name "$SCRATCH/dev"; done
ln -s /proc/self/fd "$SCRATCH"/dev/fd
mkdir "$SCRATCH"/dev/shm "$SCRATCH"/dev/hugepages
mount --bind "$SCRATCH"/dev /dev
mount -t tmpfs -o size=64g shm /dev/shm
mount -t tmpfs -o size=64g hugepages /dev/hugepages
mount -t tmpfs mnt /mnt
mount -t tmpfs -o mode=755 run /run
set +e
"""
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def type_at_host(
    lines: list[str], directory: Path, scratch: Path, programs: Sequence[Path] = ()
) -> list[str]:
    """Type ``lines`` one after the other; return what each has printed, errors included.

    :param directory: where the shell is, a checkout
    :param scratch: an empty directory, for the machine's private parts
    :param programs: programs that come before all others of their names
    """
    script = [_PRIVATE]
    script += [f"ln -sf {program} /usr/local/bin" for program in programs]
    for line in lines:
        script.append(f"{line}\nprintf '%s' '{_END}'")
    file = scratch / "typed"  # what bash reads, and nobody else sees
    file.write_text("\n".join(script))
    environment = {"PATH": _PATH, "HOME": "/root", "LANG": "C.UTF-8", "PYTHON": PYTHON}
    run = os.environ.get("PKERNFS_TEST_RUN")  # by which scripts/test knows what a run has left
    done = subprocess.run(
        [*"unshare -m -p -f --kill-child --mount-proc bash".split(), str(file)],
        stdin=subprocess.DEVNULL,
        cwd=directory,
        env={**environment, "SCRATCH": str(scratch), **({"PKERNFS_TEST_RUN": run} if run else {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=_SECONDS,
    )
    *printed, rest = done.stdout.split(_END)
    assert len(printed) == len(lines), f"the shell has ended: {done.stdout[-2000:]}"
    assert not rest, rest
    return printed
