"""Remapping units: the hardware that walks the tables, its registers and its demands."""
