"""Debian packages of any suite, downloaded by apt from the mirror that this machine is set up with.

Each suite gets an apt state of its own in the cache; the machine's own lists and packages are never
touched.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path

import debfile
import programs
from kexeclab import LabError

KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
MIRROR_VARIABLE = "PKERNFS_LAB_MIRROR"
_DEBIAN_SUITES = re.compile(
    r"(bullseye|bookworm|trixie|forky|sid|oldstable|stable|testing|unstable)$"
)


def run(*command: str, cwd: Path | None = None, seconds: float = 900) -> str:
    """Run a command and return its standard output.

    :raises LabError: it is missing, fails, or is not done in ``seconds``.
    """
    return programs.output(*command, error=LabError, seconds=seconds, cwd=cwd)


def mirror() -> str:
    """The address of the Debian archive that apt uses here, or the one of PKERNFS_LAB_MIRROR.

    :raises LabError: apt is set up with none.
    """
    if chosen := os.environ.get(MIRROR_VARIABLE):
        return chosen
    wanted = "$(REPO_URI) $(RELEASE) $(COMPONENT)"
    targets = run("apt-get", "indextargets", "--format", wanted, "Created-By: Packages")
    for line in targets.splitlines():
        address, release, component = [*line.split(), "", "", ""][:3]
        if component == "main" and _DEBIAN_SUITES.match(release):
            return address
    raise LabError(f"apt: no Debian mirror in its sources; set {MIRROR_VARIABLE} to one")


def source_line(suite: str) -> str:
    """The line of sources.list for ``suite``."""
    return f"deb [signed-by={KEYRING}] {mirror()} {suite} main"


def proxy_options() -> Iterator[str]:
    """Yield the settings by which apt reaches its mirror, as ``Acquire::...=value``."""
    for line in run("apt-config", "dump").splitlines():
        found = re.match(r'(Acquire::https?::\S*(?:Proxy|CaInfo|Verify-\w+)\S*) "(.+)";$', line)
        if found:
            yield f"{found.group(1)}={found.group(2)}"


def mmdebstrap_options() -> Iterator[str]:
    """Yield the options by which mmdebstrap reaches the mirror as well."""
    for option in proxy_options():
        name, value = option.split("=", 1)
        yield f'--aptopt={name} "{value}";'


class Suite:
    """One suite's packages; its lists are fetched when they are first asked for."""

    def __init__(self, name: str, cache: Path) -> None:
        self.name = name
        self._root = cache / "apt" / name
        self._fresh = False

    def depends(self, package: str) -> list[str]:
        """Return the names that ``package`` depends on, alternatives left out."""
        return debfile.dependencies(self._record(package))

    def version(self, package: str) -> str:
        """Return the version that the suite offers.

        :raises LabError: it has no such package.
        """
        found = debfile.field(self._record(package), "Version")
        if found is None:
            raise LabError(f"{package}: {self.name} has no such package")
        return found

    def download(self, package: str, directory: Path) -> Path:
        """Download the package's file into ``directory``; apt has checked its signature chain."""
        before = set(directory.glob("*.deb"))
        self._apt("apt-get", "-q", "download", package, cwd=directory)
        new = set(directory.glob("*.deb")) - before
        if len(new) != 1:
            raise LabError(f"{package}: apt-get download left {len(new)} files, expected 1")
        return new.pop()

    def _record(self, package: str) -> str:
        return self._apt("apt-cache", "show", "--no-all-versions", package)

    def _apt(self, tool: str, *words: str, cwd: Path | None = None) -> str:
        self._refresh()
        return run(tool, *self._options(), *words, cwd=cwd)

    def _options(self) -> list[str]:
        settings = {
            "Dir::Etc::sourcelist": self._root / "sources.list",
            "Dir::Etc::sourceparts": "/dev/null",
            "Dir::Etc::preferencesparts": "/dev/null",
            "Dir::State": self._root / "state",
            "Dir::State::status": "/dev/null",
            "Dir::Cache": self._root / "cache",
            "APT::Architecture": "amd64",
            "Acquire::Languages": "none",
            "Acquire::Retries": "3",
        }
        words = [word for key, value in settings.items() for word in ("-o", f"{key}={value}")]
        return [*words, "-o", debfile.AS_CALLER]

    def _refresh(self) -> None:
        if self._fresh:
            return
        for part in ("state/lists/partial", "cache/archives/partial"):
            (self._root / part).mkdir(parents=True, exist_ok=True)
        (self._root / "sources.list").write_text(source_line(self.name) + "\n")
        run("apt-get", *self._options(), "-q", "update")
        self._fresh = True


def unpack(package: Path, directory: Path, wanted: re.Pattern[str]) -> None:
    """Unpack the members of a package whose names (without ``./``) match ``wanted``.

    :raises LabError: it cannot be unpacked.
    """
    with debfile.content(package, LabError) as archive:
        for member in archive:
            if wanted.match(member.name.removeprefix("./")):
                archive.extract(member, directory, filter="tar")
