"""For authors of VMMs: a guest's live update, and the take-over of devices at work, by VFIO.

``live_update``
    saves a guest's device state and restores it, with ``qmp``, QEMU's monitor
``takeover``
    takes devices over after a kexec, by what ``export`` reads and ``plan`` has checked; ``memory``
    maps the region, and ``hold`` stops a device's requests for a moment
``vfio``
    opens devices in a container or in iommufd, by the structures of ``uapi``; ``sysfs`` finds
    and binds them

Everything works without pkernfs's extension modules, pyfuse3 and trio: besides these modules, the
package needs :mod:`pkernfs.errors`, :mod:`pkernfs.quantities`, :mod:`pkernfs.host.pci_config` and
the command ``pkernfs``.
Every failure is a :class:`~pkernfs.errors.VmmError`, or an :class:`OSError` of a file; nothing is
printed.
"""
