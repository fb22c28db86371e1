"""``pkernfs info``: print the superblock and the state page of a region, mounted or not.

It reads a mounted region without its lock, and stores nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from pkernfs.control.mounts import mounts_of_region, region_of
from pkernfs.errors import PkernfsError, one_line
from pkernfs.host import boot
from pkernfs.host.sysroot import HOST
from pkernfs.options import format_size

if TYPE_CHECKING:
    from pkernfs.region.region import Region


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``pkernfs info``."""
    parser.add_argument("--json", action="store_true", help="print JSON.")
    parser.add_argument("target", metavar="REGION|MNT", help="a region, or the mount point of one.")


def run(args: argparse.Namespace) -> int:
    """Print the facts about ``args.target``."""
    facts = describe(region_of(args.target))
    if args.json:
        print(json.dumps(facts, indent=2))
    else:
        _print_facts(facts)
    return 0


def describe(spec: str) -> dict[str, Any]:
    """Build the JSON of ``pkernfs info``, as docs/operations.md has it."""
    from pkernfs.fs import superblock
    from pkernfs.region.region import Region

    with Region.open(spec, write=False, lock=False) as region:
        facts: dict[str, Any] = {"region": spec, **superblock.describe(region)}
        facts["pool"] = _pool(region)
    facts["mount_points"] = mounts_of_region(spec)
    facts["kexec"] = _kexec(facts)
    facts["verification"] = None
    if facts.get("history") and facts["mount_points"]:
        facts["verification"] = _verification(facts["mount_points"][0])
    return facts


def _pool(region: Region) -> dict[str, Any] | None:
    """Tell what segments come from, how many there are, and the plain paths to them; None: none."""
    from pkernfs.fs import superblock
    from pkernfs.layout import PAGE, POOL_DAX

    pool = superblock.load(region).pool
    if not pool.pool:
        return None
    from pkernfs.fs.segment_table import totals
    from pkernfs.host import kernel_image, plain_paths

    is_dax = pool.pool == POOL_DAX
    ways = plain_paths.of_pool(
        HOST, kernel_image.running_config(HOST), dax=is_dax, huge=region.page_bytes > PAGE
    )
    found = totals(region)
    return {
        "kind": "dax" if is_dax else "directory",
        "granule": pool.granule,
        "segments": None if found is None else found.segments,
        "segment_bytes": None if found is None else found.bytes,
        "plain_paths": [{"name": w.name, "offered": w.offered, "why": w.why} for w in ways],
    }


def _verification(mount_point: str) -> dict[str, Any] | None:
    """Ask for the outcome of the handover before the mount; None if the daemon does not tell."""
    from pkernfs.control import client, protocol
    from pkernfs.control.wire import VersionError

    try:
        found = asdict(client.call(mount_point, protocol.HandoverStatus()))
    except VersionError as e:
        print(f"pkernfs: {e}", file=sys.stderr)
        return None
    except (PkernfsError, OSError):  # not for us to ask, or nobody answers
        return None
    if found["state"] == "none":
        return {name: found[name] for name in ("state", "trouble", "changes", "lost")}
    return found


def _kexec(facts: dict[str, Any]) -> dict[str, Any]:
    """Tell how the running kernel was started, and whether it adopted tables in force."""
    path = "orderly" if facts.get("arrival") == "live update" else None
    return {
        "path": "panic" if boot.by_panic(HOST) else path,
        "units": [a._asdict() for a in boot.adoptions(HOST)],
    }


def _print_facts(facts: dict[str, Any]) -> None:
    """Print one ``name: value`` a line; sizes and times also as people read them."""
    for name, value in facts.items():
        label = name.removesuffix("_ns").replace("_", " ")
        if name == "ranges":
            for number, entry in enumerate(value):
                print(f"range {number}: {_range(entry)}")
        elif name == "features":
            print("features:", ", ".join(f"{kind} {word:#x}" for kind, word in value.items()))
        elif name == "handover":
            print(f"handover: {_handover(value)}")
        elif name == "history":
            for entry in value:
                print(f"history: {_history(entry)}")
        elif name == "verification":
            _print_verification(value)
        elif name == "kexec":
            _print_kexec(value)
        elif name == "pool":
            _print_pool(value)
        elif name.endswith("_bytes"):
            print(f"{label.removesuffix(' bytes')}: {value} bytes ({format_size(value)})")
        elif name.endswith("_ns"):
            print(f"{label}: {_time(value)}")
        elif isinstance(value, list):
            print(f"{label}: {', '.join(value) or '-'}")
        elif isinstance(value, bool):
            print(f"{label}: {'yes' if value else 'no'}")
        else:
            print(f"{label}: {'-' if value in ('', None) else value}")


def _range(entry: dict[str, Any]) -> str:
    text = f"{format_size(entry['length'])} at {entry['offset']:#x}"
    if entry["physical"] is not None:
        text += f", physical {entry['physical']:#x}"
    return text


def _handover(record: dict[str, Any] | None) -> str:
    if record is None:
        return "-"
    digests = "with digests" if record["digests"] else "without digests"
    return f"number {record['number']}, {_time(record['handed_over_ns'])}, {digests}"


def _history(entry: dict[str, Any]) -> str:
    text = f"{entry['arrival']}, mounted {_time(entry['mounted_ns'])}"
    if entry["handover"] is None:
        return f"{text}, without a handover"
    text += f", {entry['gap_ns'] / 1e9:.3f} s after handover {entry['handover']}: {entry['result']}"
    return f"{text} ({entry['changed']})" if entry["changed"] else text


_PATHS = {
    "panic": "by a panic: devices were not stopped",
    "orderly": "orderly: devices were stopped",
}


def _print_kexec(found: dict[str, Any]) -> None:
    if found["path"] is not None:
        print(f"kexec: {_PATHS[found['path']]}")
    for unit in found["units"]:
        what = "adopted" if unit["adopted"] else "not adopted"
        print(f"tables in force in {unit['unit']}: {what} ({one_line(unit['log'])})")


_OFFERED = {True: "yes", False: "no", None: "not known"}


def _print_pool(pool: dict[str, Any] | None) -> None:
    if pool is None:
        print("pool: -")
        return
    print(f"pool: {pool['kind']}, in units of {format_size(pool['granule'])}")
    if pool["segments"] is not None:
        print(f"segments: {pool['segments']}, {format_size(pool['segment_bytes'])}")
    for way in pool["plain_paths"]:
        print(f"plain path, {way['name']}: {_OFFERED[way['offered']]}: {way['why']}")


def _print_verification(found: dict[str, Any] | None) -> None:
    if found is None or found["state"] == "none":
        return
    text = found["state"]
    if found["state"] == "running":
        text += f", {found['done_bytes'] / max(found['total_bytes'], 1):.0%}"
    if found["not_verified"]:
        text += f", {found['not_verified']} files not, for they were changed meanwhile"
    if found["trouble"]:
        text += f", {found['trouble']}"
    print(f"verification: {text}")
    for change in found["changes"]:
        print(f"changed: {one_line(change['path'] or 'file system')}: {one_line(change['what'])}")
    for file in found["lost"]:
        print(f"lost: {one_line(file['path'])}: {one_line(file['why'])}")


def _time(nanoseconds: int) -> str:
    if not nanoseconds:
        return "never"
    return time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(nanoseconds // 10**9))
