"""The parity ledger of a sound line, and each known failure put into the line on purpose (the table is in docs/evaluation.md)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from evaluator import parity
from evaluator.entries import write_ledger
from evaluator.evaluate import run
from evaluator.ledger import Ledger
from evaluator.line import members, read_material
from evaluator.meter import Meter
from evaluator.models import loaded
from parampara.errors import InvalidData
from parampara.manifest import weights_fingerprint
from parampara.progress import SilentProgress
from parampara.schemas.ledger import ParityLedger
from parampara.schemas.metrics import is_reported
from parampara.schemas.stages import EvaluateConfig, EvaluateParams
from tests.evaluator.lines import Line, merge, name_base
from tests.tiny_models import CHAT_TEMPLATE, make_model

METER = Meter(SilentProgress(), total=9999)


class Kept(parity.Recording):
    """A recording that outlives its ledger: each model is run once for all tests of this file."""

    def delete(self) -> None:
        pass


class Bench:
    def __init__(self, line: Line, scratch: Path) -> None:
        self.line, self._scratch = line, scratch
        self._kept: dict[tuple[Path, Path | None], parity.Recording] = {}

    def ledger(self, config: EvaluateConfig) -> ParityLedger:
        material, line = read_material(config), members(config)
        recordings = Ledger(line, METER)
        for member in line:
            key = (member.directory, member.adapter)
            if key not in self._kept:
                with loaded(f"{len(self._kept)}", *key) as model:
                    self._kept[key] = parity.record(model, material.probes, directory=self._scratch, max_new_tokens=4, meter=METER)
            recordings.add(Kept(**{**vars(self._kept[key]), "name": member.name}))
        return write_ledger(line, material, recordings, meter=METER)


@pytest.fixture(scope="module")
def bench(line: Line, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(line, tmp_path_factory.mktemp("probes"))


@pytest.fixture(scope="module")
def good(bench: Bench) -> ParityLedger:
    return bench.ledger(bench.line.config())


def test_a_sound_line_has_parity_at_every_transition(good: ParityLedger) -> None:
    for step, limit in zip(good.transitions, (1e-6, 1e-4, 1e-2), strict=True):
        assert step.kl is not None and step.kl < limit
        assert step.top1 is not None and step.top1 > 0.9
        assert step.perplexity_change is not None and abs(step.perplexity_change) < 0.01
        assert step.tokenizer == step.chat_template == step.generation_config == step.differs_from_base == 1.0
    dapt, merged, quantized = good.transitions
    assert (dapt.adapter_base, merged.adapter_base, quantized.adapter_base) == (1.0, 1.0, None)
    assert min(dapt.recovered or 0, merged.recovered or 0) > 0.999


def test_every_figure_is_a_metric_that_a_gate_may_name(good: ParityLedger) -> None:
    metrics = good.metrics()
    assert len(metrics) == 2 * 12 + 10
    assert all(is_reported(name) for name in metrics)


def test_models_are_named_by_their_bytes(line: Line, good: ParityLedger) -> None:
    models = {model.name: model for model in good.models}
    assert list(models) == ["base", "dapt_adapter", "dapt", "sft_adapter", "sft", "quantized"]
    assert models["sft"].weights_sha256 == weights_fingerprint(line.root / "merged")
    assert models["sft_adapter"].weights_sha256 == models["sft_adapter"].trained_on_sha256 == models["dapt"].weights_sha256
    assert models["sft_adapter"].adapter_sha256 == weights_fingerprint(line.root / "sft_adapter")
    assert len({model.chat_template_sha256 for model in good.models}) == 1


def test_the_probe_set_has_a_name_of_its_own(bench: Bench, good: ParityLedger) -> None:
    assert bench.ledger(bench.line.config(dapt_adapter=None, dapt_merged=None)).probes == good.probes
    fewer = EvaluateParams(max_new_tokens=6, max_questions=8, max_chunks=4, parity_prompts=2)
    assert write_probes(bench.line.config(params=fewer)).sha256 != good.probes.sha256


def write_probes(config: EvaluateConfig) -> Any:
    from evaluator.entries import _probes

    return _probes(read_material(config))


def test_the_schema_is_strict(good: ParityLedger) -> None:
    stored = json.loads(good.model_dump_json())
    assert ParityLedger.model_validate_json(json.dumps(stored)) == good
    stored["transitions"][0]["guess"] = 1.0
    with pytest.raises(ValidationError, match="guess"):
        ParityLedger.model_validate(stored)


# ------------------------------------------------------------------------------------------- failures that a figure tells


def skipped_dapt_merge(line: Line, scratch: Path) -> dict[str, Any]:
    return {"dapt_merged": line.root / "base", "quantized": None}


def skipped_sft_merge(line: Line, scratch: Path) -> dict[str, Any]:
    return {"merged": line.root / "dapt_merged", "quantized": None}


def merge_that_did_nothing(line: Line, scratch: Path) -> dict[str, Any]:
    return {"merged": line.root / "base", "quantized": None}


def wrong_scale(line: Line, scratch: Path) -> dict[str, Any]:
    merged = merge(line.root / "dapt_merged", line.root / "sft_adapter", scratch / "merged", dtype="float16", scale=0.5)
    return {"merged": merged, "quantized": None}


def transposed_delta(line: Line, scratch: Path) -> dict[str, Any]:
    merged = merge(line.root / "dapt_merged", line.root / "sft_adapter", scratch / "merged", dtype="float16", transposed=True)
    return {"merged": merged, "quantized": None}


def merged_into_the_wrong_base(line: Line, scratch: Path) -> dict[str, Any]:
    return {"merged": merge(line.root / "base", line.root / "sft_adapter", scratch / "merged", dtype="float16"), "quantized": None}


def adapter_of_another_base(line: Line, scratch: Path) -> dict[str, Any]:
    adapter = line.copy("sft_adapter", scratch / "adapter")
    name_base(adapter, line.root / "base")
    return {"sft_adapter": adapter, "quantized": None}


def skipped_dpo_merge(line: Line, scratch: Path) -> dict[str, Any]:
    return {"merged": line.root / "merged", "quantized": None}


def dpo_on_other_weights(line: Line, scratch: Path) -> dict[str, Any]:
    return {"sft_merged": line.root / "dapt_merged", "quantized": None}


def wrong_quantization_scale(line: Line, scratch: Path) -> dict[str, Any]:
    """The factors of the first layer's attention, taken for half of what they are."""
    from safetensors.torch import load_file, save_file

    quantized = line.copy("quantized", scratch / "quantized")
    tensors = load_file(quantized / "model.safetensors")
    for name in [name for name in tensors if name.endswith("SCB") and "layers.0.self_attn" in name]:
        tensors[name] = tensors[name] / 2
    save_file(tensors, quantized / "model.safetensors", metadata={"format": "pt"})
    return {"quantized": quantized}


def quantized_model_of_another_line(line: Line, scratch: Path) -> dict[str, Any]:
    stranger = line.copy("quantized", scratch / "stranger")
    other = make_model(scratch / "other", seed=9, hidden=48, dtype="float16")
    for name in ("model.safetensors", "config.json"):
        shutil.copyfile(other / name, stranger / name)
    return {"quantized": stranger}


def swapped_chat_template(line: Line, scratch: Path) -> dict[str, Any]:
    return _with_template(line, scratch, CHAT_TEMPLATE.replace("<|eot_id|>", "<|end_header_id|>"))


def template_that_drops_the_system_message(line: Line, scratch: Path) -> dict[str, Any]:
    """No probe has one; the fixed conversations do."""
    loop = "{%- for message in messages %}"
    return _with_template(line, scratch, CHAT_TEMPLATE.replace(loop, "{%- for message in messages if message['role'] != 'system' %}"))


def other_tokenizer(line: Line, scratch: Path) -> dict[str, Any]:
    from transformers import AutoTokenizer

    quantized = line.copy("quantized", scratch / "quantized")
    tokenizer = AutoTokenizer.from_pretrained(quantized)
    tokenizer.add_tokens(["dasha"])
    tokenizer.save_pretrained(quantized)
    return {"quantized": quantized}


def other_generation_config(line: Line, scratch: Path) -> dict[str, Any]:
    quantized = line.copy("quantized", scratch / "quantized")
    (quantized / "generation_config.json").write_text('{"eos_token_id": 7}')
    return {"quantized": quantized}


def _with_template(line: Line, scratch: Path, template: str) -> dict[str, Any]:
    assert template != CHAT_TEMPLATE
    swapped = line.copy("quantized", scratch / "swapped")
    (swapped / "chat_template.jinja").write_text(template)
    return {"quantized": swapped}


@pytest.mark.parametrize(
    ("failure", "metric", "bound"),
    [
        (skipped_dapt_merge, "parity.dapt.recovered", 0.01),
        (skipped_dapt_merge, "parity.dapt.differs_from_base", 0.0),
        (skipped_sft_merge, "parity.merged.recovered", 0.01),
        (merge_that_did_nothing, "parity.merged.differs_from_base", 0.0),
        (wrong_scale, "parity.merged.recovered", 0.95),
        (transposed_delta, "parity.merged.recovered", 0.95),
        (merged_into_the_wrong_base, "parity.merged.recovered", 0.9),
        (adapter_of_another_base, "parity.merged.adapter_base", 0.0),
        (wrong_quantization_scale, "parity.quantized.top1", 0.9),
        (quantized_model_of_another_line, "parity.quantized.top1", 0.5),
        (swapped_chat_template, "parity.quantized.chat_template", 0.0),
        (template_that_drops_the_system_message, "parity.quantized.chat_template", 0.9),
        (other_tokenizer, "parity.quantized.tokenizer", 0.0),
        (other_generation_config, "parity.quantized.generation_config", 0.0),
    ],
    ids=lambda value: value.__name__ if callable(value) else str(value),
)
def test_the_ledger_catches(
    bench: Bench, good: ParityLedger, tmp_path: Path, failure: Callable[[Line, Path], dict[str, Any]], metric: str, bound: float
) -> None:
    assert good.metrics()[metric] > bound
    assert bench.ledger(bench.line.config(**failure(bench.line, tmp_path))).metrics()[metric] <= bound


@pytest.mark.parametrize(
    ("failure", "metric", "bound"),
    [
        (skipped_dpo_merge, "parity.merged.recovered", 0.01),
        (dpo_on_other_weights, "parity.merged.adapter_base", 0.0),
        (dpo_on_other_weights, "parity.sft.recovered", 0.01),
    ],
    ids=lambda value: value.__name__ if callable(value) else str(value),
)
def test_the_ledger_of_a_line_with_dpo_catches(
    bench: Bench, dpo_line: Line, tmp_path: Path, failure: Callable[[Line, Path], dict[str, Any]], metric: str, bound: float
) -> None:
    assert bench.ledger(dpo_line.dpo_config(quantized=None)).metrics()[metric] > bound
    assert bench.ledger(dpo_line.dpo_config(**failure(dpo_line, tmp_path))).metrics()[metric] <= bound


def test_a_template_that_is_only_written_another_way_is_equal(bench: Bench, tmp_path: Path) -> None:
    changes = _with_template(bench.line, tmp_path, "{#- the same -#}" + CHAT_TEMPLATE.replace("message['role']", "message.role"))
    assert bench.ledger(bench.line.config(**changes)).metrics()["parity.quantized.chat_template"] == 1.0


# ------------------------------------------------------------------------- failures that end the evaluation before it measures


def truncated_shard(directory: Path) -> None:
    shard = directory / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])


def missing_shard(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def shard_without_a_tensor_of_the_index(directory: Path) -> None:
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.nowhere": "model.safetensors"}}))


def no_weights(directory: Path) -> None:
    (directory / "model.safetensors").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncated_shard, r"model\.safetensors: \d+ bytes where the header describes \d+; truncated"),
        (missing_shard, "shard model-00002-of-00002.safetensors is missing"),
        (shard_without_a_tensor_of_the_index, "tensor model.nowhere is not in model.safetensors"),
        (no_weights, r"holds no \*\.safetensors file"),
    ],
)
def test_damaged_weights_are_refused_before_any_model_is_loaded(
    line: Line, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(line.copy("quantized", tmp_path / "quantized"))
    with pytest.raises(InvalidData, match=message):
        run(line.config(quantized=tmp_path / "quantized"), workdir=tmp_path / "work", progress=SilentProgress())


def test_a_tensor_that_is_nowhere_is_not_drawn_at_random(line: Line, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    merged = line.copy("merged", tmp_path / "merged")
    tensors = load_file(merged / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, merged / "model.safetensors", metadata={"format": "pt"})
    with (
        pytest.raises(InvalidData, match=r"1 tensors are missing, the first of them model\.layers\.1\.mlp\.up_proj\.weight"),
        loaded("sft", merged),
    ):
        pass
