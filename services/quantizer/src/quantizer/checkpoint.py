"""Model directories as quantization reads and writes them: config, companions, stored types, and a check of the product."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parampara.errors import InvalidData, ParamparaError
from parampara.manifest import MANIFEST_NAME

if TYPE_CHECKING:
    import torch

    from parampara.weights.merged import MergedModel

_EIGHT_BITS = {"I8", "F8_E4M3", "F8_E5M2"}
_PACKED = ".weight_packed"
"""End of a name under which compressed-tensors stores four eight-bit weights in each int32."""
_OF_THE_PARENT = ("config.json", "merge.json", MANIFEST_NAME)
"""Files that describe the parent's own weights: the product has its own, or none."""
_WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json")
_PROBES, _PROBE_TOKENS = 4, 48


@dataclass(frozen=True)
class Agreement:
    """How a quantized model's next-token distributions compare with its parent's."""

    kl: float
    """Mean Kullback-Leibler divergence from the parent, nats per token."""
    top1: float
    """Share of positions where both name the same most likely token."""


def read_config(model: Path) -> dict[str, Any]:
    """``config.json`` of an unquantized model directory.

    Raises:
        InvalidData: not a model directory with safetensors weights, or already quantized.
    """
    try:
        config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidData(f"{model} is not a model directory: config.json cannot be read ({error}).", param="model") from None
    if not any(model.glob("*.safetensors")):
        raise InvalidData(f"{model} holds no *.safetensors file; merge or convert the model first.", param="model")
    if method := (config.get("quantization_config") or {}).get("quant_method"):
        raise InvalidData(f"{model} is already quantized ({method}); quantize the merged model instead.", param="model")
    return config


def stored_dtype(config: dict[str, Any]) -> str:
    """``float16``, ``bfloat16`` or ``float32``, as ``config.json`` says (older files call it ``torch_dtype``)."""
    return config.get("dtype") or config.get("torch_dtype") or "float16"


def weight_bytes(model: Path) -> int:
    return sum(path.stat().st_size for path in model.glob("*.safetensors"))


def copy_companions(model: Path, output: Path) -> None:
    """Give ``output`` the parent's tokenizer, chat template and generation config, byte for byte.

    A saving library may write its own versions of them; the parent's replace those, and what the parent lacks is removed.
    """
    for path in model.iterdir():
        if path.is_file() and path.name not in _OF_THE_PARENT and not path.name.endswith(_WEIGHTS):
            shutil.copyfile(path, output / path.name)
    if not (model / "generation_config.json").exists():
        (output / "generation_config.json").unlink(missing_ok=True)


def quantized_weights(output: Path) -> list[str]:
    """Names of the weight tensors that are stored in eight bits, packed ones among them."""
    from safetensors import safe_open

    names: list[str] = []
    for shard in sorted(output.glob("*.safetensors")):
        with safe_open(shard, framework="pt") as tensors:
            stored = list(tensors.keys())
            names += [name for name in stored if name.endswith(_PACKED)]
            plain = [name for name in stored if name.endswith(".weight")]
            names += [name for name in plain if tensors.get_slice(name).get_dtype() in _EIGHT_BITS]
    return names


def directory_of(model: Path | MergedModel) -> Path:
    """Where config and tokenizer lie; those of a base are its merged model's too."""
    return model if isinstance(model, Path) else model.base.directory


def open_model(model: Path | MergedModel) -> Any:
    """A model in evaluation mode. On a GPU it runs in its stored type, on CPU an unquantized one runs in float32.

    Adapters of a merged model are merged in memory, cast once to the type that it runs in.
    """
    import torch
    from transformers import AutoModelForCausalLM

    directory = directory_of(model)
    quantized = "quantization_config" in json.loads((directory / "config.json").read_text(encoding="utf-8"))
    device: int | str = 0 if torch.cuda.is_available() else "cpu"
    dtype = "auto" if quantized or device == 0 else torch.float32
    loaded = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, device_map={"": device}, local_files_only=True).eval()
    if not isinstance(model, Path):
        _merge_into(loaded, model)
    return loaded


def next_token_log_probs(model: Path) -> torch.Tensor:
    """:func:`probe_log_probs` of a saved model."""
    return probe_log_probs(open_model(model))


def probe_log_probs(loaded: Any) -> torch.Tensor:
    """Log-probabilities of a model on fixed probe tokens, float32 on CPU, shape (probes, tokens, vocabulary).

    The probes are drawn from a fixed seed over the whole vocabulary, so parent and child see the same ones.
    """
    import torch

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, loaded.config.get_text_config().vocab_size, (_PROBES, _PROBE_TOKENS), generator=generator)
    with torch.inference_mode():
        return torch.cat([loaded(row[None].to(loaded.device)).logits.float().log_softmax(-1).cpu() for row in ids])


@contextmanager
def faults_as(error: Callable[[str], ParamparaError]) -> Iterator[None]:
    """Turn what the libraries raise for a checkpoint that they cannot load into ``error``; out of memory stays what it is."""
    import torch
    from safetensors import SafetensorError

    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (ImportError, OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError, SafetensorError) as fault:
        raise error(f"{type(fault).__name__}: {str(fault)[:300]}") from fault


def agreement(parent: torch.Tensor, child: torch.Tensor) -> Agreement:
    """Compare two results of :func:`probe_log_probs`; NaN in the child gives a NaN ``kl``."""
    kl = (parent.exp() * (parent - child)).sum(-1).mean()
    top1 = (parent.argmax(-1) == child.argmax(-1)).float().mean()
    return Agreement(kl=float(kl), top1=float(top1))


def _merge_into(loaded: Any, model: MergedModel) -> None:
    from parampara.weights.full import FullWeights

    tensors = loaded.state_dict()
    whole = set().union(*(trained.targets for trained in model.adapters if isinstance(trained, FullWeights)))
    unread = whole - tensors.keys()  # whole weights hold what the library leaves unread, too: old tables of positions
    for name in model.changed - unread:
        info, start = model.tensors[name], 0
        target = tensors[name].view(info.rows, info.row_elements)
        for rows in model.rows(name):
            target[start : start + rows.shape[0]].copy_(rows)
            start += rows.shape[0]
