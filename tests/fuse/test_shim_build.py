"""What the shim is built from: shim.c, its declarations for both sides, where libfuse is."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pkernfs.fuse._shim import ffi, lib

from pkernfs.fuse import shim, shim_build
from pkernfs.native import compiler

BUILDER: Any = shim_build.ffibuilder


def answering(monkeypatch: pytest.MonkeyPatch, answer: str | Exception) -> list[list[str]]:
    """Let pkg-config answer so; what it was asked."""
    asked: list[list[str]] = []

    def run(words: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        asked.append(words)
        assert options["check"]
        if isinstance(answer, Exception):
            raise answer
        return subprocess.CompletedProcess(words, 0, answer, "")

    monkeypatch.setattr(subprocess, "run", run)
    return asked


def test_where_pkg_config_says(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = answering(monkeypatch, '-I/opt/fuse3 "-I/a b"  -DX\n')
    assert shim_build._pkg_config("--cflags") == ["-I/opt/fuse3", "-I/a b", "-DX"]
    assert asked == [["pkg-config", "--cflags", "fuse3"]]


@pytest.mark.parametrize(
    "failure", [FileNotFoundError(2, "pkg-config"), subprocess.CalledProcessError(1, "pkg-config")]
)
def test_where_debian_has_it(monkeypatch: pytest.MonkeyPatch, failure: Exception) -> None:
    """There is no pkg-config, or it does not know fuse3."""
    answering(monkeypatch, failure)
    assert shim_build._pkg_config("--cflags") == ["-I/usr/include/fuse3"]
    assert shim_build._pkg_config("--libs") == ["-lfuse3"]


def test_what_the_compiler_gets() -> None:
    name, source, _, options = BUILDER._assigned_source
    assert name == "pkernfs.fuse._shim"
    shim_c = Path(shim_build.__file__).with_name("shim.c").read_text()
    assert source.endswith(shim_c)
    flags = options["extra_compile_args"]
    assert flags[: len(compiler.COMPILE)] == compiler.COMPILE
    assert "-D_FILE_OFFSET_BITS=64" in flags
    assert "-ldl" in options["extra_link_args"]


def test_sources_stay_out_of_the_path() -> None:
    """Only while it is imported, for a build before anything is installed."""
    before = list(sys.path)
    runpy.run_path(shim_build.__file__)
    assert sys.path == before


def test_everything_that_is_declared_is_there() -> None:
    declared = BUILDER._cdefsources
    text = "".join(part for part in declared if isinstance(part, str))
    names = set(re.findall(r"\b(pk_\w+)(?=[;(,\[])", text))
    assert len(names) > 15
    structs = {"pk_request", "pk_negotiated"}
    assert names - structs <= set(dir(lib))
    for struct, size in (("pk_request", 32), ("pk_negotiated", 40)):
        assert ffi.sizeof(f"struct {struct}") == size


def test_an_answer_that_comes_later_is_no_result() -> None:
    assert lib.PK_LATER == shim.LATER == -(1 << 63)
