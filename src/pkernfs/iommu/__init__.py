"""VT-d tables that an IOMMU walks in place: formats, builders, walkers and checks, without FUSE.

docs/iommu.md says what is where, in which order it is stored, and why.
"""

from pkernfs.host.bars import Bar
from pkernfs.iommu.check import Report, check
from pkernfs.iommu.config import Config, configure, load_config
from pkernfs.iommu.context_walk import ContextReader, Device, Mode
from pkernfs.iommu.memory import Commit, Memory, store_words
from pkernfs.iommu.page_pool import Mapping
from pkernfs.iommu.page_table import PageTable
from pkernfs.iommu.page_walk import Code, Finding
from pkernfs.iommu.root_tables import RootTables
from pkernfs.iommu.translate import Translation, WalkStep, translate, translate_domain
from pkernfs.vtd.entries import READ, READ_WRITE, WRITE, FaultReason, parse_bdf, parse_perm

__all__ = [
    "READ",
    "READ_WRITE",
    "WRITE",
    "Bar",
    "Code",
    "Commit",
    "Config",
    "ContextReader",
    "Device",
    "FaultReason",
    "Finding",
    "Mapping",
    "Memory",
    "Mode",
    "PageTable",
    "Report",
    "RootTables",
    "Translation",
    "WalkStep",
    "check",
    "configure",
    "load_config",
    "parse_bdf",
    "parse_perm",
    "store_words",
    "translate",
    "translate_domain",
]
