"""The exception tree: what can go wrong, each with its errno. Exit statuses are the commands'.

A :class:`PkernfsError` is something a user can understand or mend and is shown as one line. Any
other exception is a bug and keeps its traceback. Message grammar:
``<structure> <where>: <reason>: got <x>, expected <y>``; lower case, no full stop, offsets in hex.
"""

from __future__ import annotations

import collections.abc
import errno as _errno
import os as _os


def one_line(message: str) -> str:
    """A message as it may be shown, whatever is in the names that it quotes."""
    return "".join(c if c.isprintable() or c == " " else ascii(c)[1:-1] for c in message)


def os_reason(error: OSError) -> str:
    """Return a system call's failure as it is shown: the file, if one is named, and the reason."""
    why = error.strerror or str(error)
    name = error.filename
    return why if name is None else f"{_os.fsdecode(name)}: {why}"


class PkernfsError(Exception):
    """Base of all expected failures; a system call through the mount fails with ``errno``."""

    errno: int = _errno.EIO


class NotFoundError(PkernfsError):
    """No such name or inode."""

    errno = _errno.ENOENT


class ExistsError(PkernfsError):
    """The name is taken."""

    errno = _errno.EEXIST


class NoSpaceError(PkernfsError):
    """No free block, page or inode; nothing was changed."""

    errno = _errno.ENOSPC


class NoTablePagesError(NoSpaceError):
    """Too few free pages for tables in ``what``; nothing was changed.

    ``missing`` is how many bytes it lacks. A table file grows in steps of 2 MiB.
    """

    def __init__(self, what: str, missing: int) -> None:
        steps = -(-missing // (2 << 20))
        super().__init__(
            f"{what}: no free page for tables: it must grow by {2 * steps} MiB: "
            f"truncate -s +{2 * steps}M"
        )
        self.missing = missing


class NotDirError(PkernfsError):
    """A directory was needed."""

    errno = _errno.ENOTDIR


class IsDirError(PkernfsError):
    """Anything but a directory was needed."""

    errno = _errno.EISDIR


class NotEmptyError(PkernfsError):
    """The directory has entries."""

    errno = _errno.ENOTEMPTY


class NameTooLongError(PkernfsError):
    """A name of more than 255 bytes, or a symlink target of more than 4095."""

    errno = _errno.ENAMETOOLONG


class InvalidError(PkernfsError):
    """An argument out of its range."""

    errno = _errno.EINVAL


class PermissionDeniedError(PkernfsError):
    """The operation is not allowed on this object, whoever asks."""

    errno = _errno.EPERM


class ReadOnlyError(PkernfsError):
    """The file system is read-only."""

    errno = _errno.EROFS


class BusyError(PkernfsError):
    """In use."""

    errno = _errno.EBUSY


class NoDataError(PkernfsError):
    """No such extended attribute."""

    errno = _errno.ENODATA


class StaleError(PkernfsError):
    """The inode lost its last name; the kernel looks the path up again."""

    errno = _errno.ESTALE


class RangeTooSmallError(PkernfsError):
    """The result does not fit the buffer."""

    errno = _errno.ERANGE


class TooBigError(PkernfsError):
    """Beyond the largest file size, or an attribute value that is too large."""

    errno = _errno.EFBIG


class TimeRangeError(PkernfsError):
    """A time that 64 bits of nanoseconds since 1970 do not hold: before 1677 or after 2262."""

    errno = _errno.EOVERFLOW


class ArgumentTooLongError(PkernfsError):
    """An extended attribute value of more than 64 KiB."""

    errno = _errno.E2BIG


class NotSupportedError(PkernfsError):
    """An operation or a mode that this file system does not have."""

    errno = _errno.EOPNOTSUPP


class NoSuchAddressError(PkernfsError):
    """lseek(SEEK_DATA or SEEK_HOLE) beyond the end."""

    errno = _errno.ENXIO


class TooManyLinksError(PkernfsError):
    """The link count would not fit."""

    errno = _errno.EMLINK


class CorruptionError(PkernfsError):
    """Something in the region contradicts the format (``Structure needs cleaning``)."""

    errno = _errno.EUCLEAN


class BeyondRepairError(CorruptionError):
    """Damage that fsck.pkernfs does not repair: too little is left to go by."""


def with_remedy(error: PkernfsError) -> str:
    """Return a message, with what repairs the damage if it is of that kind."""
    mendable = isinstance(error, CorruptionError) and not isinstance(error, BeyondRepairError)
    text = str(error)
    return f"{text}: run fsck.pkernfs -y" if mendable and "fsck" not in text else text


class TableDamageError(PkernfsError):
    """IOMMU tables that contradict their format, or are not where they were made for.

    The file system itself is none the worse.
    """

    errno = _errno.EUCLEAN


class UnitError(PkernfsError):
    """An IOMMU unit does not do what it was told, or says that something is wrong."""


class VmmError(PkernfsError):
    """A step that :mod:`pkernfs.vmm` takes for a VMM fails: a program, a device, a monitor."""


class VfioError(VmmError):
    """VFIO, or sysfs on its behalf, refuses a device or an address space."""


class TakeOverError(VfioError):
    """A device cannot be taken over. Unless the message says so, nothing has been changed."""


class QemuError(VmmError):
    """QEMU refuses a command of its monitor, does not answer, or has ended."""


class LiveUpdateError(VmmError):
    """A virtual machine cannot be started, saved or restored."""


class FormatError(PkernfsError):
    """Not a pkernfs, or one that this version must not touch."""

    errno = _errno.EINVAL


class RegionError(PkernfsError):
    """The region cannot be opened, sized or mapped."""

    def __init__(self, message: str, errno: int = _errno.EINVAL) -> None:
        super().__init__(message)
        self.errno = errno


class LockedError(RegionError):
    """Another process has the region."""

    def __init__(self, message: str) -> None:
        super().__init__(message, _errno.EBUSY)


class UsageError(PkernfsError):
    """The command line makes no sense."""

    errno = _errno.EINVAL


class Needed(Exception):  # not an error: control flow
    """The operation needs something that takes long; it is to be called again after that."""


class WorkNeeded(Needed):
    """The operation needs ``work()`` to be done first, which may take long; any thread may do it.

    What the operation has changed until now stands for itself. ``work`` raises nothing: the
    operation finds what came of it.
    """

    def __init__(self, work: collections.abc.Callable[[], None]) -> None:
        super().__init__()
        self.work = work


class ZeroingNeeded(Needed):
    """The operation needs more zeroed memory than may be zeroed at once; nothing was changed.

    ``blocks`` are ``(first, count)`` runs of free 2 MiB blocks; plain pairs, for errors know no
    other module. The caller claims them, zeroes them where it likes, finishes the claim and calls
    the operation again.
    """

    def __init__(self, blocks: collections.abc.Sequence[tuple[int, int]]) -> None:
        super().__init__(blocks)
        self.blocks = blocks
