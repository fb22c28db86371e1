"""The file system: core, checker, FUSE adapter."""
