"""A request for what tables say, as whoever answers it sees it; test_protocol.py has the wire."""

from __future__ import annotations

import dataclasses

from pkernfs.control.table_protocol import Read
from pkernfs.dma.output import Question
from pkernfs.quantities import Iova, SourceId


def test_a_question_has_all_that_was_asked() -> None:
    asked = Read("show", 1, SourceId(2), Iova(3), 4, 1, True, True)
    assert asked.question() == Question("show", 1, SourceId(2), Iova(3), 4, 1, True, True)
    assert [f.name for f in dataclasses.fields(asked)] == list(Question._fields)
    assert Read("check").question() == Question("check")
