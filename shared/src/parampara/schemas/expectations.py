"""What a served model has to answer: ``expectations.json`` of an evaluation, replayed against the live endpoint by a deployment.

The evaluator writes it from the very model that is to be served, while that is in memory; the deploy stage reads it before any alias
moves. It is self-contained, so that the machine that deploys needs neither tokenizer nor weights.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, ValidationError, model_validator

from parampara.errors import InvalidData
from parampara.schemas.stages import Strict

FILE_NAME = "expectations.json"
MAX_PROBES = 16
MAX_TOKENS = 1024
"""Of one probe, prompt and continuation together."""
MAX_FORCED_TOKENS = 64
TOP_K = 20
"""What vLLM's ``prompt_logprobs`` gives at most unless it is started with another ``--max-logprobs``."""
MAX_BYTES = 8 * 1024 * 1024

TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1, max_length=MAX_TOKENS)]
ServedModel = Literal["sft", "dpo", "quantized"]
LogProb = Annotated[float, Field(le=0)]


class ProbeMessage(Strict):
    role: Literal["system", "user", "assistant"]
    content: str


class ExpectedProbe(Strict):
    """One conversation up to an answer, and what the evaluated model says about a fixed continuation of it."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    messages: Annotated[list[ProbeMessage], Field(min_length=1)]
    prompt: str
    """The messages as training rendered them, generation prompt included."""
    prompt_ids: TokenIds
    forced_ids: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1, max_length=MAX_FORCED_TOKENS)]
    """The reference answer's first tokens, given to the model whatever it would have said itself."""
    forced_logprobs: list[LogProb]
    """Of each forced token given all before it, in nats."""
    top_ids: list[Annotated[list[int], Field(min_length=1, max_length=TOP_K)]]
    """The likeliest tokens at each forced position, the likeliest first."""
    top_logprobs: list[Annotated[list[LogProb], Field(min_length=1, max_length=TOP_K)]]
    greedy_ids: list[int]
    """The model's own greedy answer to the prompt, without the token that ended it."""

    @model_validator(mode="after")
    def _fits_together(self) -> ExpectedProbe:
        count = len(self.forced_ids)
        if {len(self.forced_logprobs), len(self.top_ids), len(self.top_logprobs)} != {count}:
            raise ValueError(f"forced_logprobs, top_ids and top_logprobs hold one entry for each of the {count} forced_ids")
        if any(len(ids) != len(told) for ids, told in zip(self.top_ids, self.top_logprobs, strict=True)):
            raise ValueError("top_ids and top_logprobs differ in length at some position")
        return self


class Expectations(Strict):
    format: Literal[1] = 1
    model: ServedModel
    """Which model of the line it was measured on: the one that is deployed."""
    generation_config: dict[str, Any]
    """What the model directory says about generation, library versions left out; see :func:`generation_config`."""
    stop_ids: list[int]
    """Tokens that end an answer."""
    max_new_tokens: Annotated[int, Field(ge=1, le=4096)]
    """Length at which ``greedy_ids`` were cut."""
    probes: Annotated[list[ExpectedProbe], Field(min_length=1, max_length=MAX_PROBES)]


def generation_config(directory: Path) -> dict[str, Any]:
    """What ``generation_config.json`` of a model directory says, without who wrote it; nothing where there is no such file.

    Raises:
        InvalidData: it is not a JSON object.
    """
    path = directory / "generation_config.json"
    try:
        stored = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise InvalidData(f"{path} cannot be read: {error}", param="model") from None
    if not isinstance(stored, dict):
        raise InvalidData(f"{path} holds no JSON object.", param="model")
    return {key: value for key, value in stored.items() if key not in ("transformers_version", "_from_model_config")}


def read_expectations(evaluation: Path) -> Expectations | None:
    """The expectations of an evaluation artifact; None for one that was made without.

    Raises:
        InvalidData: the file is too large, or not what it has to be.
    """
    path = evaluation / FILE_NAME
    if not path.is_file():
        return None
    if (size := path.stat().st_size) > MAX_BYTES:
        raise InvalidData(f"{path} has {size} bytes; at most {MAX_BYTES} are read.", param="evaluation")
    try:
        return Expectations.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise InvalidData(f"{path}: {place or 'the file'}: {first['msg']}.", param="evaluation") from None
