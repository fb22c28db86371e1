"""A process that becomes the owner of a directory, before it deals with the guest there.

What is in a tenant's directory is the tenant's, and any name in it may lead elsewhere (a symbolic
link). So root opens nothing there. For each directory there is a process that becomes its owner
before it looks at anything, and QEMU, which it starts, runs as the owner. scripts/live-update has
such processes for several guests at once.

The path that leads there decides whose guest it is. So nobody else may be able to change it.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import stat
from pathlib import Path

from pkernfs.errors import VmmError, os_reason
from pkernfs.host.mount_table import table_lines
from pkernfs.vmm import live_update

#: What an owner's programs may know of root's environment.
KEPT = ("PATH", "LANG", "TERM")
_MOUNTS = "/proc/self/mountinfo"
#: Who has made a FUSE mount, in the options of its file system.
_MADE_BY = re.compile(r"(?:^|,)user_id=(\d+)(?:,|$)")
_FLAGS = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def become_owner(directory: Path) -> Path:
    """Have this process, if it is root's, be the owner of ``directory`` from now on, for good.

    It has the owner's groups, no terminal, and only the words ``KEPT`` of root's environment. Its
    working directory is ``/``. Of a user that is not root, the directory for monitors is made first
    (:func:`~pkernfs.vmm.live_update.run_directory`). Call it in a process of a fork: the others of
    a shell's job cannot leave the terminal.

    :returns: the directory by the path that was checked, which holds no link; it may be missing
    :raises VmmError: it cannot, or others can change what the path leads to.
    """
    path = Path(os.path.abspath(directory))
    try:
        found = _look_up(path)
        if found is not None and found.st_uid and not os.geteuid():
            _become(found.st_uid, found.st_gid)
    except OSError as error:
        raise VmmError(f"{directory}: cannot be its owner: {os_reason(error)}") from error
    return path


# ------------------------------------------------------------------------------ the path


def _look_up(path: Path) -> os.stat_result | None:
    """Return the status of a directory that nobody else can exchange; None if there is none.

    :raises VmmError: others can exchange it, or make it.
    """
    with contextlib.ExitStack() as opened:
        above: int | None = None
        for place in (*reversed(path.parents), path):
            if above is not None:
                _check_above(place.parent, os.fstat(above))
            try:
                above = os.open(place.name or "/", _FLAGS, dir_fd=above)
            except FileNotFoundError:
                if above is not None and os.fstat(above).st_mode & _OTHERS_WRITE:
                    raise VmmError(f"{place}: no such directory, and others can make it") from None
                return None  # whoever needs it will say so
            except NotADirectoryError:
                raise VmmError(f"{place}: a link, or no directory: name the directory") from None
            opened.callback(os.close, above)
            found = os.fstat(above)
            _check_mount(place, found)
    if not found.st_uid and found.st_mode & _OTHERS_WRITE:
        raise VmmError(f"{path}: it is root's, but others can write there: chmod go-w")
    return found


def _check_above(place: Path, found: os.stat_result) -> None:
    """Refuse a directory in which somebody else can exchange what leads to the guest.

    With the sticky bit only the owner of an entry can, and nobody becomes anyone but that owner.
    """
    if found.st_uid not in (0, os.geteuid()):
        raise VmmError(f"{place}: it is above a guest's directory, and not root's")
    if found.st_mode & _OTHERS_WRITE and not found.st_mode & stat.S_ISVTX:
        raise VmmError(f"{place}: it is above a guest's directory: others can write there")


def _check_mount(place: Path, found: os.stat_result) -> None:
    """Refuse a user's own FUSE mount, which can name any owner."""
    device = f"{os.major(found.st_dev)}:{os.minor(found.st_dev)}"
    for line in table_lines(_MOUNTS):
        left, _, right = line.partition(" - ")
        if left.split(" ")[2] != device:
            continue
        made_by = _MADE_BY.search(right.rpartition(" ")[2])  # the field before is the user's words
        if made_by is not None and int(made_by[1]) not in (0, os.geteuid()):
            raise VmmError(f"{place}: it is on a mount of user {made_by[1]}")


# ------------------------------------------------------------------------------ the process


def _become(uid: int, gid: int) -> None:
    try:
        user = pwd.getpwuid(uid)
    except KeyError:  # a number that no user has here
        groups, own = [gid], {}
    else:
        gid = user.pw_gid
        groups = os.getgrouplist(user.pw_name, gid)
        own = {"HOME": user.pw_dir, "USER": user.pw_name, "LOGNAME": user.pw_name}
    _make_run_directory(uid, gid)
    _leave_roots_surroundings(own)
    os.setgroups(groups)
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)


def _leave_roots_surroundings(own: dict[str, str]) -> None:
    """Keep root's terminal, environment and working directory from the owner's programs.

    Who has a terminal may be able to type there.
    """
    if os.getsid(0) != os.getpid():
        os.setsid()
    with contextlib.suppress(OSError):
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
        raise VmmError("this process leads the session of a terminal: it has to fork first")
    kept = {name: os.environ[name] for name in KEPT if name in os.environ}
    os.environ.clear()
    os.environ.update(kept | own)
    os.chdir("/")


def _make_run_directory(uid: int, gid: int) -> None:
    """Make the directory for the monitors of a user's machines, below one that is root's.

    Whatever the umask is, and also where one that made it was killed.
    """
    place = live_update.run_directory(uid)
    place.parent.mkdir(exist_ok=True)
    place.parent.chmod(0o755)
    with contextlib.suppress(FileExistsError):
        place.mkdir(mode=0o700)
    os.chown(place, uid, gid, follow_symlinks=False)
    place.chmod(0o700)
