"""The lab: Debian kernels in QEMU, with this checkout installed inside, through real kexecs.

On the host: `debian` (packages from apt's own mirror), `rootfs`, `kernels`, `qemus` and `project`
(a machine's disks, kept in the cache), `machine` (QEMU, its console and side channel), `feed`
(packets for a machine's network card) and `runner` (a test's stages, one after each kexec). Inside
the machine: `guest` (what a test's stages are given) and `agent` (which runs them). Standard
library only, so that it runs before any set-up.
"""


class LabError(Exception):
    """Something that the lab needs failed; the text is one line that says what and why."""


class StageFailed(Exception):
    """A stage of a test ran and failed; the text is the report from inside the machine."""


class LostMachine(Exception):
    """The machine panicked, hung, ended or went silent: nothing is known of the test itself."""
