"""What this machine and its kernel say of themselves: /proc, /sys, ACPI, kernel images."""
