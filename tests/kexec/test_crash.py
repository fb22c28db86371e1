"""pkernfs kexec for devices that go on: the plan on made-up machines, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from pkernfs.errors import NotFoundError, RegionError
from pkernfs.host.iomem import Span, parse_iomem
from pkernfs.kexec import crash
from pkernfs.kexec.needs import Needs
from pkernfs.kexec.plan import Plan, make_plan
from pkernfs.quantities import PhysAddr
from support.made_up_host import Machine, bzimage, make_machine

GIB = 1 << 30
SPAN = Span(PhysAddr(GIB), GIB // 2)
NIC, EDU, DISK = "0000:00:06.0", "0000:00:05.0", "0000:00:01.0"
RELEASE = "7.3.4"
KERNEL = f"boot/vmlinuz-{RELEASE}"
LINE = "root=/dev/vda crashkernel=256M intel_iommu=off memmap=512M%1G pkernfs=512M!1G"
MEMORY = "memmap=0x9e000@0x1000,0x3ff00000@0x100000,0x1ffe0000@0x60000000,0x80000000@0x100000000"
NIC_ALIAS = "pci:v00008086d000010D3sv00001AF4sd00001100bc02sc00i00"


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    machine = make_machine(tmp_path, command_line=LINE)
    machine.write("proc/sys/kernel/osrelease", RELEASE)
    machine.write("proc/sysrq-trigger", "")
    machine.write("sys/kernel/kexec_crash_size", str(256 << 20))
    machine.write(KERNEL, bzimage(RELEASE))
    machine.write("sys/kernel/boot_params/data", bytes(4096))  # no initrd
    options = ("INTEL_IOMMU", "CRASH_DUMP", "DEVMEM", "DEV_DAX", "DEV_DAX_HMEM")
    machine.write(f"boot/config-{RELEASE}", "".join(f"CONFIG_{name}=y\n" for name in options))
    machine.write(f"lib/modules/{RELEASE}/modules.builtin.modinfo", "")
    machine.write(
        f"lib/modules/{RELEASE}/modules.alias",
        "# Aliases\nalias pci:v00008086d000010D3sv*sd*bc*sc*i* e1000e\n"
        "alias pci:v00001AF4d*sv*sd*bc*sc*i* virtio_pci\n",
    )
    for name, alias in (
        (NIC, NIC_ALIAS),
        (EDU, "pci:v00001234d000011E8sv00001AF4sd00001100bc00scFFi00"),
        (DISK, "pci:v00001AF4d00001001sv00001AF4sd00000002bc01sc00i00"),
    ):
        machine.write(f"sys/bus/pci/devices/{name}/modalias", alias + "\n")
    return machine


def plan(
    machine: Machine,
    append: str | None = None,
    *,
    devices: tuple[str, ...] = (EDU,),
    scalable: bool = False,
) -> Plan:
    needs = Needs(devices, [], scalable)
    return make_plan([SPAN], ["/mnt/a"], append=append, needs=needs, host=machine)


def test_the_whole_plan(machine: Machine) -> None:
    made = plan(machine)
    line = (
        "root=/dev/vda crashkernel=256M memmap=512M%1G pkernfs=512M!1G "
        f"{MEMORY} elfcorehdr=0x40000000 {crash.AWAKE} intel_iommu=on,sm_off"
    )
    assert made.problems == []
    assert made.append == line
    assert made.added == [
        MEMORY, "elfcorehdr=0x40000000", crash.AWAKE, "intel_iommu=on,sm_off",
    ]  # fmt: skip
    assert made.commands == [
        ["kexec", "-s", "-p", f"/{KERNEL}", f"--command-line={line}"],
        ["pkernfs", "handover", "/mnt/a", "--cmdline", line],
    ]
    assert made.losses == [f"{EDU}: its interrupts reach nobody until it is taken over"]


def test_without_devices_it_is_orderly(machine: Machine) -> None:
    made = make_plan([SPAN], [], needs=Needs([], [EDU], False), host=machine)
    assert not made.crash
    assert made.commands[0][:3] == ["kexec", "-s", "-l"]
    assert "intel_iommu=off" in made.append


def test_a_second_time(machine: Machine) -> None:
    """What the running kernel was told because of a panic is told anew, or not at all."""
    first = plan(machine).append
    machine.write("proc/cmdline", f"elfcorehdr=0x5f000000 {first}")
    assert plan(machine).append == first
    orderly = make_plan([SPAN], [], host=machine).append
    assert "elfcorehdr" not in orderly
    assert MEMORY in orderly


def test_what_is_added_is_the_kernels_not_that_of_init(machine: Machine) -> None:
    """A kernel looks at nothing behind ``--``: it would have no memory, and drop the tables."""
    machine.write("proc/cmdline", f"{LINE} -- single")
    made = plan(machine, devices=(EDU, NIC))
    assert made.problems == []
    assert made.append.endswith(" module_blacklist=e1000e -- single")
    assert made.append.index(MEMORY) < made.append.index(" -- ")
    machine.write("proc/cmdline", "pkernfs=512M!512M memmap=512M%512M")
    given = make_plan(
        [Span(PhysAddr(GIB // 2), GIB // 2)], [], append="quiet -- single", host=machine
    )
    assert given.append == "quiet pkernfs=512M!512M memmap=512M%512M -- single"
    assert given.problems == []


def test_soft_reserved_memory_is_no_ram_before(machine: Machine) -> None:
    line = (
        "memmap=512M%1G-1+0xefffffff pkernfs=/dev/dax0.0 reset_devices "
        "vfio-pci.ids=8086:10d3 vfio-pci.disable_idle_d3=0"
    )
    assert crash.for_crash(line, "memmap=1M@0", "elfcorehdr=0").split() == [
        "memmap=512M%1G+0xefffffff", "pkernfs=/dev/dax0.0", "vfio-pci.ids=8086:10d3",
        "memmap=1M@0", "elfcorehdr=0", "vfio_pci.disable_idle_d3=1",
    ]  # fmt: skip


def test_a_region_that_is_memory(machine: Machine) -> None:
    resources = parse_iomem(machine.read("proc/iomem"))
    with pytest.raises(RegionError, match="System RAM"):
        crash.memory_parameter(resources, [Span(PhysAddr(2 * GIB - (1 << 29)), 1 << 21)])
    with pytest.raises(RegionError, match="no System RAM"):
        crash.memory_parameter([], [])


def test_what_the_firmware_keeps_in_the_middle_of_memory(machine: Machine) -> None:
    text = """\
00001000-0009fbff : System RAM
00100000-4effa17f : System RAM
4effa180-4effa18f : System RAM
4effa190-7fffffff : System RAM
  00100800-001017ff : Reserved
  30000000-3fffffff : Crash kernel
  7ffff000-7fffffff : Reserved
80000000-8fffffff : Reserved
100000000-17fffffff : System RAM (kmem)
"""
    assert crash.memory_parameter(parse_iomem(text), []) == (
        "memmap=0x9e000@0x1000,0x7fefd000@0x102000"
    )


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("sys/kernel/kexec_crash_size", "0", "crashkernel=256M"),
        ("proc/sys/kernel/kexec_load_disabled", "1", "kexec_load_disabled"),
        (KERNEL, "no kernel", "cannot see its configuration"),
        (f"boot/config-{RELEASE}", "CONFIG_INTEL_IOMMU=y\n", "no CONFIG_CRASH_DUMP"),
        (f"boot/config-{RELEASE}", "CONFIG_CRASH_DUMP=y\n", "no CONFIG_INTEL_IOMMU"),
    ],
)
def test_a_host_or_kernel_that_will_not_do(
    machine: Machine, name: str, text: str, problem: str
) -> None:
    machine.write(name, text)
    problems = plan(machine).problems
    assert any(problem in p for p in problems), problems


@pytest.mark.parametrize(
    ("more", "scalable", "problem"),
    [
        ("intel_iommu=off", False, "needs intel_iommu=on"),
        ("intel_iommu=on intel_iommu=off", False, "needs intel_iommu=on"),
        ("intel_iommu=on iommu=off", False, "iommu=off"),
        ("intel_iommu=on iommu=pt,off", False, "iommu=off"),
        ("intel_iommu=on,sm_on", False, "intel_iommu=on,sm_off"),
        ("intel_iommu=on", True, "intel_iommu=on,sm_on"),
        ("intel_iommu=on", False, None),
        ("intel_iommu=on,sm_on", True, None),
        ("", True, None),
    ],
)
def test_a_command_line_with_which_the_tables_would_go(
    machine: Machine, more: str, scalable: bool, problem: str | None
) -> None:
    problems = plan(machine, f"quiet {more}", scalable=scalable).problems
    if problem is None:
        assert problems == []
    else:
        [found] = problems
        assert problem in found


def test_defaults_of_the_next_kernel_count(machine: Machine) -> None:
    config = (
        "CONFIG_INTEL_IOMMU=y\nCONFIG_CRASH_DUMP=y\nCONFIG_INTEL_IOMMU_DEFAULT_ON=y\n"
        "CONFIG_INTEL_IOMMU_SCALABLE_MODE_DEFAULT_ON=y\n"
    )
    machine.write(f"boot/config-{RELEASE}", config)
    needs = Needs([EDU], [], False)
    [problem] = crash.adoption_problems(machine, f"/{KERNEL}", "quiet", needs)
    assert "sm_off" in problem
    needs = Needs([EDU], [], True)
    assert list(crash.adoption_problems(machine, f"/{KERNEL}", "quiet", needs)) == []


# ---------------------------------------------------------------------- drivers


def drive(machine: Machine, device: str, module: str) -> None:
    """Have a driver of that module have a device."""
    machine.write(f"sys/module/{module}/x", "")
    driver = Path(machine.path(f"sys/bus/pci/drivers/{module}"))
    driver.mkdir(parents=True, exist_ok=True)
    (driver / "module").symlink_to(machine.path(f"sys/module/{module}"))
    Path(machine.path(f"sys/bus/pci/devices/{device}/driver")).symlink_to(driver)


def test_a_driver_that_would_reset_a_device_is_kept_away(machine: Machine) -> None:
    made = plan(machine, devices=(EDU, NIC))
    assert made.problems == []
    assert made.added[-1] == "module_blacklist=e1000e"
    machine.write("proc/cmdline", f"{LINE} module_blacklist=floppy")
    assert plan(machine, devices=(NIC,)).added[-1] == "module_blacklist=floppy,e1000e"


def test_a_driver_that_another_device_needs(machine: Machine) -> None:
    drive(machine, DISK, "virtio_pci")
    machine.write(f"sys/bus/pci/devices/{NIC}/modalias", "pci:v00001AF4d00001000svsdbcsci")
    [problem] = plan(machine, devices=(NIC,)).problems
    assert "virtio_pci" in problem
    assert DISK in problem


def test_a_driver_that_is_built_in(machine: Machine) -> None:
    machine.write(
        f"lib/modules/{RELEASE}/modules.builtin.modinfo",
        "e1000e.license=GPL\0e1000e.alias=pci:v00008086d000010D3sv*sd*bc*sc*i*\0",
    )
    [problem] = plan(machine, devices=(NIC,)).problems
    assert "e1000e built in" in problem


def test_a_kernel_whose_modules_are_nowhere(machine: Machine) -> None:
    Path(machine.path(f"lib/modules/{RELEASE}/modules.alias")).unlink()
    [problem] = plan(machine).problems
    assert "cannot see which of its drivers" in problem


def test_a_kernel_of_which_it_is_not_known_what_is_built_in(machine: Machine) -> None:
    Path(machine.path(f"lib/modules/{RELEASE}/modules.builtin.modinfo")).unlink()
    [problem] = plan(machine).problems
    assert "cannot see which of its drivers" in problem


# ---------------------------------------------------------------------- memory that is kept apart


def test_memory_that_the_firmware_keeps_apart_is_asked_for(machine: Machine) -> None:
    """A crash kernel's map does not have it: all of it, so that the device is the same."""
    for name, text in (("start", "0x40000000"), ("end", "0x7fffffff"), ("type", "Soft Reserved")):
        machine.write(f"sys/firmware/memmap/1/{name}", text)
    machine.write("proc/cmdline", "root=/dev/vda crashkernel=256M modprobe.blacklist=kmem")
    made = plan(machine)
    assert "memmap=1G%1G+0xefffffff" in made.added
    assert made.obstacles == []


def test_memory_that_no_kexec_passes_on_is_asked_for(machine: Machine) -> None:
    line = "efi_fake_mem=512M@1G:0x40000 crashkernel=256M modprobe.blacklist=kmem"
    machine.write("proc/cmdline", line)
    assert "memmap=512M%1G+0xefffffff" in plan(machine).added


@pytest.mark.parametrize(
    ("word", "kept"),
    [
        ("512M%1G-1+0xefffffff", "512M%1G+0xefffffff"),
        ("512M%1G-1+0xEFFFFFFF", "512M%1G+0xEFFFFFFF"),
        ("0x20000000%0x40000000-7+0xefffffff", "0x20000000%0x40000000+0xefffffff"),
        ("512M%1G-0xc+0xefffffff", "512M%1G+0xefffffff"),
        ("512M%1G-1+12", "512M%1G+12"),
        ("512M%1G-1", "512M%1G-1"),
        ("512M%1G+0xefffffff", "512M%1G+0xefffffff"),
        ("1M$5G,512M%1G-7+0xefffffff", "1M$5G,512M%1G+0xefffffff"),
    ],
)
def test_old_types_are_left_out(word: str, kept: str) -> None:
    """Of whatever type it is to be, nothing is there before."""
    assert crash.for_crash(f"memmap={word}", "m", "h") == f"memmap={kept} m h {crash.AWAKE}"


def test_a_device_that_is_gone(machine: Machine) -> None:
    with pytest.raises(NotFoundError, match="0000:00:1e"):
        plan(machine, devices=("0000:00:1e.0",))


def test_names_of_lost_mounts_are_not_escaped(machine: Machine) -> None:
    """proc(5): white space, backslash and # are octal in a table of mounts."""
    machine.write(
        "proc/self/mounts",
        "/dev/dax0.0 /mnt/my\\040guests fuse.pkernfs rw 0 0\n"
        "/dev/sdb1 /srv/a\\040\\011b\\134c xfs rw 0 0\n"
        " /run tmpfs rw 0 0\n"
        "/dev/sdc1 /srv/\r\x0c\u2028end ext4 rw 0 0\n",
    )
    assert list(crash.losses(machine, Needs([], [], False), ["/mnt/my guests"])) == [
        "/srv/a \tb\\c: left as by a loss of power, after a sync",
        "/srv/\r\x0c\u2028end: left as by a loss of power, after a sync",
    ]


def test_what_is_lost(machine: Machine) -> None:
    machine.write(
        "proc/self/mounts",
        "/dev/vda / ext4 rw,relatime 0 0\n/dev/vdb /srv xfs ro 0 0\ntmpfs /run tmpfs rw 0 0\n",
    )
    assert list(crash.losses(machine, Needs([], [EDU], False), ["/mnt/a"])) == [
        f"{EDU}: cut off, for it is not to persist",
        "/: left as by a loss of power, after a sync",
    ]
