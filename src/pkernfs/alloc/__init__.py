"""Allocation of the region: 2 MiB blocks, and 4 KiB pages within them."""
