"""SIGBUS: how a process ends when memory of a region turns out not to be there."""

from __future__ import annotations

from pkernfs.native._native import lib


def exit_on_bus_error(who: str, status: int) -> None:
    """End the process with one line at a bus error from now on.

    :param who: what the line begins with
    :param status: the exit status

    The kernel raises one when a file region is shortened while it is mapped, or when the file
    system that it is on has no room for a hole that is written (or, on tmpfs, read); when a dax
    device is taken from its driver; and when memory fails. From here on, those that
    :class:`~pkernfs.region.region.Region` meets while it copies or zeroes are errors if the file
    system is full: metadata and tables have their memory before they are stored into.
    """
    line = (
        f"{who}: bus error: the region's file was cut short, or the file system it is on is full; "
        "or the device is gone, or its memory is broken\n"
    )
    lib.pk_exit_on_bus_error(line.encode(), status)
