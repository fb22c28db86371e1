"""``pkernfs doctor``: print what this host can do, what it lacks, and the remedy."""

from __future__ import annotations

import argparse
import json

from pkernfs import doctor

_AREAS = {
    "mount": "mount a file system",
    "region": "keep a region in reserved memory",
    "guest": "run guests in it, and save them",
    "segments": "give each guest memory of its own, by a plain path",
    "kexec": "replace the kernel",
    "dma": "leave devices running meanwhile",
    "units": "do it with systemd",
}
_ANSWERS = {True: "yes", False: "no", None: "not known"}
_MARKS = {doctor.OK: "ok", doctor.WARNING: "!", doctor.MISSING: "MISSING", doctor.UNKNOWN: "?"}


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``pkernfs doctor``."""
    parser.add_argument("--json", action="store_true", help="print JSON.")


def run(args: argparse.Namespace) -> int:
    """Print the checks; return 0 if a file system can be mounted, else 1."""
    results = list(doctor.examine())
    able = {area: doctor.able(results, area) for area in _AREAS}
    if args.json:
        checks = [r._asdict() for r in results]
        known = {area: found is True for area, found in able.items()}
        print(json.dumps({"able": known, "checks": checks}, indent=2))
    else:
        _print(results, able)
    return 0 if able["mount"] else 1


def _print(results: list[doctor.Result], able: dict[str, bool | None]) -> None:
    for area, purpose in _AREAS.items():
        print(f"{purpose}: {_ANSWERS[able[area]]}")
        for r in results:
            if r.area == area:
                print(f"  {_MARKS[r.status]:<8}{r.name}: {r.detail}")
                if r.remedy:
                    print(f"          remedy: {r.remedy}")
