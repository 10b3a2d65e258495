"""Loading the models of a line, one at a time, and rendering conversations as they see them."""

from __future__ import annotations

import gc
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from parampara.datasets import chat
from parampara.datasets.chat import Conversation, token_ids
from parampara.errors import InvalidData
from parampara.weights.full import WEIGHTS, FullWeights, is_full
from parampara.weights.model_files import ModelFiles
from parampara.weights.tensor_files import TensorFile

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass
class Loaded:
    """A model in memory. ``model`` is a transformers or PEFT causal language model in evaluation mode; None once it was let go."""

    name: str
    model: Any
    tokenizer: Any

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def max_tokens(self) -> int:
        """Longest sequence that the model's positions allow."""
        return self.model.config.get_text_config().max_position_embeddings

    @property
    def pad_id(self) -> int:
        return self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.tokenizer.eos_token_id

    @property
    def stop_ids(self) -> list[int]:
        """Where an answer ends: what the generation config, the tokenizer and Llama 3's template say."""
        told = self.model.generation_config.eos_token_id
        ids = set(told if isinstance(told, list) else [told])
        ids |= {self.tokenizer.eos_token_id, self.tokenizer.get_vocab().get("<|eot_id|>")}
        return sorted(identifier for identifier in ids if identifier is not None)


def common_dtype(final: Path, *, gpu: bool) -> torch.dtype:
    """The type in which all unquantized models of a line run: that of the final merged model, float32 on a CPU.

    One type for all, or a base in bfloat16 and its copy in float16 would differ by rounding alone, as much as training may change.

    Raises:
        InvalidData: ``final`` is not a model directory.
    """
    config = _config(final)
    stored = config.get("dtype") or config.get("torch_dtype")
    return _DTYPES.get(stored or "", torch.float16) if gpu else torch.float32


@contextmanager
def loaded(name: str, directory: Path, adapter: Path | None = None, *, dtype: torch.dtype = torch.float32) -> Iterator[Loaded]:
    """Hold a model in memory for the length of the block, and not longer; with what was trained on it applied: an adapter, or all weights.

    An unquantized model runs in ``dtype``, a quantized one as it is stored.

    Raises:
        InvalidData: ``directory`` is not a model directory, or the whole weights are not those of such a model.
    """
    quantized = "quantization_config" in _config(directory)
    device: int | str = 0 if torch.cuda.is_available() else "cpu"
    held = Loaded(
        name=name,
        model=_open(directory, adapter, dtype="auto" if quantized else dtype, device=device),
        tokenizer=load_tokenizer(adapter if adapter is not None and (adapter / "tokenizer.json").is_file() else directory),
    )
    try:
        yield held
    finally:
        held.model = None  # whoever still holds ``held`` no longer holds the weights
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def require_whole(directory: Path) -> None:
    """Check the header of every weight file of a model or adapter directory against its size, and the index against the headers.

    Raises:
        InvalidData: a file is missing, cut off or no safetensors file, or a tensor of the index is not where it should be.
    """
    found: dict[str, set[str]] = {}
    for path in sorted(directory.glob("*.safetensors")):
        try:
            with TensorFile(path) as shard:
                found[path.name] = set(shard.tensors)
        except InvalidData as error:
            raise InvalidData(f"{directory}: {error.message}", param=path.name) from None
    if not found:
        raise InvalidData(f"{directory} holds no *.safetensors file.", param="model")
    for tensor, shard in _index(directory).items():
        if shard not in found:
            raise InvalidData(f"{directory}: shard {shard} is missing.", param=shard)
        if tensor not in found[shard]:
            raise InvalidData(f"{directory}: tensor {tensor} is not in {shard}, where the index says it is.", param=shard)


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
    return token_ids(tokenizer, chat.render(tokenizer, conversation, add_generation_prompt=True))


def segments(tokenizer: Any, conversation: Conversation) -> list[tuple[list[int], bool]]:
    """The whole conversation as ``(token ids, is an answer)`` in turn, as :func:`parampara.datasets.chat.segments` parts it.

    Raises:
        InvalidData: the tokenizer has no chat template, or one that does not render turn by turn.
    """
    return [(token_ids(tokenizer, text), answer) for text, answer in chat.segments(tokenizer, conversation)]


def _open(directory: Path, adapter: Path | None, *, dtype: torch.dtype | str, device: int | str) -> Any:
    if adapter is not None and is_full(adapter):
        with _model_of(directory, adapter) as whole:
            return _open(whole, None, dtype=dtype, device=device)
    opened: Any = AutoModelForCausalLM.from_pretrained(
        directory, dtype=dtype, device_map={"": device}, local_files_only=True, output_loading_info=True
    )
    model, told = opened
    if missing := sorted(told["missing_keys"]):  # the library would only warn, and draw random weights
        raise InvalidData(f"{directory}: {len(missing)} tensors are missing, the first of them {missing[0]}.", param="model")
    return (model if adapter is None else PeftModel.from_pretrained(model, str(adapter))).eval()


@contextmanager
def _model_of(base: Path, trained: Path) -> Iterator[Path]:
    """A model directory for the length of the block: links to the base's files and, as its weights, to those that were trained."""
    weights, files = FullWeights(trained, 0), ModelFiles(base)
    try:
        weights.check_against(files)
    finally:
        weights.close()
        files.close()
    with tempfile.TemporaryDirectory(prefix="full-weights-") as folder:
        for path in base.iterdir():
            if path.is_file() and ".safetensors" not in path.name:
                (Path(folder) / path.name).symlink_to(path.resolve())
        (Path(folder) / WEIGHTS).symlink_to((trained / WEIGHTS).resolve())
        yield Path(folder)


def _index(directory: Path) -> dict[str, str]:
    """Tensor to shard, as the index of a sharded checkpoint says; empty for one file."""
    path = directory / "model.safetensors.index.json"
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))["weight_map"]) if path.is_file() else {}
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidData(f"{path} cannot be read: {error}", param="model") from None


def _config(directory: Path) -> dict[str, Any]:
    try:
        return json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidData(f"{directory} is not a model directory: config.json cannot be read ({error}).", param="model") from None
