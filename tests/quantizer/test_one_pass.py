"""Adapters merged on the way into eight bits: the same numbers as merging first without rounding, and the same refusals."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from merger import merge
from parampara.errors import Diverged, InvalidData, Preempted
from parampara.execution import stop
from parampara.manifest import sha256_file, weights_fingerprint
from parampara.progress import SilentProgress
from parampara.schemas.stages import (
    Dtype,
    MergeConfig,
    MergeParams,
    QaData,
    QuantizeConfig,
    QuantizeParams,
    QuantizeResult,
    StreamedScheme,
)
from parampara.weights.merged import MergedModel
from parampara.weights.tensor_files import ShardWriter
from quantizer import quantize
from quantizer.backends.compressed import write
from quantizer.gate import measure, read_held_out
from tests.quantizer.trained import make_trained
from tests.tiny_models import make_adapter, make_full, make_model, record_training

SCHEMES: tuple[StreamedScheme, ...] = get_args(StreamedScheme)
PROJECTIONS = 14
SCALE = 2.0
"""lora_alpha / r of a tiny adapter."""


def stacked(base: Path, directory: Path, count: int = 2, **lora: Any) -> list[Path]:
    """Adapters as the trainer leaves them, each trained on what those before it made of ``base``."""
    made: list[Path] = []
    for position in range(count):
        adapter = make_adapter(base, directory / f"adapter{position}", seed=position + 1, **lora)
        made.append(record_training(adapter, base, before=made, first=base))
    return made


def merge_first(base: Path, adapters: list[Path], workdir: Path, dtype: Dtype) -> Path:
    config = MergeConfig(model=base, adapters=adapters, params=MergeParams(dtype=dtype))
    return merge.run(config, workdir=workdir, progress=SilentProgress()).output


def run(base: Path, adapters: list[Path], workdir: Path, scheme: StreamedScheme = "w8a8", **settings: Any) -> QuantizeResult:
    config = QuantizeConfig(model=base, adapters=adapters, params=QuantizeParams(schemes=[scheme]), **settings)
    return quantize.run(config, workdir=workdir, progress=SilentProgress())


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in sorted(directory.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert (tensor.dtype, tensor.shape) == (theirs[name].dtype, theirs[name].shape), name
        assert torch.equal(tensor.view(torch.uint8), theirs[name].view(torch.uint8)), name


def write_merged(base: Path, adapters: list[Path], output: Path, scheme: StreamedScheme = "w8a8") -> dict[str, torch.Tensor]:
    with MergedModel(base, adapters) as model:
        write(model, output, scheme=scheme, progress=SilentProgress())
    return tensors_of(output)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("base") / "model", max_shard_size="200KB")


@pytest.fixture(scope="module")
def bfloat16_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("bfloat16") / "model", dtype="bfloat16")


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return stacked(base, tmp_path_factory.mktemp("adapters"))


@pytest.mark.timeout(300)
@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    scheme=st.sampled_from(SCHEMES),
    count=st.integers(1, 2),
    lora=st.fixed_dictionaries(
        {
            "r": st.integers(1, 6),
            "use_rslora": st.booleans(),
            "use_dora": st.booleans(),
            "target_modules": st.sampled_from([["q_proj"], ["up_proj", "down_proj"], ["v_proj", "gate_proj", "lm_head"]]),
            "modules_to_save": st.sampled_from([None, ["embed_tokens"]]),
        }
    ),
)
def test_on_a_float32_base_it_is_merging_and_then_quantizing_bit_for_bit(
    base: Path, scheme: StreamedScheme, count: int, lora: dict[str, Any]
) -> None:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        stack = stacked(base, directory, count, **lora)
        write(merge_first(base, stack, directory, "float32"), directory / "two", scheme=scheme, progress=SilentProgress())
        assert_same(write_merged(base, stack, directory / "one", scheme), tensors_of(directory / "two"))
        one, two = (json.loads((directory / steps / "config.json").read_text()) for steps in ("one", "two"))
        assert one["quantization_config"] == two["quantization_config"]


def test_on_a_bfloat16_base_no_code_is_far_from_the_two_steps_and_the_error_is_smaller(bfloat16_base: Path, tmp_path: Path) -> None:
    """Merging first rounds to bfloat16 in between, which moves a code by less than one step unless it moves the scale too."""
    stack = stacked(bfloat16_base, tmp_path)
    write(merge_first(bfloat16_base, stack, tmp_path, "bfloat16"), tmp_path / "two", scheme="w8a8", progress=SilentProgress())
    one, two = write_merged(bfloat16_base, stack, tmp_path / "one"), tensors_of(tmp_path / "two")
    before, factors = tensors_of(bfloat16_base), [load_file(adapter / "adapter_model.safetensors") for adapter in stack]
    errors, differ = {"one": 0.0, "two": 0.0}, 0
    for name in (name for name in before if name.endswith("_proj.weight")):
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        deltas = [SCALE * (held[f"{stem}.lora_B.weight"].double() @ held[f"{stem}.lora_A.weight"].double()) for held in factors]
        exact = before[name].double() + sum(deltas)
        scale = f"{name}_scale"
        assert one[scale].dtype == two[scale].dtype == torch.bfloat16
        apart = (one[name].int() - two[name].int()).abs()
        same_scale = (one[scale] == two[scale]).expand_as(apart)
        assert same_scale.float().mean() > 0.5
        assert apart[same_scale].max() <= 1
        assert apart.max() <= 2
        differ += int(apart.count_nonzero())
        for steps, held in (("one", one), ("two", two)):
            errors[steps] += float((held[name].double() * held[scale].double() - exact).square().sum())
    assert differ > 0  # so the rounding in between is there to be saved
    assert errors["one"] < errors["two"]
    untouched = [name for name in before if not name.endswith("_proj.weight")]
    assert_same({name: one[name] for name in untouched}, {name: before[name] for name in untouched})


def test_layers_that_no_adapter_changes_are_those_of_the_base_alone(bfloat16_base: Path, tmp_path: Path) -> None:
    one = write_merged(bfloat16_base, stacked(bfloat16_base, tmp_path, 1, target_modules=["q_proj"]), tmp_path / "one")
    write(bfloat16_base, tmp_path / "alone", scheme="w8a8", progress=SilentProgress())
    alone = tensors_of(tmp_path / "alone")
    untouched = [name for name in one if "q_proj" not in name]
    assert_same({name: one[name] for name in untouched}, {name: alone[name] for name in untouched})
    assert not any(torch.equal(one[name], alone[name]) for name in one if name.endswith("q_proj.weight"))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_stage_measures_it_against_the_merged_model_and_records_what_was_merged(
    base: Path, adapters: list[Path], tmp_path: Path, scheme: StreamedScheme
) -> None:
    result = run(base, adapters, tmp_path / "one", scheme)
    merged = merge_first(base, adapters, tmp_path, "float32")
    two = quantize.run(
        QuantizeConfig(model=merged, params=QuantizeParams(schemes=[scheme])), workdir=tmp_path / "two", progress=SilentProgress()
    )
    assert [attempt.model_copy(update={"seconds": 0}) for attempt in result.attempts] == [
        attempt.model_copy(update={"seconds": 0}) for attempt in two.attempts
    ]
    assert result.merge is not None and two.merge is None
    assert result.merge.base_sha256 == weights_fingerprint(base)
    assert result.merge.adapters == [sha256_file(adapter / "adapter_model.safetensors") for adapter in adapters]
    assert (result.merge.merged_tensors, result.quantized_modules) == (PROJECTIONS, PROJECTIONS)
    assert result.merge.max_abs_delta > 0
    assert json.loads((result.output / "quantize.json").read_text())["merge"] == result.merge.model_dump()
    assert {path.name for path in (tmp_path / "one").iterdir()} == {"output"}


@pytest.mark.parametrize("tied", [False, True])
def test_whole_weights_below_an_adapter_are_quantized_and_measured_on_the_way(tmp_path: Path, tied: bool) -> None:
    """Full fine-tuning, then LoRA; the base also holds a table that transformers does not read."""
    base = make_model(tmp_path / "base", tied=tied)
    spoilt = {**load_file(base / "model.safetensors"), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    save_file(spoilt, base / "model.safetensors", metadata={"format": "pt"})
    whole = record_training(make_full(base, tmp_path / "full"), base)
    between = merge_first(base, [whole], tmp_path / "between", "float32")
    adapter = record_training(make_adapter(between, tmp_path / "lora"), between, before=[whole], first=base)
    result = run(base, [whole, adapter], tmp_path / "one")
    merged = merge_first(base, [whole, adapter], tmp_path, "float32")
    write(merged, tmp_path / "two", scheme="w8a8", progress=SilentProgress())
    assert_same(tensors_of(result.output), tensors_of(tmp_path / "two"))
    assert result.merge is not None
    assert result.merge.adapters == [sha256_file(whole / "model.safetensors"), sha256_file(adapter / "adapter_model.safetensors")]
    with MergedModel(base, [whole, adapter]) as model:
        assert torch.equal(measure(model).probes, measure(merged).probes)


def test_held_out_data_is_measured_on_the_merged_model(tmp_path: Path) -> None:
    config = make_trained(tmp_path)
    stack = stacked(config.model, tmp_path, 1, target_modules=["q_proj", "lm_head"], modules_to_save=["embed_tokens"])
    held_out = read_held_out(config)
    with MergedModel(config.model, stack) as model:
        here = measure(model, held_out)
    there = measure(merge_first(config.model, stack, tmp_path, "float32"), held_out)
    assert torch.equal(here.probes, there.probes)
    assert (here.text, here.answer) == (there.text, there.answer)
    assert not torch.equal(here.probes, measure(config.model).probes)


def test_without_measuring_nothing_is_loaded_and_the_record_says_so(
    base: Path, adapters: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantize, "measure", None)
    result = run(base, adapters, tmp_path, measure=False)
    (attempt,) = result.attempts
    assert attempt.ok and "neither loaded nor measured" in attempt.reason
    assert (attempt.kl, attempt.top1, attempt.perplexity_increase) == (None, None, None)
    assert attempt.bytes == result.bytes


def test_a_float16_base_refuses_what_it_can_not_hold_once_merged(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base", dtype="float16")
    (adapter,) = stacked(base, tmp_path, 1)
    spoil(adapter / "adapter_model.safetensors", "up_proj.lora_B", 1e7)
    with pytest.raises(Diverged, match=r"up_proj\.weight holds .*, which float16 can not hold"):
        run(base, [adapter], tmp_path / "work")
    assert not list((tmp_path / "work").iterdir())


def spoil(file: Path, name: str, value: float) -> None:
    tensors = load_file(file)
    tensors[next(key for key in tensors if name in key)][1, 1] = value
    save_file(tensors, file, metadata={"format": "pt"})


def the_wrong_base(base: Path, stack: list[Path]) -> list[Path]:
    spoil(next(iter(sorted(base.glob("*.safetensors")))), "weight", 0.5)
    return stack


def another_order(base: Path, stack: list[Path]) -> list[Path]:
    return stack[::-1]


def an_unsupported_setting(base: Path, stack: list[Path]) -> list[Path]:
    file = stack[0] / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "layer_replication": [[0, 2], [1, 2]]}))
    return stack


def no_record_of_the_training(base: Path, stack: list[Path]) -> list[Path]:
    (stack[1] / "training.json").unlink()
    return stack


def a_missing_shard(base: Path, stack: list[Path]) -> list[Path]:
    sorted(base.glob("*.safetensors"))[1].unlink()
    return stack


def an_untrained_adapter(base: Path, stack: list[Path]) -> list[Path]:
    file = stack[0] / "adapter_model.safetensors"
    save_file({name: tensor * ("lora_A" in name) for name, tensor in load_file(file).items()}, file)
    return stack[:1]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (the_wrong_base, "was trained on weights"),
        (another_order, "was trained on"),
        (an_unsupported_setting, "layer_replication"),
        (no_record_of_the_training, r"adapters\[1\]: training.json can not be read"),
        (a_missing_shard, "the shard is missing"),
        (an_untrained_adapter, "change nothing"),
    ],
)
def test_what_does_not_belong_together_is_refused_by_name_and_leaves_nothing(
    base: Path, adapters: list[Path], tmp_path: Path, change: Callable[[Path, list[Path]], list[Path]], told: str
) -> None:
    model = shutil.copytree(base, tmp_path / "model")
    stack = [Path(shutil.copytree(adapter, tmp_path / adapter.name)) for adapter in adapters]
    (tmp_path / "work").mkdir()
    with pytest.raises(InvalidData, match=told):
        run(model, change(model, stack), tmp_path / "work")
    assert not list((tmp_path / "work").iterdir())


@pytest.mark.parametrize("where", ["base", "adapter"])
def test_a_weight_that_is_no_number_is_named_and_leaves_nothing(tmp_path: Path, where: str) -> None:
    base = make_model(tmp_path / "base", dtype="bfloat16")
    adapter = make_adapter(base, tmp_path / "adapter")
    spoil(base / "model.safetensors" if where == "base" else adapter / "adapter_model.safetensors", "layers.1.mlp.up_proj", float("nan"))
    with pytest.raises(Diverged, match=r"layers\.1\.mlp\.up_proj\.weight holds nan"):
        run(base, [record_training(adapter, base)], tmp_path / "work")
    assert not list((tmp_path / "work").iterdir())


def test_a_full_disk_leaves_nothing(base: Path, adapters: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: ShardWriter, rows: torch.Tensor) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ShardWriter, "write", full)
    with pytest.raises(OSError, match="No space left"):
        run(base, adapters, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_wish_to_stop_is_heard_while_merging(base: Path, adapters: list[Path], tmp_path: Path) -> None:
    class Stopping(SilentProgress):
        def step(self, step: int, total: int, **metrics: float) -> None:
            stop.request()

    config = QuantizeConfig(model=base, adapters=adapters, params=QuantizeParams(schemes=["w8a8"]))
    try:
        with pytest.raises(Preempted):
            quantize.run(config, workdir=tmp_path, progress=Stopping())
    finally:
        stop.clear()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"adapters": [Path("/a")]}, "adapters are merged on the way only with w8a8, w8a16, fp8: params.schemes holds unsloth"),
        ({"measure": False, "params": QuantizeParams(schemes=["w8a8", "gptq"])}, "params.schemes holds gptq"),
        (
            {"measure": False, "qa": QaData(train=[Path("/q")]), "params": QuantizeParams(schemes=["w8a8"])},
            "text and qa are what is measured on, and measure is false",
        ),
    ],
)
def test_configurations_that_can_not_be_are_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        QuantizeConfig(model=Path("/m"), **settings)


def test_the_command_line_merges_on_the_way(base: Path, adapters: list[Path], tmp_path: Path) -> None:
    config = {"model": str(base), "adapters": [str(adapter) for adapter in adapters], "params": {"schemes": ["w8a8"]}, "measure": False}
    (tmp_path / "quantize.json").write_text(json.dumps(config))
    command = [sys.executable, "-m", "quantizer", "quantize", "--config", str(tmp_path / "quantize.json"), "--workdir", str(tmp_path / "w")]
    subprocess.run(command, check=True, capture_output=True)
    result = QuantizeResult.model_validate_json((tmp_path / "w" / "result.json").read_text())
    assert result.merge is not None and len(result.merge.adapters) == 2
    assert_same(tensors_of(result.output), write_merged(base, adapters, tmp_path / "here"))
