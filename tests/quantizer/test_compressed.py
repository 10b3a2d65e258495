"""The streaming writer on tiny models: what it writes, what it refuses, that it can be stopped, and that its memory does not grow."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file, save_file

from parampara.errors import Diverged, InvalidData, Preempted
from parampara.execution import stop
from parampara.progress import SilentProgress
from parampara.schemas.stages import QuantizeConfig, QuantizeParams, QuantizeResult
from parampara.weights.merged import MergedModel
from parampara.weights.tensor_files import Planned, ShardWriter
from quantizer.backends import SchemeUnavailable
from quantizer.backends.compressed import CHUNK_ELEMENTS, StreamedScheme, linear_layers, write
from quantizer.quantize import run
from tests.compressed import SCHEME
from tests.quantizer.llmcompressor import PYTHON, needs_llmcompressor
from tests.tiny_models import make_model, record_training

SCHEMES: tuple[StreamedScheme, ...] = get_args(StreamedScheme)
PROJECTIONS = 14
SUFFIX = {"w8a8": "weight", "w8a16": "weight_packed", "fp8": "weight"}
STORED = {"w8a8": torch.int8, "w8a16": torch.int32, "fp8": torch.float8_e4m3fn}


class Steps(SilentProgress):
    def __init__(self, stop_at: int | None = None) -> None:
        self.seen: list[tuple[int, int]] = []
        self._stop_at = stop_at

    def step(self, step: int, total: int, **metrics: float) -> None:
        self.seen.append((step, total))
        if len(self.seen) == self._stop_at:
            stop.request()


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("parent"), dtype="bfloat16", max_shard_size="200KB")


@pytest.fixture
def no_wish_to_stop() -> Iterator[None]:
    yield
    stop.clear()


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in sorted(directory.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def quantize(model: Path, workdir: Path, scheme: StreamedScheme = "w8a8") -> QuantizeResult:
    return run(QuantizeConfig(model=model, params=QuantizeParams(schemes=[scheme])), workdir=workdir, progress=SilentProgress())


def changed(model: Path, target: Path, name: str, change: Any) -> Path:
    """A copy of a model of one file with one tensor changed in place, or removed where ``change`` gives None."""
    shutil.copytree(model, target)
    tensors = load_file(target / "model.safetensors")
    tensor = change(tensors.pop(name))
    save_file(tensors if tensor is None else {**tensors, name: tensor}, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_stage_writes_each_scheme_and_it_answers_like_its_parent(parent: Path, tmp_path: Path, scheme: StreamedScheme) -> None:
    result = quantize(parent, tmp_path, scheme)
    assert result.scheme == scheme
    assert result.quantized_modules == PROJECTIONS
    before, after = tensors_of(parent), tensors_of(result.output)
    rounded = [name for name in before if name.endswith("_proj.weight")]
    assert len(rounded) == PROJECTIONS
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items() if name not in rounded)
    for name in rounded:
        module = name.removesuffix("weight")
        assert after[module + SUFFIX[scheme]].dtype == STORED[scheme]
        assert (after[f"{name}_scale"].dtype, after[f"{name}_scale"].shape) == (torch.bfloat16, (before[name].shape[0], 1))
    assert {path.name for path in result.output.iterdir()} >= {"tokenizer.json", "chat_template.jinja", "generation_config.json"}


def test_the_config_is_the_one_that_llm_compressor_writes_for_w8a8(parent: Path, tmp_path: Path) -> None:
    write(parent, tmp_path / "out", scheme="w8a8", progress=SilentProgress())
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    config = written.pop("quantization_config")
    assert written == json.loads((parent / "config.json").read_text())
    group, expected = config["config_groups"]["group_0"], SCHEME["config_groups"]["group_0"]
    for key in ("weights", "input_activations"):
        assert expected[key].items() <= group[key].items()
    assert (group["targets"], group["format"]) == (expected["targets"], expected["format"])
    assert {key: config[key] for key in ("quant_method", "format", "quantization_status", "ignore")} == {
        key: SCHEME[key] for key in ("quant_method", "format", "quantization_status", "ignore")
    }


def test_the_output_is_sharded_with_an_index_and_a_scale_lies_beside_its_weight(parent: Path, tmp_path: Path) -> None:
    write(parent, tmp_path / "one", scheme="w8a8", progress=SilentProgress())
    write(parent, tmp_path / "many", scheme="w8a8", progress=SilentProgress(), max_shard_bytes=100_000)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert set(index["weight_map"].values()) == set(files)
    assert all(
        index["weight_map"][name] == file for name, file in index["weight_map"].items() if name in load_file(tmp_path / "many" / file)
    )
    assert all(
        index["weight_map"][f"{name}_scale"] == index["weight_map"][name] for name in index["weight_map"] if name.endswith("_proj.weight")
    )
    one, many = tensors_of(tmp_path / "one"), tensors_of(tmp_path / "many")
    assert one.keys() == many.keys() == index["weight_map"].keys()
    assert all(torch.equal(one[name].view(torch.uint8), many[name].view(torch.uint8)) for name in one)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in many.values())


def test_progress_is_told_per_tensor(parent: Path, tmp_path: Path) -> None:
    steps = Steps()
    write(parent, tmp_path / "out", scheme="w8a8", progress=steps)
    total = len(tensors_of(parent))
    assert steps.seen == [(step, total) for step in range(1, total + 1)]


@pytest.mark.usefixtures("no_wish_to_stop")
def test_a_wish_to_stop_is_heard_between_tensors_and_nothing_is_left(parent: Path, tmp_path: Path) -> None:
    config = QuantizeConfig(model=parent, params=QuantizeParams(schemes=["w8a8"]))
    steps = Steps(stop_at=3)
    with pytest.raises(Preempted):
        run(config, workdir=tmp_path, progress=steps)
    assert len(steps.seen) == 3
    assert not list(tmp_path.iterdir())


def test_a_tied_head_and_the_embedding_stay_whole(tmp_path: Path) -> None:
    model = make_model(tmp_path / "tied", tied=True, dtype="float16")
    assert linear_layers(model).heads == ["lm_head"]
    result = quantize(model, tmp_path / "work")
    assert result.quantized_modules == PROJECTIONS
    assert "lm_head.weight" not in tensors_of(result.output)
    assert json.loads((result.output / "config.json").read_text())["quantization_config"]["ignore"] == ["lm_head"]


def test_one_row_one_head_and_odd_widths(tmp_path: Path) -> None:
    model = make_model(tmp_path / "odd", num_attention_heads=1, num_key_value_heads=1, head_dim=2, intermediate_size=1, dtype="float32")
    for scheme in SCHEMES:
        write(model, tmp_path / scheme, scheme=scheme, progress=SilentProgress())
        after = tensors_of(tmp_path / scheme)
        assert after["model.layers.0.mlp.up_proj.weight_scale"].shape == (1, 1)
        assert after[f"model.layers.0.mlp.down_proj.{SUFFIX[scheme]}"].shape == (64, 1)


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight", "model.norm.weight"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_no_number_ends_the_stage_by_name_and_leaves_nothing(tmp_path: Path, name: str, bad: float) -> None:
    def spoil(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[-1] = bad
        return tensor

    model = changed(make_model(tmp_path / "whole", dtype="bfloat16"), tmp_path / "model", name, spoil)
    with pytest.raises(Diverged, match=rf"{name}.*row \d+ holds (nan|inf)"):
        quantize(model, tmp_path / "work")
    assert not list((tmp_path / "work").iterdir())


def test_a_missing_shard_is_named(parent: Path, tmp_path: Path) -> None:
    model = shutil.copytree(parent, tmp_path / "model")
    missing = sorted(model.glob("*.safetensors"))[1]
    missing.unlink()
    with pytest.raises(InvalidData, match=f"{missing.name}, but the shard is missing"):
        quantize(model, tmp_path / "work")


def test_a_truncated_shard_is_named(parent: Path, tmp_path: Path) -> None:
    model = shutil.copytree(parent, tmp_path / "model")
    shard = sorted(model.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-7])
    with pytest.raises(InvalidData, match=rf"{shard.name}: \d+ bytes where the header describes"):
        quantize(model, tmp_path / "work")


def test_a_weight_of_another_shape_than_the_config_says_is_refused(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    model = changed(make_model(tmp_path / "whole"), tmp_path / "model", name, lambda tensor: tensor[:-1].contiguous())
    with pytest.raises(InvalidData, match=r"up_proj.weight has shape \(127, 64\); config.json describes \(128, 64\)"):
        write(model, tmp_path / "out", scheme="fp8", progress=SilentProgress())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("change", [lambda tensor: None, lambda tensor: tensor.double()])
def test_layers_that_are_not_where_they_should_be_make_the_scheme_unavailable(tmp_path: Path, change: Any) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    model = changed(make_model(tmp_path / "whole"), tmp_path / "model", name, change)
    with pytest.raises(SchemeUnavailable, match=name):
        write(model, tmp_path / "out", scheme="w8a8", progress=SilentProgress())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_written_checkpoint_is_not_quantized_again(parent: Path, tmp_path: Path, scheme: StreamedScheme) -> None:
    write(parent, tmp_path / "once", scheme=scheme, progress=SilentProgress())
    with pytest.raises(InvalidData, match=r"already quantized \(compressed-tensors\)"):
        write(tmp_path / "once", tmp_path / "twice", scheme=scheme, progress=SilentProgress())


@pytest.mark.parametrize("adapters", [0, 2])
def test_memory_does_not_grow_with_the_model(tmp_path: Path, adapters: int) -> None:
    """The peak above the start is some chunks: 88 MB of weights in tensors of 16 MB pass through 25 MB, merged on the way or not."""
    model = make_model(tmp_path / "model", hidden=64, layers=1, dtype="bfloat16")
    config = json.loads((model / "config.json").read_text())
    config |= {"hidden_size": 1024, "intermediate_size": 8192, "vocab_size": 8192, "head_dim": 64, "num_attention_heads": 16}
    (model / "config.json").write_text(json.dumps(config))
    layers = linear_layers(model).shapes
    norms = ["model.norm", "model.layers.0.input_layernorm", "model.layers.0.post_attention_layernorm"]
    shapes: dict[str, tuple[int, ...]] = {
        "lm_head": (8192, 1024),
        "model.embed_tokens": (8192, 1024),
        **layers,
        **dict.fromkeys(norms, (1024,)),
    }
    planned = [Planned(f"{name}.weight", torch.bfloat16, shape) for name, shape in shapes.items()]
    with ShardWriter(model / "model.safetensors", planned) as writer:
        for tensor in planned:
            rows = torch.randn(64, *tensor.shape[1:]).bfloat16()
            for _ in range(tensor.shape[0] // 64):
                writer.write(rows)
    stack = [random_adapter(layers, tmp_path / f"adapter{position}") for position in range(adapters)]
    for position, adapter in enumerate(stack):
        record_training(adapter, model, before=stack[:position], first=model)
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak to what is resident now
    before = resident("VmRSS")
    with MergedModel(model, stack) as source:
        write(source, tmp_path / "out", scheme="w8a8", progress=SilentProgress())
    assert (model / "model.safetensors").stat().st_size > 80e6
    assert resident("VmHWM") - before < 12 * 4 * CHUNK_ELEMENTS


def random_adapter(layers: dict[str, tuple[int, int]], directory: Path) -> Path:
    directory.mkdir()
    factors = {}
    for name, (rows, columns) in layers.items():
        factors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(2, columns)
        factors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(rows, 2)
    save_file(factors, directory / "adapter_model.safetensors")
    (directory / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 0.001}')
    return directory


def resident(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key))


LLM_COMPRESSOR = """
import sys
from llmcompressor import model_free_ptq
model_free_ptq(sys.argv[1], sys.argv[2], scheme=sys.argv[3], ignore=["re:.*lm_head$", "re:.*embed_tokens$"], max_workers=1, device="cpu")
"""


@needs_llmcompressor
@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(("scheme", "preset"), [("w8a8", "W8A8"), ("fp8", "FP8_DYNAMIC")])
def test_in_its_rounding_the_weights_are_llm_compressor_s_bit_for_bit(
    tmp_path: Path, scheme: StreamedScheme, preset: str, dtype: str
) -> None:
    model = make_model(tmp_path / "model", dtype=dtype)
    peer, environment = tmp_path / "peer", {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    command = [str(PYTHON), "-I", "-c", LLM_COMPRESSOR, str(model), str(peer), preset]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
    write(model, tmp_path / "ours", scheme=scheme, progress=SilentProgress(), rounding="llm-compressor")
    ours, theirs = tensors_of(tmp_path / "ours"), tensors_of(peer)
    assert ours.keys() == theirs.keys()
    assert len([name for name in ours if name.endswith("_scale")]) == PROJECTIONS
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype, name
        assert torch.equal(ours[name].view(torch.uint8), theirs[name].view(torch.uint8)), name
