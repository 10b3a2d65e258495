"""Stage evaluate over a whole tiny line: metrics, decision, files, and what it does when asked to stop."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from evaluator.comparison import read_items
from evaluator.evaluate import run
from evaluator.line import members
from parampara.errors import InvalidData, InvalidRequest, Preempted
from parampara.execution import stop
from parampara.progress import SilentProgress
from parampara.schemas.comparison import Comparison
from parampara.schemas.expectations import read_expectations
from parampara.schemas.ledger import ParityLedger
from parampara.schemas.metrics import is_reported
from parampara.schemas.stages import EvaluateParams, EvaluateResult, Gate
from tests.evaluator.lines import FORMATS, Line

GATES = [
    Gate(metric="parity.merged.recovered", min=0.99, action="fail"),
    Gate(metric="parity.quantized.top1", min=0.5, action="hold"),
    Gate(metric="dapt.perplexity_reduction", min=0.99, action="promote"),
]


class Recorded(SilentProgress):
    def __init__(self) -> None:
        self.phases: list[str] = []
        self.steps: list[tuple[int, int]] = []

    def phase(self, name: str) -> None:
        self.phases.append(name)

    def step(self, step: int, total: int, **metrics: float) -> None:
        self.steps.append((step, total))


@pytest.fixture(scope="module")
def done(line: Line, tmp_path_factory: pytest.TempPathFactory) -> tuple[EvaluateResult, Recorded]:
    progress = Recorded()
    return run(line.config(gates=GATES), workdir=tmp_path_factory.mktemp("work"), progress=progress), progress


def test_every_promised_metric_is_there(done: tuple[EvaluateResult, Recorded]) -> None:
    metrics = done[0].metrics
    models = ["base", "dapt", "sft", "quantized"]
    for prefix in ("perplexity", "exact", "validation_loss"):
        assert {f"{prefix}.{model}" for model in models} <= metrics.keys()
    parity = ["kl", "top1", "greedy_match", "greedy_prefix", "perplexity_change", "tokenizer", "chat_template", "generation_config"]
    for transition in ("dapt", "merged", "quantized"):
        assert {f"parity.{transition}.{name}" for name in parity} <= metrics.keys()
    assert {
        "dapt.perplexity_reduction",
        "sft.validation_loss.before",
        "sft.validation_loss.after",
        "sft.perplexity_change",
        "exact.kinds_mean",
        "quantize.perplexity_increase",
        "format.cites_rule",
        "exact.kind.star_lord",
        "exact.language.hinglish",
        "language.reference.hinglish",
        "parity.merged.differs_from_base",
    } <= metrics.keys()
    assert [name for name in metrics if not is_reported(name, formats=FORMATS)] == [], "a gate may name each of them"


def test_the_parts_agree_with_each_other(done: tuple[EvaluateResult, Recorded]) -> None:
    metrics = done[0].metrics
    assert metrics["dapt.perplexity_reduction"] == pytest.approx(1 - metrics["perplexity.dapt"] / metrics["perplexity.base"])
    assert metrics["sft.validation_loss.before"] == metrics["validation_loss.dapt"]
    assert metrics["sft.validation_loss.after"] == metrics["validation_loss.sft"]
    assert metrics["sft.perplexity_change"] == pytest.approx(metrics["perplexity.sft"] / metrics["perplexity.dapt"] - 1)
    assert metrics["exact.kinds_mean"] == pytest.approx((metrics["exact.kind.star_lord"] + metrics["exact.kind.year"]) / 2)
    assert abs(metrics["quantize.perplexity_increase"]) < 0.05
    assert metrics["size.quantized_bytes"] < metrics["size.merged_bytes"]


def test_gates_decide(done: tuple[EvaluateResult, Recorded]) -> None:
    result = done[0]
    assert [gate.passed for gate in result.gates] == [True, True, False]
    assert result.decision == "promote"


def test_the_output_is_the_report_and_nothing_else_remains(done: tuple[EvaluateResult, Recorded]) -> None:
    result = done[0]
    assert {path.name for path in result.output.iterdir()} == {
        "README.md",
        "report.json",
        "report.html",
        "ledger.json",
        "items.jsonl",
        "expectations.json",
    }
    assert {path.name for path in result.output.parent.iterdir()} == {"output"}
    assert EvaluateResult.model_validate_json((result.output / "report.json").read_text()).metrics == result.metrics
    ledger = ParityLedger.model_validate_json((result.output / "ledger.json").read_text())
    assert ledger.metrics() == {name: value for name, value in result.metrics.items() if name.startswith("parity.")}


def test_the_expectations_are_what_the_quantized_model_says(done: tuple[EvaluateResult, Recorded], line: Line) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    told = read_expectations(done[0].output)
    assert told is not None
    assert (told.model, len(told.probes), told.max_new_tokens) == ("quantized", 3, 6)
    probe, directory = told.probes[0], line.root / "quantized"
    tokenizer: Any = AutoTokenizer.from_pretrained(line.root / "base")
    messages = [message.model_dump() for message in probe.messages]
    assert probe.prompt == tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert probe.prompt_ids == tokenizer(probe.prompt, add_special_tokens=False).input_ids
    assert tokenizer.decode(probe.forced_ids).startswith("Answer: ")
    model: Any = AutoModelForCausalLM.from_pretrained(directory, device_map={"": "cpu"})
    with torch.inference_mode():
        rows = model(torch.tensor([probe.prompt_ids + probe.forced_ids])).logits[0].float().log_softmax(-1)[len(probe.prompt_ids) - 1 : -1]
    assert probe.forced_logprobs == pytest.approx([float(row[token]) for row, token in zip(rows, probe.forced_ids, strict=True)], abs=0.05)
    assert [ids[0] for ids in probe.top_ids] == rows.argmax(-1).tolist()
    assert len(probe.greedy_ids) <= 6


def test_every_question_is_stored_with_every_models_result(done: tuple[EvaluateResult, Recorded]) -> None:
    result, items = done[0], read_items(done[0].output)
    assert items is not None and len({item.id for item in items}) == len(items) == 8
    for model in ("base", "dapt", "sft", "quantized"):
        assert sum(item.models[model].exact for item in items) / 8 == result.metrics[f"exact.{model}"]
    assert all(0 < (item.models["sft"].loss or 0) < 50 for item in items)


def test_a_champion_is_compared_on_the_same_questions(done: tuple[EvaluateResult, Recorded], line: Line, tmp_path: Path) -> None:
    """The served model of the champion is the quantized one, that of this shorter line the merged one."""
    config = line.config(champion=done[0].output, dapt_adapter=None, dapt_merged=None, sft_adapter=None, quantized=None)
    result = run(config, workdir=tmp_path, progress=SilentProgress())
    stored = Comparison.model_validate_json((result.output / "comparison.json").read_text())
    assert stored.items == 8
    assert stored.metrics().items() <= result.metrics.items()
    assert stored.loss is not None and 0 < abs(stored.loss.value) < 0.1
    assert all(is_reported(name) for name in stored.metrics())


def test_samples_hold_every_models_answer_in_both_languages(done: tuple[EvaluateResult, Recorded]) -> None:
    samples = done[0].samples
    assert {sample.language for sample in samples} == {"english", "hinglish"}
    assert all(list(sample.answers) == ["base", "dapt", "sft", "quantized"] for sample in samples)


def test_progress_counts_up_to_its_total(done: tuple[EvaluateResult, Recorded]) -> None:
    progress = done[1]
    assert progress.steps[-1][0] == progress.steps[-1][1]
    assert [step for step, _ in progress.steps] == sorted(step for step, _ in progress.steps)
    assert "answers of quantized" in progress.phases


def test_a_wish_to_stop_leaves_nothing(line: Line, tmp_path: Path) -> None:
    stop.request()
    try:
        with pytest.raises(Preempted):
            run(line.config(), workdir=tmp_path, progress=SilentProgress())
    finally:
        stop.clear()
    assert not list(tmp_path.iterdir())


def test_a_broken_format_is_refused_before_any_model_is_loaded(line: Line, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="not a regular expression"):
        run(line.config(params=EvaluateParams.model_construct(formats={"x": "("})), workdir=tmp_path, progress=SilentProgress())


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({}, ["base", "dapt_adapter", "dapt", "sft_adapter", "sft", "quantized"]),
        ({"quantized": None}, ["base", "dapt_adapter", "dapt", "sft_adapter", "sft"]),
        ({"sft_adapter": None, "dapt_merged": None}, ["base", "dapt", "sft", "quantized"]),
        ({"dapt_adapter": None, "dapt_merged": None}, ["base", "sft_adapter", "sft", "quantized"]),
        (
            {"sft_merged": Path("sft_merged"), "dpo_adapter": Path("dpo_adapter")},
            ["base", "dapt_adapter", "dapt", "sft_adapter", "sft", "dpo_adapter", "dpo", "quantized"],
        ),
        (
            {"sft_merged": Path("sft_merged"), "dpo_adapter": Path("dpo_adapter"), "sft_adapter": None, "quantized": None},
            ["base", "dapt_adapter", "dapt", "sft", "dpo_adapter", "dpo"],
        ),
    ],
)
def test_members_of_a_shorter_line(line: Line, changes: dict[str, Any], names: list[str]) -> None:
    assert [member.name for member in members(line.config(**changes))] == names


def test_an_sft_adapter_without_the_model_it_was_trained_on_is_refused(line: Line) -> None:
    with pytest.raises(InvalidData) as caught:
        members(line.config(dapt_merged=None))
    assert caught.value.param == "dapt_merged"


@pytest.mark.parametrize("alone", ["sft_merged", "dpo_adapter"])
def test_a_dpo_adapter_and_the_model_it_was_trained_on_come_together(line: Line, alone: str) -> None:
    with pytest.raises(InvalidData, match="name both or neither") as caught:
        members(line.config(**{alone: Path("/x")}))
    assert caught.value.param == "sft_merged"


@pytest.mark.slow
def test_the_command_line_runs_the_stage(line: Line, tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(line.config(quantized=None).model_dump_json())
    command = [sys.executable, "-m", "evaluator", "evaluate", "--config", str(config), "--workdir", str(tmp_path / "work")]
    finished = subprocess.run(command, capture_output=True, text=True, check=False, timeout=110)
    assert finished.returncode == 0, finished.stderr
    stored = json.loads((tmp_path / "work" / "result.json").read_text())
    assert Path(stored["output"], "report.html").is_file()
