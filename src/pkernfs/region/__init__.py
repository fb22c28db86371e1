"""Regions: the memory that holds a file system; its kinds, its bounds, its locks."""
