"""Answers on their way back, chunk by chunk."""

from __future__ import annotations

from typing import Any

from gateway.answers import Cited, GroundedStream
from gateway.grounding import Grounded
from tests.gateway.test_grounding import passage


def streamed(*pieces: str, finish_with: str | None = None) -> list[dict[str, Any]]:
    """What goes out for pieces that come with the log-probability of one token each; the finish holds ``finish_with`` or nothing."""
    stream = GroundedStream(Cited(Grounded([], [passage("Ketu rules Ashwini.")], ["Ketu rules Ashwini."]), "http://x"))

    def chunk(text: str | None, reason: str | None) -> dict[str, Any]:
        logprobs = None if text is None else {"content": [{"token": text, "logprob": -0.1}], "refusal": None}
        delta = {} if text is None else {"content": text}
        return {"id": "c", "choices": [{"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": reason}]}

    chunks = [*(chunk(piece, None) for piece in pieces), chunk(finish_with, "stop")]
    return [out["choices"][0] for given in chunks for out in stream.rewrite(given)]


def test_no_logprob_is_lost_with_text_that_is_held_back() -> None:
    for pieces, finish_with in [
        (("Ketu", " ", "[", "1", "]", " rules"), None),
        (("Ketu", " [", "9", "]"), None),  # the whole marker is taken out
        (("Ketu", " ", "[", "1"), "]"),
        (("Ketu",), " [9]"),
        (("x", " "), None),
    ]:
        out = streamed(*pieces, finish_with=finish_with)
        tokens = [entry["token"] for choice in out for entry in (choice["logprobs"] or {}).get("content", [])]
        assert tokens == [*pieces, *([finish_with] if finish_with else [])]
        assert [choice["finish_reason"] for choice in out] == [None] * (len(out) - 1) + ["stop"]


def test_logprobs_stand_beside_the_text_they_belong_to() -> None:
    out = streamed("Ketu", " ", "[", "1", "]", " rules")
    said = {choice["delta"]["content"]: "".join(entry["token"] for entry in choice["logprobs"]["content"]) for choice in out[:3]}
    assert said == {"Ketu": "Ketu", " [1]": " [1]", " rules": " rules"}
