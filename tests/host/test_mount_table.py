"""Lines of /proc/self/mounts: escapes, empty fields, and bytes that end a line for Python only."""

from __future__ import annotations

from pathlib import Path

import pytest

from pkernfs.host.mount_table import MountLine, own_mounts, table_lines, unescape
from support.made_up_host import make_machine


@pytest.mark.parametrize(
    ("field", "name"),
    [
        (r"/mnt/my\040guests", "/mnt/my guests"),
        (r"a\011b\012c\134d\043e", "a\tb\nc\\d#e"),
        (r"\134040", r"\040"),
        (r"\08", r"\08"),
        ("/plain", "/plain"),
    ],
)
def test_escapes(field: str, name: str) -> None:
    assert unescape(field) == name


def test_the_mounts_of_this_process(tmp_path: Path) -> None:
    machine = make_machine(tmp_path)
    assert list(own_mounts(machine)) == []
    machine.write("proc/self/mounts", "/dev/a /a\\040b ext4 rw,x=\\054 0 0\n /run tmpfs ro 0 0\n")
    assert list(own_mounts(machine)) == [
        MountLine("/dev/a", "/a b", "ext4", ("rw", "x=,")),
        MountLine("", "/run", "tmpfs", ("ro",)),
    ]


def test_only_a_line_feed_ends_a_line(tmp_path: Path) -> None:
    table = tmp_path / "mounts"
    table.write_bytes("a\r b\x0b\x0c\x1c\x85\u2028c\nd\n".encode())
    assert table_lines(str(table)) == ["a\r b\x0b\x0c\x1c\x85\u2028c", "d"]
