"""The gate between schemes: what it measures, on what, and that it takes the first scheme which costs little enough."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from parampara.datasets import hold_out, read_qa
from parampara.errors import InvalidData, InvalidRequest
from parampara.progress import SilentProgress
from parampara.schemas.stages import QuantizeConfig, QuantizeParams, SftParams, TrainParams
from quantizer.backends import unsloth
from quantizer.gate import Figures, compare, measure, read_held_out
from quantizer.quantize import run
from tests.compressed import compress
from tests.quantizer.trained import make_trained


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> QuantizeConfig:
    return make_trained(tmp_path_factory.mktemp("trained"))


def test_a_scheme_that_costs_too_much_is_recorded_with_its_figures_and_the_next_is_kept(
    config: QuantizeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unsloth, "write", lambda model, output, **_: compress(model, output, largest=11))
    result = run(config, workdir=tmp_path, progress=SilentProgress())
    coarse, kept = result.attempts
    assert [(coarse.scheme, coarse.ok), (kept.scheme, kept.ok)] == [("unsloth", False), ("bitsandbytes", True)]
    assert coarse.perplexity_increase is not None and coarse.answer_perplexity_increase is not None
    assert max(coarse.perplexity_increase, coarse.answer_perplexity_increase) > config.params.max_degradation
    assert "the limit is +1.00% (params.max_degradation)" in coarse.reason
    assert kept.perplexity_increase is not None and abs(kept.perplexity_increase) < 0.01
    assert kept.answer_perplexity_increase is not None and abs(kept.answer_perplexity_increase) < 0.01
    assert result.held_out_text_tokens > 100 and result.held_out_answer_tokens > 10
    assert {path.name for path in tmp_path.iterdir()} == {"output"}
    stored = json.loads((result.output / "quantize.json").read_text())
    assert stored["attempts"] == json.loads(result.model_dump_json(exclude={"attempts": {"__all__": {"seconds"}}}))["attempts"]


def test_the_first_scheme_within_the_limit_is_kept_and_no_other_tried(
    config: QuantizeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unsloth, "write", lambda model, output, **_: compress(model, output))
    result = run(config, workdir=tmp_path, progress=SilentProgress())
    assert [(attempt.scheme, attempt.ok) for attempt in result.attempts] == [("unsloth", True)]


def test_when_no_scheme_stays_within_the_limit_the_error_holds_every_figure(
    config: QuantizeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unsloth, "write", lambda model, output, **_: compress(model, output, largest=11))
    alone = config.model_copy(update={"params": config.params.model_copy(update={"schemes": ["unsloth", "unsloth"]})})
    with pytest.raises(InvalidRequest, match=r"stay within params.max_degradation \(1.00%\)") as caught:
        run(alone, workdir=tmp_path, progress=SilentProgress())
    assert caught.value.code == "no_scheme_ran"
    assert caught.value.message.count("perplexity of held-out text +") == caught.value.message.count("held-out answers +") == 2
    assert not list(tmp_path.iterdir())


def test_without_held_out_data_the_record_says_that_degradation_was_not_measured(config: QuantizeConfig, tmp_path: Path) -> None:
    alone = QuantizeConfig(model=config.model, params=QuantizeParams(schemes=["bitsandbytes"]))
    result = run(alone, workdir=tmp_path, progress=SilentProgress())
    (attempt,) = result.attempts
    assert "degradation was not measured" in attempt.reason
    assert (attempt.perplexity_increase, attempt.answer_perplexity_increase) == (None, None)
    assert attempt.kl is not None and attempt.bytes == result.bytes
    assert result.held_out_text_tokens == result.held_out_answer_tokens == 0


def test_losses_are_the_hand_computed_ones(config: QuantizeConfig) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    held_out = read_held_out(config)
    measured = measure(config.model, held_out)
    model = AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.float32)
    for sequences, loss in ((held_out.texts, measured.text), (held_out.answers, measured.answer)):
        nats, tokens = 0.0, 0
        for sequence in sequences:
            with torch.inference_mode():
                told = model(torch.tensor([sequence.ids])).logits[0].double().log_softmax(-1)
            counted = [position for position, counts in enumerate(sequence.counted) if counts]
            nats -= sum(float(told[position - 1, sequence.ids[position]]) for position in counted)
            tokens += len(counted)
        assert loss is not None
        assert (loss.tokens, loss.nats) == (tokens, pytest.approx(nats, rel=1e-4))


def test_it_measures_on_what_training_did_not_see(config: QuantizeConfig) -> None:
    from transformers import AutoTokenizer

    assert config.qa is not None
    tokenizer = AutoTokenizer.from_pretrained(config.model)
    _, held = hold_out(read_qa(config.qa.train[0]), fraction=0.4, seed=config.seed, content=lambda row: row.asked)
    everything = config.model_copy(update={"params": QuantizeParams()})
    found = [tokenizer.decode(sequence.ids) for sequence in read_held_out(everything).answers]
    assert len(found) == len(held) == 4
    assert all(any(row.question in text and row.answer in text for text in found) for row in held)
    assert (len(read_held_out(config).texts), len(read_held_out(config).answers)) == (4, 3)  # max_chunks, max_questions


def test_answers_that_do_not_fit_are_told_before_anything_is_written(config: QuantizeConfig, tmp_path: Path) -> None:
    short = config.model_copy(update={"sft_params": SftParams(validation_fraction=0.4, train=TrainParams(max_seq_length=16))})
    with pytest.raises(InvalidData, match="first 16 tokens"):
        run(short, workdir=tmp_path, progress=SilentProgress())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "answer", "above"),
    [
        (0.01, None, False),
        (0.011, 0.0, True),
        (0.0, 0.011, True),
        (-0.5, -0.5, False),
        (math.nan, 0.0, True),
        (0.0, math.inf, True),
        (None, None, False),
    ],
)
def test_either_increase_is_held_against_the_limit(text: float | None, answer: float | None, above: bool) -> None:
    figures = Figures(kl=0.0, top1=1.0, perplexity_increase=text, answer_perplexity_increase=answer)
    assert figures.above(0.01) is above


def test_a_model_differs_from_itself_by_nothing(config: QuantizeConfig) -> None:
    measured = measure(config.model, read_held_out(config))
    same = compare(measured, measured)
    assert (same.kl, same.top1, same.perplexity_increase, same.answer_perplexity_increase) == (0.0, 1.0, 0.0, 0.0)
