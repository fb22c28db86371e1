"""VFIO and the take-over of devices at work, for VMMs to use or to copy."""
