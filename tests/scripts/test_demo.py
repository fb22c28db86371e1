"""scripts/demo, but for what it installs and downloads before."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType

import pytest

from guestlab import GuestLabError, kernel

DEMO = Path(__file__).parents[2] / "scripts" / "demo"


@pytest.fixture(scope="module")
def demo() -> ModuleType:
    """The script, as a module."""
    loader = importlib.machinery.SourceFileLoader("demo", str(DEMO))
    spec = importlib.util.spec_from_loader("demo", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def guest_kernel() -> kernel.Kernel:
    """A Debian kernel, from the cache or by apt."""
    try:
        return kernel.fetch(kernel.default_cache())
    except GuestLabError as error:
        if "vm" in os.environ.get("PKERNFS_REQUIRE", "").split(","):
            pytest.fail(f"vm is required (PKERNFS_REQUIRE): {error}")
        pytest.skip(f"no kernel to boot: {error}")


@pytest.mark.vm
@pytest.mark.fuse
def test_it_passes(
    demo: ModuleType,
    guest_kernel: kernel.Kernel,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With less memory, which takes less time."""
    monkeypatch.setattr(demo, "RAM_BYTES", 160 << 20)
    monkeypatch.setattr(demo, "MARKED_PAGES", 512)
    with ExitStack() as stack:
        demo.Demo(stack, guest_kernel, "auto").play()
    said = capsys.readouterr().out
    assert "FAILED" not in said
    is_direct = demo.why_not_direct() is None
    assert ("0 pages in the page cache of the mount" in said) == is_direct
    assert ("through the page cache" in said) == (not is_direct)


@pytest.mark.parametrize(("status", "reason"), [("ok", None), ("warning", "kernel 6.1 has none")])
def test_it_asks_the_doctor(
    demo: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: str, reason: str
) -> None:
    program = tmp_path / "pkernfs"
    check = '{"name": "tmpfs, FUSE passthrough", "status": "%s", "detail": "kernel 6.1 has none"}'
    program.write_text(f"#!/bin/sh\necho '{{\"checks\": [{check % status}]}}'; exit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert demo.why_not_direct() == reason
