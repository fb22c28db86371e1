"""A libvirtd of a test's own: its directories, its users and its guests end with it.

It runs in namespaces of mounts, processes and networks. There its directories lie over those of
the machine, a pkernfs mount is at /mnt/pkernfs, and /etc/passwd has the users of
:data:`USERS` as well. So it reads and writes the paths that Debian's package does, and nothing
of the machine's.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Self

import pytest

from support.mounting import wait_until

#: The user that Debian's libvirt-daemon-system makes for guests, and two owners of guests.
USERS = {"libvirt-qemu": 64055, "guest-a": 64056, "guest-b": 64057}
#: Where the mount is, for libvirt and its guests.
MOUNT = Path("/mnt/pkernfs")
PROGRAMS = ("libvirtd", "virsh")
_DRIVER = "*/libvirt/connection-driver/libvirt_driver_qemu.so"
_VIRSH_SECONDS = 60.0
_END_SECONDS = 20.0

# cgroups, AppArmor and virtlogd are the machine's; without them libvirt needs no service of it.
_QEMU_CONF = 'cgroup_controllers = [ ]\nsecurity_driver = "none"\nstdio_handler = "file"\n'
_LIBVIRTD_CONF = 'auth_unix_rw = "none"\n'
_OVER = {
    "etc": "/etc/libvirt",
    "lib": "/var/lib",
    "log": "/var/log",
    "cache": "/var/cache",
    "passwd": "/etc/passwd",
    "group": "/etc/group",
    "run": "/run",
}
# The shell is process 1 of its namespace: when it ends, the kernel kills all that are in it. It
# ends when the test closes the pipe, however the test ends. Other tests' mounts go first: a copy
# of a mount keeps its daemon serving. /dev has no kvm: where root can use it and the guests' user
# cannot, libvirt asks QEMU anew, for ten seconds, whenever it needs to know what QEMU can do.
_INSIDE = """
set -e
mount --make-rprivate /
findmnt -rn -t fuse.pkernfs -o TARGET | while read -r at; do
    [ "$at" = "$1" ] || umount -l "$at"
done
mount -t tmpfs none /mnt
mkdir /mnt/pkernfs
mount --bind "$1" /mnt/pkernfs
shift
mkdir /mnt/dev
mount -t tmpfs -o mode=755 none /mnt/dev
for node in null,3 zero,5 full,7 random,8 urandom,9; do
    mknod -m 666 "/mnt/dev/${node%,*}" c 1 "${node#*,}"
done
for node in $1; do
    mknod -m 600 "/mnt/dev/${node%,*}" c 1 5
    chown "${node#*,}" "/mnt/dev/${node%,*}"
done
shift
mkdir /mnt/dev/shm /mnt/dev/pts
mount --rbind /dev/shm /mnt/dev/shm
mount -t devpts -o newinstance,ptmxmode=666,mode=620,gid=5 none /mnt/dev/pts
ln -s pts/ptmx /mnt/dev/ptmx
umount -R -l /dev || true  # in a chroot it is no mount
mount --move /mnt/dev /dev
while [ $# -gt 0 ]; do mount --bind "$1" "$2"; shift 2; done
libvirtd &
read -r _ || true
"""


def needs_libvirt() -> None:
    """Skip the test where Debian's libvirt is not installed; fail it where it has to be."""
    absent = [program for program in PROGRAMS if shutil.which(program) is None]
    if not any(Path("/usr/lib").glob(_DRIVER)):
        absent.append(Path(_DRIVER).name)
    if not absent:
        return
    why = f"no {', '.join(absent)} (scripts/setup --libvirt)"
    if "vm" in os.environ.get("PKERNFS_REQUIRE", "").split(","):
        pytest.fail(f"vm is required (PKERNFS_REQUIRE): {why}")
    pytest.skip(why)


def _with_users(table: Path, line: str) -> str:
    """/etc/passwd or /etc/group of this machine, and a line for each user of ours."""
    kept = [one for one in table.read_text().splitlines() if one.partition(":")[0] not in USERS]
    ours = [line.format(name=name, uid=uid) for name, uid in USERS.items()]
    return "\n".join([*kept, *ours, ""])


class Libvirt:
    """A libvirtd that runs while the block does, with a pkernfs mount at :data:`MOUNT`.

    :ivar images: the directory that it knows as /var/lib/libvirt/images
    :param conf: lines of qemu.conf
    :param nodes: names in /dev, each with the user whom it belongs to; they read as /dev/zero
    """

    def __init__(self, mount: Path, conf: str = "", nodes: Mapping[str, str] | None = None) -> None:
        self._mount = mount
        self._conf = _QEMU_CONF + conf
        self._nodes = " ".join(f"{name},{USERS[user]}" for name, user in (nodes or {}).items())
        self._directory = Path(tempfile.mkdtemp(prefix="pkernfs-libvirt."))
        self._directory.chmod(0o755)
        self.images = self._directory / "lib/libvirt/images"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        try:
            self._lay_out()
            self._start()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self._end()

    def _lay_out(self) -> None:
        for name in ("etc", "lib", "log", "cache", "run"):
            (self._directory / name).mkdir()
        self.images.mkdir(parents=True)
        line = "{name}:x:{uid}:{uid}::/nonexistent:/usr/sbin/nologin"
        (self._directory / "passwd").write_text(_with_users(Path("/etc/passwd"), line))
        (self._directory / "group").write_text(_with_users(Path("/etc/group"), "{name}:x:{uid}:"))
        (self._directory / "etc/qemu.conf").write_text(self._conf)
        (self._directory / "etc/libvirtd.conf").write_text(_LIBVIRTD_CONF)

    def _start(self) -> None:
        over = [word for name, at in _OVER.items() for word in (str(self._directory / name), at)]
        apart = ["unshare", "--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]
        with (self._directory / "libvirtd.log").open("wb") as log:
            self._process = subprocess.Popen(
                [*apart, "bash", "-c", _INSIDE, "libvirtd", str(self._mount), self._nodes, *over],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
            )
        try:
            wait_until(lambda: self._socket.exists() or self._has_ended, "libvirtd listens")
        except TimeoutError as error:
            raise AssertionError(f"{error}: {self._log()}") from None
        assert not self._has_ended, self._log()

    @property
    def _socket(self) -> Path:
        return self._directory / "run/libvirt/libvirt-sock"

    @property
    def _has_ended(self) -> bool:
        return self._process is None or self._process.poll() is not None

    def _log(self) -> str:
        return (self._directory / "libvirtd.log").read_text(errors="replace")

    def _end(self) -> None:
        """End libvirtd and its guests: nothing of them is left when this returns."""
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
            try:
                self._process.wait(_END_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        shutil.rmtree(self._directory)

    def _run(self, *words: str | Path) -> subprocess.CompletedProcess[str]:
        command = ["virsh", "-q", "-c", f"qemu:///system?socket={self._socket}", *map(str, words)]
        return subprocess.run(command, capture_output=True, text=True, timeout=_VIRSH_SECONDS)

    def virsh(self, *words: str | Path) -> str:
        """``virsh WORDS``, which succeeds; what it prints."""
        done = self._run(*words)
        assert done.returncode == 0, f"virsh {words}: {done.stderr}{self._log()}"
        return done.stdout

    def refused(self, *words: str | Path) -> str:
        """``virsh WORDS``, which fails; why."""
        done = self._run(*words)
        assert done.returncode != 0, f"virsh {words}: {done.stdout}"
        return done.stderr

    def define(self, xml: str) -> None:
        """``virsh define`` of a domain."""
        file = self._directory / "domain.xml"
        file.write_text(xml)
        self.virsh("define", file)

    def guest(self, name: str) -> int:
        """The process number of a running domain's QEMU, as the test sees it."""
        assert self._process is not None
        own = os.readlink(f"/proc/{self._process.pid}/ns/pid_for_children")
        for command in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                is_it = f"guest={name},".encode() in command.read_bytes()
                if is_it and os.readlink(command.parent / "ns/pid") == own:
                    return int(command.parent.name)
            except OSError:
                continue  # it ended
        raise AssertionError(f"no QEMU of {name}: {self._log()}")

    def in_place_of(self, name: str, *command: str | Path) -> subprocess.CompletedProcess[str]:
        """Run a command with the user, the group and the mounts of a domain's QEMU."""
        pid = self.guest(name)
        owner = Path(f"/proc/{pid}").stat()
        return subprocess.run(
            [
                "nsenter", f"--target={pid}", "--mount", f"--setuid={owner.st_uid}",
                f"--setgid={owner.st_gid}", *map(str, command),
            ],
            capture_output=True,
            text=True,
            timeout=_VIRSH_SECONDS,
        )  # fmt: skip
