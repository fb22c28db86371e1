"""Flags of the compiler for the two extension modules; only their builders import this."""

import os
import shlex

#: Words for the compiler and the linker, from whoever tests: an installation must not fail for a
#: warning that a newer compiler has, a test run (scripts/test) must.
_MORE = shlex.split(os.environ.get("PKERNFS_CFLAGS", ""))

COMPILE = ["-O2", "-Wall", "-Wextra", "-std=gnu11", *_MORE]
LINK = _MORE
