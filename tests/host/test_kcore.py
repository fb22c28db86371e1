"""The running kernel's memory, read from a made-up /proc/kcore."""

from __future__ import annotations

from pathlib import Path

import pytest

from pkernfs.host.kcore import Kcore, KcoreError
from pkernfs.quantities import PhysAddr
from support.kernel_memory import SYMBOL, TEXT, VIRTUAL, Memory


@pytest.fixture
def memory(tmp_path: Path) -> Memory:
    made = Memory(tmp_path)
    made.word(0x1238, 0x1122_3344_5566_7788)
    made.word(0x20_0000, 77)
    made.save()
    return made


def test_by_physical_address_by_address_and_by_symbol(memory: Memory) -> None:
    with Kcore(memory.host) as kernel:
        assert kernel.read_physical(PhysAddr(0x20_0000), 8) == (77).to_bytes(8, "little")
        assert kernel.read(VIRTUAL + 0x20_0000, 4096) == bytes(memory.bytes[0x20_0000:][:4096])
        assert kernel.symbol("kexec_image") == SYMBOL
        assert kernel.word(SYMBOL) == 0x1122_3344_5566_7788
        assert kernel.word(TEXT + 0x1238) == kernel.word(VIRTUAL + 0x1238)
        assert kernel.find_physical(PhysAddr(len(memory.bytes) - 8), 8) == bytes(8)


@pytest.mark.parametrize("at", [4 << 20, (4 << 20) - 7, 1 << 45, (1 << 64) - 1])
def test_what_is_not_in_there(memory: Memory, at: PhysAddr) -> None:
    with Kcore(memory.host) as kernel:
        assert kernel.find_physical(at, 8) is None
        with pytest.raises(KcoreError, match=f"{at:#x} is not in /proc/kcore"):
            kernel.read_physical(at, 8)
        with pytest.raises(KcoreError):
            kernel.read(at, 8)


def test_memory_that_the_file_says_it_has_and_has_not(memory: Memory) -> None:
    path = memory.root / "proc/kcore"
    path.write_bytes(path.read_bytes()[: 1 << 20])
    with Kcore(memory.host) as kernel, pytest.raises(KcoreError, match="is not in /proc/kcore"):
        kernel.read_physical(PhysAddr(0x20_0000), 4096)


@pytest.mark.parametrize("data", [b"", b"\x7fELF\x01", b"\x7fELF\x02" + bytes(59)])
def test_no_such_file(memory: Memory, data: bytes) -> None:
    (memory.root / "proc/kcore").write_bytes(data)
    with pytest.raises(KcoreError, match="not what it should be"):
        Kcore(memory.host)


def test_headers_that_are_cut(memory: Memory) -> None:
    path = memory.root / "proc/kcore"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(KcoreError, match="not what it should be"):
        Kcore(memory.host)
    path.unlink()
    with pytest.raises(FileNotFoundError):
        Kcore(memory.host)
