"""The step to the next kernel: what it needs, the handover of file systems, and its start."""
