"""Stage evaluate: measures the models of a line one after another, keeps the parity ledger, applies the gates, writes the report."""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from evaluator import comparison, expectations, harness, judge, metrics, parity, plateau, report
from evaluator.answers import compile_formats, generate
from evaluator.card import model_card
from evaluator.curves import read_curves
from evaluator.entries import write_ledger
from evaluator.items import make_items
from evaluator.ledger import Ledger
from evaluator.line import GREEDY_PROBE_TOKENS, Material, Measured, Member, check_weights, members, read_material, work
from evaluator.meter import Meter
from evaluator.models import Loaded, common_dtype, loaded
from evaluator.perplexity import answer_sequences, loss, losses, total
from evaluator.report import Findings
from evaluator.schemes import read_schemes
from parampara import gates
from parampara.errors import OutOfMemory
from parampara.progress import Progress
from parampara.schemas.comparison import Comparison, Item
from parampara.schemas.expectations import FILE_NAME, Expectations, ServedModel
from parampara.schemas.stages import EvaluateConfig, EvaluateResult
from parampara.storage import fsync_tree


def run(config: EvaluateConfig, *, workdir: Path, progress: Progress, judge_api_key: str = "") -> EvaluateResult:
    """Evaluate a line of models into ``workdir / "output"`` (report.json, report.html, ledger.json, items.jsonl, expectations.json,
    README.md, and comparison.json where there is a champion).

    Raises:
        InvalidData: a model directory or held-out file is not what it has to be.
        InvalidRequest: a format of ``params.formats`` is not a regular expression, or the judge that is asked for has no endpoint or
            refuses to grade, or lm-evaluation-harness or one of its tasks is not here.
        Unavailable: the judge cannot be reached.
        HarnessFailed: lm-evaluation-harness ended without a result.
        OutOfMemory: a model does not fit this machine.
        Preempted: asked to stop; the next attempt measures again.
    """
    started = time.monotonic()
    compile_formats(config.params.formats)
    asked_judge = judge.find_judge(config, api_key=judge_api_key)
    progress.phase("read held-out data")
    material = read_material(config)
    line = members(config)
    check_weights(line)
    scratch = workdir / "probes"
    shutil.rmtree(scratch, ignore_errors=True)
    further = judge.work(asked_judge, config, len(material.held_out.questions)) + harness.work(config)
    meter = Meter(progress, total=sum(work(member, material) for member in line) + len(material.expected) + further)
    if asked_judge is not None:
        judge.require_answering(asked_judge, meter)
    if material.held_out.trained_on:
        asked = len(material.held_out.questions)
        asked_in = "training files" if config.preferences is None else "training files or preferences"
        meter.warn(f"{material.held_out.trained_on} of {asked} held-out questions are asked in the {asked_in} too; bring others.")
    try:
        tested = harness.evaluate(config, scratch=scratch, meter=meter)
        measured, recorded = measure_line(config, line, material, scratch=scratch, meter=meter)
        ledger = write_ledger(line, material, recorded, meter=meter)
        items = make_items(material.held_out.questions, measured)
        compared = _compare(config, items, meter)
        if asked_judge is not None:
            items = judge.judge_items(asked_judge, items, material.held_out.questions, measured, meter)
        values = metrics.collect(config, measured, material, ledger) | _plateau(config) | (compared.metrics() if compared else {})
        values |= judge.metrics(items) | harness.metrics(tested, config.params.harness)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    known = {name: value for name, value in sorted(values.items()) if math.isfinite(value)}
    for name in sorted(set(values) - set(known)):
        meter.warn(f"{name} is not finite and is left out; a gate on it fails.")
    results = gates.apply(config.gates, known)
    result = EvaluateResult(
        output=workdir / "output",
        metrics=known,
        gates=results,
        decision=gates.decide(results),
        samples=metrics.samples(material.held_out.questions, measured),
        schemes=read_schemes(config.quantized),
        seconds=time.monotonic() - started,
    )
    meter.phase("write report")
    curves = read_curves(dapt=config.dapt_adapter, sft=config.sft_adapter, dpo=config.dpo_adapter)
    _publish(
        config,
        Findings(result, ledger, curves, items, compared, config.params.judge, tested),
        measured[line[-1].name].expectations,
        workdir=workdir,
    )
    return result


def measure_line(
    config: EvaluateConfig, line: list[Member], material: Material, *, scratch: Path, meter: Meter
) -> tuple[dict[str, Measured], Ledger]:
    """Measure the models in the order of the line, one in memory at a time; recordings lie in ``scratch`` while they are needed.

    Raises:
        InvalidData: a directory is not a model directory.
        OutOfMemory, Preempted: see :func:`run`.
    """
    import torch

    dtype = common_dtype(config.merged, gpu=torch.cuda.is_available())
    ledger, measured = Ledger(line, meter), {}
    for member in line:
        meter.phase(f"load {member.name}")
        try:
            with loaded(member.name, member.directory, member.adapter, dtype=dtype) as model:
                recording = _record(model, config, material, scratch=scratch, meter=meter)
                measured[member.name] = _measure_held_out(model, config, material, meter=meter) if member.measured else Measured()
                if member is line[-1]:
                    measured[member.name].expectations = _expect(model, member, config, material, meter=meter)
        except (MemoryError, torch.OutOfMemoryError) as error:
            raise OutOfMemory(f"Out of memory while {member.name} was evaluated: {error}", param="params") from None
        ledger.add(recording)
    return measured, ledger


def _compare(config: EvaluateConfig, items: Sequence[Item], meter: Meter) -> Comparison | None:
    """Against the model that serves now, where there is one and its evaluation asked some of the same questions."""
    if config.champion is None:
        return None
    champion = comparison.read_items(config.champion)
    compared = comparison.compare(champion, items, seed=config.seed) if champion is not None else None
    if compared is None:
        meter.warn("The evaluation of the model that serves now shares no question with this one: the two are not compared.")
    return compared


def _plateau(config: EvaluateConfig) -> dict[str, float]:
    (curve,) = read_curves(sft=config.sft_adapter) or [None]
    return plateau.metrics(curve.validation) if curve is not None else {}


def _record(model: Loaded, config: EvaluateConfig, material: Material, *, scratch: Path, meter: Meter) -> parity.Recording:
    meter.phase(f"parity probes of {model.name}")
    new_tokens = min(config.params.max_new_tokens, GREEDY_PROBE_TOKENS)
    return parity.record(model, material.probes, directory=scratch, max_new_tokens=new_tokens, meter=meter)


def _expect(model: Loaded, member: Member, config: EvaluateConfig, material: Material, *, meter: Meter) -> Expectations | None:
    meter.phase(f"expectations of {model.name}")
    return expectations.measure(
        model,
        material.expected,
        name=cast(ServedModel, member.name),  # the last of a line is one of these
        directory=member.directory,
        max_new_tokens=min(config.params.max_new_tokens, GREEDY_PROBE_TOKENS),
        meter=meter,
    )


def _measure_held_out(model: Loaded, config: EvaluateConfig, material: Material, *, meter: Meter) -> Measured:
    questions = material.held_out.questions
    meter.phase(f"perplexity of {model.name}")
    text = loss(model, material.texts, meter)
    meter.phase(f"validation loss of {model.name}")
    limit = min(config.sft_params.train.max_seq_length, model.max_tokens)
    cut = [answer_sequences(model.tokenizer, [question.conversation], max_tokens=limit) for question in questions]
    told = iter(losses(model, [sequence for found in cut for sequence in found], meter))
    answer_losses = [next(told) if found else None for found in cut]
    meter.phase(f"answers of {model.name}")
    return Measured(
        text=text,
        answer=total([one for one in answer_losses if one is not None]),
        answer_losses=answer_losses,
        answers=generate(model, questions, max_new_tokens=config.params.max_new_tokens, meter=meter),
    )


def _publish(config: EvaluateConfig, findings: Findings, expected: Expectations | None, *, workdir: Path) -> None:
    output, staging = findings.result.output, workdir / "staging"
    shutil.rmtree(staging, ignore_errors=True)
    shutil.rmtree(output, ignore_errors=True)
    staging.mkdir()
    report.write(findings, directory=staging)
    (staging / "README.md").write_text(model_card(config, findings.result, findings.ledger), encoding="utf-8")
    if expected is not None:
        (staging / FILE_NAME).write_text(expected.model_dump_json() + "\n", encoding="utf-8")
    fsync_tree(staging)
    os.rename(staging, output)
