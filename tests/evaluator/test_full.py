"""A line whose stages trained every weight: its members open, agree with what was merged, and name the weights they started from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from evaluator import parity
from evaluator.entries import _trained_on, write_ledger
from evaluator.ledger import Ledger
from evaluator.line import check_weights, members, read_material
from evaluator.meter import Meter
from evaluator.models import loaded
from parampara.errors import InvalidData
from parampara.manifest import weights_fingerprint
from parampara.progress import SilentProgress
from parampara.weights import full
from tests.evaluator.lines import COMPANIONS, Line
from tests.tiny_models import make_full, record_training

METER = Meter(SilentProgress(), total=999)


def made_whole(model: Path, directory: Path, output: Path, *, dtype: torch.dtype, seed: int) -> None:
    """Full weights trained on ``model``, and the model that a merge makes of them."""
    record_training(make_full(model, directory, seed=seed), model)
    output.mkdir()
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(directory / full.WEIGHTS).items()}
    save_file(tensors, output / "model.safetensors", metadata={"format": "pt"})
    described = {**json.loads((model / "config.json").read_text()), "dtype": str(dtype).removeprefix("torch.")}
    (output / "config.json").write_text(json.dumps(described))
    for name in COMPANIONS:
        shutil.copyfile(model / name, output / name)
        if name != "generation_config.json":
            shutil.copyfile(model / name, directory / name)


@pytest.fixture(scope="module")
def whole(line: Line, tmp_path_factory: pytest.TempPathFactory) -> Line:
    """The same base and data; DAPT and SFT changed every weight."""
    root = tmp_path_factory.mktemp("whole")
    for name in ("book.txt", "qa.jsonl"):
        shutil.copyfile(line.root / name, root / name)
    base = line.copy("base", root / "base")
    made_whole(base, root / "dapt_adapter", root / "dapt_merged", dtype=torch.float32, seed=1)
    made_whole(root / "dapt_merged", root / "sft_adapter", root / "merged", dtype=torch.float16, seed=2)
    return Line(root)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whole_weights_open_on_their_base_in_the_evaluations_type(whole: Line, dtype: torch.dtype) -> None:
    ids = torch.arange(5, 30)[None]
    answers = []
    for directory, trained in ((whole.root / "base", whole.root / "dapt_adapter"), (whole.root / "dapt_merged", None)):
        with loaded("dapt", directory, trained, dtype=dtype) as model, torch.no_grad():
            assert model.model.dtype == dtype
            assert model.stop_ids == [1]
            answers.append(model.model(ids).logits)
    assert torch.equal(*answers)
    with loaded("base", whole.root / "base", dtype=dtype) as model, torch.no_grad():
        assert not torch.equal(model.model(ids).logits, answers[0])


def test_the_ledger_of_such_a_line_has_parity_and_lineage(whole: Line, tmp_path: Path) -> None:
    config = whole.config(quantized=None)
    material, line = read_material(config), members(config)
    check_weights(line)
    recordings = Ledger(line, METER)
    for member in line:
        with loaded(member.name, member.directory, member.adapter) as model:
            recordings.add(parity.record(model, material.probes, directory=tmp_path, max_new_tokens=4, meter=METER))
    ledger = write_ledger(line, material, recordings, meter=METER)
    dapt, merged = ledger.transitions
    assert (dapt.kl, dapt.top1, dapt.recovered, dapt.adapter_base, dapt.differs_from_base) == (0, 1, 1, 1, 1)
    assert merged.kl is not None and 0 <= merged.kl < 1e-4  # float16, and float32 before
    assert (merged.adapter_base, merged.tokenizer, merged.chat_template) == (1, 1, 1)
    models = {model.name: model for model in ledger.models}
    assert models["sft_adapter"].trained_on_sha256 == models["dapt"].weights_sha256 == weights_fingerprint(whole.root / "dapt_merged")
    assert models["dapt_adapter"].adapter_sha256 == weights_fingerprint(whole.root / "dapt_adapter")


def test_weights_of_another_base_or_model_are_told(whole: Line, tmp_path: Path) -> None:
    other = whole.copy("sft_adapter", tmp_path / "other")
    full.describe(other, base_sha256=weights_fingerprint(whole.root / "base"))
    record_training(other, whole.root / "base")
    assert _trained_on(other) == weights_fingerprint(whole.root / "base") != weights_fingerprint(whole.root / "dapt_merged")
    path = other / full.WEIGHTS
    tensors = load_file(path)
    del tensors["model.norm.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with (
        pytest.raises(InvalidData, match=r"tensor model\.norm\.weight of the base is missing"),
        loaded("sft_adapter", whole.root / "dapt_merged", other),
    ):
        pass
