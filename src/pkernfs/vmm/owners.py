"""A process that becomes the owner of a directory, before it deals with the guest there.

What is in a tenant's directory is the tenant's, and any name in it may lead elsewhere (a symbolic
link). So root opens nothing there. For each directory there is a process that becomes its owner
before it looks at anything, and QEMU, which it starts, runs as the owner. scripts/live-update has
such processes for several guests at once.
"""

from __future__ import annotations

import os
import pwd
from pathlib import Path

from pkernfs.errors import VmmError, os_reason
from pkernfs.vmm import live_update


def become_owner(directory: Path) -> None:
    """Have this process, if it is root's, be the owner of ``directory`` from now on, for good.

    With the owner's groups. Of a user that is not root, the directory for monitors is made first
    (:func:`~pkernfs.vmm.live_update.run_directory`).

    :raises VmmError: it cannot.
    """
    if os.geteuid():
        return
    try:
        found = directory.stat()
        if found.st_uid:
            _become(found.st_uid, found.st_gid)
    except FileNotFoundError:
        return  # whoever needs it will say so
    except OSError as error:
        raise VmmError(f"{directory}: cannot be its owner: {os_reason(error)}") from error


def _become(uid: int, gid: int) -> None:
    try:
        user = pwd.getpwuid(uid)
    except KeyError:  # a number that no user has here
        groups = [gid]
    else:
        gid = user.pw_gid
        groups = os.getgrouplist(user.pw_name, gid)
    _make_run_directory(uid, gid)
    os.setgroups(groups)
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)


def _make_run_directory(uid: int, gid: int) -> None:
    """Make the directory for the monitors of a user's machines, below one that is root's."""
    place = live_update.run_directory(uid)
    place.parent.mkdir(mode=0o755, exist_ok=True)
    try:
        place.mkdir(mode=0o700)
    except FileExistsError:
        return
    os.chown(place, uid, gid)
