"""pkernfs kexec: the plan, on made-up machines."""

from __future__ import annotations

from pathlib import Path

import pytest

from pkernfs.errors import NotFoundError, RegionError
from pkernfs.host.iomem import Span
from pkernfs.kexec.plan import Plan, check_command_line, make_plan, without_boot_loader
from pkernfs.quantities import PhysAddr
from support.made_up_host import Machine, bzimage, make_machine

GIB = 1 << 30
SPAN = Span(PhysAddr(GIB), GIB // 2)
LINE = (
    'BOOT_IMAGE=/vmlinuz root=/dev/vda dyndbg="file x +p" memmap=512M%1G pkernfs=512M!1G initrd=a'
)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    machine = make_machine(tmp_path, command_line=LINE)
    machine.write("proc/sys/kernel/osrelease", "7.3.4")
    machine.write("boot/vmlinuz-7.3.4", "")
    machine.write("boot/initrd.img-7.3.4", "")
    return machine


def plan(
    machine: Machine,
    append: str | None = None,
    *,
    kernel: str | None = None,
    initrd: str | None = None,
) -> Plan:
    return make_plan(
        [SPAN], ["/mnt/a", "/mnt/b"], append=append, kernel=kernel, initrd=initrd, host=machine
    )


def test_the_running_kernel_again(machine: Machine) -> None:
    made = plan(machine)
    line = 'root=/dev/vda dyndbg="file x +p" memmap=512M%1G pkernfs=512M!1G'
    assert made.added == []
    assert made.commands == [
        ["kexec", "-s", "-l", "/boot/vmlinuz-7.3.4", "--initrd=/boot/initrd.img-7.3.4",
         f"--command-line={line}"],
        ["pkernfs", "handover", "/mnt/a"],
        ["pkernfs", "handover", "/mnt/b"],
        ["kexec", "-e"],
    ]  # fmt: skip


def test_parameters_that_are_missing_are_added(machine: Machine) -> None:
    made = plan(machine, "root=/dev/vdb quiet")
    assert made.append == "root=/dev/vdb quiet memmap=512M%1G pkernfs=512M!1G"
    assert made.added == ["memmap=512M%1G", "pkernfs=512M!1G"]
    assert plan(machine, made.append).added == []


def test_what_keeps_dax_devices_from_the_kernel_is_added(machine: Machine) -> None:
    line = "memmap=512M%1G-1+0xefffffff"
    keep = "modprobe.blacklist=kmem"
    machine.write("proc/cmdline", f"{line} {keep}")
    assert plan(machine, line).added == [keep]
    assert plan(machine, f"{line} dax_hmem.region_idle=1").added == []


SOFT = "memmap=512M%1G-1+0xefffffff"


def options(machine: Machine, **config: str) -> None:
    """Give the running kernel this configuration."""
    text = "".join(f"CONFIG_{name}={value}\n" for name, value in config.items())
    machine.write("boot/config-7.3.4", text)


def test_what_keeps_kmem_away_is_added_whatever_does_it_now(machine: Machine) -> None:
    """A file in modprobe.d need not be in the initrd; if kmem is built in, none helps."""
    machine.write("proc/cmdline", SOFT)
    machine.write("etc/modprobe.d/dax.conf", "blacklist kmem\n")
    assert plan(machine).added == ["modprobe.blacklist=kmem"]
    options(machine, DEV_DAX="m", DEV_DAX_HMEM="m", DEV_DAX_KMEM="y")
    assert plan(machine).added == ["dax_hmem.region_idle=1"]
    assert plan(machine, "modprobe.blacklist=kmem").added == [SOFT, "dax_hmem.region_idle=1"]
    options(machine, DEV_DAX="m", DEV_DAX_HMEM="m")
    assert plan(machine).added == []


def test_kmem_that_has_a_device_is_not_kept_away(machine: Machine) -> None:
    """That would take memory from the next kernel that this one has."""
    machine.write("proc/cmdline", SOFT)
    machine.write("sys/bus/dax/drivers/kmem/dax1.0", "")
    made = plan(machine)
    assert made.added == []
    assert "dax1.0 is its: " in made.obstacles[-1]
    machine.write("proc/cmdline", f"{SOFT} dax_hmem.region_idle=1")
    assert not any("kmem" in text for text in plan(machine).obstacles)


@pytest.mark.parametrize("word", ["device_hmem.disable=1", "module_blacklist=dax_hmem"])
def test_a_command_line_by_which_there_is_no_dax_device(machine: Machine, word: str) -> None:
    machine.write("proc/cmdline", f"{SOFT} modprobe.blacklist=kmem")
    says = f"the next kernel would have no dax device: its command line has {word}"
    assert says in plan(machine, word).obstacles
    machine.write("proc/cmdline", "memmap=512M%1G")
    assert says not in plan(machine, word).obstacles


@pytest.mark.parametrize(
    ("running", "lacking"),
    [
        ("memmap=512M%1G", "DEVMEM"),
        ("memmap=512M$1G", "DEVMEM"),
        (SOFT, "DEV_DAX"),
        (SOFT, "DEV_DAX_HMEM"),
        ("memmap=512M!1G", "DEV_DAX_PMEM"),
        ("memmap=512M!1G", "X86_PMEM_LEGACY"),
    ],
)
def test_a_kernel_that_lacks_a_driver_of_the_region(
    machine: Machine, running: str, lacking: str
) -> None:
    everything = ("DEVMEM", "DEV_DAX", "DEV_DAX_HMEM", "DEV_DAX_PMEM", "LIBNVDIMM",
                  "X86_PMEM_LEGACY")  # fmt: skip
    machine.write("proc/cmdline", running)
    options(machine, **dict.fromkeys(everything, "y"))
    assert not any("CONFIG_" in text for text in plan(machine).obstacles)
    options(machine, **{name: "y" for name in everything if name != lacking})
    says = f"/boot/vmlinuz-7.3.4: no CONFIG_{lacking}: it could not mount a region again"
    assert says in plan(machine).obstacles


@pytest.mark.parametrize(
    ("own", "says"),
    [
        ({"CMDLINE_OVERRIDE": "y", "CMDLINE": '"quiet"'}, "CONFIG_CMDLINE_OVERRIDE"),
        ({"CMDLINE": '"quiet memmap=4G@0"'}, "CONFIG_CMDLINE has 'quiet memmap=4G@0'"),
        ({"CMDLINE": '"mem=1G"'}, "CONFIG_CMDLINE has"),
        ({"CMDLINE": '"quiet"'}, None),
    ],
)
def test_a_kernel_with_a_command_line_of_its_own(
    machine: Machine, own: dict[str, str], says: str | None
) -> None:
    options(machine, DEVMEM="y", CMDLINE_BOOL="y", **own)
    found = [text for text in plan(machine).obstacles if "CMDLINE" in text]
    assert len(found) == (says is not None)
    assert says is None or says in found[0]


def test_a_kernel_of_which_nothing_is_known(machine: Machine) -> None:
    machine.write("boot/new", bzimage("9.1"))
    says = "/boot/new: cannot see its configuration (9.1): it may lack the drivers of a region"
    assert any(text.startswith(says) for text in plan(machine, kernel="/boot/new").obstacles)
    machine.write("boot/config-9.1", "CONFIG_DEVMEM=y\n")
    assert not any("configuration" in t for t in plan(machine, kernel="/boot/new").obstacles)


# ---------------------------------------------------------------------- in no word of this kernel


def test_what_a_kexec_does_not_pass_on_is_asked_for_by_a_word(machine: Machine) -> None:
    """efi_fake_mem= is followed by a kernel that EFI starts; no other one has EFI's memory map."""
    machine.write("proc/cmdline", "efi_fake_mem=512M@1G:0x40000 modprobe.blacklist=kmem")
    assert plan(machine).added == [SOFT]
    assert plan(machine, "quiet").added == ["modprobe.blacklist=kmem", SOFT]
    machine.write("proc/cmdline", "quiet")  # and yet it is no System RAM in /proc/iomem
    assert plan(machine).added == ["memmap=512M%1G-1"]


@pytest.mark.parametrize(
    "word",
    ["memmap=512M%1G-7+0xefffffff", "memmap=512M%1G-12+0xefffffff", "memmap=512M%1G+0xefffffff"],
)
def test_other_old_types_are_kept(tmp_path: Path, word: str) -> None:
    """What the firmware reports as persistent memory, and a word makes soft-reserved."""
    kind = "Persistent Memory (legacy)" if "-12" in word else "Persistent Memory"
    firmware = ((0, GIB - 1, "System RAM"), (GIB, 2 * GIB - 1, kind))
    line = f"{word} modprobe.blacklist=kmem"
    other = make_machine(tmp_path, command_line=line, firmware=firmware)
    other.write("proc/sys/kernel/osrelease", "7.3.4")
    other.write("boot/vmlinuz-7.3.4", "")
    assert plan(other, "quiet").added == [word, "modprobe.blacklist=kmem"]
    if "-" in word.partition("%")[2].replace("+", " ").split()[0]:
        with pytest.raises(RegionError, match="for ordinary memory"):  # of RAM it makes nothing
            check_command_line(line, [SPAN])


def test_an_initrd_that_is_not_found_is_an_obstacle(machine: Machine) -> None:
    Path(machine.path("boot/initrd.img-7.3.4")).unlink()
    assert any("--initrd none" in text for text in plan(machine).obstacles)
    assert not any("initrd" in text for text in plan(machine, initrd="none").obstacles)


# ---------------------------------------------------------------------- the rest of the plan


def test_memory_that_the_firmware_keeps_apart_needs_no_parameter(machine: Machine) -> None:
    device = Span(PhysAddr(64 * GIB), GIB)
    assert make_plan([SPAN, device], [], append="quiet", host=machine).added == [
        "memmap=512M%1G",
        "pkernfs=512M!1G",
    ]
    machine.write("proc/cmdline", "quiet")
    options(machine, X="y")
    made = make_plan([device], [], append="quiet", host=machine)
    assert made.added == []
    assert not any("CONFIG" in text for text in made.obstacles)


def test_systemd_shuts_down_in_its_own_way(machine: Machine) -> None:
    machine.write("run/systemd/system/x", "")
    assert plan(machine).commands[-1] == ["systemctl", "kexec"]


def test_a_kernel_that_could_place_itself_into_a_region(machine: Machine) -> None:
    line = "memmap=2G%1G"
    machine.write("proc/cmdline", line)
    made = make_plan([Span(PhysAddr(GIB), 2 * GIB)], [], append=line, host=machine)
    assert made.append.endswith(" nokaslr")
    assert "nokaslr" not in make_plan([], [], append=line, host=machine).append
    assert (
        make_plan(
            [Span(PhysAddr(GIB), 2 * GIB)], [], append=f"nokaslr {line}", host=machine
        ).append.count("nokaslr")
        == 1
    )


def test_nokaslr_is_added_where_the_region_is_not_avoided(machine: Machine) -> None:
    """More words than the decompressor counts, of which the region's comes last."""
    machine.write("proc/cmdline", "memmap=512M$1G")
    four = "memmap=1M$4G,1M$5G,1M$6G,1M$7G"
    assert plan(machine, "quiet").added == ["memmap=512M$1G"]
    assert plan(machine, four).added == ["memmap=512M$1G", "nokaslr"]
    assert plan(machine, f"{four},1M$8G").added == ["memmap=512M$1G"]  # KASLR is off


def test_the_rules_are_those_of_the_next_kernel(machine: Machine) -> None:
    machine.write("proc/cmdline", "memmap=512M$1G")
    machine.write("boot/old", bzimage("6.1.0"))
    machine.write("boot/new", bzimage("6.12.0"))
    line = "efi_fake_mem=1G@9G:0x40000 memmap=1M$4G,1M$5G,1M$6G"
    assert plan(machine, line, kernel="/boot/old").added == ["memmap=512M$1G", "nokaslr"]
    assert plan(machine, line, kernel="/boot/new").added == ["memmap=512M$1G"]


def test_a_command_line_on_which_nokaslr_does_not_count(machine: Machine) -> None:
    """The decompressor does not see the word behind one that is its beginning."""
    machine.write("proc/cmdline", "memmap=512M$1G")
    line = "memmap=1M$4G,1M$5G,1M$6G,1M$7G memmap=512M$1G no"
    with pytest.raises(RegionError, match="nokaslr does not count where the command line has it"):
        plan(machine, line)
    assert plan(machine, f"nokaslr {line}").added == []


def test_a_limit_that_keeps_the_region_is_kept(machine: Machine) -> None:
    machine.write("proc/cmdline", "mem=1G pkernfs=512M!1G")
    assert plan(machine, "quiet").added == ["mem=1G", "pkernfs=512M!1G"]
    machine.write("proc/cmdline", "mem=8G memmap=512M$1G")
    assert plan(machine, "quiet").added == ["memmap=512M$1G"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("memmap=512M%1G,1G%4G-1+1", "would stop at boot: memmap=1G%4G-1\\+1: it changes a type"),
        ("memmap=exactmap,1G@0", "would stop at boot: memmap=exactmap: fewer than two"),
        ("memmap=2GB$1GB", "needs memmap=512M%1G"),
        ("memmap=512M%1GB", "needs memmap=512M%1G"),
        ("", "needs memmap=512M%1G"),
        ("memmap=256M%1G", "would take 0x50000000-0x5fffffff"),
        ("memmap=512M@1G", "ordinary memory"),
        ("-- memmap=512M%1G", "needs memmap="),
        ("memmap=512M%1G " + "x" * 2048, "too long"),
    ],
)
def test_a_command_line_that_loses_a_region(line: str, reason: str) -> None:
    with pytest.raises(RegionError, match=reason):
        check_command_line(line, [SPAN])


@pytest.mark.parametrize("line", ["memmap=512M$1G", "memmap=1G!1G", "memmap=1G%1G-1+0xefffffff"])
def test_every_way_to_reserve_will_do(line: str) -> None:
    check_command_line(line, [SPAN])


def test_a_kernel_that_is_not_there(machine: Machine) -> None:
    with pytest.raises(NotFoundError, match=r"^/boot/vmlinuz-9: no such file$"):
        plan(machine, kernel="/boot/vmlinuz-9")
    with pytest.raises(NotFoundError, match=r"other\.img"):
        plan(machine, initrd="/boot/other.img")
    Path(machine.path("boot/vmlinuz-7.3.4")).unlink()
    with pytest.raises(NotFoundError, match=r"vmlinuz-7\.3\.4: no such file: name one with --k"):
        plan(machine)


def test_a_kernel_in_this_directory(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/usr")
    machine.write("usr/k", "")
    assert plan(machine, kernel="k").commands[0][3] == "/usr/k"


def test_another_kernel_without_an_initrd(machine: Machine) -> None:
    machine.write("boot/other", "")
    made = plan(machine, kernel="/boot/other")
    assert made.initrd is None
    assert made.commands[0][:4] == ["kexec", "-s", "-l", "/boot/other"]


def test_quotes_of_the_command_line_stay() -> None:
    assert without_boot_loader('a="b c" BOOT_IMAGE=x "d e"') == 'a="b c" "d e"'
