"""Every kind of change that the merge knows, over random shapes and settings, against PEFT's own ``merge_and_unload``."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from parampara.errors import Diverged
from parampara.weights import merged
from parampara.weights.merged import MergedModel
from tests.tiny_models import record_training

PROJECTIONS = ["q_proj", "up_proj", "down_proj"]


class Net(nn.Module):
    """The modules that adapters meet, of any shape; ``conv1d`` makes the projections GPT-2's."""

    def __init__(self, hidden: int, wide: int, vocabulary: int, *, conv1d: bool = False) -> None:
        from transformers.pytorch_utils import Conv1D

        super().__init__()
        linear = (lambda i, o: Conv1D(o, i)) if conv1d else nn.Linear
        self.embed_tokens = nn.Embedding(vocabulary, hidden)
        self.q_proj = linear(hidden, hidden)
        self.up_proj = linear(hidden, wide)
        self.down_proj = linear(wide, hidden)
        self.norm = nn.LayerNorm(hidden)
        self.lm_head = nn.Linear(hidden, vocabulary, bias=False)


def randomize(parameters: Any) -> None:
    with torch.no_grad():
        for parameter in parameters:
            parameter.normal_(0.0, 0.3)


def save_base(net: nn.Module, directory: Path, *, kind: str) -> None:
    directory.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in net.state_dict().items()}, str(directory / "model.safetensors"))
    (directory / "config.json").write_text(json.dumps({"model_type": kind}))


@st.composite
def lora_configs(draw: st.DrawFn, *, conv1d: bool) -> dict[str, Any]:
    """Settings of peft.LoraConfig, in every combination that PEFT itself can train and merge."""
    targets = draw(st.lists(st.sampled_from([*PROJECTIONS, "embed_tokens", "lm_head"]), min_size=1, unique=True))
    config: dict[str, Any] = {
        "target_modules": targets,
        "r": draw(st.integers(1, 6)),
        "lora_alpha": draw(st.integers(1, 12)),
        "use_rslora": draw(st.booleans()),
        "use_dora": draw(st.booleans()),
        "bias": draw(st.sampled_from(["none", "all", "lora_only"])),
        "rank_pattern": draw(st.dictionaries(st.sampled_from(["q_proj", "^lm_.*", "(up|down)_proj"]), st.integers(1, 7))),
        "alpha_pattern": draw(st.dictionaries(st.sampled_from(["q_proj", ".*_proj", "head"]), st.integers(1, 9))),
        "fan_in_fan_out": conv1d,
    }
    ends = {"embed_tokens", "lm_head"} - set(targets)
    config["lora_bias"] = not config["use_dora"] and set(targets) <= set(PROJECTIONS) and draw(st.booleans())
    config["modules_to_save"] = draw(st.lists(st.sampled_from(sorted(ends)), unique=True)) if ends else None
    if "embed_tokens" in ends - set(config["modules_to_save"] or []):
        config["trainable_token_indices"] = draw(st.lists(st.integers(0, 6), unique=True)) or None
    return config


def train(net: nn.Module, config: dict[str, Any], directory: Path) -> None:
    """An adapter as PEFT saves it after every trainable weight has moved."""
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(net, LoraConfig(**config))  # type: ignore[arg-type]
    randomize(parameter for parameter in adapted.parameters() if parameter.requires_grad)
    adapted.save_pretrained(str(directory), save_embedding_layers=False)


def merged_by_peft(net: nn.Module, *adapters: Path) -> dict[str, torch.Tensor]:
    from peft import PeftModel

    for adapter in adapters:
        double = net.state_dict()["lm_head.weight"].dtype == torch.float64
        adapted: Any = PeftModel.from_pretrained(net, str(adapter), autocast_adapter_dtype=not double)  # type: ignore[arg-type]
        net = (adapted.double() if double else adapted).merge_and_unload()
    return {name: tensor.detach() for name, tensor in net.state_dict().items()}


def read(model: MergedModel) -> dict[str, torch.Tensor]:
    return {name: torch.cat([rows.clone() for rows in model.rows(name)]).reshape(info.shape) for name, info in model.tensors.items()}


@pytest.mark.timeout(600)  # the first import of PEFT counts, which takes minutes on a crowded machine
@pytest.mark.parametrize("conv1d", [False, True], ids=["linear", "conv1d"])
@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_merged_rows_equal_peft(conv1d: bool, data: st.DataObject) -> None:
    """float32 equals PEFT's; a half-precision base is nearer to the float64 merge than PEFT's. One or two adapters, small chunks."""
    hidden, wide = data.draw(st.integers(2, 24)), data.draw(st.integers(2, 40))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    configs = data.draw(st.lists(lora_configs(conv1d=conv1d), min_size=1, max_size=2))

    def net(of: torch.dtype) -> nn.Module:
        torch.manual_seed(hidden * 100 + wide)
        fresh = Net(hidden, wide, vocabulary=7, conv1d=conv1d)
        randomize(fresh.parameters())
        return fresh.to(dtype).to(of)  # values that the base's dtype holds

    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        base, adapters = Path(name) / "base", [Path(name) / f"adapter{position}" for position in range(len(configs))]
        save_base(net(dtype), base, kind="gpt2" if conv1d else "llama")
        for position, config in enumerate(configs):
            train(net(torch.float32), config, adapters[position])
            record_training(adapters[position], base, before=adapters[:position], first=base)
        patch.setattr(merged, "CHUNK_BYTES", 4 * hidden * 3)
        with MergedModel(base, adapters) as model:
            ours = read(model)
        exact, theirs = merged_by_peft(net(torch.float64), *adapters), merged_by_peft(net(dtype), *adapters)
    for key, reference in exact.items():
        assert ours[key].dtype == torch.float32
        if dtype == torch.float32:
            torch.testing.assert_close(ours[key], theirs[key], rtol=2e-6, atol=2e-6, msg=lambda text, key=key: f"{key}: {text}")
        else:
            error = (ours[key].to(dtype).double() - reference).norm()
            assert error <= 1.001 * (theirs[key].double() - reference).norm() + 1e-6, key


def test_without_adapters_the_base_itself_arrives(tmp_path: Path) -> None:
    net = Net(8, 12, 5)
    save_base(net, tmp_path / "base", kind="llama")
    with MergedModel(tmp_path / "base") as model:
        assert all(torch.equal(tensor, net.state_dict()[name]) for name, tensor in read(model).items())
        assert not model.changed
        assert model.max_abs_delta == 0.0


def test_a_value_above_the_target_dtype_is_named(tmp_path: Path) -> None:
    net = Net(8, 12, 5)
    with torch.no_grad():
        net.up_proj.weight[3, 3] = 70_000.0  # type: ignore[index,union-attr]
    save_base(net, tmp_path / "base", kind="llama")
    with MergedModel(tmp_path / "base") as model:
        assert sum(rows.shape[0] for rows in model.rows("up_proj.weight")) == 12
        with pytest.raises(Diverged, match=r"up_proj\.weight holds 70000, which float16"):
            list(model.rows("up_proj.weight", limit=torch.float16))


@pytest.mark.parametrize("tied", [False, True])
def test_trained_tokens_of_a_real_model_equal_peft(tmp_path: Path, tied: bool) -> None:
    """Rows of an embedding that were trained alone; a tied head has them too, being the same tensor."""
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    from tests.tiny_models import make_model

    base = make_model(tmp_path / "base", tied=tied, layers=1)
    load = lambda: AutoModelForCausalLM.from_pretrained(str(base), dtype=torch.float32)  # noqa: E731
    adapted = get_peft_model(load(), LoraConfig(target_modules=["q_proj"], trainable_token_indices=[9, 3], task_type="CAUSAL_LM"))
    randomize(parameter for parameter in adapted.parameters() if parameter.requires_grad)
    adapted.save_pretrained(str(tmp_path / "adapter"))
    adapter = record_training(tmp_path / "adapter", base)
    expected = PeftModel.from_pretrained(load(), str(adapter)).merge_and_unload().state_dict()  # type: ignore[operator]
    with MergedModel(base, [adapter]) as model:
        for name, tensor in read(model).items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-6)
        assert "model.embed_tokens.weight" in model.changed
