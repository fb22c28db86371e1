"""A throwaway guest machine: a Debian kernel, a tiny initramfs, QEMU, and a search of its memory.

What the demo, and tests with the marker ``vm``, share. Standard library only, so that it runs
before any set-up; nothing here knows of pkernfs: a guest's memory is just a file with a path.
"""


class GuestLabError(Exception):
    """Something that the guest needs failed; the text is one line that says what and why."""
