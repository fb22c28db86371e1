"""Every test gets from here: capabilities, the settings of Hypothesis, a file system to work on.

``PKERNFS_REQUIRE=fuse,vm`` (set by scripts/test as root) turns a missing capability into a failure,
so that a machine that lost its /dev/fuse does not look like a passing one.
``PKERNFS_HYPOTHESIS=thorough`` lets every property look much longer. The seed of a run stands in
the report's header: ``--hypothesis-seed=N`` runs the same examples again.
"""

from __future__ import annotations

import gc
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings, strategies

from guestlab import GuestLabError, kernel, qemu
from kexeclab.runner import Lab
from pkernfs.dma.mount import mount_filesystem
from pkernfs.fs.filesystem import FileSystem
from pkernfs.fs.mkfs import make_filesystem
from pkernfs.region import locks
from support.checking import MemoryFile, assert_clean
from support.command_lines import Command, runner

#: What a test may take, and the slowest ones at the end of a run.
pytest_plugins = ("support.budgets",)

_COMMON = settings(
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.register_profile("default", _COMMON, max_examples=25, stateful_step_count=40)
settings.register_profile("thorough", _COMMON, max_examples=500, stateful_step_count=80)
settings.load_profile(os.environ.get("PKERNFS_HYPOTHESIS", "default"))


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Choose the seed here, so that it can be told."""
    if getattr(config.option, "hypothesis_seed", None) is None:
        config.option.hypothesis_seed = str(random.getrandbits(32))


def pytest_report_header(config: pytest.Config) -> str:
    """The seed, for a run that fails now and then."""
    return f"run it again with: --hypothesis-seed={config.option.hypothesis_seed}"


def _missing_fuse() -> str | None:
    if os.geteuid() != 0:
        return "not root"
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR))
    except OSError as error:
        return f"/dev/fuse: {error.strerror}"
    return None


def _missing_vm() -> str | None:
    return None if shutil.which("qemu-system-x86_64") else "no qemu-system-x86_64"


def _missing_lab() -> str | None:
    if os.geteuid() != 0:
        return "not root"
    tools = ("qemu-system-x86_64", "mmdebstrap", "apt-get", "mke2fs", "unshare")
    absent = [tool for tool in tools if shutil.which(tool) is None]
    return f"no {', '.join(absent)} (scripts/setup --lab)" if absent else None


_CAPABILITIES = {"fuse": _missing_fuse, "vm": _missing_vm, "lab": _missing_lab}


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip, or fail, a test whose marker names something that is not to be had here."""
    required = os.environ.get("PKERNFS_REQUIRE", "").split(",")
    for name, missing in _CAPABILITIES.items():
        if item.get_closest_marker(name) is None or (reason := missing()) is None:
            continue
        if name in required:
            pytest.fail(f"{name} is required (PKERNFS_REQUIRE) and missing: {reason}")
        pytest.skip(f"needs {name}: {reason}")


@pytest.fixture(scope="session")
def new_qemu() -> Path:
    """A QEMU that has offset= and cpr-reboot (8.2), from PATH or the cache, else by mmdebstrap."""
    try:
        return qemu.newer((8, 2), kernel.default_cache())
    except GuestLabError as error:
        if "vm" in os.environ.get("PKERNFS_REQUIRE", "").split(","):
            pytest.fail(f"vm is required (PKERNFS_REQUIRE): {error}")
        pytest.skip(f"no QEMU 8.2: {error}")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Write what tests with machines told: figures are for people, also when all is well."""
    for report in terminalreporter.stats.get("passed", []):
        has_machine = {"lab", "vm"} & set(report.keywords)
        if report.when == "call" and has_machine and report.capstdout:
            terminalreporter.section(report.nodeid, sep="-")
            terminalreporter.write(report.capstdout)


def pytest_collection_finish(session: pytest.Session) -> None:
    """For ``scripts/lab list``: write each test, with what it shows, to the file that it names."""
    if listing := os.environ.get("PKERNFS_LAB_LIST"):
        functions = [item for item in session.items if isinstance(item, pytest.Function)]
        shows = {item.originalname: item.function.__doc__ or "" for item in functions}
        lines = [f"{name}\t{text.partition(chr(10))[0]}\n" for name, text in shows.items()]
        Path(listing).write_text("".join(lines))
    _get_ready()


def _get_ready() -> None:
    """Do once what would else be some test's time, whichever comes first.

    Hypothesis reads all modules for constants at its first draws. And what is there now stays: to
    look through all of it for garbage takes a second.
    """
    settings(max_examples=200, database=None)(given(strategies.integers())(_drawn))()
    gc.collect()
    gc.freeze()


def _drawn(_number: int) -> None:
    pass


@pytest.fixture(scope="session")
def lab() -> Lab:
    """Machines in QEMU that a test's stages run in (marker ``lab``)."""
    return Lab()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give up at once on a region that is served: for tests in which the holder will not let go."""
    monkeypatch.setattr(locks, "_SERVED_WAIT_SECONDS", 0.02)


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """Run a command line in this process."""
    return runner(capsys)


@pytest.fixture
def fs(request: pytest.FixtureRequest) -> Iterator[FileSystem]:
    """A mounted file system in a sparse region of 64 MiB (or the parameter's bytes).

    It is checked at the end as it stands, and again after an unmount.
    """
    with MemoryFile(getattr(request, "param", 64 << 20)) as memory, memory.open() as region:
        make_filesystem(region)
        mounted = mount_filesystem(region)
        yield mounted
        assert_clean(region)
        mounted.unmount()
        assert_clean(region)
