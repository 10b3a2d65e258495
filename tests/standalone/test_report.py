"""The page that the demo writes: complete, self-contained, and safe with whatever a model says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from standalone.demo import report
from standalone.demo.curves import curve


@pytest.fixture
def told() -> dict[str, Any]:
    citation = {"marker": "[1]", "title": "stars.txt", "text": "Ashwini is ruled by Ketu.", "cited": True, "attributed_by": "gateway"}
    return {
        "run": "run_1",
        "recipe": "tiny-cpu.yaml",
        "model": "ft:tiny:org:kp:1",
        "base_model": "tiny-llama",
        "alias": "kp",
        "gate": "promote",
        "base_url": "http://127.0.0.1:8000/v1",
        "vector_store": "vs_1",
        "machine": "x86_64",
        "timings": {"run": 61.0, "total": 75.0},
        "stages": [
            {"stage": "dapt", "status": "succeeded", "seconds": 20.0, "reused": False, "figure": "perplexity 9 → 5", "artifact": None}
        ],
        "curves": {"dapt": [{"step": 1, "loss": 3.0}, {"step": 2, "loss": None}, {"step": 3, "loss": 2.0, "eval_loss": 2.5}], "sft": []},
        "metrics": {"exact.base": 0.1, "parity.merged.kl": 1e-7, "parity.merged.top1": 1.0, "parity.live.top1": 0.9876},
        "gates": [{"metric": "exact.sft", "value": None, "min": 0.5, "max": None, "action": "hold", "passed": False}],
        "samples": [{"question": "Who?", "language": "english", "expected": "Ketu", "answers": {"sft": "Answer: Ketu", "base": "cow"}}],
        "results": {"quantize": {"attempts": [{"scheme": "unsloth", "ok": False, "reason": "needs a GPU"}]}},
        "answers": [
            {
                "question": {"text": "Who?", "language": "english", "streamed": True, "expected": "Ketu"},
                "text": "Answer: <script>alert(1)</script>",
                "model": "ft:tiny:org:kp:1",
                "citations": [citation, {**citation, "marker": "[2]", "cited": False, "attributed_by": None}],
                "seconds": 1.2,
                "first_token_seconds": 0.4,
                "matches": False,
            }
        ],
    }


def test_both_files_are_written_and_hold_the_line(told: dict[str, Any], tmp_path: Path) -> None:
    page = report.write(told, tmp_path / "demo").read_text(encoding="utf-8")
    assert json.loads((tmp_path / "demo" / "report.json").read_text(encoding="utf-8")) == told
    for words in (
        "perplexity 9 → 5",
        "1:15",
        "exact.sft",
        "missing",
        "Ashwini is ruled by Ketu.",
        "1.00e-07",
        "0.9876",
        "needs a GPU",
        "<svg",
        "Answer: Ketu",
    ):
        assert words in page, words
    assert page.index(">base</th>") < page.index(">sft</th>")


def test_the_page_loads_nothing_and_runs_nothing(told: dict[str, Any], tmp_path: Path) -> None:
    page = report.write(told, tmp_path).read_text(encoding="utf-8")
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "src=" not in page
    assert "<link" not in page


def test_a_curve_skips_steps_without_a_finite_loss() -> None:
    drawn = curve([{"step": 1, "loss": 2.0}, {"step": 2, "loss": float("nan")}, {"step": 3, "loss": 1.0}], title="a<b")
    assert drawn.count("<circle") == 2
    assert "a&lt;b" in drawn
    assert "nan" not in drawn
    assert "no steps" in curve([], title="x")


@pytest.mark.parametrize(
    ("kind", "result", "words"),
    [
        ("dapt", {"perplexity_before": 90.0, "perplexity_after": 30.0, "backend": "trl"}, "perplexity 90.0 → 30.0 (trl)"),
        (
            "dpo",
            {**dict.fromkeys(("validation_loss_before", "validation_loss_after"), 0.5), "reward_accuracy": 0.9, "reward_margin": 1.2}
            | {"backend": "trl", "perplexity_before": None},
            "loss of pairs 0.500 → 0.500, better answers preferred in 90%, margin 1.20 (trl)",
        ),
        ("merge", {"merged_tensors": 28, "tensors": 39, "dtype": "float16"}, "28 of 39"),
        ("quantize", {"parent_bytes": 4_700_000, "bytes": 3_200_000, "scheme": "bitsandbytes"}, "4.7 → 3.2 MB"),
        ("evaluate", {"metrics": {}}, "exact answers 10% → 80%, mean of kinds 70%, perplexity of books in SFT 600 → 3258"),
        ("deploy", {"ready_seconds": 20.4}, "20 s"),
        ("dapt", None, ""),
    ],
)
def test_every_stage_has_its_key_figure(kind: str, result: dict[str, Any] | None, words: str) -> None:
    job = {
        "name": kind,
        "kind": kind,
        "status": "succeeded",
        "result": result,
        "reused_from": None,
        "artifact_id": None,
        "started_at": 1,
        "finished_at": 3,
    }
    measured = {"exact.base": 0.1, "exact.quantized": 0.8, "exact.kinds_mean": 0.7}
    books = {"perplexity.dapt": 600.0, "perplexity.sft": 3258.0, "sft.perplexity_change": 4.43}
    row = report.stage_row(job, measured | books)
    assert words in row["figure"]
    assert row["seconds"] == 2


def test_a_line_with_dpo_tells_what_that_did_to_the_answers_and_has_a_column_for_it(told: dict[str, Any], tmp_path: Path) -> None:
    job = {"name": "evaluate", "kind": "evaluate", "status": "succeeded", "started_at": None, "reused_from": None, "artifact_id": None}
    measured = {"exact.base": 0.1, "exact.sft": 0.9, "exact.dpo": 0.7, "dpo.exact_change": -0.2}
    assert report.stage_row({**job, "result": {"x": 1}}, measured)["figure"] == "exact answers 10% → 70%, -20 points in DPO"
    told["samples"][0]["answers"] = {"quantized": "q", "dpo": "d", "sft": "s", "base": "b"}
    page = report.write(told, tmp_path).read_text(encoding="utf-8")
    assert page.index(">sft</th>") < page.index(">dpo</th>") < page.index(">quantized</th>")


def test_the_deployment_tells_its_speed_and_its_parity() -> None:
    metrics = {"parity.live.top1": 0.987, "serving.tokens_per_second": 61.4}
    job = {"name": "deploy", "kind": "deploy", "status": "succeeded", "started_at": None, "reused_from": None, "artifact_id": None}
    measured = report.stage_row({**job, "result": {"ready_seconds": 29.4, "metrics": metrics}}, {})
    assert measured["figure"] == "answered after 29 s, same top token as evaluated 98.7%, 61 tokens/s"
    assert report.stage_row({**job, "result": {"ready_seconds": 29.4}}, {})["figure"] == "answered after 29 s"
