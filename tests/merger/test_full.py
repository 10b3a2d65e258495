"""Weights that were trained as a whole, merged: alone, before and after adapters, against transformers and PEFT; and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from parampara.errors import Diverged, InvalidData
from parampara.manifest import sha256_file, weights_fingerprint
from parampara.weights import full
from tests.merger.test_merge import MEASURED, run, weights
from tests.tiny_models import make_adapter, make_full, make_model, record_training


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("base") / "model", dtype="float16")


@pytest.fixture(scope="module")
def whole(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return record_training(make_full(base, tmp_path_factory.mktemp("full") / "one"), base)


def model_of(base: Path, *trained: Path) -> dict[str, torch.Tensor]:
    """State of the model that transformers and PEFT make of it, in float32: whole weights are loaded, adapters are merged."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(str(base), dtype=torch.float32)
    for directory in trained:
        if (directory / "adapter_config.json").exists():
            model = PeftModel.from_pretrained(model, str(directory)).merge_and_unload()
        else:
            told = model.load_state_dict(load_file(str(directory / "model.safetensors")), strict=False)
            assert told.unexpected_keys == []
    return dict(model.state_dict())


def assert_state(output: Path, expected: dict[str, torch.Tensor], *, exact: bool = False) -> None:
    got = weights(output)
    assert set(expected) - set(got) <= {"lm_head.weight"}  # a tied head is stored once
    for name, tensor in got.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0 if exact else 1e-5, atol=0 if exact else 1e-6)


@pytest.mark.parametrize("tied", [False, True])
def test_whole_weights_become_the_model_bit_by_bit(tmp_path: Path, tied: bool) -> None:
    base = make_model(tmp_path / "base", tied=tied, dtype="bfloat16", max_shard_size="60KB")
    whole = record_training(make_full(base, tmp_path / "full"), base)
    result = run(tmp_path / "work", base, whole)
    trained = load_file(str(whole / "model.safetensors"))
    assert_state(result.output, model_of(base, whole), exact=True)
    assert result.merged_tensors == result.tensors == len(trained)
    before = weights(base)
    assert result.max_abs_delta == max(float((tensor - before[name].float()).abs().max()) for name, tensor in trained.items())
    halved = weights(run(tmp_path / "half", base, whole, dtype="float16").output)
    assert all(torch.equal(halved[name], tensor.to(torch.float16)) for name, tensor in trained.items())
    record = json.loads((result.output / "merge.json").read_text())
    assert record["adapters"] == [sha256_file(whole / "model.safetensors")]
    assert not (result.output / full.DESCRIPTION).exists()


@pytest.mark.parametrize("kinds", [("full", "lora"), ("lora", "full"), ("full", "full"), ("dora", "lora", "full", "dora")])
def test_whole_weights_and_adapters_stack_in_every_order(tmp_path: Path, base: Path, kinds: tuple[str, ...]) -> None:
    """In one pass what stage by stage gives, and what transformers and PEFT make of the same files."""
    line, model = [], base
    for number, kind in enumerate(kinds):
        place = tmp_path / f"{number}-{kind}"
        lora = {"use_dora": kind == "dora", "target_modules": ["q_proj", "down_proj", "embed_tokens"] if kind == "dora" else ["v_proj"]}
        made = make_full(model, place, seed=number) if kind == "full" else make_adapter(model, place, seed=number + 5, **lora)
        line.append(record_training(made, model, before=list(line), first=base))
        model = run(tmp_path / f"merged{number}", base, *line).output
    assert_state(model, model_of(base, *line))
    assert json.loads((model / "merge.json").read_text())["adapters"] == [sha256_file(next(a.glob("*.safetensors"))) for a in line]
    with pytest.raises(InvalidData, match="was trained on"):
        run(tmp_path / "turned", base, *reversed(line))


def changed(whole: Path, target: Path, **tensors: torch.Tensor | None) -> Path:
    """A copy in which tensors are others, or absent."""
    shutil.copytree(whole, target)
    path = target / "model.safetensors"
    held = {name: tensor for name, tensor in {**load_file(str(path)), **tensors}.items() if tensor is not None}
    save_file(held, str(path), metadata={"format": "pt"})
    return target


UP, NORM = "model.layers.1.mlp.up_proj.weight", "model.norm.weight"


@pytest.mark.parametrize(
    ("tensors", "named"),
    [
        ({UP: None}, rf"tensor {UP} of the base is missing \(1 in all\)"),
        ({"model.extra.weight": torch.ones(3)}, r"has no tensor model\.extra\.weight"),
        ({NORM: torch.ones(32)}, rf"{NORM} has shape \(32,\), in the base \(64,\)"),
        ({NORM: torch.ones(64, dtype=torch.int32)}, rf"{NORM} is torch\.int32, in the base torch\.float16"),
    ],
    ids=["missing", "extra", "shape", "kind"],
)
def test_weights_of_another_model_are_refused_by_tensor(tmp_path: Path, base: Path, whole: Path, tensors: Any, named: str) -> None:
    with pytest.raises(InvalidData, match=named) as caught:
        run(tmp_path / "work", base, changed(whole, tmp_path / "full", **tensors))
    assert caught.value.param == "adapters[0]"
    assert not (tmp_path / "work").exists()


def test_whole_weights_of_another_base_are_refused(tmp_path: Path, base: Path, whole: Path) -> None:
    other = make_model(tmp_path / "other", seed=5, dtype="float16")
    with pytest.raises(InvalidData, match="was trained on weights"):
        run(tmp_path / "work", other, whole)
    renamed = shutil.copytree(whole, tmp_path / "renamed")
    full.describe(renamed, base_sha256=weights_fingerprint(other))
    with pytest.raises(InvalidData, match=r"full_weights\.json names base .*, training\.json"):
        run(tmp_path / "work", base, renamed)
    templated = shutil.copytree(whole, tmp_path / "templated")
    (templated / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(InvalidData, match=r"chat_template\.jinja"):
        run(tmp_path / "work", base, templated)


def test_a_directory_that_is_neither_or_both_is_refused(tmp_path: Path, base: Path, whole: Path) -> None:
    both = shutil.copytree(whole, tmp_path / "both")
    (both / "adapter_config.json").write_text("{}")
    with pytest.raises(InvalidData, match="it can be one only"):
        run(tmp_path / "work", base, both)
    newer = shutil.copytree(whole, tmp_path / "newer")
    (newer / full.DESCRIPTION).write_text('{"format": 2, "weights": "model.safetensors", "base_sha256": ""}')
    with pytest.raises(InvalidData, match="does not describe weights that are read here"):
        run(tmp_path / "work", base, newer)
    empty = shutil.copytree(whole, tmp_path / "empty")
    (empty / "model.safetensors").unlink()
    with pytest.raises(InvalidData, match=r"model\.safetensors is missing"):
        run(tmp_path / "work", base, empty)
    short = shutil.copytree(whole, tmp_path / "short")
    (short / "model.safetensors").write_bytes((whole / "model.safetensors").read_bytes()[:-8])
    with pytest.raises(InvalidData, match="truncated"):
        run(tmp_path / "work", base, short)


def test_whole_weights_that_are_not_numbers_or_changed_nothing_are_not_merged(tmp_path: Path, base: Path, whole: Path) -> None:
    broken = torch.full((64,), float("nan"))
    with pytest.raises(Diverged, match=NORM):
        run(tmp_path / "work", base, changed(whole, tmp_path / "nan", **{NORM: broken}))
    untrained = record_training(make_full(base, tmp_path / "zero", scale=0.0), base)
    with pytest.raises(InvalidData, match="change nothing"):
        run(tmp_path / "work", base, untrained)


def test_what_is_no_float_stays_the_bases(tmp_path: Path) -> None:
    """Some old models store tables of numbers beside their weights."""
    base = make_model(tmp_path / "base")
    path = base / "model.safetensors"
    save_file({**load_file(str(path)), "model.table": torch.arange(6)}, str(path), metadata={"format": "pt"})
    whole = make_full(base, tmp_path / "full")
    floats = {**load_file(str(whole / "model.safetensors")), "model.table": torch.arange(6)}
    save_file(floats, str(whole / "model.safetensors"), metadata={"format": "pt"})
    output = run(tmp_path / "work", base, record_training(whole, base)).output
    assert torch.equal(weights(output)["model.table"], torch.arange(6))


def test_memory_does_not_grow_with_whole_weights(tmp_path: Path) -> None:
    """128 MiB that take the place of 64 MiB, merged in less than half of the smaller."""
    base, whole = tmp_path / "base", tmp_path / "full"
    for directory in (base, whole):
        directory.mkdir()
    names = [f"model.layers.{layer}.mlp.up_proj.weight" for layer in range(2)]
    save_file({name: torch.zeros(4096, 4096, dtype=torch.float16) for name in names}, str(base / "model.safetensors"))
    save_file({name: torch.full((4096, 4096), 0.01) for name in names}, str(whole / full.WEIGHTS))
    (base / "config.json").write_text('{"model_type": "llama"}')
    full.describe(whole, base_sha256=weights_fingerprint(base))
    record_training(whole, base)
    command = [sys.executable, "-c", MEASURED, str(base), str(whole), str(tmp_path / "work")]
    done = subprocess.run(command, capture_output=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    written, grown = map(int, done.stdout.split())
    assert written >= 64 * 1024  # KiB, in float16
    assert grown < 32 * 1024
