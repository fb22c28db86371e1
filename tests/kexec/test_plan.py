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


def test_memory_that_the_firmware_keeps_apart_needs_no_parameter(machine: Machine) -> None:
    device = Span(PhysAddr(64 * GIB), GIB)
    assert make_plan([SPAN, device], [], append="quiet", host=machine).added == [
        "memmap=512M%1G",
        "pkernfs=512M!1G",
    ]
    machine.write("proc/cmdline", "quiet")
    assert make_plan([device], [], append="quiet", host=machine).added == []


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
