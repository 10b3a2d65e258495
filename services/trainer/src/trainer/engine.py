"""The line that all training stages share: load, measure, train (or go on), measure again, write the adapter.

A stage brings its rows; everything else (backend, precision, checkpoints, result) is here. Read :func:`train_adapter` top
to bottom.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from parampara.errors import InvalidData
from parampara.execution import stop
from parampara.manifest import weights_fingerprint
from parampara.progress import Progress
from parampara.schemas.stages import DpoConfig, MicroBatchReduction, TrainResult
from parampara.schemas.training import AdapterParams
from trainer import faults, full, memory, sharding, tracking
from trainer.backends import Choice
from trainer.building import Config, build_trainer, load_model, optimizer_taken, run_name
from trainer.checkpoints import CheckpointStore
from trainer.layout import Layout
from trainer.loop import Ledger, RunContext, append_metrics, load_trainable, read_ledger, truncate_metrics
from trainer.methods import trained_in
from trainer.output import read_lineage, write_output
from trainer.plan import Plan
from trainer.precision import Hardware, choose_hardware
from trainer.ranks import ALONE, Group
from trainer.rows import StageData
from trainer.speed import Speedometer
from trainer.steps import announce, fit_layout, plan_steps

_VERSIONED = ("torch", "transformers", "trl", "peft", "accelerate", "safetensors", "tokenizers", "unsloth", "unsloth_zoo", "bitsandbytes")


def train_adapter(
    config: Config, *, choice: Choice, build: Callable[[Any, Any], StageData], workdir: Path, progress: Progress, group: Group = ALONE
) -> TrainResult:
    """Train one LoRA adapter on ``config.model``, or without ``lora`` the model itself, and leave it in ``workdir/"output"``.

    All ranks of ``group`` run this and train together; rank 0 alone writes, and reports to ``progress``.

    Raises:
        InvalidData, InvalidRequest: configuration, model directory or data can not work.
        Preempted, Diverged, OutOfMemory: see :mod:`parampara.errors`.
    """
    with stop.interruptible("while the data were read"):
        hardware = _announced_hardware(config, choice=choice, progress=progress, group=group)
        _require_model_directory(config.model)
        if config.params.lora is None:
            full.check(config.model, config.params.train, hardware, progress)
        directory = config.tracking_directory or workdir / "tracking"
        tracking.prepare(config.tracking, directory=directory, run=run_name(config, workdir))
        progress.phase("prepare data")
        base_sha256 = weights_fingerprint(config.model)
        lineage = read_lineage(config.model, base_sha256)
        tokenizer = load_tokenizer(config.model)
        with group.in_turn():
            data = build(config, tokenizer)
    with _out_of_memory_named(config.params):
        progress.phase("load model")
        with stop.interruptible("while the model was loaded"):
            model = load_model(config, choice, hardware, group)
            layout = fit_layout(config, choice=choice, hardware=hardware, model=model, tokenizer=tokenizer)
            plan = plan_steps(config, data, layout)
            announce(config, data, layout, plan, progress)
            facts = _resume_facts(
                config, choice=choice, hardware=hardware, data=data, plan=plan, layout=layout, base_sha256=base_sha256, group=group
            )
            store = CheckpointStore(workdir / "checkpoints", facts=facts, keep=config.params.train.keep_checkpoints)
            trainer = build_trainer(
                config, choice=choice, hardware=hardware, model=model, tokenizer=tokenizer, data=data, plan=plan, workdir=workdir
            )
            group.seed(config.seed)
            if not group.first:
                tracking.silence(trainer)
            if (taken := optimizer_taken(trainer)) != hardware.optimizer:
                progress.event(f"the backend takes the optimizer {taken} instead of {hardware.optimizer} here", level="warn")
            resumed = _attach(
                trainer,
                config,
                hardware=hardware,
                data=data,
                plan=plan,
                layout=layout,
                store=store,
                workdir=workdir,
                progress=progress,
                group=group,
            )
        if resumed is None:
            _measure_before(trainer, progress)
        progress.phase("train")
        trainer.train(resume_from_checkpoint=None if resumed is None else str(resumed))
        progress.phase("validate")
        after = trainer.run.validate(trainer.model)
        append_metrics(trainer.run.metrics_path, plan.steps, {"validation_loss": after, **trainer.held_out_figures})
        outcome = _choose_step(trainer, after, progress)
    sharding.put_together(trainer.model, keep=group.first)
    progress.phase("write adapter")
    result = _result(
        config,
        choice=choice,
        hardware=hardware,
        trainer=trainer,
        data=data,
        outcome=outcome,
        base_sha256=base_sha256,
        workdir=workdir,
        resumed=resumed,
    )
    if group.first:
        write_output(result, config=config, model=trainer.model, lineage=lineage, data=data, metrics=trainer.run.metrics_path)
    return result


def load_tokenizer(model: Path) -> Any:
    """The model's own tokenizer, unchanged.

    Raises:
        InvalidData: there is none, or it can not be read.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(model), trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError) as error:
        raise InvalidData(f"{model}: its tokenizer can not be read ({str(error).splitlines()[0][:200]}).", param="model") from None


def _announced_hardware(config: Config, *, choice: Choice, progress: Progress, group: Group) -> Hardware:
    """Device, format and optimizer of the run, told with what about them is not as it was asked for."""
    train = config.params.train
    hardware = choose_hardware(train.precision, train.optim)
    progress.event(f"backend {choice.name}: {choice.reason}", backend=choice.name, device=hardware.device.type, dtype=hardware.dtype)
    if train.load_in_4bit:
        progress.event("the adapter is trained on a 4-bit copy of the base and merged into the base itself: the two differ", level="warn")
    if group.size == 1 or (taken := sharding.optimizer_for_shards(hardware.optimizer)) == hardware.optimizer:
        return hardware
    progress.event(
        f"several processes take the optimizer {taken} instead of {hardware.optimizer}, whose kernels know no shards", level="warn"
    )
    return replace(hardware, optimizer=taken)


def _require_model_directory(path: Path) -> None:
    if not (path / "config.json").is_file():
        raise InvalidData(f"{path} is not a model directory: it has no config.json.", param="model")


def _resume_facts(
    config: Config, *, choice: Choice, hardware: Hardware, data: StageData, plan: Plan, layout: Layout, base_sha256: str, group: Group
) -> dict[str, Any]:
    """Everything that must be equal for a resumed run to be the same run. Not paths, retention, trackers and prices."""
    settings = config.model_dump(mode="json", exclude={"model", "data", "tracking", "tracking_directory", "machine"})
    for free in ("checkpoint_steps", "keep_checkpoints", "load_best", "logging_steps"):
        settings["params"]["train"].pop(free)
    return {
        "settings": settings,
        "backend": choice.name,
        "device": hardware.device.type,
        "dtype": hardware.dtype,
        "optimizer": hardware.optimizer,
        "data": data.sha256,
        "order": plan.sha256,
        "layout": [layout.kind, layout.max_tokens],
        "base": base_sha256,
        "versions": library_versions(),
        **({"processes": group.size} if group.size > 1 else {}),
    }


def library_versions() -> dict[str, str]:
    installed = {}
    for name in _VERSIONED:
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return installed


def _attach(
    trainer: Any,
    config: Config,
    *,
    hardware: Hardware,
    data: StageData,
    plan: Plan,
    layout: Layout,
    store: CheckpointStore,
    workdir: Path,
    progress: Progress,
    group: Group,
) -> Path | None:
    """Give the trainer its run, fresh or from the newest checkpoint that verifies; return that checkpoint's path."""
    found, skipped = store.newest()
    group.require_equal([store.facts, None if found is None else found.step], "data, settings and checkpoints")
    for reason in skipped:
        progress.event(f"checkpoint passed over: {reason}", level="warn")
    ledger = Ledger() if found is None else read_ledger(found.path)
    train = config.params.train
    run = RunContext(
        plan=plan,
        rows=data.train,
        layout=layout,
        store=store,
        progress=progress,
        metrics_path=workdir / "metrics.jsonl" if group.first else group.scratch(workdir) / "metrics.jsonl",
        stopped=group.stopped,
        validate=lambda model: trainer.held_out_loss(model, data.validation, layout=layout, hardware=hardware),
        train=train,
        full=config.params.lora is None,
        speed=Speedometer.of(trainer.model, hardware=hardware, machine=config.machine, processes=group.size),
        ledger=ledger,
        group=group,
    )
    truncate_metrics(run.metrics_path, -1 if found is None else found.step, evaluated=ledger.validation_after)
    trainer.start(run)
    if found is not None:
        progress.event(f"resumed from the checkpoint of step {found.step}", step=found.step)
    return None if found is None else found.path


def _measure_before(trainer: Any, progress: Progress) -> None:
    """Validation loss of the base alone (the model before its first step), and random generators as if it had not been measured."""
    progress.phase("validate base")
    with torch.random.fork_rng(), nullcontext() if trainer.run.full else trainer.model.disable_adapter():
        before = trainer.run.validate(trainer.model)
    trainer.model.train()
    trainer.run.ledger.validation_before = before
    append_metrics(trainer.run.metrics_path, 0, {"validation_loss": before})
    trainer.track({"validation_loss": before})


@dataclass(frozen=True)
class _Outcome:
    """Which step's weights the model holds, and their validation loss; the best ones where the run was evaluated on the way."""

    step: int
    loss: float
    best_step: int | None
    best_loss: float | None


def _choose_step(trainer: Any, after: float, progress: Progress) -> _Outcome:
    """Stay with the last step, or with ``load_best`` put the weights of the best one into the model."""
    run = trainer.run
    last, best = run.plan.steps, run.ledger.best_step
    if best is None or run.ledger.validation_after[str(best)] >= after:
        return _Outcome(last, after, *((None, None) if run.train.eval_steps is None else (last, after)))
    lowest = run.ledger.validation_after[str(best)]
    if run.train.load_best:
        found = run.store.at(best)
        if found is not None:
            load_trainable(trainer.model, found.path)
            if run.plan.steps != best and trainer.held_out_figures:
                run.validate(trainer.model)  # for the figures beside the loss
            progress.event(f"the weights are those of step {best}: validation loss {lowest:.4f}, {after:.4f} after the last", step=best)
            return _Outcome(best, lowest, best, lowest)
        progress.event(f"the checkpoint of the best step ({best}) is damaged or gone; the weights are those of the last", level="warn")
    return _Outcome(last, after, best, lowest)


def _result(
    config: Config,
    *,
    choice: Choice,
    hardware: Hardware,
    trainer: Any,
    data: StageData,
    outcome: _Outcome,
    base_sha256: str,
    workdir: Path,
    resumed: Path | None,
) -> TrainResult:
    ledger, plan = trainer.run.ledger, trainer.run.plan
    rate = ledger.tokens / max(ledger.seconds, 1e-9)
    measured = trainer.run.speed.read(tokens_per_second=rate, seconds=ledger.seconds)
    span = max(1, min(10, len(ledger.losses) // 2))
    by_pairs = isinstance(config, DpoConfig)
    return TrainResult(
        output=workdir / "output",
        backend=choice.name,
        backend_reason=choice.reason,
        base_sha256=base_sha256,
        dtype=hardware.dtype,
        trained_in=trained_in(config.params, hardware),
        optimizer=optimizer_taken(trainer),
        steps=plan.steps,
        epochs=plan.epoch_at(plan.steps),
        trained_tokens=ledger.tokens,
        tokens_per_second=rate,
        seconds=ledger.seconds,
        train_loss_first=sum(ledger.losses[:span]) / span,
        train_loss_last=sum(ledger.losses[-span:]) / span,
        validation_loss_before=ledger.validation_before,
        validation_loss_after=outcome.loss,
        perplexity_before=None if by_pairs else math.exp(min(ledger.validation_before, 700.0)),
        perplexity_after=None if by_pairs else math.exp(min(outcome.loss, 700.0)),
        reward_accuracy=trainer.held_out_figures.get("reward_accuracy"),
        reward_margin=trainer.held_out_figures.get("reward_margin"),
        adapter_step=outcome.step,
        best_step=outcome.best_step,
        best_validation_loss=outcome.best_loss,
        resumed_from_step=0 if resumed is None else int(resumed.name.rpartition("-")[2]),
        packing_efficiency=ledger.tokens / ledger.positions,
        peak_memory_bytes=int(measured["peak_memory_bytes"]),
        flops_per_token=trainer.run.speed.flops_per_token,
        mfu=measured.get("mfu"),
        cost=measured.get("cost"),
        processes=trainer.run.group.size,
        micro_batch_reductions=[MicroBatchReduction(**reduction) for reduction in ledger.reductions],
        library_versions=library_versions(),
    )


@contextmanager
def _out_of_memory_named(params: AdapterParams) -> Iterator[None]:
    """For what no smaller micro-batch helps: loading, the optimizer's state, validation. :class:`StageLoop` handles the steps."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not faults.is_out_of_memory(error):
            raise
        raise memory.out_of_memory(params.train, error, full=params.lora is None) from error
