"""Loading the models of a line, one at a time, and rendering conversations as they see them."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from parampara.errors import InvalidData

Conversation = list[dict[str, str]]
"""Messages as a chat template takes them: ``[{"role": "user", "content": "..."}, ...]``."""


@dataclass(frozen=True)
class Loaded:
    """A model in memory. ``model`` is a transformers or PEFT causal language model in evaluation mode."""

    name: str
    model: Any
    tokenizer: Any
    stop_ids: list[int]
    pad_id: int
    max_tokens: int
    """Longest sequence that the model's positions allow."""

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device


@contextmanager
def loaded(name: str, directory: Path, adapter: Path | None = None) -> Iterator[Loaded]:
    """Hold a model (with an adapter applied on top) in memory for the length of the block.

    An unquantized model runs in float32 on CPU and in its stored type on a GPU; a quantized one always as it is stored.

    Raises:
        InvalidData: ``directory`` is not a model directory.
    """
    config = _config(directory)
    device: int | str = 0 if torch.cuda.is_available() else "cpu"
    dtype = "auto" if device == 0 or "quantization_config" in config else torch.float32
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, device_map={"": device}, local_files_only=True)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter))
    model.eval()
    tokenizer = load_tokenizer(adapter if adapter is not None and (adapter / "tokenizer.json").is_file() else directory)
    try:
        yield Loaded(
            name=name,
            model=model,
            tokenizer=tokenizer,
            stop_ids=_stop_ids(model, tokenizer),
            pad_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            max_tokens=model.config.get_text_config().max_position_embeddings,
        )
    finally:
        del model, tokenizer
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def load_tokenizer(directory: Path) -> Any:
    """The tokenizer of a model or adapter directory.

    Raises:
        InvalidData: there is none.
    """
    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError) as error:
        raise InvalidData(f"{directory} holds no tokenizer that can be loaded: {error}", param="model") from None


def prompt_ids(tokenizer: Any, conversation: Conversation) -> list[int]:
    """Token ids of the conversation up to where the assistant's answer starts.

    Raises:
        InvalidData: the tokenizer has no chat template.
    """
    return _ids(tokenizer, _render(tokenizer, conversation, add_generation_prompt=True))


def segments(tokenizer: Any, conversation: Conversation) -> list[tuple[list[int], bool]]:
    """The whole conversation as ``(token ids, is an answer)`` in turn; an answer includes its end mark.

    Prompt and answer are tokenized apart, as the server's prompt and the model's own tokens are: no token straddles the border.

    Raises:
        InvalidData: the tokenizer has no chat template, or one that does not render turn by turn.
    """
    parts: list[tuple[list[int], bool]] = []
    done = ""
    for turn, message in enumerate(conversation):
        if message["role"] != "assistant":
            continue
        before = _render(tokenizer, conversation[:turn], add_generation_prompt=True)
        after = _render(tokenizer, conversation[: turn + 1], add_generation_prompt=False)
        if not (before.startswith(done) and after.startswith(before) and len(after) > len(before)):
            raise InvalidData(f"The chat template does not render turn {turn} as prompt, answer and end mark.", param="base")
        parts += [(_ids(tokenizer, before[len(done) :]), False), (_ids(tokenizer, after[len(before) :]), True)]
        done = after
    return parts


def _render(tokenizer: Any, conversation: Conversation, *, add_generation_prompt: bool) -> str:
    if not tokenizer.chat_template:
        raise InvalidData("The model's tokenizer has no chat template: questions cannot be put to it.", param="base")
    return tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=add_generation_prompt)


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def _config(directory: Path) -> dict[str, Any]:
    try:
        return json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidData(f"{directory} is not a model directory: config.json cannot be read ({error}).", param="model") from None


def _stop_ids(model: Any, tokenizer: Any) -> list[int]:
    """Where an answer ends: what the generation config, the tokenizer and Llama 3's template say."""
    told = model.generation_config.eos_token_id
    ids = set(told if isinstance(told, list) else [told])
    ids |= {tokenizer.eos_token_id, tokenizer.get_vocab().get("<|eot_id|>")}
    return sorted(identifier for identifier in ids if identifier is not None)
