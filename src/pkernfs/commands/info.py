"""``pkernfs info``: what the superblock and the state page of a region say, mounted or not.

A mounted region is read without its lock and never stored to.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from typing import Any

from pkernfs.errors import InvalidError
from pkernfs.mounts import FSTYPE, canonical_spec, mount_at, mount_of, mounts_of_region
from pkernfs.options import format_size


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``pkernfs info``."""
    parser.add_argument("--json", action="store_true", help="print JSON.")
    parser.add_argument("target", metavar="REGION|MNT", help="a region, or where one is mounted.")


def run(args: argparse.Namespace) -> int:
    """Print what is known of ``args.target``."""
    facts = describe(region_of(args.target))
    if args.json:
        print(json.dumps(facts, indent=2))
    else:
        _print_facts(facts)
    return 0


def region_of(target: str) -> str:
    """The region that ``target`` is, or that is mounted there.

    :raises InvalidError: a directory that is in no pkernfs.
    """
    here = mount_at(target)
    if here is not None and here.fstype == FSTYPE:
        return here.source  # even if its daemon is dead and nothing can be asked about it
    if not os.path.isdir(target):
        return canonical_spec(target)
    mount = mount_of(target)
    if mount is None:
        raise InvalidError(f"{target}: not a region: it is a directory and not on a pkernfs mount")
    return mount.source


def describe(spec: str) -> dict[str, Any]:
    """The JSON of ``pkernfs info``, documented in docs/operations.md."""
    from pkernfs.fs import superblock
    from pkernfs.region import Region

    with Region.open(spec, write=False, lock=False) as region:
        facts: dict[str, Any] = {"region": spec, **superblock.describe(region)}
    facts["mount_points"] = mounts_of_region(spec)
    return facts


def _print_facts(facts: dict[str, Any]) -> None:
    """One ``name: value`` a line, sizes and times also as people read them."""
    for name, value in facts.items():
        label = name.removesuffix("_ns").replace("_", " ")
        if name == "ranges":
            for number, entry in enumerate(value):
                print(f"range {number}: {_range(entry)}")
        elif name == "features":
            print("features:", ", ".join(f"{kind} {word:#x}" for kind, word in value.items()))
        elif name.endswith("_bytes"):
            print(f"{label.removesuffix(' bytes')}: {value} bytes ({format_size(value)})")
        elif name.endswith("_ns"):
            print(f"{label}: {_time(value)}")
        elif isinstance(value, list):
            print(f"{label}: {', '.join(value) or '-'}")
        else:
            print(f"{label}: {value if value != '' else '-'}")


def _range(entry: dict[str, Any]) -> str:
    text = f"{format_size(entry['length'])} at {entry['offset']:#x}"
    if entry["physical"] is not None:
        text += f", physical {entry['physical']:#x}"
    return text


def _time(nanoseconds: int) -> str:
    if not nanoseconds:
        return "never"
    return time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(nanoseconds // 10**9))
