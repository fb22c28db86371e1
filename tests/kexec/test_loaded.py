"""The kernel loaded for kexec: what must be repeated, and reading it from a made-up /proc/kcore."""

from __future__ import annotations

import contextlib
import random
from pathlib import Path

import pytest

from pkernfs.host.iomem import Span
from pkernfs.kexec import loaded
from pkernfs.kexec.spans import KexecError
from pkernfs.quantities import PhysAddr
from support.kernel_memory import (
    IMAGE,
    PAGES,
    RUNNING,
    TEXT,
    Memory,
)
from support.made_up_host import Machine, add_dax, make_machine

G = 1 << 30
SPEC = "512M!1G"
SOFT = "memmap=512M%1G-1+0xefffffff"


@pytest.fixture
def memory(tmp_path: Path) -> Memory:
    return Memory(tmp_path)


# ---------------------------------------------------------------------- reading


@pytest.mark.parametrize("length", [1, 100, 2047, 2048, 2049, 6000, 20_000])
@pytest.mark.parametrize("before", [0, 1, 509, 510, 511, 1500])
def test_reads_the_command_line(memory: Memory, length: int, before: int) -> None:
    text = "".join(random.Random(length).choices("abc =/!%", k=length)).strip() or "x"
    if before > 500 and length > 6000:
        return  # no room
    memory.bytes = bytearray(16 << 20)
    memory.load(text, before=before)
    assert loaded.command_line_of_loaded(SPEC, memory.host) == text


@pytest.mark.parametrize(
    ("break_it", "reason"),
    [
        (lambda m: m.write("sys/kernel/kexec_loaded", "0"), "no kernel is loaded for kexec"),
        (lambda m: (m.root / "sys/kernel/kexec_loaded").unlink(), "no kernel is loaded"),
        (lambda m: (m.root / "proc/kcore").unlink(), "No such file"),
        (lambda m: (m.root / "proc/kcore").write_bytes(b"\x7fELF\x01"), "not what it should be"),
        (lambda m: m.write("proc/kallsyms", "0000000000000000 B kexec_image"), "does not tell"),
        (lambda m: m.write("proc/kallsyms", "zzz B kexec_image"), "does not tell"),
        (lambda m: m.write("proc/kallsyms", "ff B kexec_image"), "is not in /proc/kcore"),
        (lambda m: m.write("proc/kallsyms", f"{TEXT:x} T _text"), "does not tell"),
        (lambda m: (m.word(0x1238, 0), m.save()), "there is none"),
        (lambda m: (m.word(IMAGE, 4), m.save()), "no boot parameters"),
        (lambda m: (m.word(IMAGE, IMAGE | 2), m.save()), "no end"),
        (lambda m: (m.word(IMAGE, 1 << 45 | 2), m.save()), "is not in /proc/kcore"),
    ],
)
def test_what_cannot_be_read_is_said(memory: Memory, break_it: object, reason: str) -> None:
    memory.load(RUNNING)
    break_it(memory)  # type: ignore[operator]
    with pytest.raises(KexecError, match=reason) as failure:
        loaded.command_line_of_loaded(SPEC, memory.host)
    assert "--cmdline" in str(failure.value)
    assert "\n" not in str(failure.value)


def test_a_kernel_that_would_be_put_into_the_region(memory: Memory) -> None:
    memory.load(RUNNING, before=8)
    kernel = 0x100_0000
    for start, size, at in (
        (kernel, 0x8000, kernel),
        (kernel + 0x7000, 0x8000, kernel + 0x7000),
        (kernel - 0x2000, 0x3000, kernel),
    ):
        with pytest.raises(
            KexecError, match=rf"into the region, at {at:#x}: load it with kexec -s"
        ):
            loaded.command_line_of_loaded(
                SPEC, memory.host, [Span(PhysAddr(0), 4096), Span(PhysAddr(start), size)]
            )
    for start in (kernel - 0x8000, kernel + 0x8000):
        near = [Span(PhysAddr(start), 0x8000)]
        assert loaded.command_line_of_loaded(SPEC, memory.host, near) == RUNNING


@pytest.mark.slow("300 memories of garbage")
def test_garbage_in_memory_is_an_error(memory: Memory) -> None:
    memory.load(RUNNING, before=5)
    good = bytes(memory.bytes)
    used = [IMAGE, *range(PAGES, memory._next, 4096)]
    for seed in range(300):
        rng = random.Random(seed)
        memory.bytes[:] = good
        for _ in range(rng.randrange(1, 12)):
            at = rng.choice(used) + 8 * rng.randrange(0, 40)
            memory.word(at, rng.choice([rng.getrandbits(64), rng.randrange(1 << 22), 0]))
        memory.save()
        with contextlib.suppress(KexecError):
            loaded.command_line_of_loaded(SPEC, memory.host)


# ---------------------------------------------------------------------- what must be repeated


@pytest.mark.parametrize(
    ("running", "following"),
    [
        (RUNNING, RUNNING),
        (RUNNING, "pkernfs=0x20000000!0x40000000 console=ttyS0 memmap=0x20000000%1024M"),
        (RUNNING, "memmap=1G%1G pkernfs=512M!1G"),
        (RUNNING, "memmap=4G%8G memmap=256M%1G,256M%1280M pkernfs=512M!1G nokaslr"),
        ("memmap=512M!1G", "memmap=512M!1G"),
        ("memmap=512M$1G pkernfs=a:512M!1G", "memmap=512M$1G pkernfs=a:512M!1G"),
        ("memmap=512M@1G", "given as RAM: it is not kept apart"),
    ],
)
def test_repeated(memory: Memory, running: str, following: str) -> None:
    memory.write("proc/cmdline", running)
    loaded.check(SPEC, following, memory.host)
    memory.load(following)
    loaded.check(SPEC, None, memory.host)


@pytest.mark.parametrize("kind", ["Soft Reserved", "Persistent Memory", "Reserved", "anything"])
@pytest.mark.parametrize("running", ["quiet", "memmap=1G%8G pkernfs=1G!8G"])
def test_what_the_firmware_keeps_apart_needs_no_word(
    memory: Memory, kind: str, running: str
) -> None:
    """Another region's words are none of this one's business."""
    firmware(memory, (0, G, "System RAM"), (G, 2 * G, kind))
    memory.write("proc/cmdline", running)
    loaded.check(SPEC, "anything", memory.host)
    memory.load("anything")
    loaded.check(SPEC, None, memory.host)


def firmware(memory: Memory, *entries: tuple[int, int, str]) -> None:
    """Have the firmware report these: start, end, type."""
    for number, (start, end, kind) in enumerate(entries):
        for name, text in (("start", hex(start)), ("end", hex(end - 1)), ("type", kind)):
            memory.write(f"sys/firmware/memmap/{number}/{name}", text)


def test_a_word_that_undoes_what_the_firmware_does(memory: Memory) -> None:
    firmware(memory, (0, G, "System RAM"), (G, 2 * G, "Soft Reserved"))
    memory.write("proc/cmdline", "quiet")
    says = (
        r"the firmware keeps 0x40000000-0x5fffffff apart, and the kernel loaded for kexec would "
        r"not: its command line"
    )
    for line in ("memmap=1G%1G-0xefffffff+1", "memmap=exactmap,2G@0,1G!4G"):
        with pytest.raises(KexecError, match=says):
            loaded.check(SPEC, line, memory.host)


def test_the_map_that_kexec_gives_the_loaded_kernel(memory: Memory) -> None:
    """kexec -c makes one of its own, and knows no soft-reserved memory."""
    firmware(memory, (0, G, "System RAM"), (G, 2 * G, "Soft Reserved"))
    memory.write("proc/cmdline", "quiet")
    memory.load("quiet", memory_map=[(0, G, 1), (G, G, 0xEFFFFFFF)])
    loaded.check(SPEC, None, memory.host)
    memory.load("quiet", memory_map=[(0, G, 1), (G, G, 2)])
    with pytest.raises(KexecError, match=r"the map that kexec gives it, .*: load it with kexec -s"):
        loaded.check(SPEC, None, memory.host)


@pytest.mark.parametrize(
    ("running", "iomem", "word", "why"),
    [
        ("efi_fake_mem=1G@1G:0x40000", "Soft Reserved", "memmap=1G%1G-1+0xefffffff",
         " (no kernel that kexec starts follows efi_fake_mem=)"),
        ("quiet", "dax0.0", "memmap=1G%1G-1+0xefffffff",
         " (it cannot be seen what keeps it from this one)"),
        ("quiet", "Soft Reserved", "memmap=1G%1G-1+0xefffffff", ""),
        ("quiet", "Persistent Memory", "memmap=1G%1G-1+12", ""),
        ("quiet", "something", "memmap=1G%1G-1", ""),
    ],
)  # fmt: skip
def test_what_keeps_it_apart_is_not_passed_on(
    memory: Memory, running: str, iomem: str, word: str, why: str
) -> None:
    """By the firmware's map and the words this would be ordinary memory; it is not."""
    firmware(memory, (0, 2 * G, "System RAM"))
    memory.write("proc/cmdline", running)
    memory.write("proc/iomem", f"00100000-3fffffff : System RAM\n40000000-7fffffff : {iomem}\n")
    memory.load(running)
    for given in (None, running):
        with pytest.raises(KexecError) as failure:
            loaded.check(SPEC, given, memory.host)
        assert f"is not told {word}: it would take" in str(failure.value)
        assert str(failure.value).endswith(why)
    loaded.check(SPEC, f"{word} nokaslr", memory.host)


def test_a_command_line_at_which_a_kernel_stops(memory: Memory) -> None:
    line = f"{RUNNING} memmap=1M%8G-2+2"
    with pytest.raises(
        KexecError, match=r"would stop at boot: memmap=1M%8G-2\+2: it changes a type"
    ):
        loaded.check(SPEC, line, memory.host)


def test_a_number_that_not_all_kernels_take_for_this_region(memory: Memory) -> None:
    """Which release is loaded is not known: 7.3 takes it for the largest number, others for 1G."""
    line = RUNNING.replace("512M%1G", "512M$1G") + " nokaslr"
    loaded.check(SPEC, line, memory.host)
    line += f" memmap=1M%{(1 << 64) + (1 << 30)}-2+1"
    with pytest.raises(KexecError, match="it would take the region for ordinary memory"):
        loaded.check(SPEC, line, memory.host)


def test_a_kernel_without_the_initrd_that_this_one_has(memory: Memory) -> None:
    memory.load(RUNNING, before=5)
    (memory.root / "sys/kernel/boot_params/data").unlink()
    with pytest.raises(KexecError, match="and it cannot be seen whether this one was started with"):
        loaded.check(SPEC, None, memory.host)
    for had, has, refused in ((0, 0, False), (5, 0, True), (5, 7, False)):
        data = bytearray(4096)
        data[0x21C] = had
        path = memory.root / "sys/kernel/boot_params/data"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        memory.load(RUNNING, before=5, initrd=has)
        if refused:
            with pytest.raises(KexecError, match="has no initrd, and this one was started with"):
                loaded.check(SPEC, None, memory.host)
            loaded.check(SPEC, None, memory.host, needs_initrd=False)
        else:
            loaded.check(SPEC, None, memory.host)


def test_a_region_that_ends_with_this_kernel(memory: Memory) -> None:
    says = "/dev/shm: it ends with this kernel; nothing here survives a kexec"
    with pytest.raises(KexecError, match=f"^{says}$"):
        loaded.check("/dev/shm", "quiet", memory.host)


@pytest.mark.parametrize(
    ("running", "following", "missing"),
    [
        (RUNNING, "quiet", "memmap=512M%1G pkernfs=512M!1G"),
        (RUNNING, "quiet pkernfs=512M!1G", "memmap=512M%1G"),
        (RUNNING, "quiet memmap=512M%1G", "pkernfs=512M!1G"),
        (RUNNING, "memmap=256M%1G pkernfs=512M!1G", "memmap=512M%1G"),
        (RUNNING, "memmap=512M%2G pkernfs=512M!1G", "memmap=512M%1G"),
        (RUNNING, "memmap=512M!1G pkernfs=512M!1G", "memmap=512M%1G"),
        (RUNNING, "memmap=512M%1G -- pkernfs=512M!1G", "pkernfs=512M!1G"),
        (RUNNING, "memmap=512M%1G pkernfs=b:512M!1G", "pkernfs=512M!1G"),
        (RUNNING, "memmap=512M%1G pkernfs=256M!1G", "pkernfs=512M!1G"),
        (RUNNING, "memmap=512M%1G pkernfs=", "pkernfs=512M!1G"),
        (
            "memmap=256M%1G memmap=256M$1280M",
            "memmap=256M%1G",
            "memmap=256M$1280M",
        ),
    ],
)
def test_not_repeated(memory: Memory, running: str, following: str, missing: str) -> None:
    memory.write("proc/cmdline", running)
    memory.load(following)
    for given in (None, following):
        with pytest.raises(KexecError) as failure:
            loaded.check(SPEC, given, memory.host)
        why = "`none` would not" if missing.startswith("pkernfs=") else "it would take"
        assert f"is not told {missing}: {why}" in str(failure.value)


@pytest.mark.parametrize(
    "following",
    ["memmap=512M%1G memmap=1M@1G", "memmap=512M%1G,1M@1G", "memmap=1M@1500M,512M%1G memmap=1M@1G"],
)
def test_repeated_and_undone(memory: Memory, following: str) -> None:
    """A word that is there is not missing."""
    with pytest.raises(KexecError) as failure:
        loaded.check(SPEC, f"{following} pkernfs=512M!1G", memory.host)
    assert "is told memmap=512M%1G, but another word undoes that" in str(failure.value)
    assert "without such a word" in str(failure.value)


def dax_line(machine: Machine, *more: str) -> str:
    """A command line that names the device of a made-up machine."""
    return " ".join((f"{SOFT} pkernfs=guests:{machine.path('dev/dax0.0')}", *more))


def test_a_dax_device_is_repeated(tmp_path: Path) -> None:
    machine = make_machine(tmp_path)
    add_dax(machine, "dax0.0", (1 << 30, 512 << 20))
    spec = machine.path("dev/dax0.0")
    named = f"pkernfs=guests:{spec}"
    keep = "modprobe.blacklist=floppy,kmem"
    for running, following, missing in (
        (dax_line(machine), dax_line(machine, "quiet"), ""),
        (dax_line(machine), f"memmap=1G%1G-1+0xefffffff {named}", ""),
        (dax_line(machine), named, SOFT),
        (dax_line(machine), f"memmap=512M%1G {named}", SOFT),
        (dax_line(machine), SOFT, named),
        (dax_line(machine), f"{SOFT} pkernfs={spec}", named),
        (dax_line(machine), dax_line(machine).replace("dax0.0", "dax0.1"), named),
        (dax_line(machine, keep), dax_line(machine, "dax_hmem.region_idle=1"), ""),
        (dax_line(machine, keep), dax_line(machine, "module_blacklist=kmem"), ""),
        (dax_line(machine, keep), dax_line(machine), keep),
        (dax_line(machine, keep), dax_line(machine, "dax_hmem.region_idle=0"), keep),
        (dax_line(machine, keep), dax_line(machine, "modprobe.blacklist=kmem2"), keep),
        (f"{SOFT} {named} dax_hmem.region_idle", dax_line(machine), "dax_hmem.region_idle"),
    ):
        machine.write("proc/cmdline", running)
        if not missing:
            loaded.check(spec, following, machine)
            continue
        with pytest.raises(KexecError) as failure:
            loaded.check(spec, following, machine)
        why = "`none` would not" if missing.startswith("pkernfs=") else "it would take"
        assert f"is not told {missing}: {why}" in str(failure.value), following


@pytest.mark.parametrize("following", ["64M%1G", "64M%1G-1+0xefffffff", "256M%1G-1+0xefffffff"])
def test_segments_of_a_dax_device_are_kept_as_well(tmp_path: Path, following: str) -> None:
    """They are other devices of its dax region; what is there free is theirs, too."""
    machine = make_machine(tmp_path, command_line=SOFT)
    add_dax(machine, "dax0.0", (1 << 30, 64 << 20))
    add_dax(machine, "dax0.1", ((1 << 30) + (300 << 20), 32 << 20))
    spec = machine.path("dev/dax0.0")
    loaded.check(spec, SOFT, machine)
    with pytest.raises(KexecError, match=f"is not told {SOFT.replace('+', '.')}: it would take"):
        loaded.check(spec, f"memmap={following}", machine)


def test_a_dax_device_of_memory_that_the_firmware_keeps_apart(tmp_path: Path) -> None:
    """It needs no word but what keeps kmem from it; that may stand in modprobe.d."""
    soft = (1 << 30, (2 << 30) - 1, "Soft Reserved")
    machine = make_machine(tmp_path, command_line="quiet", firmware=(soft,))
    add_dax(machine, "dax0.0", (1 << 30, 512 << 20))
    spec = machine.path("dev/dax0.0")
    loaded.check(spec, "", machine)
    for running, modprobe in (("modprobe.blacklist=kmem", ""), ("quiet", "blacklist kmem\n")):
        machine.write("proc/cmdline", running)
        machine.write("etc/modprobe.d/x.conf", modprobe)
        with pytest.raises(KexecError, match=r"is not told modprobe\.blacklist=kmem: it"):
            loaded.check(spec, "", machine)
        loaded.check(spec, "modprobe.blacklist=kmem", machine)


def test_memory_in_dev_mem_is_not_kmems(memory: Memory) -> None:
    memory.write("proc/cmdline", f"{RUNNING} modprobe.blacklist=kmem")
    loaded.check(SPEC, RUNNING, memory.host)


def test_files_need_nothing(memory: Memory, tmp_path: Path) -> None:
    memory.write("sys/kernel/kexec_loaded", "0")
    loaded.check(str(tmp_path / "region"), None, memory.host)
    loaded.check(str(tmp_path / "region"), "quiet", memory.host)


def test_kaslr(memory: Memory) -> None:
    """A region that is larger than its start is no place that KASLR keeps clear of."""
    line = "memmap=2G%1G pkernfs=2G!1G"
    memory.write("proc/cmdline", line + " nokaslr")
    with pytest.raises(
        KexecError,
        match=r"may put itself into it, at 0x40000000 \(KASLR: it takes memmap=2G%1G for a limit "
        r"of 2G\): load it again with nokaslr",
    ):
        loaded.check("2G!1G", line, memory.host)
    loaded.check("2G!1G", line + " nokaslr", memory.host)
    many = ",".join(f"1M${4 + i}G" for i in range(5))
    loaded.check("2G!1G", f"{line} memmap={many}", memory.host)


def test_a_range_that_kaslr_does_not_count(memory: Memory) -> None:
    """Four ranges are avoided; the fifth in a parameter of its own is not, and KASLR stays on."""
    line = "memmap=2G$1G pkernfs=2G!1G"
    four = " ".join(f"memmap=1M${4 + i}G" for i in range(4))
    memory.write("proc/cmdline", line)
    loaded.check("2G!1G", f"{line} {four}", memory.host)
    with pytest.raises(KexecError, match=r"memmap=2G\$1G comes after the 4 ranges"):
        loaded.check("2G!1G", f"{four} {line}", memory.host)
