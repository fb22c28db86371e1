"""Pools: what segments are made of, beside the base range (docs/format.md, section 12)."""
