"""The file system: trees, inodes, names, data, and the mount."""
