"""Region specs: SIZE!START, the names of pkernfs=, files."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from pkernfs.errors import RegionError
from pkernfs.host.iomem import Span
from pkernfs.quantities import PhysAddr
from pkernfs.region.spec import (
    did_you_mean,
    dir_of,
    file_of,
    is_file_spec,
    parse_span,
    resolve,
    resolve_none,
)
from support.made_up_host import make_machine

G = 1 << 30
M = 1 << 20


def test_specs_have_one_form() -> None:
    for spec in ("1G!4G", "1024M!4G", "0x40000000!0x100000000", "1048576k!4096m"):
        assert str(parse_span(spec)) == "1G!4G"
    assert str(parse_span("1026M!2M")) == "1026M!2M"
    assert parse_span("2M!1T") == Span(PhysAddr(1 << 40), 2 * M)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("1G!1Z", "1G!1Z: bad region: expected SIZE!START, as in 1G!4G"),
        ("1GB!1G", "1GB!1G: bad region: expected SIZE!START (did you mean 1G!1G?)"),
        ("2GiB!4GB", "2GiB!4GB: bad region: expected SIZE!START (did you mean 2G!4G?)"),
        ("1MiB!1G", "1MiB!1G: bad region: expected SIZE!START, as in 1G!4G"),
        ("08!1G", "08!1G: bad region: expected SIZE!START, as in 1G!4G"),
        ("0!1G", "0!1G: bad size: got 0"),
        ("1M!1G", "1M!1G: bad size: got 0x100000, expected a multiple of 2 MiB (0x200000)"),
        (
            "1G!1025M",
            "1G!1025M: bad start: got 0x40100000, expected a multiple of 2 MiB (0x200000)",
        ),
        (
            "1G!4P",
            "1G!4P: beyond the last physical address: got 0x1000003fffffff, expected below 2^52",
        ),
        (
            "15E!15E",
            "15E!15E: beyond the last physical address: "
            "got 0x1dfffffffffffffff, expected below 2^52",
        ),
    ],
)
def test_specs_that_cannot_be(spec: str, message: str) -> None:
    with pytest.raises(RegionError) as caught:
        parse_span(spec)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("spec", "hint"),
    [
        ("1G%1G", " (did you mean 1G!1G?)"),
        ("1G$4G", " (did you mean 1G!4G?)"),
        (r"1G\!4G", " (did you mean 1G!4G?)"),
        ("/here/1GiB@4GB", " (did you mean 1G!4G?)"),
        ("1g-0x100000000", " (did you mean 1G!4G?)"),
        ("1G%1025K", ""),
        ("region", ""),
        ("2024-11", ""),
        ("vm1G%1G", ""),
    ],
)
def test_what_is_nearly_a_spec(spec: str, hint: str) -> None:
    assert did_you_mean(spec) == hint


def test_what_a_spec_means(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    machine = make_machine(tmp_path / "root")
    assert resolve("none", machine) == "512M!1G"
    assert resolve("1024M!0x100000000", machine) == "1G!4G"
    assert resolve("region", machine) == str(tmp_path / "region")
    assert resolve("./1G!1G", machine) == str(tmp_path / "1G!1G")
    for spec in ("none", "none:a", "1G!1G", "9!9", "/dev/dax0.0", "1G!1G,1G!4G"):
        assert not is_file_spec(spec)
    for spec in ("region", "./none", "a!b", "/dev/shm/region", "./1G!1G", "a,b"):
        assert is_file_spec(spec)
    for spec in ("1G!1G,1G!4G", "/dev/dax0.0,/dev/dax1.0", "/dev/shm/no,1G!1G"):
        with pytest.raises(RegionError, match="several ranges"):
            resolve(spec, machine)


def test_a_directory_names_the_region_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pool").mkdir()
    (tmp_path / "link").symlink_to("pool")
    for spec in ("pool", "pool/", "./pool", "link", "link/"):
        assert is_file_spec(spec)
        assert dir_of(spec) == str(tmp_path / "pool")
        with pytest.raises(RegionError, match="a directory without a file named base") as caught:
            file_of(spec)
        assert caught.value.errno == errno.EISDIR
    (tmp_path / "pool/base").touch()
    for spec in ("pool", "pool/", "link"):
        assert resolve(spec) == str(tmp_path / "pool/base")
        assert os.path.samefile(file_of(spec), tmp_path / "pool/base")
    assert dir_of("new/") == str(tmp_path / "new"), "which is to be made"
    with pytest.raises(RegionError, match="new/: not a region: no such directory"):
        resolve("new/")
    for spec in ("pool/base", "region", "none", "1G!4G", "/dev/dax0.0"):
        assert dir_of(spec) is None
    assert file_of("region") == "region"


# ------------------------------------------------------------------------------ none


def test_none_is_what_the_command_line_names() -> None:
    line = "pkernfs=1G!1G quiet pkernfs=b.2:/dev/dax0.0 pkernfs=c-d:2G!8G"
    assert resolve_none("none", line) == "1G!1G"
    assert resolve_none("none:b.2", line) == "/dev/dax0.0"
    assert resolve_none("none", "pkernfs=only:2G!8G") == "2G!8G"


@pytest.mark.parametrize(
    ("spec", "line", "message"),
    [
        (
            "none",
            "quiet",
            "none: no pkernfs= on the kernel command line: "
            "boot with pkernfs=SIZE!START memmap=SIZE%START",
        ),
        (
            "none",
            "pkernfs=a:1G!1G pkernfs=b:1G!2G",
            "none: pkernfs= names 2 regions: expected none:a or none:b",
        ),
        (
            "none",
            "pkernfs=1G!1G pkernfs=1G!2G",
            "none: pkernfs= names 2 regions: expected 1G!1G or 1G!2G",
        ),
        (
            "none:c",
            "pkernfs=a:1G!1G pkernfs=1G!2G",
            "none:c: no region of that name in pkernfs=: expected none:a or 1G!2G",
        ),
        ("none:", "pkernfs=1G!1G", "none:: no region of that name in pkernfs=: expected 1G!1G"),
        (
            "none",
            "pkernfs=a:1G!1G pkernfs=a:1G!2G",
            "pkernfs=a:1G!2G: the name is there twice",
        ),
        (
            "none",
            "pkernfs=",
            "pkernfs=: empty on the kernel command line: expected SIZE!START",
        ),
    ],
)
def test_what_none_cannot_be(spec: str, line: str, message: str) -> None:
    with pytest.raises(RegionError) as caught:
        resolve_none(spec, line)
    assert str(caught.value) == message
