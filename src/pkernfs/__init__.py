"""pkernfs: a FUSE file system that lives in a reserved memory region and survives kexec."""

__version__ = "0.1.0"
