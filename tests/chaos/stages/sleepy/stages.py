"""The stage functions: real configs in, real directories and results out, no arithmetic in between."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

from parampara.errors import Diverged, InvalidData, OutOfMemory, Preempted, WorkdirBusy
from parampara.execution import stop
from parampara.gates import apply, decide
from parampara.progress import Progress
from parampara.schemas.ingest import IngestConfig, IngestResult
from parampara.schemas.stages import (
    DaptConfig,
    DeployConfig,
    DeployResult,
    DpoConfig,
    EvaluateConfig,
    EvaluateResult,
    GateResult,
    MergeConfig,
    MergeResult,
    QuantizeConfig,
    QuantizeResult,
    SchemeAttempt,
    SftConfig,
    TrainResult,
)
from parampara.storage import write_atomically


def dapt(config: DaptConfig, *, workdir: Path, progress: Progress) -> TrainResult:
    orders = json.loads(config.data.train[0].read_text())
    return _train(orders, config, workdir, progress)


def sft(config: SftConfig, *, workdir: Path, progress: Progress) -> TrainResult:
    return _train({"steps": 2, "seconds": 0}, config, workdir, progress)


def dpo(config: DpoConfig, *, workdir: Path, progress: Progress) -> TrainResult:
    return _train({"steps": 2, "seconds": 0}, config, workdir, progress)


def merge(config: MergeConfig, *, workdir: Path, progress: Progress) -> MergeResult:
    names = [(path / "adapter.txt").read_text() for path in config.adapters]
    output = _write(workdir, {"merged.txt": f"{names} {config.params.dtype}"})
    return MergeResult(
        output=output,
        dtype=config.params.dtype,
        tensors=1,
        merged_tensors=1,
        bytes=1,
        seconds=0,
        max_abs_delta=1,
        weights_sha256="0",
        peak_memory_bytes=1,
    )


def quantize(config: QuantizeConfig, *, workdir: Path, progress: Progress) -> QuantizeResult:
    output = _write(workdir, {"quantized.txt": (config.model / "merged.txt").read_text()})
    tried = [SchemeAttempt(scheme="bitsandbytes", ok=True, reason="asked for")]
    return QuantizeResult(
        output=output, scheme="bitsandbytes", attempts=tried, bytes=1, parent_bytes=2, quantized_modules=1, seconds=0, peak_memory_bytes=1
    )


def evaluate(config: EvaluateConfig, *, workdir: Path, progress: Progress) -> EvaluateResult:
    """Every metric is 0.5; the gates are judged for real."""
    gates = [
        GateResult(
            **gate.model_dump(exclude={"optional"}),
            value=0.5,
            passed=(gate.min is None or gate.min <= 0.5) and (gate.max is None or gate.max >= 0.5),
        )
        for gate in config.gates
    ]
    missed = [gate.action for gate in gates if not gate.passed]
    decision = "fail" if "fail" in missed else "hold" if "hold" in missed else "promote"
    assert config.quantized is not None
    assert (config.quantized / "quantized.txt").is_file()
    output = _write(workdir, {"report.json": json.dumps([gate.model_dump() for gate in gates])})
    return EvaluateResult(output=output, metrics={"half": 0.5}, gates=gates, decision=decision, seconds=0)


def deploy(config: DeployConfig, *, workdir: Path, progress: Progress) -> DeployResult:
    """A server of 40 tokens/s, where it is deployed with an evaluation; the gates are judged for real."""
    metrics = {"serving.tokens_per_second": 40.0} if config.evaluation is not None and (config.evaluation / "report.json").is_file() else {}
    results = apply(config.gates, metrics)
    if config.params.max_num_seqs == 4096:
        raise InvalidData("the model server refused the model")
    return DeployResult(
        model_name=config.model_name,
        alias=config.alias,
        url="http://model:8002",
        generation=config.generation,
        ready_seconds=0,
        first_answer="namaste",
        metrics=metrics,
        gates=results,
        decision=decide(results),
    )


def ingest(config: IngestConfig, *, workdir: Path, progress: Progress) -> IngestResult:
    """One chunk per line of a document; an empty document fails."""
    rows: list[dict[str, Any]] = []
    failed = {}
    for document in config.documents:
        lines = document.path.read_text().splitlines()
        if not lines:
            failed[document.file_id] = "the document is empty"
        for position, line in enumerate(lines):
            place = {"file_id": document.file_id, "filename": document.filename, "position": position, "page": None}
            rows.append({**place, "text": line, "tokens": len(line.split()), "embedding": [1.0, 0.0, 0.5]})
    output = _write(workdir, {"chunks.jsonl": "".join(json.dumps(row) + "\n" for row in rows)})
    return IngestResult(
        output=output,
        documents=len(config.documents),
        chunks=len(rows),
        tokens=sum(row["tokens"] for row in rows),
        seconds=0,
        failed=failed,
    )


def _train(orders: dict[str, Any], config: DaptConfig | SftConfig | DpoConfig, workdir: Path, progress: Progress) -> TrainResult:
    checkpoint = workdir / "checkpoints" / "step"
    checkpoint.parent.mkdir(exist_ok=True)
    first = int(checkpoint.read_text()) + 1 if checkpoint.exists() else 1
    if not orders.get("silent"):
        progress.phase("train")
    for step in range(first, orders["steps"] + 1):
        if stop.requested() and not orders.get("deaf"):
            raise Preempted(f"stopped after step {step - 1}")
        time.sleep(orders["seconds"])
        if step == orders.get("at"):
            _end(orders["exit"], orders.get("says", ""))
        with (workdir / "trace.jsonl").open("a") as trace:
            trace.write(json.dumps([os.getpid(), time.monotonic(), step]) + "\n")
        write_atomically(checkpoint, str(step).encode())
        if not orders.get("silent"):
            progress.step(step, orders["steps"], loss=1 / step)
        if "says" in orders:
            progress.event(orders["says"], said=orders["says"])
    output = _write(workdir, {"adapter.txt": f"{config.kind} {orders['steps']} steps, seed {config.seed}"})
    return TrainResult(
        output=output,
        backend="trl",
        backend_reason=orders.get("says", "double"),
        base_sha256="0",
        dtype="float32",
        steps=orders["steps"],
        epochs=1,
        trained_tokens=1,
        tokens_per_second=1,
        seconds=0,
        train_loss_first=1,
        train_loss_last=0.5,
        validation_loss_before=1,
        validation_loss_after=0.5,
        perplexity_before=2,
        perplexity_after=1.5,
        resumed_from_step=first - 1,
        peak_memory_bytes=1,
    )


def _end(how: str, says: str) -> None:
    match how:
        case "crash":
            raise RuntimeError("a bug in the stage")
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "diverged":
            raise Diverged("the loss is not finite at step 5; lower the learning rate")
        case "refuse":
            raise InvalidData(f"row 3 has no question{says}", param="datasets.qa")
        case "busy":
            raise WorkdirBusy("process 7 still works here")
        case "preempted":
            raise Preempted("stopped by itself")
        case "memory":
            raise OutOfMemory("out of memory at micro-batch 1")


def _write(workdir: Path, files: dict[str, str]) -> Path:
    aside = workdir / "output.tmp"
    aside.mkdir(exist_ok=True)
    for name, text in files.items():
        (aside / name).write_text(text)
    aside.rename(workdir / "output")
    return workdir / "output"
