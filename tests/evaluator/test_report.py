"""The report: self-contained, escaped, and complete; loss curves read as the trainer writes them."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import pytest

from evaluator.curves import Curve, draw, read_curves
from evaluator.report import Findings, change, figure, render, write
from evaluator.schemes import read_schemes
from parampara.errors import InvalidData
from parampara.schemas.comparison import Comparison, Flip, Interval
from parampara.schemas.ledger import LedgerModel, LedgerProbes, LedgerTransition, ParityLedger
from parampara.schemas.stages import EvaluateResult, GateResult, Sample, SchemeAttempt

NASTY = "<script>alert('x')</script> & \"quotes\""
CURVE = Curve(title="DAPT: loss on books", train=[(1, 3.5), (2, 3.1), (3, 2.6)], validation=[(0, 3.4), (3, 2.7)])


def result() -> EvaluateResult:
    metrics = {
        "perplexity.base": 33.0,
        "perplexity.dapt": 12.0,
        "perplexity.sft": 11.0,
        "perplexity.quantized": 11.01,
        "dapt.perplexity_reduction": 0.636,
        "sft.perplexity_change": 4.43,
        "exact.kinds_mean": 0.713,
        "sft.validation_loss.before": 2.4,
        "sft.validation_loss.after": 1.3,
        "exact.base": 0.0,
        "exact.sft": 0.8,
        "exact.quantized": 0.79,
        "quantize.perplexity_increase": 0.0009,
        "size.merged_bytes": 100.0,
        "size.quantized_bytes": 60.0,
        "format.cites_rule": 0.97,
        "language.hinglish": 0.91,
    }
    missed = GateResult(metric="exact.quantized", value=None, min=0.7, max=None, action="hold", passed=False)
    sample = Sample(question=NASTY, language="english", expected=NASTY, answers={"base": NASTY, "sft": "Answer: Ketu"})
    return EvaluateResult(output=Path("/secret/place"), metrics=metrics, gates=[missed], decision="hold", samples=[sample], seconds=12.0)


def ledger() -> ParityLedger:
    base, sft = (
        LedgerModel(name=name, weights_sha256=digit * 64, tokenizer_sha256=None, chat_template_sha256="c" * 64)
        for name, digit in (("base", "a"), ("sft", "b"))
    )
    step = LedgerTransition(
        name="merged",
        reference="sft_adapter",
        candidate="sft",
        kl=2e-8,
        perplexity_change=0.0004,
        tokenizer=1,
        chat_template=0.75,
        generation_config=0,
    )
    probes = LedgerProbes(sha256="d" * 64, conversations=16, tokens=900, rendered_sha256="e" * 64)
    return ParityLedger(probes=probes, models=[base, sft], transitions=[step])


def findings(*curves: Curve) -> Findings:
    interval = Interval(value=0.05, low=-0.011, high=0.12)
    flip = Flip(id="f" * 64, question=NASTY, expected=NASTY, champion=NASTY, candidate="Answer: Ketu", to="won")
    comparison = Comparison(items=40, won=3, lost=1, exact=interval, loss=interval, flips=[flip])
    return Findings(result(), ledger(), curves, items=[], comparison=comparison)


def test_nothing_of_the_data_can_become_markup() -> None:
    page = render(findings(Curve(title=NASTY, train=CURVE.train, validation=CURVE.validation)))
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 4


def test_nothing_is_loaded_from_elsewhere() -> None:
    page = render(findings(CURVE))
    assert not re.findall(r"""(?:src|href)\s*=|url\(|@import|https?://""", page)


def test_gates_metrics_parity_and_samples_are_shown() -> None:
    text = _text(render(findings(CURVE)))
    for shown in [
        "hold",
        "not measured",
        "≥ 0.7",
        "exact.quantized",
        "63.6 %",
        "2.0e-08",
        "differs",
        "differs in 25.0 %",
        "+0.04 %",
        "b" * 12,
        "40 questions were put to both: 3 won, 1 lost",
        "+12.0 %",
        "97.0 %",
        "Answer: Ketu",
        "+0.09 %",
        "+443 % in SFT",
        "mean over kinds 71.3 %",
    ]:
        assert shown in text, shown


def test_json_is_the_result_without_the_machines_path(tmp_path: Path) -> None:
    write(findings(), directory=tmp_path)
    stored = EvaluateResult.model_validate_json((tmp_path / "report.json").read_text())
    assert stored == result().model_copy(update={"output": Path(".")})
    assert "/secret" not in (tmp_path / "report.json").read_text() + (tmp_path / "report.html").read_text()


def test_a_curve_is_well_formed_svg_inside_its_frame() -> None:
    svg = ElementTree.fromstring(draw(CURVE))
    width, height = (float(value) for value in svg.attrib["viewBox"].split()[2:])
    points = [pair.split(",") for line in svg.findall("polyline") for pair in line.attrib["points"].split()]
    assert len(points) == 5
    assert all(0 <= float(x) <= width and 0 <= float(y) <= height for x, y in points)


def test_a_long_history_is_thinned() -> None:
    svg = draw(Curve(title="long", train=[(float(step), 2.0) for step in range(5000)], validation=[]))
    assert len(re.findall(r"\d+\.\d+,\d+", svg)) <= 400


def test_curves_as_the_trainer_writes_them(tmp_path: Path) -> None:
    rows = [{"step": 0, "validation_loss": 3.6}, {"step": 1, "loss": 3.5, "tokens_per_s": 800.0}, {"step": 2, "loss": None}]
    rows += [{"step": 2, "loss": 3.0}, {"step": 2, "validation_loss": 3.1}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (curve,) = read_curves(dapt=tmp_path, sft=None)
    assert (curve.train, curve.validation) == ([(1, 3.5), (2, 3.0)], [(0, 3.6), (2, 3.1)])


def test_a_curve_says_how_fast_and_at_what_cost(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 3.5}\n{"step": 9, "loss": 2.5}\n')
    summary = {
        "backend": "trl",
        "trained_in": "nf4",
        "steps": 9,
        "tokens_per_second": 8100.4,
        "mfu": 0.41,
        "cost": 1.5,
        "peak_memory_bytes": 22.1e9,
    }
    (tmp_path / "training.json").write_text(json.dumps(summary))
    (curve,) = read_curves(dapt=None, sft=tmp_path)
    assert curve.note == "trl, base in nf4, 9 steps, 8,100 tokens/s, 41% of the device's peak, cost 1.50, peak memory 22.1 GB"
    (tmp_path / "training.json").write_text(json.dumps({**summary, "trained_in": "float32", "params": {"lora": None}}))
    assert read_curves(dapt=None, sft=tmp_path)[0].note.startswith("trl, every weight trained, in float32, 9 steps")
    (tmp_path / "training.json").write_text(json.dumps({**summary, "params": {"lora": {"r": 4}}}))
    assert read_curves(dapt=None, sft=tmp_path)[0].note == curve.note
    write(findings(curve), directory=tmp_path)
    assert "41% of the device" in (tmp_path / "report.html").read_text()


def test_the_summary_fills_in_a_missing_validation_history(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 3.5}\n{"step": 9, "loss": 2.5}\n')
    (tmp_path / "training.json").write_text('{"validation_loss_before": 3.6, "validation_loss_after": 2.7}')
    (curve,) = read_curves(dapt=None, sft=tmp_path)
    assert curve.validation == [(1, 3.6), (9, 2.7)]


def test_dpo_has_a_curve_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 0.69}\n{"step": 2, "loss": 0.5}\n')
    (curve,) = read_curves(dapt=None, sft=None, dpo=tmp_path)
    assert (curve.title, curve.train) == ("DPO: loss on preferences", [(1, 0.69), (2, 0.5)])


def test_an_adapter_without_history_has_no_curve(tmp_path: Path) -> None:
    assert read_curves(dapt=tmp_path, sft=None) == []


def test_figures() -> None:
    assert [figure(value) for value in (None, 0.0, 2e-8, 0.12345, 12345.6)] == ["not measured", "0", "2.0e-08", "0.1235", "12,346"]


class _TextOnly(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []

    def handle_data(self, data: str) -> None:
        self.parts.append(data)


def _text(page: str) -> str:
    parser = _TextOnly()
    parser.feed(page)
    return " ".join(parser.parts)


def test_every_scheme_that_was_tried_is_shown_with_its_figures_or_its_reason(tmp_path: Path) -> None:
    tried = [
        SchemeAttempt(scheme="unsloth", ok=False, reason="needs a GPU & more"),
        SchemeAttempt(scheme="w8a8", ok=False, reason="too much", perplexity_increase=0.0213, kl=0.01, top1=0.9, bytes=5),
        SchemeAttempt(scheme="bitsandbytes", ok=True, reason="fits", perplexity_increase=0.0024, kl=3e-5, top1=0.992, bytes=7),
    ]
    (tmp_path / "quantize.json").write_text(json.dumps({"attempts": [attempt.model_dump() for attempt in tried]}))
    assert read_schemes(tmp_path) == tried
    assert read_schemes(None) == read_schemes(tmp_path / "none") == []
    page = render(Findings(result().model_copy(update={"schemes": tried}), ledger(), [], items=[]))
    table = page[page.index("Ways to eight bits") : page.index("Answers of the SFT model")]
    assert table.count("not taken") == 2 and table.count("kept") == 1
    for told in ("needs a GPU &amp; more", change(0.0213), change(0.0024), "99.2 %"):
        assert told in table, told
    assert "Ways to eight bits" not in render(findings())


def test_a_torn_record_of_the_schemes_is_named(tmp_path: Path) -> None:
    (tmp_path / "quantize.json").write_text('{"attempts": [{"scheme": 1')
    with pytest.raises(InvalidData, match="not the quantizer's record"):
        read_schemes(tmp_path)
