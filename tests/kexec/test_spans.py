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


def pooled(tmp_path: Path, size: int = G) -> Machine:
    """A dax region of 1 GiB: a base of 64 MiB, a segment in two pieces, and what kmem has."""
    made = make_machine(tmp_path)
    add_dax(made, "dax0.0", (G, 64 * M))
    add_dax(made, "dax0.1", (G + 256 * M, 32 * M), (G + 128 * M, 2 * M))
    add_dax(made, "dax0.2", (G + 512 * M, 512 * M), driver="kmem")
    made.write("sys/devices/platform/hmem.0/dax_region/size", f"{size}\n")
    return made


def test_segments_are_kept_with_all_of_their_dax_region(tmp_path: Path) -> None:
    """Else the next kernel would have another dax region, or none where they are."""
    machine = pooled(tmp_path)
    base = machine.path("dev/dax0.0")
    assert spans.physical_spans(base, machine) == [Span(PhysAddr(G), 64 * M)]
    assert spans.kept_spans(base, machine) == [
        Span(PhysAddr(G), 64 * M),
        Span(PhysAddr(G + 64 * M), 448 * M),
    ]
    assert spans.kept_spans("512M!1G", machine) == [Span(PhysAddr(G), 512 * M)]
    assert spans.kept_spans(str(tmp_path / "region"), machine) == []


def test_segments_are_kept_where_it_is_not_seen_what_their_dax_region_is(tmp_path: Path) -> None:
    """As of a device that does not begin it."""
    machine = pooled(tmp_path, 512 * M)
    first, second = Span(PhysAddr(G + 256 * M), 32 * M), Span(PhysAddr(G + 128 * M), 2 * M)
    base = Span(PhysAddr(G), 64 * M)
    assert spans.kept_spans(machine.path("dev/dax0.0"), machine) == [base, first, second]
    machine = pooled(tmp_path / "other")
    assert spans.kept_spans(machine.path("dev/dax0.1"), machine) == [first, second, base]


def test_what_ends_with_this_kernel(machine: Machine) -> None:
    assert spans.ends_with_kernel(IN_MEMORY, machine)
    for spec in ("512M!1G", machine.path("dev/dax0.0"), "/proc/self/exe/none"):
        assert not spans.ends_with_kernel(spec, machine)
        spans.refuse_if_it_ends(spec, machine)
    with pytest.raises(KexecError) as caught:
        spans.refuse_if_it_ends(IN_MEMORY, machine)
    assert str(caught.value) == spans.ends_message(IN_MEMORY)
    assert spans.ends_message("x") == "x: it ends with this kernel; nothing here survives a kexec"
