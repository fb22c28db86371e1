"""QEMU's intel-iommu and its edu devices, driven without a guest, for tests of the tables.

QEMU runs with a CPU that only halts and with a region's file as its memory, so that what
pkernfs.iommu stores is what QEMU's intel-iommu walks, at once. The registers are reached by QEMU's
qtest protocol.
"""

from __future__ import annotations

import json
import socket
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from pkernfs.iommu import (
    READ,
    WRITE,
    Config,
    Memory,
    Mode,
    PageTable,
    RootTables,
    Translation,
    configure,
    store_words,
    translate,
)
from pkernfs.layout import PAGE
from pkernfs.quantities import Iova, PhysAddr, RegionOff, RegionRun, SourceId
from pkernfs.region.region import Region
from pkernfs.vtd.entries import width_bits
from support.unit_drivers import BUFFER, Edu, Fault, Unit, reasons_in_qemu

MIB = 1 << 20
GIB = 1 << 30
RAM = 2 * GIB  # below 4 GiB, so that a physical address is an offset in the file; sparse
FIRST, SECOND = SourceId(0x28), SourceId(0x30)  # 00:05.0 and 00:06.0
DEVICES = {FIRST: 0xE000_0000, SECOND: 0xE010_0000}  # and where their BARs go
ROOT = RegionRun(RegionOff(MIB), 64 * PAGE)
QUEUE = ROOT.offset + ROOT.length
DOM_0 = RegionRun(RegionOff(2 * MIB), 6 * MIB)
DOM_1 = RegionRun(RegionOff(8 * MIB), 2 * MIB)
SCRATCH_PAGE = PhysAddr(12 * MIB)  # mapped by both domains, for what their devices have read
DATA = PhysAddr(16 * MIB)  # from here on, memory is free for tests


class Machine:
    """QEMU, spoken to by qtest's line protocol; QMP stops its clock."""

    def __init__(
        self, memory: Path, *, width: int = 48, scalable: bool = False, options: str = ""
    ) -> None:
        unit = f"intel-iommu,aw-bits={width},intremap=off{options}"
        unit += ",x-scalable-mode=on" if scalable else ""
        backend = f"memory-backend-file,id=ram,size={RAM},mem-path={memory},share=on"
        firmware = memory.with_name("firmware")
        firmware.write_bytes(bytes(0x10000 - 16) + b"\xfa\xf4\xeb\xfd" + bytes(12))  # cli; hlt
        command = ["qemu-system-x86_64", "-display", "none", "-nodefaults", "-accel", "tcg"]
        # Time jumps to the device's next timer: each transfer would take 100 ms otherwise.
        command += ["-icount", "shift=0,sleep=off", "-bios", str(firmware)]
        command += ["-qtest", "stdio", "-object", backend, "-m", str(RAM // MIB)]
        command += ["-M", "q35,memory-backend=ram", "-device", unit]
        for number in (5, 6):
            command += ["-device", f"edu,addr={number:02x}.0,dma_mask={(1 << 64) - 1:#x}"]
        self._devices: dict[SourceId, Edu] = {}
        ours, theirs = socket.socketpair()
        with theirs:
            command += [
                "-chardev",
                f"socket,id=qmp,fd={theirs.fileno()}",
                "-mon",
                "qmp,mode=control",
            ]
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                pass_fds=[theirs.fileno()],
            )
        ours.settimeout(30)
        self._socket = ours
        self._qmp: IO[str] = ours.makefile("rw")
        try:
            self._qmp.readline()  # the greeting
            self._monitor("qmp_capabilities")
            for source_id, bar in DEVICES.items():
                self._devices[source_id] = Edu(self, bar)
                self._configure(source_id, 0x10, bar)
                self._configure(source_id, 0x04, 6)  # memory space, bus master
        except BaseException:
            self.close()
            raise

    def say(self, *words: object) -> int:
        """One command; the number that it is answered with, if there is one."""
        return self.say_all([words])[0]

    def say_all(self, commands: Sequence[Sequence[object]]) -> list[int]:
        """Commands in one go, which takes the time of one; what each is answered with."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        text = "".join(" ".join(map(str, words)) + "\n" for words in commands)
        self._process.stdin.write(text)
        self._process.stdin.flush()
        answers = []
        for words in commands:
            while (line := self._process.stdout.readline()).startswith("IRQ"):
                pass
            answer = line.split()
            assert answer[:1] == ["OK"], (words, line)
            answers.append(int(answer[1], 0) if len(answer) > 1 else 0)
        return answers

    def _monitor(self, command: str) -> None:
        self._qmp.write(json.dumps({"execute": command}) + "\n")
        self._qmp.flush()
        while "return" not in (answer := json.loads(self._qmp.readline())):
            assert "event" in answer, answer

    def _configure(self, source_id: SourceId, register: int, value: int) -> None:
        self.say("outl", 0xCF8, 1 << 31 | source_id << 8 | register)
        self.say("outl", 0xCFC, value)

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """The clock stands still, and with it each transfer that is under way."""
        self._monitor("stop")
        try:
            yield
        finally:
            self._monitor("cont")

    def start(
        self, source_id: SourceId, source: int, target: int, command: int, count: int = 8
    ) -> None:
        """Have a device begin a transfer: command 1 reads memory, 3 writes it."""
        self._devices[source_id].start(source, target, command, count)

    def busy(self, source_id: SourceId) -> bool:
        """Whether a device's transfer is under way."""
        return self._devices[source_id].busy()

    def finish(self, source_id: SourceId) -> None:
        """Wait for the end of a device's transfer."""
        self._devices[source_id].finish()

    def close(self) -> None:
        """End QEMU."""
        self._process.kill()
        self._process.communicate()
        self._qmp.close()
        self._socket.close()


class Lab:
    """A region that is QEMU's memory, two domains with a device each, and the unit at work.

    :param levels: of the domains' tables. QEMU walks 3 and 4.
    :param queue: invalidate through the queue; scalable mode always does.
    """

    def __init__(
        self, path: Path, mode: Mode = Mode.LEGACY, levels: int = 4, *, queue: bool = False
    ) -> None:
        memory = path / "memory"
        Region.create(str(memory), RAM)
        self.mode = mode
        self.levels = levels
        self.region = Region.open(str(memory), write=True, phys_base=PhysAddr(0))
        self.commit = store_words(self.region)
        root = Memory(self.region, [ROOT])
        configure(root, self.commit, Config(mode, levels))
        self.root = RootTables(root, self.commit, walked=True)
        self.memories = {
            "dom-0": Memory(self.region, [DOM_0]),
            "dom-1": Memory(self.region, [DOM_1]),
        }
        self.scratch = Iova(1 << width_bits(levels) - 2)
        self.first, self.second = (
            PageTable(m, self.commit, levels=levels, walked=True) for m in self.memories.values()
        )
        for table in (self.first, self.second):
            table.map(self.scratch, SCRATCH_PAGE, PAGE, READ | WRITE)
        self.domain_ids = {FIRST: 2, SECOND: 3}
        self.root.attach(FIRST, self.first.root, 2)
        self.root.attach(SECOND, self.second.root, 3)
        scalable = mode is Mode.SCALABLE
        self.machine = Machine(memory, width=width_bits(min(levels, 4)), scalable=scalable)
        self.unit = Unit(self.machine)
        if queue or scalable:
            self.unit.use_queue(QUEUE, wide=scalable)
        self.unit.enable(self.root.root, scalable=scalable)

    def close(self) -> None:
        """End QEMU."""
        self.machine.close()
        self.region.close()

    def told(self, domain_id: int, start: int, end: int) -> None:
        """Tell the unit of a change to a domain's tables, page by page, as it has to be."""
        self.unit.invalidate_pages(domain_id, start, end)
        (self.first if domain_id == 2 else self.second).invalidated()

    def walk(self, source_id: SourceId, iova: Iova, access: int = READ) -> Translation:
        """What pkernfs says that a request comes to."""
        memory = Memory.whole(self.region)
        return translate(memory, self.root.root, source_id, iova, mode=self.mode, access=access)

    def word(self, physical: PhysAddr) -> int:
        """The word in memory at a physical address."""
        return int(self.region.view(RegionOff(physical), 8).cast("Q")[0])

    def put(self, physical: PhysAddr, word: int) -> None:
        """Store a word there."""
        self.region.store_u64(RegionOff(physical), word)

    # ------------------------------------------------------------------ what devices do

    def load(self, source_id: SourceId, iovas: Sequence[int]) -> list[int | Fault]:
        """What a device reads at each of up to 512 addresses: the word, or the fault."""
        faults: dict[int, Fault] = {}
        for slot, iova in enumerate(iovas):
            self.machine.start(source_id, iova, BUFFER + 8 * slot, 1)
            self.machine.finish(source_id)
            fault = self.unit.fault()
            if fault is not None:
                faults[slot] = fault
        if len(faults) == len(iovas):
            return list(faults.values())
        # The device has the words in its buffer, and hands them on through memory.
        self.machine.start(source_id, BUFFER, self.scratch, 3, 8 * len(iovas))
        self.machine.finish(source_id)
        assert self.unit.fault() is None
        words = self.region.view(RegionOff(SCRATCH_PAGE), 8 * len(iovas)).cast("Q")
        return [faults.get(slot, word) for slot, word in enumerate(words)]

    def fill(self, source_id: SourceId, word: int) -> None:
        """Have a device read a word into its buffer, to be written by :meth:`write`."""
        self.put(SCRATCH_PAGE, word)
        self.machine.start(source_id, self.scratch, BUFFER, 1)
        self.machine.finish(source_id)
        assert self.unit.fault() is None

    def write(self, source_id: SourceId, iova: Iova) -> Fault | None:
        """Let a device write the word in its buffer; the fault, if that is what it comes to."""
        self.machine.start(source_id, BUFFER, iova, 3)
        self.machine.finish(source_id)
        return self.unit.fault()

    def store(self, source_id: SourceId, iova: Iova, word: int) -> Fault | None:
        """Let a device write a word."""
        self.fill(source_id, word)
        return self.write(source_id, iova)

    # ------------------------------------------------------------------ comparisons

    def compare(self, source_id: SourceId, *iovas: int) -> list[str]:
        """QEMU and translate() agree on reads of these addresses: what each comes to."""
        expected = [self.walk(source_id, Iova(iova)) for iova in iovas]
        for walk in expected:
            self.forget_refusal(source_id, walk)
            if walk.physical is not None and walk.physical >= DATA:
                self.put(walk.physical, walk.physical | 1)  # a word of its own for each address
        before = [0 if w.physical is None else self.word(w.physical) for w in expected]
        outcomes = []
        found = self.load(source_id, iovas)
        for walk, word, got in zip(expected, before, found, strict=True):
            if walk.fault is not None:
                assert isinstance(got, Fault), (hex(walk.iova), got, walk)
                self.same_fault(got, source_id, walk, write=False)
                outcomes.append(walk.fault.name.removeprefix("SM_"))
            else:
                assert got == word, (hex(walk.iova), got, walk)
                outcomes.append(f"level {walk.level}")
        return outcomes

    def forget_refusal(self, source_id: SourceId, walk: Translation) -> None:
        """QEMU reports a lack of permission when it walks, not when its IOTLB says so."""
        if walk.fault is not None and walk.fault.name.removeprefix("SM_") in ("READ", "WRITE"):
            page = walk.iova & -PAGE
            self.unit.invalidate_pages(self.domain_ids[source_id], page, page + PAGE)

    def compare_write(self, source_id: SourceId, iova: Iova) -> str:
        """As :meth:`compare`, for a write."""
        walk = self.walk(source_id, iova, WRITE)
        self.forget_refusal(source_id, walk)
        word = iova ^ 0x5A5A_5A5A_5A5A_5A5A
        fault = self.store(source_id, iova, word)
        if walk.fault is not None:
            self.same_fault(fault, source_id, walk, write=True)
            return walk.fault.name.removeprefix("SM_")
        assert fault is None, (fault, walk)
        assert walk.physical is not None
        assert self.word(walk.physical) == word, walk
        return f"level {walk.level}"

    def same_fault(
        self, fault: Fault | None, source_id: SourceId, walk: Translation, *, write: bool
    ) -> None:
        """A recorded fault is the one that translate() has foreseen."""
        assert fault is not None, walk
        assert walk.fault is not None
        assert fault.reason in reasons_in_qemu(walk.fault, write=write), (fault, walk)
        assert fault[1:] == (source_id, walk.iova & -PAGE, write), (fault, walk)
