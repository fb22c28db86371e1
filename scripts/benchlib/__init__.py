"""The parts of scripts/bench; nothing in the project imports it.

machine    facts about the machine, pinning, dropping caches
client     compiles client.c and runs its verbs
systems    the file systems that are compared: start, stop, count requests
results    figures, ratios within one round, targets
workloads  what is measured, interleaved over the systems
region     what only pkernfs has: mkfs, mount time, memory, extents, zeroing
plain_paths  what pkernfs exec costs
segments   files with memory of their own: mapped, read, truncated; mounts with many of them
report     JSON and Markdown
floor      an empty pyfuse3 file system (a program of its own)
"""
