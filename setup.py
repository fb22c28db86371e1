"""The cffi extension modules; everything else is in pyproject.toml."""

from setuptools import setup

setup(
    cffi_modules=[
        "src/pkernfs/native_build.py:ffibuilder",
        "src/pkernfs/fuse_shim_build.py:ffibuilder",
    ],
)
