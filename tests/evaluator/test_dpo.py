"""A line with DPO: which of its models is the final one, what is told of the preferences, and its parity ledger."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from evaluator.comparison import compare, read_items
from evaluator.evaluate import run
from evaluator.heldout import read_held_out
from evaluator.models import load_tokenizer
from parampara.progress import SilentProgress
from parampara.schemas.expectations import read_expectations
from parampara.schemas.ledger import ParityLedger
from parampara.schemas.metrics import is_of_dpo, is_reported
from parampara.schemas.stages import EvaluateResult, Gate, PreferenceData, QaData, SftParams
from tests.evaluator.lines import FORMATS, LEARNT, Line, rows, write_rows

GATES = [Gate(metric="dpo.reward_accuracy", min=0.8, action="fail"), Gate(metric="dpo.reward_margin", min=2, action="hold")]
MODELS = ["base", "dapt", "sft", "dpo", "quantized"]


@pytest.fixture(scope="module")
def done(dpo_line: Line, tmp_path_factory: pytest.TempPathFactory) -> EvaluateResult:
    return run(dpo_line.dpo_config(gates=GATES), workdir=tmp_path_factory.mktemp("work"), progress=SilentProgress())


@pytest.fixture(scope="module")
def ledger(done: EvaluateResult) -> ParityLedger:
    return ParityLedger.model_validate_json((done.output / "ledger.json").read_text())


def test_what_was_learnt_comes_from_the_adapter_and_what_it_did_is_measured(done: EvaluateResult) -> None:
    metrics = done.metrics
    assert metrics["dpo.validation_loss.before"] == LEARNT["validation_loss_before"]
    assert metrics["dpo.validation_loss.after"] == LEARNT["validation_loss_after"]
    assert (metrics["dpo.reward_accuracy"], metrics["dpo.reward_margin"]) == (0.875, 1.25)
    assert metrics["dpo.exact_change"] == metrics["exact.dpo"] - metrics["exact.sft"]
    assert metrics["dpo.perplexity_change"] == pytest.approx(metrics["perplexity.dpo"] / metrics["perplexity.sft"] - 1)
    assert metrics["perplexity.dpo"] != metrics["perplexity.sft"]
    assert [name for name in metrics if not is_reported(name, formats=FORMATS)] == [], "a gate may name each of them"


def test_quantization_is_held_against_the_final_merged_model(done: EvaluateResult) -> None:
    metrics = done.metrics
    assert metrics["quantize.perplexity_increase"] == pytest.approx(metrics["perplexity.quantized"] / metrics["perplexity.dpo"] - 1)
    assert abs(metrics["quantize.perplexity_increase"]) < 0.05
    assert metrics["quantize.exact_change"] == metrics["exact.quantized"] - metrics["exact.dpo"]


def test_gates_on_preferences_decide(done: EvaluateResult) -> None:
    assert ([gate.passed for gate in done.gates], done.decision) == ([True, False], "hold")


def test_every_model_answers_side_by_side(done: EvaluateResult) -> None:
    assert all(list(sample.answers) == MODELS for sample in done.samples)
    items = read_items(done.output)
    assert items is not None and all(list(item.models) == MODELS for item in items)


def test_the_ledger_follows_each_adapter_into_its_merge(ledger: ParityLedger, done: EvaluateResult) -> None:
    steps = [(step.name, step.reference, step.candidate) for step in ledger.transitions]
    assert steps == [
        ("dapt", "dapt_adapter", "dapt"),
        ("sft", "sft_adapter", "sft"),
        ("merged", "dpo_adapter", "dpo"),
        ("quantized", "dpo", "quantized"),
    ]
    for step, limit in zip(ledger.transitions, (1e-6, 1e-4, 1e-4, 1e-2), strict=True):
        assert step.kl is not None and step.kl < limit, step.name
        assert step.tokenizer == step.chat_template == step.generation_config == step.differs_from_base == 1.0
    for step in ledger.transitions[:3]:
        assert step.adapter_base == 1.0 and step.recovered is not None and step.recovered > 0.999, step.name
    assert ledger.metrics() == {name: value for name, value in done.metrics.items() if name.startswith("parity.")}


def test_the_report_shows_the_preferences(done: EvaluateResult) -> None:
    page = (done.output / "report.html").read_text()
    for shown in (
        "DPO: loss on preferences",
        "Answers of the DPO model",
        "SFT adapter → merged SFT model",
        "DPO adapter → final merged model",
        "better answers gained more in 87.5 % of the pairs",
        "base to DPO",
    ):
        assert shown in page, shown


def test_the_card_says_that_preferences_were_learnt(done: EvaluateResult) -> None:
    card = ModelCard((done.output / "README.md").read_text())
    assert "direct preference optimization, each by LoRA, merged into the base and quantized" in card.text
    assert "the better one gained more in 87.5%, by 1.25 on average" in card.text
    assert "dpo" in card.data.to_dict()["tags"]


def test_a_line_that_ends_unquantized_serves_the_dpo_model(done: EvaluateResult, dpo_line: Line, tmp_path: Path) -> None:
    """Only base, merged SFT and DPO models: what is expected of the endpoint and compared with a champion is the last one's."""
    shorter = dpo_line.dpo_config(dapt_adapter=None, dapt_merged=None, sft_adapter=None, quantized=None, champion=done.output)
    result = run(shorter, workdir=tmp_path, progress=SilentProgress())
    told = read_expectations(result.output)
    assert told is not None and told.model == "dpo"
    ledger = ParityLedger.model_validate_json((result.output / "ledger.json").read_text())
    assert [(step.name, step.candidate) for step in ledger.transitions] == [("merged", "dpo")]
    champion, items = read_items(done.output), read_items(result.output)
    assert champion is not None and items is not None
    compared = compare(champion, items, seed=1)
    assert compared is not None and compared.loss is not None
    losses = [(new.models["dpo"].loss or 0) - (old.models["quantized"].loss or 0) for old, new in zip(champion, items, strict=True)]
    assert compared.loss.value == pytest.approx(sum(losses) / len(losses))


def test_an_adapter_that_says_nothing_of_preferences_leaves_their_metrics_out(dpo_line: Line, tmp_path: Path) -> None:
    from evaluator.curves import preference_metrics

    assert preference_metrics(tmp_path) == {}
    (tmp_path / "training.json").write_text(json.dumps({**LEARNT, "reward_margin": None, "reward_accuracy": float("nan")}))
    assert set(preference_metrics(tmp_path)) == {"dpo.validation_loss.before", "dpo.validation_loss.after"}
    assert all(is_of_dpo(name) for name in preference_metrics(dpo_line.root / "dpo_adapter"))


def test_held_out_questions_that_are_asked_in_the_preferences_are_counted(line: Line, tmp_path: Path) -> None:
    """The split of SFT holds them out of its own rows and knows nothing of the pairs; those that DPO holds out itself do not count."""
    path, params = line.root / "qa.jsonl", SftParams(validation_fraction=0.4)
    tokenizer = load_tokenizer(line.root / "base")
    config = line.config(qa=QaData(train=[path]), sft_params=params)
    held = [question.text for question in read_held_out(config, tokenizer).questions]
    trained = next(row["messages"][0]["content"] for row in rows() if row["messages"][0]["content"] not in held)
    pairs = [{"question": text, "chosen": "a", "rejected": "b"} for text in (*held, trained)]
    write_rows(tmp_path / "pairs.jsonl", pairs)
    write_rows(tmp_path / "others.jsonl", [{**pairs[0], "question": "Another?"}])
    validated = PreferenceData(train=[tmp_path / "pairs.jsonl"], validation=[tmp_path / "others.jsonl"])
    assert read_held_out(config.model_copy(update={"preferences": validated}), tokenizer).trained_on == len(held)
    halved = config.dpo_params.model_copy(update={"validation_fraction": 0.5})
    split = config.model_copy(update={"preferences": PreferenceData(train=[tmp_path / "pairs.jsonl"]), "dpo_params": halved})
    assert 0 < read_held_out(split, tokenizer).trained_on < len(held)
    assert read_held_out(config, tokenizer).trained_on == 0
