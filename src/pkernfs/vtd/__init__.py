"""The VT-d specification as declarations: entries, registers, commands; no I/O."""
