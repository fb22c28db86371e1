"""Free space: 2 MiB blocks, and 4 KiB pages in blocks that are allocated page by page."""
