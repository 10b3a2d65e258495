"""What a training stage leaves behind: a PEFT adapter, or all weights of the model, that says which weights it belongs to."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from parampara.errors import InvalidData
from parampara.schemas.stages import DaptConfig, DpoConfig, LoraParams, SftConfig, TrainResult
from parampara.storage import fsync_directory, fsync_tree
from trainer import full
from trainer.divergence import require_finite
from trainer.loop import trainable_tensors
from trainer.methods import adapter_arguments
from trainer.rows import StageData
from trainer.tensor_files import save_tensors

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)

_STAGE = ".output-"


class Lineage(BaseModel):
    """Where the weights that an adapter was trained on came from: a base, and the adapters merged into it in order."""

    model_config = ConfigDict(extra="ignore")

    base_sha256: str
    """:func:`parampara.manifest.weights_fingerprint` of the first model of the line."""
    adapters: list[str] = []
    """sha256 of each merged adapter's ``adapter_model.safetensors``, or of the ``model.safetensors`` of full weights."""


def read_lineage(model: Path, base_sha256: str) -> Lineage:
    """The line that ends in ``model``: its ``merge.json`` where it is a merged model, else itself.

    Raises:
        InvalidData: ``merge.json`` describes other weights than the ones beside it.
    """
    path = model / "merge.json"
    if not path.exists():
        return Lineage(base_sha256=base_sha256)
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["weights_sha256"] != base_sha256:
            raise InvalidData(f"{path} describes other weights than the ones beside it; merge again.", param="model")
        return Lineage.model_validate(record)
    except (ValueError, KeyError, TypeError, ValidationError) as error:
        if isinstance(error, InvalidData):
            raise
        raise InvalidData(f"{path} is not a merge record ({error}).", param="model") from None


def write_output(
    result: TrainResult, *, config: DaptConfig | SftConfig | DpoConfig, model: Any, lineage: Lineage, data: StageData, metrics: Path
) -> None:
    """Write ``result.output`` aside, fsync and rename: it is there whole or not at all.

    Raises:
        Diverged: what was trained holds values that are not finite.
    """
    final = result.output
    for leftover in final.parent.glob(f"{_STAGE}*"):  # of an attempt that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    stage = final.parent / f"{_STAGE}{uuid.uuid4().hex}"
    stage.mkdir(parents=True)
    try:
        if config.params.lora is None:
            stored = full.stored_as(model, config.model)
            full.write(stage, stored=stored, trained=trainable_tensors(model), base=config.model, base_sha256=result.base_sha256)
        else:
            _write_adapter(stage, model=model, lora=config.params.lora, base_sha256=result.base_sha256)
        for name in TOKENIZER_FILES:
            if (config.model / name).is_file():  # byte for byte: what is served must be what was trained with
                shutil.copyfile(config.model / name, stage / name)
        shutil.copyfile(metrics, stage / "metrics.jsonl")
        record = {
            "kind": config.kind,
            **result.model_dump(mode="json", exclude={"output"}),
            "lineage": lineage.model_dump(),
            "params": config.params.model_dump(mode="json"),
            "seed": config.seed,
            "data": {**data.facts, "sha256": data.sha256},
        }
        (stage / "training.json").write_text(json.dumps(record, indent=2), encoding="utf-8")
        fsync_tree(stage)
        shutil.rmtree(final, ignore_errors=True)
        os.rename(stage, final)
        fsync_directory(final.parent)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _write_adapter(directory: Path, *, model: Any, lora: LoraParams, base_sha256: str) -> None:
    """``adapter_model.safetensors`` and ``adapter_config.json`` in PEFT's format, equal for both backends."""
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    tensors = {name: state[name].detach().to("cpu").contiguous().clone() for name in sorted(state)}
    require_finite(tensors)
    save_tensors(tensors, directory / "adapter_model.safetensors")
    described = LoraConfig(**adapter_arguments(lora), task_type="CAUSAL_LM", inference_mode=True).to_dict()
    # not a path of this machine: the weights themselves are the name of the base
    described["base_model_name_or_path"] = f"sha256:{base_sha256}"
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in described.items()}
    (directory / "adapter_config.json").write_text(json.dumps(plain, indent=2, sort_keys=True, default=str), encoding="utf-8")
