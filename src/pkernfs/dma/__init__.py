"""Tables as files of a file system, and the devices that depend on them."""
