"""``pkernfs handover``: hand over a mounted file system, and print how it went."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from pkernfs.commands.progress import Teller
from pkernfs.options import format_size

if TYPE_CHECKING:
    from pkernfs.kexec.handover import Handover


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``pkernfs handover``."""
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--digest",
        action="store_true",
        help="also take digests of the data of all files, at the speed of memory; the next mount "
        "compares them.",
    )
    what.add_argument(
        "--abort", action="store_true", help="undo a handover; the mount accepts changes again."
    )
    parser.add_argument(
        "--cmdline",
        metavar="TEXT",
        help="the next kernel's command line, if no kernel is loaded for kexec or its command line "
        "cannot be read. It must reserve the region as the running kernel's does.",
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="hand over although the region does not outlive a kexec; print why it does not.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON.")
    parser.add_argument("mnt", metavar="MNT", help="the mount point of the file system.")


def run(args: argparse.Namespace) -> int:
    """Hand over, or undo it."""
    if args.abort:
        _abort(args.mnt, as_json=args.json)
        return 0
    from pkernfs.kexec.handover import hand_over_mount, load_for

    load_for(args.mnt)
    done = hand_over_mount(
        args.mnt,
        digests=args.digest,
        command_line=args.cmdline,
        force=args.force,
        observer=Teller(),
    )
    if args.json:
        print(json.dumps(done._asdict(), indent=2))
    else:
        _print(args.mnt, done)
    return 0


def _abort(mnt: str, *, as_json: bool) -> None:
    from pkernfs.kexec.daemon import Daemon

    Daemon(mnt).abort()
    if as_json:
        print(json.dumps({"aborted": True}, indent=2))
    else:
        print(f"{mnt}: thawed: there is no handover any more")


def _print(mnt: str, done: Handover) -> None:
    print(
        f"{mnt}: handed over (number {done.number}) in {done.seconds * 1e3:.0f} ms: "
        f"{done.inodes} inodes, {done.metadata_pages} pages of metadata checked"
    )
    if done.digest_bytes:
        rate = int(done.digest_bytes / max(done.digest_seconds, 1e-9))
        print(
            f"{mnt}: digests of {format_size(done.digest_bytes)} in "
            f"{done.digest_seconds:.2f} s ({format_size(rate)}/s)"
        )
    if done.not_digested:
        print(f"{mnt}: files without digests, for they could not be read: {done.not_digested}")
    print(f"{mnt}: every change is refused now; kexec, or pkernfs handover --abort {mnt}")
