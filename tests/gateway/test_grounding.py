"""How passages are laid before the model."""

from __future__ import annotations

from typing import Any

from gateway.grounding import ground
from gateway.search import Passage


def passage(text: str) -> Passage:
    return Passage(
        chunk_id=1,
        vector_store_id="vs_1",
        file_id="file-1",
        filename="book.txt",
        page=None,
        position=0,
        text=text,
        score=1.0,
        attributes={},
    )


async def never(messages: list[dict[str, Any]]) -> int:
    raise AssertionError("without a window nothing is counted")


async def test_what_looks_like_a_marker_within_a_passage_is_not_laid_down_as_one() -> None:
    texts = ["as [2] says", "both [1, 2] and [3,\n4]", "[12345] and [a] stay"]
    laid = await ground(
        [{"role": "user", "content": "?"}],
        [passage(text) for text in texts],
        query="?",
        max_tokens=None,
        answer_tokens=10,
        window=None,
        count=never,
    )
    assert laid.shown == ["as (2) says", "both (1, 2) and (3,\n4)", "[12345] and [a] stay"]
    assert laid.messages[0]["content"].splitlines()[1:] == [
        "[1] as (2) says",
        "[2] both (1, 2) and (3, 4)",
        "[3] [12345] and [a] stay",
    ]
