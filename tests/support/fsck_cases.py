"""Cases of fsck's tests: kinds of damage, by the problem codes that they are reported under."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pkernfs.fs.fsck import Code
from support.damage import Damage

Case = Callable[[Damage], None]


class Cases:
    """The cases of one test module: ``case = Cases()``, then ``@case(Code.…)`` on functions."""

    def __init__(self) -> None:
        self._found: list[tuple[Code, Case]] = []
        self._lossless: list[Case] = []

    def __call__(self, *codes: Code, lossless: bool = False) -> Callable[[Case], Case]:
        """Note that the function's damage is reported under these codes.

        ``lossless``: a repair brings every name and byte back.
        """

        def add(function: Case) -> Case:
            self._found.extend((code, function) for code in codes)
            if lossless:
                self._lossless.append(function)
            return function

        return add

    @property
    def each(self) -> pytest.MarkDecorator:
        """Run a test with ``code`` and ``function`` of each case so far."""
        ids = [f"{code.name}-{function.__name__}" for code, function in self._found]
        return pytest.mark.parametrize(("code", "function"), self._found, ids=ids)

    @property
    def each_lossless(self) -> pytest.MarkDecorator:
        """Run a test with ``function`` of each case so far whose repair loses nothing."""
        ids = [function.__name__ for function in self._lossless]
        return pytest.mark.parametrize("function", self._lossless, ids=ids)
