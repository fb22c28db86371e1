"""scripts/setup and what it puts into /usr/local: whose links and pages they are.

The checkouts have nothing but the script, and a Python that only looks like one.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from support.sessions import ROOT
from support.typing_host import type_at_host

pytestmark = pytest.mark.fuse  # root, and a machine of its own

_PYTHON = """#!/bin/bash
case "$*" in
    "-m venv "*) mkdir -p "${*: -1}/bin"; cp "$0" "${*: -1}/bin/python"
        echo "#!${*: -1}/bin/python" >"${*: -1}/bin/pip" ;;
    *sys.prefix*) dirname "$(dirname "$0")" ;;
esac
"""
_PAGE = '.TH {} 8 "" "pkernfs 0.1" "System Administration"'


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A directory with ``checkout`` and ``python``; and room for the shell."""
    (tmp_path / "scratch").mkdir()
    scripts = tmp_path / "checkout/scripts"
    scripts.mkdir(parents=True)
    (tmp_path / "checkout/src/pkernfs").mkdir(parents=True)
    shutil.copy(ROOT / "scripts/setup", scripts)
    (tmp_path / "python").write_text(_PYTHON)
    (tmp_path / "python").chmod(0o755)
    return tmp_path


def typed(place: Path, *lines: str) -> list[str]:
    """Type lines where /mnt/a and /mnt/b are checkouts; return what each has printed."""
    begin = (
        "cp python /mnt; for c in a b; do cp -r checkout /mnt/$c; done; export PYTHON=/mnt/python"
    )
    return type_at_host([begin, *lines], place, place / "scratch")[1:]


def test_links_that_lead_elsewhere_are_told(place: Path) -> None:
    first, again, second, link = typed(
        place,
        "/mnt/a/scripts/setup",
        "/mnt/a/scripts/setup",
        "/mnt/b/scripts/setup",
        "readlink /usr/local/bin/pkernfs",
    )
    assert first == "setup: preparing /mnt/a/.venv\n"
    assert again == ""
    told = [
        f"setup: /usr/local/{path} was a link to /mnt/a/.venv/bin/{path.partition('/')[2]}; "
        "it leads to this checkout now"
        for path in ("bin/pkernfs", "sbin/mkfs.pkernfs", "sbin/fsck.pkernfs")
    ]
    assert second.splitlines() == ["setup: preparing /mnt/b/.venv", *told]
    assert link == "/mnt/b/.venv/bin/pkernfs\n"


def test_pages_go_with_the_links(place: Path) -> None:
    """Also the pages that another version has, and never those of another program."""
    pages = "/usr/local/share/man/man8"
    *_, installed, other, kept, own, gone = typed(
        place,
        f"mkdir -p {pages}; rm -f {pages}/*",
        f'echo \'.TH FOREIGN 8 "" "pkernfstools 1"\' >{pages}/foreign.8',
        f"echo '{_PAGE.format('OLD')}' >{pages}/pkernfs-old.8",
        "/mnt/a/scripts/setup",
        "mkdir -p /mnt/a/.venv/share/man/man8",
        f"echo '{_PAGE.format('NEW')}' >/mnt/a/.venv/share/man/man8/pkernfs-new.8",
        "/mnt/a/scripts/setup",
        f"ls {pages}",
        "/mnt/b/scripts/setup --uninstall",
        f"ls {pages} /usr/local/sbin/*.pkernfs",
        "/mnt/a/scripts/setup --uninstall",
        f"ls {pages} /usr/local/sbin",
    )
    assert installed.split() == ["foreign.8", "pkernfs-new.8"]
    assert other == (
        "setup: /usr/local/bin/pkernfs is a link to /mnt/a/.venv/bin/pkernfs: "
        "it and the manual pages are left as they are\n"
    )
    assert {"pkernfs-new.8", "/usr/local/sbin/fsck.pkernfs"} <= set(kept.split())
    assert own == ""
    assert "foreign.8" in gone
    assert "pkernfs" not in gone


def test_pages_without_a_link_are_nobodys(place: Path) -> None:
    pages = "/usr/local/share/man/man8"
    _, uninstall, left = typed(
        place,
        f"mkdir -p {pages}; echo '{_PAGE.format('OLD')}' >{pages}/pkernfs-old.8",
        "/mnt/a/scripts/setup --uninstall",
        f"ls {pages} | grep pkernfs",
    )
    assert (uninstall, left) == ("", "")


@pytest.mark.parametrize(
    ("closed", "told"),
    [
        ("mv /mnt/a /mnt/own; ln -s /mnt/own/a /mnt/a", "the checkout is"),
        ("mv /mnt/python /mnt/own; PYTHON=/mnt/own/python", "/mnt/own/python is"),
    ],
)
def test_what_only_root_can_run_is_told(closed: str, told: str, place: Path) -> None:
    setup = "/mnt/a/scripts/setup"
    _, said, again = typed(place, f"mkdir -m 700 /mnt/own; {closed}", setup, setup)
    (line,) = [line for line in said.splitlines() if "only root" in line]
    assert line.startswith(
        f"setup: only root can run pkernfs: {told} below /mnt/own, which others cannot enter"
    )
    assert again == ""
