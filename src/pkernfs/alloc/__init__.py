"""Space: 2 MiB blocks, and 4 KiB pages carved from them."""
