"""This machine and its kernel, as they describe themselves: /proc, /sys, ACPI, kernel images."""
