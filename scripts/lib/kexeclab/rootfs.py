"""The root file system that all machines share: Debian 13, made by mmdebstrap, read only.

mmdebstrap takes one command, no daemon and half a minute, and gives plain Debian: the guest is what
a user has, whatever the host is. (virtme-ng shares the host's own root instead, through 9p, which
Debian's cloud kernels lack, or virtiofs, which needs a daemon beside QEMU and shared guest memory;
and the guest is then as old or new as the host.)
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

from kexeclab import LabError, cache
from kexeclab.debian import mmdebstrap_options, run, source_line

SUITE = "trixie"
PROJECT = "/opt/pkernfs"  # where a project disk is mounted
LAB = f"{PROJECT}/scripts/lib/kexeclab"
_PACKAGES = """
    fuse3 kexec-tools kmod util-linux procps udev systemd systemd-sysv strace pciutils less
    python3 python3-venv python3-dev python3-setuptools python3-pytest
    python3-pyfuse3 python3-trio python3-cffi
    gcc libc6-dev libfuse3-dev pkg-config
    qemu-system-x86 busybox-static
""".split()
# With systemd: what a machine without a network or a user at its console can do without, for each
# second of a boot is four without KVM.
_NO_UNITS = """
    getty.target getty-static.service serial-getty@ttyS0.service systemd-binfmt.service
    proc-sys-fs-binfmt_misc.automount modprobe@drm.service modprobe@efi_pstore.service
    sys-kernel-tracing.mount dev-mqueue.mount systemd-journal-flush.service
    systemd-random-seed.service apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer
    fstrim.timer e2scrub_all.timer e2scrub_reap.service systemd-tmpfiles-clean.timer
    systemd-user-sessions.service
""".split()
_NO_MODULES = "ahci kvm_amd kvm_intel powernow_k8 psmouse i2c_i801 lpc_ich button pcspkr".split()
_LEAVE_OUT = ("man", "locale", "doc", "info")
# Changes to how the tree is made that its packages do not show.
_REVISION = "4"


@dataclass(frozen=True)
class Root:
    """The tree, for working in it with chroot, and the disk made of it."""

    tree: Path
    image: Path


def fetch() -> Root:
    """The root file system, from the cache or made now.

    :raises LabError: it cannot be made.
    """
    name = cache.key(_REVISION, SUITE, *sorted(_PACKAGES))
    place = cache.entry("rootfs", name, _build)
    return Root(place / "tree", place / "root.ext4")


#: A mount namespace of a command's own, without copies of the host's pkernfs mounts: their daemons
#: would serve until the command has ended, whatever is unmounted meanwhile.
_DETACH = "umount -a -l -t fuse.pkernfs"
_OWN_MOUNTS = ("unshare", "-m", "sh", "-c", f'{_DETACH}; exec "$@"', "sh")


def _build(scratch: Path) -> None:
    cache.require_root()
    tree = scratch / "tree"
    # In a mount namespace of its own: what it mounts in the tree goes, also if it is killed.
    run(
        *_OWN_MOUNTS, "mmdebstrap", "--mode=root", "--variant=minbase", "--architectures=amd64",
        f"--include={','.join(_PACKAGES)}",
        *(f"--dpkgopt=path-exclude=/usr/share/{name}/*" for name in _LEAVE_OUT),
        *mmdebstrap_options(),
        SUITE, str(tree), source_line(SUITE),
    )  # fmt: skip
    _arrange(tree)
    cache.make_image(tree, scratch / "root.ext4", "lab-root")


def _arrange(tree: Path) -> None:
    """Add what a freshly set-up machine has beside its packages."""
    (tree / "etc/hostname").write_text("lab\n")
    (tree / "etc/hosts").write_text("127.0.0.1 localhost lab\n::1 localhost\n")
    (tree / "etc/fstab").write_text("")
    for directory in (PROJECT, "/lab/kernels", "/mnt/pkernfs"):
        (tree / directory.lstrip("/")).mkdir(parents=True)
    # As scripts/setup links them: mount(8) looks only in the standard places.
    for command, kind in (("pkernfs", "bin"), ("mkfs.pkernfs", "sbin"), ("fsck.pkernfs", "sbin")):
        link = tree / "usr/local" / kind / command
        link.symlink_to(f"{PROJECT}/.venv/bin/{command}")
    (tree / "usr/local/bin/lab-kexec").symlink_to(f"{LAB}/lab-kexec")
    units = tree / "etc/systemd/system"
    for place in (units, units / "multi-user.target.wants"):
        place.mkdir(parents=True, exist_ok=True)
        (place / "lab-agent.service").symlink_to(f"{LAB}/lab-agent.service")
    for name in _NO_UNITS:
        (units / name).symlink_to("/dev/null")
    (tree / "etc/modprobe.d/lab.conf").write_text(
        "".join(f"blacklist {name}\n" for name in _NO_MODULES)
    )
    (tree / "etc/systemd/journald.conf.d").mkdir(parents=True)
    (tree / "etc/systemd/journald.conf.d/lab.conf").write_text("[Journal]\nStorage=volatile\n")
    (tree / "etc/machine-id").write_text("6b65786563206c6162206b6578656321\n")
    # The machine's modules are on its kernel's disk.
    modules = tree / "usr/lib/modules"
    if modules.exists():
        shutil.rmtree(modules)
    modules.mkdir()
    # Newer than /usr: systemd then does not do at each boot what it does after an upgrade.
    for directory in ("etc", "var"):
        (tree / directory / ".updated").touch()


def chroot(tree: Path, mounts: dict[str, Path], *command: str) -> str:
    """Run a command in ``tree``, with directories of the host's mounted at paths inside it.

    The mounts are in a mount namespace of the command's own, and end with it.

    :raises LabError: it failed.
    """
    script = ["set -e", "mount --make-rprivate /", _DETACH]
    script.append(f"mount -t tmpfs tmpfs {tree}/tmp")
    script.append(f"mount -t proc proc {tree}/proc")
    for inside, outside in mounts.items():
        script.append(f"mount --bind {outside} {tree}{inside}")
    script.append(f'exec chroot {tree} env -i HOME=/tmp PATH={_PATH} LC_ALL=C.UTF-8 "$@"')
    if any(set(str(path)) & set(" '\"$\\;&|") for path in (tree, *mounts.values())):
        raise LabError(f"{tree}: the cache's path has characters that a shell takes for its own")
    return run("unshare", "-m", "-p", "-f", "sh", "-c", "\n".join(script), "chroot", *command)


_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
