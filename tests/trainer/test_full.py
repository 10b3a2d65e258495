"""Full fine-tuning: every weight trained, stopped, resumed and written; merged it is the trained model, alone and beside adapters."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from merger import merge
from parampara.errors import Diverged, InvalidData, InvalidRequest, OutOfMemory
from parampara.execution import stop
from parampara.manifest import sha256_file, weights_fingerprint
from parampara.progress import SilentProgress
from parampara.schemas.stages import MergeConfig, MergeParams, TrainParams
from tests.tiny_models import make_model
from tests.trainer.runs import dapt_config, losses, sft_config
from tests.trainer.test_memory import SmallMemory
from tests.trainer.test_methods import loss_of
from tests.trainer.test_training import Recorder, preempted, run, validations
from trainer import engine, full
from trainer.__main__ import _preloadable
from trainer.precision import choose_hardware
from trainer.speed import flops_per_token

WEIGHTS = Path("output") / "model.safetensors"


@pytest.fixture(autouse=True)
def _nobody_asks_to_stop() -> Iterator[None]:
    yield
    stop.clear()


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("tied") / "base", tied=True, dtype="float16")


def whole(config: Any) -> Any:
    """The same stage with ``lora: null``."""
    params = {**config.params.model_dump(), "lora": None}
    return type(config).model_validate({**config.model_dump(), "params": params})


def merged(base: Path, workdir: Path, *trained: Path) -> Path:
    config = MergeConfig(model=base, adapters=list(trained), params=MergeParams(dtype="float32"))
    return merge.run(config, workdir=workdir, progress=SilentProgress()).output


def opened(directory: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(str(directory), dtype=torch.float32).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(5, 45)[None]).logits


class Kept:
    """The models that stages have trained, in order, as they were when their output was written."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.logits: list[torch.Tensor] = []
        original = engine.write_output

        def write_output(result: Any, *, model: Any, **others: Any) -> None:
            self.logits.append(logits(model))
            original(result, model=model, **others)

        monkeypatch.setattr(engine, "write_output", write_output)


@pytest.mark.parametrize("stages", [("full", "full"), ("full", "lora"), ("lora", "full")], ids="-then-".join)
def test_a_line_is_merged_into_the_model_that_was_trained(
    tied: Path, book: Path, qa: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stages: tuple[str, str]
) -> None:
    """On a base that ties head and embedding, in its own format; the reference is the model in memory, and one that PEFT puts together."""
    from peft import PeftModel

    kept = Kept(monkeypatch)
    first = dapt_config(tied, book, max_steps=4)
    dapt = run(whole(first) if stages[0] == "full" else first, tmp_path / "dapt")
    between = merged(tied, tmp_path / "between", dapt.output)
    second = sft_config(between, qa, max_steps=4)
    sft = run(whole(second) if stages[1] == "full" else second, tmp_path / "sft")
    served = opened(merged(tied, tmp_path / "merged", dapt.output, sft.output))
    assert served.lm_head.weight is served.model.embed_tokens.weight
    exact = {"rtol": 0, "atol": 0}
    torch.testing.assert_close(logits(opened(between)), kept.logits[0], **(exact if stages[0] == "full" else {"rtol": 1e-4, "atol": 1e-5}))
    torch.testing.assert_close(logits(served), kept.logits[1], **(exact if stages[1] == "full" else {"rtol": 1e-4, "atol": 1e-5}))
    plain = opened(tied)
    for stage, trained in zip(stages, (dapt.output, sft.output), strict=True):
        if stage == "full":
            told = plain.load_state_dict(load_file(str(trained / "model.safetensors")), strict=False)
            assert (told.missing_keys, told.unexpected_keys) == (["lm_head.weight"], [])
        else:
            plain = PeftModel.from_pretrained(plain, str(trained)).merge_and_unload()
    torch.testing.assert_close(logits(served), logits(plain), rtol=1e-4, atol=1e-5)
    assert loss_of(served, second) == pytest.approx(sft.validation_loss_after, abs=1e-4)
    assert sft.validation_loss_after < sft.validation_loss_before - 0.1


def test_the_stage_says_what_it_trained_and_on_what(base: Path, qa: Path, tmp_path: Path) -> None:
    progress = Recorder()
    result = run(whole(sft_config(base, qa, backend="auto", max_steps=3)), tmp_path, progress)
    files = {path.name for path in result.output.iterdir()}
    written = {"model.safetensors", "full_weights.json", "training.json", "metrics.jsonl"}
    assert files == written | {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert (result.backend, result.backend_reason) == (
        "trl",
        "backend is auto and lora is null: every weight is trained by plain TRL alone",
    )
    described = json.loads((result.output / "full_weights.json").read_text())
    assert described == {"format": 1, "weights": "model.safetensors", "base_sha256": weights_fingerprint(base)}
    record = json.loads((result.output / "training.json").read_text())
    assert (record["params"]["lora"], record["trained_in"], record["base_sha256"]) == (None, "float32", weights_fingerprint(base))
    before, after = load_file(str(base / "model.safetensors")), load_file(str(tmp_path / WEIGHTS))
    assert list(after) == list(before)
    assert not any(torch.equal(tensor, before[name]) for name, tensor in after.items())
    plain = opened(base)
    assert result.validation_loss_before == pytest.approx(loss_of(plain, sft_config(base, qa)), abs=1e-4)
    linear = [module for module in plain.modules() if isinstance(module, torch.nn.Linear)]
    assert result.flops_per_token == flops_per_token(plain) == 6 * sum(module.weight.numel() for module in linear)
    assert any("learning_rate 0.005 is high for training every weight (usual: 1e-5 to 5e-5)" in event for event in progress.events)


@pytest.mark.parametrize("optim", ["adamw_torch", "paged_adamw_8bit"])
def test_stopped_and_continued_equals_uninterrupted(base: Path, book: Path, tmp_path: Path, optim: str) -> None:
    config = whole(dapt_config(base, book, optim=optim, max_steps=4, gradient_checkpointing=True))
    uninterrupted = run(config, tmp_path / "whole")
    preempted(config, tmp_path / "parts", at=2)
    result = run(config, tmp_path / "parts")
    assert (result.resumed_from_step, result.optimizer) == (2, optim)
    assert sha256_file(tmp_path / "parts" / WEIGHTS) == sha256_file(tmp_path / "whole" / WEIGHTS)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert (result.validation_loss_before, result.validation_loss_after) == (
        uninterrupted.validation_loss_before,
        uninterrupted.validation_loss_after,
    )


def test_gradient_checkpointing_gives_the_same_losses(base: Path, qa: Path, tmp_path: Path) -> None:
    run(whole(sft_config(base, qa, max_steps=2)), tmp_path / "off")
    run(whole(sft_config(base, qa, max_steps=2, gradient_checkpointing=True)), tmp_path / "on")
    assert losses(tmp_path / "on") == pytest.approx(losses(tmp_path / "off"), abs=1e-5)


def test_the_weights_may_be_those_of_the_best_step(base: Path, qa: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"learning_rate": 0.1, "lr_scheduler_type": "constant", "eval_steps": 1, "max_steps": 5}
    result = run(whole(sft_config(base, qa, load_best=True, checkpoint_steps=1, **settings)), tmp_path)
    curve = validations(tmp_path)
    lowest = min(list(curve)[1:], key=lambda step: curve[step])
    assert lowest < result.steps  # else this test shows nothing
    assert (result.adapter_step, result.validation_loss_after) == (lowest, curve[lowest])
    checkpoint = load_file(str(tmp_path / "checkpoints" / f"step-{lowest:010d}" / "adapter.safetensors"))
    written = load_file(str(tmp_path / WEIGHTS))
    assert checkpoint.keys() == written.keys()
    assert all(torch.equal(tensor, written[name]) for name, tensor in checkpoint.items())


def test_in_half_precision_the_weights_themselves_stay_whole(base: Path, qa: Path, tmp_path: Path) -> None:
    """A step of 1e-6 is below the last bit of nearly every weight in bfloat16, and counts."""
    result = run(whole(sft_config(base, qa, precision="bfloat16", learning_rate=1e-6, warmup_ratio=0, max_steps=2)), tmp_path)
    assert (result.dtype, result.trained_in) == ("bfloat16", "float32")
    before, after = (load_file(str(path)) for path in (base / "model.safetensors", tmp_path / WEIGHTS))
    name = "model.layers.0.mlp.up_proj.weight"
    assert after[name].dtype == torch.float32
    moved = (after[name] - before[name]).abs()
    assert 0 < float(moved.max()) < 1e-5
    assert float((moved > 0).float().mean()) > 0.9


def test_out_of_memory_trains_on_in_smaller_pieces_and_then_names_lora(
    base: Path, qa: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = whole(sft_config(base, qa, per_device_train_batch_size=4, gradient_accumulation_steps=1, max_steps=2))
    run(config, tmp_path / "straight")
    with monkeypatch.context() as patch:
        SmallMemory(patch, documents=1, from_step=2)
        reduced = run(config, tmp_path / "reduced")
    assert reduced.micro_batch_reductions
    assert losses(tmp_path / "reduced") == pytest.approx(losses(tmp_path / "straight"), abs=1e-4)
    SmallMemory(monkeypatch, documents=0)
    with pytest.raises(OutOfMemory, match=r"step 1 with a micro-batch of one document.*give lora \(an adapter"):
        run(config, tmp_path / "none")


def test_what_a_device_can_never_hold_is_refused_before_anything_is_read(
    base: Path, book: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = full._room(torch.device("cpu"))
    assert room > 1 << 28
    count = sum(tensor.numel() for tensor in load_file(str(base / "model.safetensors")).values())
    monkeypatch.setattr(full, "_room", lambda device: 16 * count - 1)
    with pytest.raises(
        OutOfMemory, match=r"takes 16 bytes each \(weight, gradient, adamw_torch\).*Give lora.*or take optim adamw_8bit"
    ) as caught:
        run(whole(dapt_config(base, book)), tmp_path)
    assert caught.value.param == "params.lora"
    assert list(tmp_path.iterdir()) == []
    hardware = choose_hardware("auto", "adamw_8bit")
    full.check(base, TrainParams(optim="adamw_8bit"), hardware, SilentProgress())
    monkeypatch.setattr(full, "_room", lambda device: 10 * count - 1)
    with pytest.raises(OutOfMemory, match=r"takes 10 bytes each.*every weight\)\.$"):
        full.check(base, TrainParams(optim="adamw_8bit"), hardware, SilentProgress())


def test_weights_that_are_not_finite_are_not_written(base: Path, tmp_path: Path) -> None:
    model = opened(base)
    with torch.no_grad():
        model.model.norm.weight[3] = float("inf")
    trained = dict(model.named_parameters())
    with pytest.raises(Diverged, match=r"model\.norm\.weight"):
        full.write(tmp_path, stored=full.stored_as(model, base), trained=trained, base=base, base_sha256="0" * 64)
    assert list(tmp_path.iterdir()) == []


def test_every_tensor_is_stored_where_the_base_stores_it(tied: Path, tmp_path: Path) -> None:
    """A tied head under both names where the base has both, and a table that nobody trains as it was."""
    tensors, table = load_file(str(tied / "model.safetensors")), torch.arange(4.0)
    twice = make_model(tmp_path / "twice", tied=True, dtype="float16")
    both = {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone(), "model.rotary_emb.inv_freq": table}
    save_file(both, str(twice / "model.safetensors"), metadata={"format": "pt"})
    model = opened(twice)
    with torch.no_grad():
        model.model.embed_tokens.weight += 1
    trained = {name: parameter.detach() for name, parameter in model.named_parameters()}
    full.write(tmp_path, stored=full.stored_as(model, twice), trained=trained, base=twice, base_sha256="0" * 64)
    written = load_file(str(tmp_path / "model.safetensors"))
    assert written.keys() == both.keys()
    assert torch.equal(written["lm_head.weight"], written["model.embed_tokens.weight"])
    assert torch.equal(written["lm_head.weight"], both["lm_head.weight"].float() + 1)
    assert torch.equal(written["model.rotary_emb.inv_freq"], table)


def test_a_model_that_could_not_be_written_again_is_refused(base: Path, book: Path, tmp_path: Path) -> None:
    """transformers finds the weights of a bare Llama without the prefix; nothing says that this way leads back."""
    bare = make_model(tmp_path / "bare")
    tensors = {name.removeprefix("model."): tensor for name, tensor in load_file(str(bare / "model.safetensors")).items()}
    save_file(tensors, str(bare / "model.safetensors"), metadata={"format": "pt"})
    with pytest.raises(InvalidData, match=r"is trained and has no tensor of that name in the model's files") as caught:
        run(whole(dapt_config(bare, book)), tmp_path / "work")
    assert caught.value.param == "params.lora"


def test_unsloth_by_name_is_refused(base: Path, qa: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"Set backend to auto or trl, or give lora\."):
        run(whole(sft_config(base, qa, backend="unsloth")), tmp_path / "work")


def test_a_process_that_has_imported_unsloth_does_not_train_every_weight(base: Path, qa: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stages are forked from processes that have imported one backend or the other."""
    config = sft_config(base, qa, backend="auto")
    monkeypatch.delitem(sys.modules, "unsloth", raising=False)
    assert (_preloadable(whole(config)), _preloadable(config)) == (True, False)
    monkeypatch.setitem(sys.modules, "unsloth", ModuleType("unsloth"))
    assert (_preloadable(whole(config)), _preloadable(config)) == (False, True)


def test_four_bits_can_not_be_trained_themselves(base: Path, qa: Path) -> None:
    with pytest.raises(ValidationError, match=r"lora is null and train\.load_in_4bit is true"):
        whole(sft_config(base, qa, load_in_4bit=True))
