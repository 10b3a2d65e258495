"""Turn the model server's answers into ours: one model name, token counts, markers checked, citations added."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from gateway import metrics
from gateway.citations import Mark, MarkerFilter, attribute, context, url_citations
from gateway.grounding import Grounded

# engine internals that no OpenAI client knows
_INTERNAL = ("prompt_logprobs", "prompt_token_ids", "prompt_text", "kv_transfer_params", "token_ids", "routed_experts")


@dataclass(frozen=True)
class Cited:
    """Adds the citations of one request to its answers. Without ``grounded`` answers pass unchanged."""

    grounded: Grounded | None
    base_url: str

    def message(self, message: dict[str, Any]) -> None:
        """Check the markers of a whole message and cite, in place."""
        if self.grounded is None:
            return
        checked = MarkerFilter(len(self.grounded.passages))
        checked.feed(message.get("content") or "")
        checked.finish()
        if message.get("content") is not None:
            message["content"] = checked.text
        message.update(self.citing(checked))

    def citing(self, checked: MarkerFilter) -> dict[str, Any]:
        """``annotations`` and ``context`` of a finished text."""
        assert self.grounded is not None
        marks: list[Mark] = checked.marks or attribute(checked.text, self.grounded.shown, question=self.grounded.query)
        for mark in marks:
            metrics.CITATIONS.labels(mark.attributed_by).inc()
        passages = self.grounded.passages
        return {
            "annotations": url_citations(marks, passages, base_url=self.base_url),
            "context": context(marks, passages, base_url=self.base_url, query=self.grounded.query, dropped=self.grounded.dropped),
        }


def finish_whole(answer: dict[str, Any], *, model: str, cited: Cited) -> dict[str, Any]:
    """A complete answer as the client gets it."""
    answer["model"] = model
    count_usage(model, answer.get("usage"))
    _strip(answer)
    for choice in answer.get("choices", []):
        _strip(choice)
        if "message" in choice:
            cited.message(choice["message"])
    return answer


def count_usage(model: str, usage: dict[str, Any] | None) -> None:
    if usage:
        metrics.TOKENS.labels(model, "prompt").inc(usage.get("prompt_tokens") or 0)
        metrics.TOKENS.labels(model, "completion").inc(usage.get("completion_tokens") or 0)


class GroundedStream:
    """Rewrites the chunks of one streamed, grounded answer; each choice has its own marker filter."""

    def __init__(self, cited: Cited) -> None:
        self._cited = cited
        self._choices: dict[int, _Choice] = {}

    def rewrite(self, chunk: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The chunks to send for one that came. Before a choice's finish comes one chunk with its citations."""
        if not chunk.get("choices"):
            yield chunk
            return
        for choice in chunk["choices"]:
            yield from self._rewrite({**chunk, "choices": []}, choice)

    def _rewrite(self, envelope: dict[str, Any], choice: dict[str, Any]) -> Iterator[dict[str, Any]]:
        assert self._cited.grounded is not None
        state = self._choices.setdefault(choice["index"], _Choice(MarkerFilter(len(self._cited.grounded.passages))))
        checked = state.checked
        state.hear(choice.get("logprobs"))
        delta, reason = choice.get("delta") or {}, choice.get("finish_reason")
        content = checked.feed(delta.get("content") or "")
        if reason is None:
            if content or not delta.get("content"):
                said = {**delta, "content": content} if delta.get("content") else delta
                yield {**envelope, "choices": [{**choice, "delta": said, "logprobs": state.take_logprobs()}]}
            return
        content += checked.finish()
        if content or any(value for key, value in delta.items() if key != "content"):
            said = {**delta, "content": content}
            yield {**envelope, "choices": [{**choice, "delta": said, "logprobs": state.take_logprobs(), "finish_reason": None}]}
        bare = {"index": choice["index"], "logprobs": None}
        yield {**envelope, "choices": [{**bare, "delta": self._cited.citing(checked), "finish_reason": None}]}
        yield {**envelope, "choices": [{**choice, "delta": {}, "logprobs": state.take_logprobs()}]}


@dataclass
class _Choice:
    """What is under way in one choice of a stream."""

    checked: MarkerFilter
    _logprobs: dict[str, Any] | None = None

    def hear(self, logprobs: dict[str, Any] | None) -> None:
        """Tokens of text that may be held back as a beginning marker: they go out with what goes out next."""
        if logprobs is not None:
            before = (self._logprobs or {}).get("content") or []
            self._logprobs = {**logprobs, "content": [*before, *(logprobs.get("content") or [])]}

    def take_logprobs(self) -> dict[str, Any] | None:
        taken, self._logprobs = self._logprobs, None
        return taken


def _strip(answer: dict[str, Any]) -> None:
    for name in _INTERNAL:
        answer.pop(name, None)
