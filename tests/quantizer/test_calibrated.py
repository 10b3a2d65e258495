"""GPTQ and SmoothQuant by the real llm-compressor, where its environment is; what it is given, and what is said where it is not."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from parampara.datasets import read_qa
from parampara.errors import InvalidRequest, Preempted
from parampara.execution import stop
from parampara.progress import SilentProgress
from parampara.schemas.stages import QuantizeConfig, QuantizeParams
from quantizer.backends import SchemeUnavailable, calibrated
from quantizer.quantize import run
from tests.quantizer.llmcompressor import PYTHON, needs_llmcompressor
from tests.quantizer.trained import make_trained


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> QuantizeConfig:
    trained = make_trained(tmp_path_factory.mktemp("trained"))
    return trained.model_copy(update={"params": QuantizeParams(schemes=["gptq"], max_chunks=4, max_questions=3)})


@pytest.mark.slow
@pytest.mark.timeout(400)
@needs_llmcompressor
@pytest.mark.parametrize("scheme", ["gptq", "smoothquant"])
def test_llm_compressor_writes_what_the_gate_takes(
    config: QuantizeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: calibrated.CalibratedScheme
) -> None:
    monkeypatch.setenv("LLMCOMPRESSOR_PYTHON", str(PYTHON))
    monkeypatch.setenv("LLM_COMPRESSOR_LOG_DISABLED", "true")  # kept from it: 0.14.0.1 dies of it
    params = config.params.model_copy(update={"schemes": [scheme]})
    result = run(config.model_copy(update={"params": params}), workdir=tmp_path, progress=SilentProgress())
    (attempt,) = result.attempts
    assert attempt.ok and attempt.scheme == scheme
    assert attempt.perplexity_increase is not None and attempt.perplexity_increase < 0.01
    assert result.quantized_modules == 14
    stored = json.loads((result.output / "config.json").read_text())
    quantization = stored["quantization_config"]
    assert (quantization["quant_method"], quantization["format"], quantization["ignore"]) == (
        "compressed-tensors",
        "int-quantized",
        ["lm_head"],
    )
    assert stored["dtype"] == "float16"
    assert (result.output / "tokenizer.json").read_bytes() == (config.model / "tokenizer.json").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"output"}


@pytest.mark.slow
@pytest.mark.timeout(400)
@needs_llmcompressor
def test_what_llm_compressor_says_when_it_fails_is_the_reason(
    config: QuantizeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMCOMPRESSOR_PYTHON", str(PYTHON))
    monkeypatch.setattr(calibrated, "calibration_rows", lambda config: [[1_000_000] * 4])  # no such token
    with pytest.raises(SchemeUnavailable, match=r"ended with status 1: .*[Ii]ndex"):
        calibrated.write(config, tmp_path / "out", scheme="gptq", scratch=tmp_path / "scratch", progress=SilentProgress())
    assert not (tmp_path / "scratch").exists()


def test_without_the_environment_the_reason_names_the_command_that_makes_it(
    config: QuantizeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMCOMPRESSOR_PYTHON", str(tmp_path / "none"))
    with pytest.raises(InvalidRequest, match=r"setup.py --only llmcompressor"):
        run(config, workdir=tmp_path / "work", progress=SilentProgress())


def test_without_training_rows_there_is_nothing_to_calibrate_on(config: QuantizeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SchemeUnavailable, match="Calibration needs the rows"):
        calibrated.calibration_rows(config.model_copy(update={"qa": None}))


def test_it_calibrates_on_training_rows_as_they_were_rendered_and_on_no_held_out_one(config: QuantizeConfig) -> None:
    from transformers import AutoTokenizer

    from quantizer.gate import read_held_out

    assert config.qa is not None
    tokenizer = AutoTokenizer.from_pretrained(config.model)
    everything = config.model_copy(update={"params": QuantizeParams()})
    rows = calibrated.calibration_rows(everything)
    held_out = [sequence.ids for sequence in read_held_out(everything).answers]
    assert len(rows) + len(held_out) == len(read_qa(config.qa.train[0])) == 9
    assert not [row for row in rows if row in held_out]
    assert all(tokenizer.decode(row).startswith("<|begin_of_text|><|start_header_id|>user") for row in rows)
    few = config.model_copy(update={"params": QuantizeParams(calibration_rows=2)})
    assert calibrated.calibration_rows(few) == rows[:2]


def test_a_wish_to_stop_ends_its_process(config: QuantizeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMCOMPRESSOR_PYTHON", sys.executable)  # any process that runs longer than it takes to hear the wish
    stop.request()
    try:
        with pytest.raises(Preempted):
            calibrated.write(config, tmp_path / "out", scheme="gptq", scratch=tmp_path / "scratch", progress=SilentProgress())
    finally:
        stop.clear()
    assert not list(tmp_path.iterdir())
