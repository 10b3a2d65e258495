"""Stage quantize on tiny models: what is written, what is recorded, and that nothing of a failure remains."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from parampara.errors import InvalidData, InvalidRequest, Preempted
from parampara.execution import stop
from parampara.progress import SilentProgress
from parampara.schemas.stages import QuantizeConfig, QuantizeParams, QuantizeResult
from quantizer.backends import SchemeUnavailable, bitsandbytes, unsloth
from quantizer.checkpoint import next_token_log_probs, quantized_weights
from quantizer.gate import measure
from quantizer.quantize import check, run
from tests.compressed import compress
from tests.tiny_models import make_model

COMPANIONS = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"]
BITSANDBYTES = QuantizeParams(schemes=["bitsandbytes"])
PROJECTIONS = 7


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = make_model(tmp_path_factory.mktemp("parent"), dtype="float16")
    (directory / "manifest.json").write_text("{}")
    (directory / "merge.json").write_text("{}")
    return directory


@pytest.fixture(scope="module")
def quantized(parent: Path, tmp_path_factory: pytest.TempPathFactory) -> QuantizeResult:
    workdir = tmp_path_factory.mktemp("work")
    (workdir / "output").mkdir()
    (workdir / "output" / "of-an-earlier-attempt").touch()
    return run(QuantizeConfig(model=parent, params=BITSANDBYTES), workdir=workdir, progress=SilentProgress())


@pytest.fixture
def asked_to_stop() -> Iterator[None]:
    stop.request()
    yield
    stop.clear()


def test_every_linear_layer_but_the_head_is_in_eight_bits(quantized: QuantizeResult) -> None:
    names = quantized_weights(quantized.output)
    assert quantized.scheme == "bitsandbytes"
    assert len(names) == quantized.quantized_modules == 2 * PROJECTIONS
    assert not [name for name in names if "lm_head" in name or "embed" in name or "norm" in name]
    assert quantized.bytes < quantized.parent_bytes


def test_the_config_names_the_method_and_the_type_that_vllm_serves(quantized: QuantizeResult) -> None:
    config = json.loads((quantized.output / "config.json").read_text())
    assert config["dtype"] == "float16"
    assert config["quantization_config"]["quant_method"] == "bitsandbytes"
    assert config["quantization_config"]["load_in_8bit"] is True


def test_companions_are_the_parents_byte_for_byte(parent: Path, quantized: QuantizeResult) -> None:
    for name in COMPANIONS:
        assert (quantized.output / name).read_bytes() == (parent / name).read_bytes(), name
    assert {path.name for path in quantized.output.iterdir()} == {*COMPANIONS, "config.json", "model.safetensors", "quantize.json"}


def test_the_saved_model_answers_like_its_float32_parent_and_reloads_to_the_same_bits(parent: Path, quantized: QuantizeResult) -> None:
    from quantizer.checkpoint import agreement

    first, second = next_token_log_probs(quantized.output), next_token_log_probs(quantized.output)
    assert first.equal(second)
    measured = agreement(next_token_log_probs(parent), first)
    assert 0 < measured.kl < 5e-3
    assert measured.top1 > 0.9


def test_files_are_readable_for_a_model_server_of_another_user(quantized: QuantizeResult) -> None:
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in quantized.output.iterdir())


def test_a_checkpoint_of_another_model_is_refused(quantized: QuantizeResult, tmp_path: Path) -> None:
    stranger = make_model(tmp_path / "stranger", seed=7, dtype="float16")
    with pytest.raises(SchemeUnavailable, match="does not answer like its parent"):
        check(measure(stranger), quantized.output)


def test_a_checkpoint_without_eight_bit_weights_is_refused(parent: Path) -> None:
    with pytest.raises(SchemeUnavailable, match="no eight-bit weight"):
        check(measure(parent), parent)


def test_a_model_that_is_already_quantized_is_refused(quantized: QuantizeResult, tmp_path: Path) -> None:
    with pytest.raises(InvalidData, match="already quantized"):
        run(QuantizeConfig(model=quantized.output, params=BITSANDBYTES), workdir=tmp_path, progress=SilentProgress())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("missing", "told"), [("config.json", "config.json cannot be read"), ("model.safetensors", "no \\*.safetensors")])
def test_an_incomplete_model_directory_is_named(parent: Path, tmp_path: Path, missing: str, told: str) -> None:
    model = tmp_path / "model"
    shutil.copytree(parent, model)
    (model / missing).unlink()
    with pytest.raises(InvalidData, match=told):
        run(QuantizeConfig(model=model, params=BITSANDBYTES), workdir=tmp_path / "work", progress=SilentProgress())


@pytest.mark.usefixtures("asked_to_stop")
def test_a_wish_to_stop_leaves_nothing_half_written(parent: Path, tmp_path: Path) -> None:
    with pytest.raises(Preempted):
        run(QuantizeConfig(model=parent, params=BITSANDBYTES), workdir=tmp_path, progress=SilentProgress())
    assert not list(tmp_path.iterdir())


def test_tied_heads_stay_whole(tmp_path: Path) -> None:
    model = make_model(tmp_path / "tied", tied=True, dtype="float16")
    (tmp_path / "out").mkdir()
    bitsandbytes.write(model, tmp_path / "out")
    assert check(measure(model), tmp_path / "out").kl < 5e-3


def nothing_in_it(model: Path, output: Path) -> None:
    output.mkdir(parents=True)


def an_unknown_method(model: Path, output: Path) -> None:
    shutil.copytree(model, output)
    config = json.loads((output / "config.json").read_text())
    (output / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "of-next-year"}}))


def a_config_of_another_shape(model: Path, output: Path) -> None:
    compress(model, output)
    config = json.loads((output / "config.json").read_text())
    (output / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 9}))


def a_torn_file(model: Path, output: Path) -> None:
    compress(model, output)
    weights = output / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def another_vocabulary(model: Path, output: Path) -> None:
    compress(make_model(output.parent / "other", vocab_size=600, dtype="float16"), output)


@pytest.mark.parametrize("product", [nothing_in_it, an_unknown_method, a_config_of_another_shape, a_torn_file, another_vocabulary])
def test_a_bad_product_of_unsloth_is_recorded_and_the_next_scheme_runs(
    parent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, product: Callable[[Path, Path], None]
) -> None:
    """Unsloth's own export needs a GPU; what it may leave behind is made here."""
    monkeypatch.setattr(unsloth, "write", lambda model, output, **_: product(model, output))
    result = run(QuantizeConfig(model=parent), workdir=tmp_path / "work", progress=SilentProgress())
    assert [(attempt.scheme, attempt.ok) for attempt in result.attempts] == [("unsloth", False), ("bitsandbytes", True)]
    assert "checkpoint" in result.attempts[0].reason
    assert quantized_weights(result.output)
    assert "staging" not in {path.name for path in (tmp_path / "work").iterdir()}


def test_a_compressed_tensors_product_is_kept(parent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unsloth, "write", lambda model, output, **_: compress(model, output))
    result = run(QuantizeConfig(model=parent), workdir=tmp_path, progress=SilentProgress())
    assert (result.scheme, len(result.attempts)) == ("unsloth", 1)
    assert result.quantized_modules == 2 * PROJECTIONS


def test_a_parent_that_cannot_be_loaded_is_the_users_fault_and_no_scheme_is_blamed(
    parent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = shutil.copytree(parent, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "model_type": "of-next-year"}))
    monkeypatch.setattr(unsloth, "write", lambda model, output, **_: compress(parent, output))
    with pytest.raises(InvalidData, match="cannot be loaded"):
        run(QuantizeConfig(model=model), workdir=tmp_path / "work", progress=SilentProgress())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_unsloth_is_told_the_stored_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    """Left to itself it takes bfloat16 on a GPU that has it, and a float16 weight loses three bits. Its own loader runs nowhere here."""
    import torch

    asked: dict[str, Any] = {}

    class Loader:
        @staticmethod
        def from_pretrained(model: str, **settings: Any) -> tuple[Any, Any]:
            asked.update(settings)
            raise RuntimeError("loaded")

    monkeypatch.setenv("UNSLOTH_COMPRESSED_QUANTIZE_PYTHONPATH", str(tmp_path))  # or its check for llm-compressor would come first
    monkeypatch.setitem(sys.modules, "unsloth", SimpleNamespace(FastLanguageModel=Loader))
    with pytest.raises(RuntimeError, match="loaded"):
        unsloth._export(str(make_model(tmp_path / "model", dtype=dtype)), "out", "w8a8")
    assert asked["dtype"] == getattr(torch, dtype)


@pytest.mark.slow
def test_unsloth_comes_first_and_its_own_reason_is_recorded(parent: Path, tmp_path: Path) -> None:
    result = run(QuantizeConfig(model=parent), workdir=tmp_path, progress=SilentProgress())
    first, *rest = result.attempts
    assert first.scheme == "unsloth"
    if not first.ok:  # no GPU, or no llm-compressor: what Unsloth itself raised, and the fallback
        assert "Unsloth" in first.reason or "unsloth" in first.reason
        assert [attempt.scheme for attempt in rest] == ["bitsandbytes"]
        assert rest[0].ok
    assert {path.name for path in tmp_path.iterdir()} == {"output"}


@pytest.mark.slow
def test_no_scheme_that_runs_is_an_error_with_every_reason_and_no_files(tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("Unsloth's export may run on a GPU")
    model = make_model(tmp_path / "model", dtype="float16")
    (tmp_path / "work").mkdir()
    config = QuantizeConfig(model=model, params=QuantizeParams(schemes=["unsloth"]))
    with pytest.raises(InvalidRequest, match=r"No scheme of params.schemes could run. unsloth: .*[Uu]nsloth") as caught:
        run(config, workdir=tmp_path / "work", progress=SilentProgress())
    assert caught.value.code == "no_scheme_ran"
    assert not list((tmp_path / "work").iterdir())


@pytest.mark.slow
def test_the_command_line_runs_the_stage(parent: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(QuantizeConfig(model=parent, params=BITSANDBYTES).model_dump_json())
    command = [sys.executable, "-m", "quantizer", "quantize", "--config", str(config), "--workdir", str(tmp_path / "work")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=110)
    assert done.returncode == 0, done.stderr
    result = QuantizeResult.model_validate_json((tmp_path / "work" / "result.json").read_text())
    assert result.output == tmp_path / "work" / "output"
    assert (result.output / "model.safetensors").is_file()
