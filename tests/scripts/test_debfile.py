"""scripts/lib/debfile: fields of records, and the files of a package that is made here."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

import debfile

RECORD = """\
Package: linux-image-cloud-amd64
Version: 6.12.1-1
Depends: linux-image-6.12-cloud-amd64 (= 6.12.1-1), kmod | module-init-tools,
Description: meta package
"""


class DebError(Exception):
    pass


def test_fields() -> None:
    assert debfile.field(RECORD, "Version") == "6.12.1-1"
    assert debfile.field(RECORD, "Source") is None
    assert debfile.dependencies(RECORD) == ["linux-image-6.12-cloud-amd64", "kmod"]
    assert debfile.dependencies("Package: x\n") == []


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="no dpkg-deb")
def test_content(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "DEBIAN").mkdir(parents=True)
    (tree / "DEBIAN/control").write_text(
        "Package: made-up\nVersion: 1\nArchitecture: all\nMaintainer: x <x@x.x>\nDescription: x\n"
    )
    (tree / "boot").mkdir()
    for number in range(20):
        (tree / f"boot/file-{number:02}").write_bytes(bytes([number]) * 100_000)
    package = tmp_path / "made-up.deb"
    subprocess.run(["dpkg-deb", "-b", tree, package], check=True, stdout=subprocess.DEVNULL)
    with debfile.content(package, DebError) as archive:
        names = [member.name for member in archive if member.isreg()]
    assert names == [f"./boot/file-{number:02}" for number in range(20)]
    with debfile.content(package, DebError) as archive:  # as who has found what it looked for
        assert next(iter(archive)).name == "."
    package.write_bytes(package.read_bytes()[:200])
    with pytest.raises(DebError, match=r"made-up\.deb: "), debfile.content(package, DebError) as a:
        list(a)
