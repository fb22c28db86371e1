"""Debian packages: fields of their records, and the files in them. Standard library only."""

import re
import signal
import subprocess
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

#: Has apt download as the user who asks: its own one could not write to that user's directory.
AS_CALLER = "APT::Sandbox::User=root"
#: How dpkg-deb ends that has been told to: the reader had seen enough.
_STOPPED = (0, -signal.SIGTERM, -signal.SIGPIPE)


def field(record: str, name: str) -> str | None:
    """Return a field of what ``apt-cache show`` prints of a package; None if it has none."""
    found = re.search(rf"^{name}: (.*)$", record, re.MULTILINE)
    return found.group(1) if found else None


def dependencies(record: str) -> list[str]:
    """Return the names of the packages that one depends on, alternatives left out."""
    entries = (field(record, "Depends") or "").split(",")
    return [entry.split()[0] for entry in entries if entry.strip()]


@contextmanager
def content(package: Path, error: type[Exception]) -> Iterator[tarfile.TarFile]:
    """Open the files of a package, as a stream.

    :param error: raised if the package cannot be unpacked
    """
    command = ["dpkg-deb", "--fsys-tarfile", str(package)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as unpacker:
        assert unpacker.stdout is not None
        try:
            with tarfile.open(fileobj=unpacker.stdout, mode="r|") as archive:
                yield archive
        except tarfile.TarError as e:
            raise error(f"{package.name}: cannot be unpacked: {e}") from e
        finally:
            unpacker.terminate()  # the rest of the package is of no interest
    if unpacker.returncode not in _STOPPED:
        raise error(f"{package.name}: dpkg-deb: exit status {unpacker.returncode}")
