"""The progress of a handover or a kexec, told to whoever has asked for it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

#: Is called with what is done of how much.
Progress = Callable[[int, int], None]


class Observer:
    """Is told how it goes. This one takes no notice; a command prints."""

    def progress(self, what: str) -> AbstractContextManager[Progress]:
        """Begin a stage that takes long; leaving the context ends it."""
        return nullcontext(lambda done, total: None)

    def say(self, text: str) -> None:
        """Take one line about something that people should know."""


SILENT = Observer()
