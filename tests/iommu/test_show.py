"""Tables as text: column for column what the kernel's debugfs files have."""

from __future__ import annotations

from pkernfs.iommu import show
from pkernfs.iommu.context_walk import Mode
from pkernfs.quantities import Iova, PhysAddr
from support.table_host import ROOT, TableHost


def test_translation_struct_is_the_kernels() -> None:
    host = TableHost()
    text = list(show.translation_struct("dmar0", host.tables.root, host.tables.devices()))
    root, context = host.word(ROOT), host.tables.devices()[0].context_words
    assert text == [
        "IOMMU dmar0: Root Table Address: 0x10000000000",
        "B.D.F\tRoot_entry\t\t\t\tContext_entry\t\t\t\tPASID\tPASID_table_entry",
        f"00:05.0\t0x0000000000000000:0x{root:016x}\t0x{context[1]:016x}:0x{context[0]:016x}"
        "\t-1    \t0x0000000000000000:0x0000000000000000:0x0000000000000000",
        text[3],
        "",
    ]
    assert text[3].startswith("01:1f.0\t")
    scalable = TableHost(Mode.SCALABLE)
    devices = scalable.tables.devices()
    text = list(show.translation_struct("dmar0", PhysAddr(0), devices))
    line = next(t for t in text if "00:05.0" in t)
    entry = devices[0].pasid_words
    assert line.endswith(f"\t0     \t0x{entry[2]:016x}:0x{entry[1]:016x}:0x{entry[0]:016x}")


def test_domain_struct_is_the_kernels() -> None:
    host = TableHost()
    lines = list(show.domain_struct("0000:00:05.0", host.first.memory, host.first.root, 4))
    assert lines[0] == "Device 0000:00:05.0 @0x10000100000"
    assert lines[1] == (
        "IOVA_PFN         \tPML5E             \tPML4E             "
        "\tPDPE              \tPDE               \tPTE"
    )
    words = [host.word(host.entry(Iova(0), level)) for level in (4, 3, 2, 1)]
    columns = "\t".join(f"0x{w:016x}" for w in [0, *words])
    assert lines[2] == f"0x0000000000000 |\t{columns}"
    assert len(lines) == 2 + 511 + 1 + 1
    assert lines[-2].startswith("0x0000000000200 |\t0x0000000000000000\t")
    assert lines[-2].count("\t") == 4
    assert lines[-1] == ""
    with_pasid = next(show.domain_struct("a", host.first.memory, host.first.root, 4, 0x1F))
    assert with_pasid == "Device a with pasid 1f @0x10000100000"


def test_merged_view() -> None:
    host = TableHost()
    lines = [line.split() for line in show.merged(host.first.mappings())]
    assert lines[1:] == [
        ["0x0000000000000000-0xfffff", "0x0000010000400000-0x100004fffff", "rw"],
        ["0x0000000000101000-0x3fffff", "0x0000010000501000-0x100007fffff", "rw"],
    ]
