"""The cffi extension modules; everything else is in pyproject.toml."""

from setuptools import setup

setup(
    cffi_modules=[
        "src/pkernfs/native/build.py:ffibuilder",
        "src/pkernfs/fuse/shim_build.py:ffibuilder",
    ],
)
