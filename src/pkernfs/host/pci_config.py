"""PCI configuration space: registers, and the walk of the list of capabilities.

Offsets and bits are those of Linux's include/uapi/linux/pci_regs.h. Callers say how a word is
loaded, so that the same walk serves a copy of the space and the device itself.
"""

from __future__ import annotations

from collections.abc import Callable

#: Registers of every function, by their offset in bytes.
COMMAND, STATUS, CLASS, CAPABILITIES = 0x04, 0x06, 0x0B, 0x34
COMMAND_MEMORY, COMMAND_MASTER = 1 << 1, 1 << 2
STATUS_CAPABILITIES = 1 << 4
#: The PCI Express capability, its status register, and the bit of requests that are under way.
EXPRESS, EXPRESS_STATUS, TRANSACTIONS_PENDING = 0x10, 0x0A, 1 << 5
#: A word that is read where nothing answers.
NO_ANSWER = 0xFFFF

_HEADER_BYTES = 0x40
_MOST_CAPABILITIES = 48  # as many as there is room for: a broken list may be a circle

#: Loads the 16-bit word at an offset in bytes; 0 behind the end of the space.
Load = Callable[[int], int]


def find_capability(load: Load, wanted: int) -> int:
    """Return the offset of the capability with the id ``wanted``; 0 if there is none."""
    at = load(CAPABILITIES) & 0xFC
    for _ in range(_MOST_CAPABILITIES):
        if at < _HEADER_BYTES:
            return 0
        word = load(at)
        if word & 0xFF == wanted:
            return at
        at = word >> 8 & 0xFC
    return 0
