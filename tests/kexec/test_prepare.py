"""Deciding on a kexec: mounts that are asked, regions that stay, file systems to hand over."""

from __future__ import annotations

from pathlib import Path

import pytest

from pkernfs.control.mounts import FSTYPE, Mount, read_mounts
from pkernfs.control.sockets import Server, servers
from pkernfs.errors import InvalidError, NotFoundError, PkernfsError, RegionError
from pkernfs.host.sysroot import HOST, Host
from pkernfs.kexec import prepare as module
from pkernfs.kexec import systemd
from pkernfs.kexec.needs import Needs
from pkernfs.kexec.prepare import Request, prepare, refuse_problems, served_elsewhere
from support.control import with_own_run
from support.made_up_host import Machine, bzimage, make_machine
from support.mounting import Mounted, own_mount_namespace, run_as

LINE = "root=/dev/vda memmap=512M%1G pkernfs=a:256M!1G pkernfs=b:256M!1280M"
EDU = "0000:00:05.0"
NOTHING = Needs([], [], False)


class Asked:
    """Daemons that answer with ``needs``; ``by_systemd`` are handed over by a unit."""

    def __init__(self) -> None:
        self.mounts = [
            Mount(1, "/mnt/a", "fuse.pkernfs", "256M!1G"),
            Mount(2, "/srv", "ext4", "/dev/vda"),
            Mount(3, "/mnt/b", "fuse.pkernfs", "256M!1280M"),
        ]
        self.needs = {"/mnt/a": NOTHING, "/mnt/b": NOTHING}
        self.points: list[str] = []
        self.by_systemd: list[str] = []
        self.servers: list[Server] = []

    def daemon(self, point: str) -> Answer:
        self.points.append(point)
        return Answer(self.needs[point])

    def hands_over(self, point: str, host: Host) -> bool:
        return point in self.by_systemd


class Answer:
    """A daemon."""

    def __init__(self, needs: Needs) -> None:
        self._needs = needs

    def needs(self) -> Needs:
        return self._needs


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    asked = Asked()
    monkeypatch.setattr(
        module, "read_mounts", lambda *path: read_mounts(*path) if path else asked.mounts
    )
    monkeypatch.setattr(module, "servers", lambda host: asked.servers)
    monkeypatch.setattr(module, "Daemon", asked.daemon)
    monkeypatch.setattr(systemd, "hands_over", asked.hands_over)
    return asked


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    machine = make_machine(tmp_path, command_line=LINE)
    machine.write("proc/sys/kernel/osrelease", "7.3.4")
    machine.write("proc/sysrq-trigger", "")
    machine.write("sys/kernel/kexec_crash_size", str(256 << 20))
    machine.write("boot/vmlinuz-7.3.4", bzimage("7.3.4"))
    machine.write("sys/kernel/boot_params/data", bytes(4096))  # no initrd
    config = "CONFIG_INTEL_IOMMU=y\nCONFIG_CRASH_DUMP=y\nCONFIG_DEVMEM=y\n"
    machine.write("boot/config-7.3.4", config)
    machine.write("lib/modules/7.3.4/modules.alias", "")
    machine.write("lib/modules/7.3.4/modules.builtin.modinfo", "")
    machine.write(f"sys/bus/pci/devices/{EDU}/modalias", "pci:v1\n")
    return machine


def test_every_pkernfs_is_handed_over(asked: Asked, machine: Machine) -> None:
    prepared = prepare(Request(), machine)
    assert asked.points == prepared.mount_points == ["/mnt/a", "/mnt/b"]
    assert prepared.with_devices == []
    assert not prepared.plan.crash
    assert prepared.plan.handovers == [
        ["pkernfs", "handover", "/mnt/a"],
        ["pkernfs", "handover", "/mnt/b"],
    ]


def test_systemd_hands_over_what_it_has_a_unit_for(asked: Asked, machine: Machine) -> None:
    asked.by_systemd = ["/mnt/b"]
    prepared = prepare(Request(), machine)
    assert prepared.mount_points == ["/mnt/a"]
    assert prepared.by_systemd == [asked.mounts[2]]
    asked.needs["/mnt/a"] = Needs([EDU], [], False, ["dmar0"])
    prepared = prepare(Request(), machine)  # systemd has no part in a panic
    assert prepared.mount_points == ["/mnt/a", "/mnt/b"]
    assert prepared.by_systemd == []


def test_devices_that_must_go_on(asked: Asked, machine: Machine) -> None:
    asked.needs["/mnt/b"] = Needs([EDU], [], False, ["dmar0"])
    prepared = prepare(Request(append="quiet"), machine)
    assert prepared.plan.crash
    assert prepared.plan.problems == []
    assert prepared.with_devices == ["/mnt/b"]
    assert prepared.plan.append.startswith("quiet ")


@pytest.mark.parametrize("append", [None, "quiet"])
def test_a_region_that_is_not_mounted_is_kept_as_well(
    asked: Asked, machine: Machine, append: str | None
) -> None:
    asked.mounts = []
    machine.write("proc/cmdline", f"{LINE} pkernfs=/dev/dax9.0 pkernfs=c:64M!64M\n")
    assert "nokaslr" not in prepare(Request(append=append), machine).plan.added
    late = LINE.replace("memmap=512M%1G", "memmap=512M$1G").replace(
        "root", "memmap=1K$5G,1K$6G,1K$7G,1K$8G root"
    )
    machine.write("proc/cmdline", f"{late}\n")
    prepared = prepare(Request(append=append), machine)
    assert "nokaslr" in prepared.plan.added
    assert prepared.mount_points == []


def test_an_orderly_one_asks_nobody(asked: Asked, machine: Machine) -> None:
    asked.needs["/mnt/b"] = Needs([EDU], [], False, ["dmar0"])
    prepared = prepare(Request(orderly=True), machine)
    assert asked.points == []
    assert not prepared.plan.crash
    assert prepared.with_devices == []


def test_a_region_that_goes_with_this_kernel(asked: Asked, machine: Machine) -> None:
    asked.mounts[0] = asked.mounts[0]._replace(source="/dev/shm/region")
    assert prepare(Request(), machine).mount_points == ["/mnt/a", "/mnt/b"]
    asked.needs["/mnt/a"] = Needs([EDU], [], False, ["dmar0"])
    with pytest.raises(InvalidError, match="/dev/shm/region: gone with this kernel"):
        prepare(Request(), machine)


def test_a_kernel_that_is_not_there_is_found_first(asked: Asked, machine: Machine) -> None:
    with pytest.raises(NotFoundError, match="/boot/none"):
        prepare(Request(kernel="/boot/none"), machine)
    assert asked.points == []


def test_problems_are_in_the_plan(asked: Asked, machine: Machine) -> None:
    asked.needs["/mnt/a"] = Needs([EDU], [], False, ["dmar0"])
    machine.write("sys/kernel/kexec_crash_size", "0")
    Path(machine.path("proc/sysrq-trigger")).unlink()
    plan = prepare(Request(), machine).plan
    with pytest.raises(PkernfsError) as caught:
        refuse_problems(plan)
    assert str(caught.value) == (
        f"kexec: {'; '.join(plan.problems)} (--orderly stops the devices, --force goes on)"
    )
    assert len(plan.problems) == 2
    plan.problems.clear()
    refuse_problems(plan)


@pytest.mark.parametrize(("append", "orderly"), [(None, False), ("quiet", True)])
def test_a_region_that_ends_with_this_kernel(
    asked: Asked, machine: Machine, append: str | None, orderly: bool
) -> None:
    """No plan of it without force, and --orderly is no remedy."""
    asked.mounts[0] = asked.mounts[0]._replace(source="/dev/shm")  # as a file there would be
    plan = prepare(Request(append=append, orderly=orderly), machine).plan
    says = "/dev/shm: it ends with this kernel; nothing here survives a kexec"
    with pytest.raises(PkernfsError, match=rf"^kexec: {says} \(--force goes on\)$"):
        refuse_problems(plan)
    assert prepare(Request(force=True), machine).force


def test_force_goes_on_with_a_region_that_is_lost(asked: Asked, machine: Machine) -> None:
    """What the command line does to it is said; one that kexec cannot load is refused."""
    running = LINE.replace("%", "$")
    machine.write("proc/cmdline", running)
    line = f"memmap=1M$4G,1M$5G,1M$6G,1M$7G {running} no"
    with pytest.raises(RegionError, match="nokaslr does not count"):
        prepare(Request(append=line), machine)
    plan = prepare(Request(append=line, force=True), machine).plan
    assert any("nokaslr does not count" in text for text in plan.obstacles)
    with pytest.raises(RegionError, match="too long"):
        prepare(Request(append="x" * 2048, force=True), machine)


def test_a_file_system_that_is_mounted_in_another_namespace_only(
    asked: Asked, machine: Machine
) -> None:
    """It cannot be handed over from here, but the next kernel keeps clear of its region."""
    here = Server("/run/pkernfs/0:1.sock", 1, 7)
    there = Server("/run/pkernfs/0:9.sock", 9, 4711)
    asked.servers = [here]
    assert prepare(Request(), machine).plan.obstacles == []
    asked.servers = [here, there]
    machine.write("proc/4711/comm", "pkernfs\n")
    machine.write(
        "proc/4711/mountinfo",
        "30 1 0:1 / /mnt/a rw - fuse.pkernfs 256M!1G rw\n"
        "31 1 0:9 / /mnt/my\\040vm rw - fuse.pkernfs 256M!1536M rw,user_id=0\n",
    )
    machine.write("proc/cmdline", f"{LINE} memmap=256M%1536M\n")
    prepared = prepare(Request(force=True), machine)
    assert prepared.plan.obstacles == [
        "256M!1536M: mounted on /mnt/my vm in the mount namespace of process 4711 (pkernfs), and "
        "not here: it is not handed over: nsenter -t 4711 -m umount '/mnt/my vm'"
    ]
    assert prepared.mount_points == ["/mnt/a", "/mnt/b"]
    with pytest.raises(PkernfsError, match=r"256M!1536M: mounted on .*--force goes on"):
        refuse_problems(prepare(Request(), machine).plan)
    line = LINE.replace("512M%1G", "512M$1G")
    machine.write("proc/cmdline", f"{line} memmap=256M$1536M\n")
    assert prepare(Request(), machine).plan.added == []
    machine.write("proc/cmdline", f"{line} memmap=1792M%1536M\n")  # KASLR: a limit
    assert prepare(Request(), machine).plan.added == ["nokaslr"]


@pytest.mark.parametrize(
    ("pid", "who"), [(0, "a daemon that is not seen from here"), (4711, r"process 4711 \(\?\)")]
)
def test_a_daemon_whose_mount_is_not_seen(
    asked: Asked, machine: Machine, pid: int, who: str
) -> None:
    asked.servers = [Server("/run/pkernfs/0:9.sock", 9, pid)]
    with pytest.raises(PkernfsError, match=rf"/run/pkernfs/0:9.sock: {who} serves a file system"):
        refuse_problems(prepare(Request(), machine).plan)


@pytest.mark.fuse
def test_a_daemon_of_another_namespace_is_seen() -> None:
    def messages() -> list[str]:
        mounts = [m for m in read_mounts() if m.fstype == FSTYPE]
        return [one.message for one in served_elsewhere(list(servers()), mounts, HOST)]

    def work() -> None:
        with Mounted(16 << 20) as m:
            assert messages() == []

            def look() -> None:
                own_mount_namespace()
                (message,) = messages()
                assert message.startswith(f"{m.region}: mounted on {m.path} in the mount namespace")
                assert message.endswith(f"-m umount {m.path}")

            run_as(0, look)

    with_own_run(work)
