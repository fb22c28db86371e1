"""What memory a region has that a kexec can keep, and which region ends with this kernel."""

from __future__ import annotations

from pathlib import Path

import pytest

from pkernfs.errors import RegionError
from pkernfs.host.iomem import Span
from pkernfs.kexec import spans
from pkernfs.kexec.spans import KexecError
from pkernfs.quantities import PhysAddr
from support.made_up_host import Machine, add_dax, make_machine

G = 1 << 30
M = 1 << 20
IN_MEMORY = "/dev/shm"


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """One with a dax device in two pieces."""
    made = make_machine(tmp_path)
    add_dax(made, "dax0.0", (G, 8 * M), (2 * G, 4 * M))
    return made


def test_physical_memory(machine: Machine, tmp_path: Path) -> None:
    assert spans.physical_spans("512M!1G", machine) == [Span(PhysAddr(G), 512 * M)]
    assert spans.physical_spans(machine.path("dev/dax0.0"), machine) == [
        Span(PhysAddr(G), 8 * M),
        Span(PhysAddr(2 * G), 4 * M),
    ]
    assert spans.physical_spans(str(tmp_path / "region"), machine) == []


def test_memory_that_is_not_there(machine: Machine) -> None:
    for spec in ("1!1G", machine.path("dev/dax0.1")):
        with pytest.raises(RegionError):
            spans.physical_spans(spec, machine)
        assert spans.spans_of(spec, machine) == []
    assert spans.spans_of("512M!1G", machine) == [Span(PhysAddr(G), 512 * M)]


def test_what_ends_with_this_kernel(machine: Machine) -> None:
    assert spans.ends_with_kernel(IN_MEMORY, machine)
    for spec in ("512M!1G", machine.path("dev/dax0.0"), "/proc/self/exe/none"):
        assert not spans.ends_with_kernel(spec, machine)
        spans.refuse_if_it_ends(spec, machine)
    with pytest.raises(KexecError) as caught:
        spans.refuse_if_it_ends(IN_MEMORY, machine)
    assert str(caught.value) == spans.ends_message(IN_MEMORY)
    assert spans.ends_message("x") == "x: it ends with this kernel; nothing here survives a kexec"
