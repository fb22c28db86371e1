"""Helpers of the lab's tests, most of which run inside a machine."""
