"""Words for the compiler that come from outside."""

from __future__ import annotations

import runpy
from typing import Any

import pytest

from pkernfs.native import compiler


def flags(words: str | None, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The module as a build has it that is started with these words."""
    if words is None:
        monkeypatch.delenv("PKERNFS_CFLAGS", raising=False)
    else:
        monkeypatch.setenv("PKERNFS_CFLAGS", words)
    return runpy.run_path(compiler.__file__)


@pytest.mark.parametrize(
    ("words", "more"),
    [
        (None, []),
        ("", []),
        ("  ", []),
        ("-Werror", ["-Werror"]),
        ("-g  -fsanitize=address", ["-g", "-fsanitize=address"]),
        ("-I'/a b' -DX=\\\"y\\\"", ["-I/a b", '-DX="y"']),
    ],
)
def test_words_are_added_to_both(
    words: str | None, more: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sanitizer is the linker's business as well."""
    found = flags(words, monkeypatch)
    assert found["COMPILE"] == [*flags(None, monkeypatch)["COMPILE"], *more]
    assert found["LINK"] == more


def test_a_warning_does_not_fail_an_installation(monkeypatch: pytest.MonkeyPatch) -> None:
    own = flags(None, monkeypatch)["COMPILE"]
    assert {"-Wall", "-Wextra"} < set(own)
    assert "-Werror" not in own


def test_words_that_are_no_words(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="No closing quotation"):
        flags("-D'X", monkeypatch)
