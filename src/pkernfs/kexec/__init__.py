"""The next kernel: how it is started without losing regions, and the handover before it."""
