"""The C of the core: stores, checksums, the journal's commit, loops over page tables, registers."""
