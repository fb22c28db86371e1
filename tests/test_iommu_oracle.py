"""The tables before an IOMMU that is not ours: QEMU's, driven without a guest.

QEMU runs with a CPU that only halts and with the region's file as its memory, so that what
pkernfs.iommu stores is what QEMU's intel-iommu walks, at once. The registers are driven by QEMU's
qtest protocol. Its edu device reads memory through the tables: each page holds its own physical
address, and so the device tells how QEMU has translated.
"""

from __future__ import annotations

import random
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pkernfs.errors import ExistsError, NoSpaceError
from pkernfs.iommu import (
    READ,
    WRITE,
    Config,
    Memory,
    Mode,
    PageTable,
    RootTables,
    Translation,
    check,
    configure,
    store_words,
    translate,
)
from pkernfs.layout import PAGE
from pkernfs.region import Region

pytestmark = pytest.mark.vm

MIB = 1 << 20
GIB = 1 << 30
RAM = 64 * MIB
ROOT = (MIB, 64 * PAGE)
DOM_0 = (2 * MIB, 2 * MIB)
DOM_1 = (4 * MIB, 2 * MIB)
DATA = 16 * MIB  # from here on, each page begins with its own physical address
DEVICES = {0x28: 0xE000_0000, 0x30: 0xE010_0000}  # 00:05.0 and 00:06.0, where their BARs go
UNIT = 0xFED9_0000
SCRATCH = 1 << 46  # an address that each domain has mapped, and the memory there
SCRATCH_PAGE = 12 * MIB


class Machine:
    """QEMU, spoken to by qtest's line protocol."""

    def __init__(self, memory: Path, scalable: bool) -> None:
        unit = "intel-iommu,aw-bits=48,intremap=off"
        unit += ",x-scalable-mode=on" if scalable else ""
        backend = f"memory-backend-file,id=ram,size={RAM},mem-path={memory},share=on"
        firmware = memory.with_name("firmware")
        firmware.write_bytes(bytes(0x10000 - 16) + b"\xfa\xf4\xeb\xfd" + bytes(12))  # cli; hlt
        command = ["qemu-system-x86_64", "-display", "none", "-nodefaults", "-accel", "tcg"]
        # Time jumps to the device's next timer: each transfer would take 100 ms otherwise.
        command += ["-icount", "shift=0,sleep=off", "-bios", str(firmware)]
        command += ["-qtest", "stdio", "-object", backend, "-m", "64"]
        command += ["-M", "q35,memory-backend=ram", "-device", unit]
        for number in (5, 6):
            command += ["-device", f"edu,addr={number:02x}.0,dma_mask={(1 << 48) - 1:#x}"]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        try:
            for source_id, bar in DEVICES.items():
                self._configure(source_id, 0x10, bar)
                self._configure(source_id, 0x04, 6)  # memory space, bus master
        except BaseException:
            self.close()
            raise

    def say(self, *words: object) -> int:
        """One command; the number that it is answered with, if there is one."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(" ".join(str(w) for w in words) + "\n")
        self._process.stdin.flush()
        while (line := self._process.stdout.readline()).startswith("IRQ"):
            pass
        answer = line.split()
        assert answer[:1] == ["OK"], (words, line)
        return int(answer[1], 0) if len(answer) > 1 else 0

    def _configure(self, source_id: int, register: int, value: int) -> None:
        self.say("outl", 0xCF8, 1 << 31 | source_id << 8 | register)
        self.say("outl", 0xCFC, value)

    def enable(self, root: int, scalable: bool) -> None:
        """Put a root table in force."""
        self.say("writeq", UNIT + 0x20, root | (1 << 10 if scalable else 0))
        self.say("writel", UNIT + 0x18, 1 << 30)
        self.invalidate()
        self.say("writel", UNIT + 0x18, 1 << 31)
        assert self.say("readl", UNIT + 0x1C) >> 31 == 1

    def invalidate(self) -> None:
        """Context cache and IOTLB, all of them."""
        self.say("writeq", UNIT + 0x28, 1 << 63 | 1 << 61)
        self.say("writeq", UNIT + 0xF8, 1 << 63 | 1 << 60)

    def fault(self) -> tuple[int, int] | None:
        """Reason and source id of the fault that is recorded, which is then cleared."""
        high = self.say("readq", UNIT + 0x228)
        if not high >> 63:
            return None
        self.say("writel", UNIT + 0x22C, 1 << 31)
        self.say("writel", UNIT + 0x34, 1)
        return high >> 32 & 0xFF, high & 0xFFFF

    def fetch(self, source_id: int, iova: int) -> None:
        """Let the device read 8 bytes into its buffer."""
        self._transfer(DEVICES[source_id], iova, 0x40000, 1)

    def put(self, source_id: int, iova: int) -> None:
        """Let the device write the 8 bytes from its buffer."""
        self._transfer(DEVICES[source_id], 0x40000, iova, 3)

    def _transfer(self, bar: int, source: int, target: int, command: int) -> None:
        self.say("writeq", bar + 0x80, source)
        self.say("writeq", bar + 0x88, target)
        self.say("writeq", bar + 0x90, 8)
        self.say("writeq", bar + 0x98, command)
        deadline = time.monotonic() + 10
        while self.say("readq", bar + 0x98) & 1:
            assert time.monotonic() < deadline, "the device does not end its transfer"

    def close(self) -> None:
        """End QEMU."""
        self._process.kill()
        self._process.communicate()


class Lab:
    """A region that is QEMU's memory, two domains and two devices."""

    def __init__(self, path: Path, mode: Mode) -> None:
        memory = path / "memory"
        Region.create(str(memory), RAM)
        self.mode = mode
        self.region = Region.open(str(memory), write=True, phys_base=0)
        for page in range(DATA, RAM, PAGE):
            self.region.store_u64(page, page)
        self.commit = store_words(self.region)
        root = Memory(self.region, [ROOT])
        configure(root, self.commit, Config(mode, 4))
        self.root = RootTables(root, self.commit)
        self.memories = {
            "dom-0": Memory(self.region, [DOM_0]),
            "dom-1": Memory(self.region, [DOM_1]),
        }
        self.first, self.second = (PageTable(m, self.commit) for m in self.memories.values())
        for table in (self.first, self.second):
            table.map(SCRATCH, SCRATCH_PAGE, PAGE, 3)
        self.root.attach(0x28, self.first.root, 2)
        self.root.attach(0x30, self.second.root, 3)
        self.machine = Machine(memory, mode is Mode.SCALABLE)
        self.machine.enable(self.root.root, mode is Mode.SCALABLE)

    def close(self) -> None:
        self.machine.close()
        self.region.close()

    def walk(self, source_id: int, iova: int, access: int) -> Translation:
        memory = Memory.whole(self.region)
        return translate(memory, self.root.root, source_id, iova, mode=self.mode, access=access)

    def word(self, physical: int) -> int:
        return int(self.region.view(physical, 8).cast("Q")[0])

    def load(self, source_id: int, iova: int) -> int:
        """What a device reads at one of its addresses; it hands it on through its scratch page."""
        self.machine.fetch(source_id, iova)
        assert self.machine.fault() is None
        self.machine.put(source_id, SCRATCH)
        assert self.machine.fault() is None
        return self.word(SCRATCH_PAGE)

    def store(self, source_id: int, iova: int, value: int) -> tuple[int, int] | None:
        """Let a device write a word; the fault, if that is what it comes to."""
        self.region.store_u64(SCRATCH_PAGE, value)
        self.machine.fetch(source_id, SCRATCH)
        assert self.machine.fault() is None
        self.machine.put(source_id, iova)
        return self.machine.fault()

    def compare(self, source_id: int, iova: int) -> str:
        """QEMU and translate() agree on a read at the start of a page: what it came to."""
        expected = self.walk(source_id, iova, READ)
        if expected.fault is not None:
            self.machine.fetch(source_id, iova)
            self.same_reason(self.machine.fault(), source_id, expected)
            return "fault"
        value = self.load(source_id, iova)
        assert expected.physical is not None
        if not DATA <= expected.physical < RAM:
            return "elsewhere"
        assert value == expected.physical, (hex(iova), hex(value), expected)
        return f"level {expected.level}"

    def same_reason(
        self, fault: tuple[int, int] | None, source_id: int, expected: Translation
    ) -> None:
        """QEMU 7.2 reports scalable mode's faults with legacy mode's numbers."""
        assert fault is not None, expected
        assert expected.fault is not None
        assert fault[1] == source_id
        if self.mode is Mode.LEGACY:
            assert fault[0] == expected.fault, (hex(expected.iova), fault, expected)
        else:
            legacy = type(expected.fault)(fault[0]).name
            name = expected.fault.name.removeprefix("SM_")
            assert legacy == {"PAGING_ENTRY_P": "READ"}.get(name, name)


@pytest.fixture(params=[Mode.LEGACY, Mode.SCALABLE], ids=["legacy", "scalable"])
def lab(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Lab]:
    made = Lab(tmp_path, request.param)
    yield made
    made.close()


def test_leaves_of_every_size(lab: Lab) -> None:
    lab.first.map(7 * PAGE, DATA + 3 * PAGE, 5 * PAGE, 3)
    lab.first.map(4 * MIB, DATA, 8 * MIB, 3)
    lab.first.map(5 * GIB, 0, GIB, 3)
    assert lab.compare(0x28, 7 * PAGE) == "level 1"
    assert lab.compare(0x28, 11 * PAGE) == "level 1"
    assert lab.compare(0x28, 4 * MIB + 3 * PAGE) == "level 2"
    assert lab.compare(0x28, 5 * GIB + 48 * MIB + 5 * PAGE) == "level 3"
    for iova in (0, 6 * PAGE, 12 * PAGE, 12 * MIB, 6 * GIB, (1 << 48) - PAGE):
        assert lab.compare(0x28, iova) == "fault"


def test_split_and_merged_leaves_while_translation_is_on(lab: Lab) -> None:
    lab.first.map(5 * GIB, 0, GIB, 3)
    assert lab.compare(0x28, 5 * GIB + 20 * MIB) == "level 3"
    lab.first.unmap(5 * GIB + 20 * MIB + PAGE, PAGE)
    lab.machine.invalidate()
    assert lab.compare(0x28, 5 * GIB + 20 * MIB) == "level 1"
    assert lab.compare(0x28, 5 * GIB + 20 * MIB + PAGE) == "fault"
    assert lab.compare(0x28, 5 * GIB + 24 * MIB) == "level 2"
    lab.first.map(5 * GIB + 20 * MIB + PAGE, 20 * MIB + PAGE, PAGE, 3)
    lab.machine.invalidate()
    assert lab.compare(0x28, 5 * GIB + 20 * MIB + PAGE) == "level 3"


def test_two_devices_in_two_domains_and_a_detached_one(lab: Lab) -> None:
    lab.first.map(GIB, DATA, PAGE, 3)
    lab.second.map(GIB, DATA + MIB, PAGE, 3)
    assert lab.load(0x28, GIB) == DATA
    assert lab.load(0x30, GIB) == DATA + MIB
    assert lab.store(0x30, GIB + 8, 0x1234) is None
    assert lab.word(DATA + MIB + 8) == 0x1234
    lab.root.detach(0x28)
    lab.machine.invalidate()
    assert lab.load(0x30, GIB) == DATA + MIB
    assert lab.compare(0x28, GIB) == "fault"


def test_a_read_only_page_faults_as_translate_says(lab: Lab) -> None:
    lab.first.map(GIB, DATA, 2 * MIB, 3)
    lab.first.protect(GIB + PAGE, PAGE, READ)
    lab.machine.invalidate()
    assert lab.compare(0x28, GIB + PAGE) == "level 1"
    lab.machine.invalidate()  # QEMU 7.2 refuses what its IOTLB forbids, but reports no fault
    fault = lab.store(0x28, GIB + PAGE, 0x5555)
    lab.same_reason(fault, 0x28, lab.walk(0x28, GIB + PAGE, WRITE))
    assert lab.word(DATA + PAGE) == DATA + PAGE
    assert lab.store(0x28, GIB + 2 * PAGE, 0x6666) is None
    assert lab.word(DATA + 2 * PAGE) == 0x6666


@pytest.mark.parametrize("seed", [1])
def test_thousands_of_changes_at_random(lab: Lab, seed: int) -> None:
    """Any sequence of changes; now and then the device looks at random addresses."""
    rng = random.Random(seed)
    outcomes: dict[str, int] = {}
    edges = [0, 2 * MIB, 512 * MIB, GIB, GIB + 2 * MIB, 3 * GIB, 512 * GIB]
    spots: list[int] = []
    for turn in range(2500):
        length = rng.choice((1, 1, 3, 100, 512, 513, 2048)) * PAGE
        iova = max(0, rng.choice(edges) + rng.randrange(-600, 600) * PAGE * rng.randrange(2))
        physical = DATA + (iova + rng.choice((0, 0, 0, PAGE))) % (40 * MIB)
        kind = rng.choice(("map", "map", "unmap", "protect"))
        try:
            if kind == "map":
                lab.first.map(iova, physical, length, rng.choice((3, 3, 3, 1)))
            elif kind == "unmap":
                lab.first.unmap(iova, length)
            else:
                lab.first.protect(iova, length, rng.choice((1, 3)))
        except (ExistsError, NoSpaceError):
            continue
        spots = [*spots[-8:], iova, iova + length - PAGE, max(0, iova - PAGE), iova + length]
        if turn % 12 == 0:
            lab.machine.invalidate()
            for spot in rng.sample(spots, 3):
                outcome = lab.compare(0x28, spot)
                outcomes[outcome] = outcomes.get(outcome, 0) + 1
    assert outcomes.keys() >= {"fault", "level 1", "level 2"}, outcomes
    assert check(None, {"dom-0": lab.memories["dom-0"]}, [(SCRATCH_PAGE, RAM)]).clean
    lab.first.unmap(0, 1 << 48)
    assert lab.first.used_pages == 1
