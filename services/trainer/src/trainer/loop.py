"""What a run adds to SFTTrainer: a planned order, exact checkpoints, a stop within one micro-batch, and divergence caught.

:class:`StageLoop` is a mixin over the SFTTrainer of a backend. It replaces the trainer's own saving, loading, logging, batch
order and gradient accumulation, and leaves forward, backward, optimizer and schedule to the library. For the library one
optimizer step is one batch; here that batch is a list of micro-batches, as many as the step's rows need.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from parampara.errors import Diverged, Preempted
from parampara.progress import Progress
from parampara.schemas.stages import TrainParams
from parampara.storage import fsync_file, write_atomically
from trainer import faults, memory, rng, sharding, shares
from trainer.checkpoints import CheckpointStore
from trainer.divergence import require_finite, require_no_runaway
from trainer.layout import Layout, documents_in
from trainer.plan import Plan
from trainer.precision import Hardware
from trainer.ranks import ALONE, Group
from trainer.rows import IGNORED, TokenRow
from trainer.speed import Speedometer
from trainer.state_tree import join_tensors, split_tensors
from trainer.tensor_files import save_tensors
from trainer.validation import mean_loss

ADAPTER = "adapter.safetensors"
STATE = "state.json"
STATE_TENSORS = "state.safetensors"
LIBRARY_STATE = "trainer_state.json"
"""The name under which the library reads its own step counter back."""
_MAX_SKIPPED_STEPS = 50
"""float16: steps in a row whose gradients overflow at every loss scale before the run counts as diverged."""


@dataclass
class Ledger:
    """What the run itself counts; saved in each checkpoint, so that it goes on exactly after a resume."""

    tokens: int = 0
    positions: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    """Mean training loss per learnt token of each step so far."""
    overflows: int = 0
    parts: int = 1
    """The token budget of a micro-batch is the layout's, divided by this, see :mod:`trainer.memory`."""
    reductions: list[dict[str, int]] = field(default_factory=list)
    """``{"step", "parts"}`` of each time that memory ran out."""
    validation_before: float | None = None
    validation_after: dict[str, float] = field(default_factory=dict)
    """Validation loss by step, of the evaluations while training."""

    @property
    def best_step(self) -> int | None:
        """The evaluated step of the lowest validation loss, the earlier one of equals."""
        return int(min(self.validation_after, key=lambda step: (self.validation_after[step], int(step)))) if self.validation_after else None


@dataclass
class RunContext:
    """Everything around the trainer."""

    plan: Plan
    rows: Sequence[TokenRow]
    layout: Layout
    store: CheckpointStore
    progress: Progress
    metrics_path: Path
    stopped: Callable[[], bool]
    validate: Callable[[Any], float]
    """Model to mean validation loss."""
    train: TrainParams
    speed: Speedometer
    full: bool = False
    """Every weight is trained: there is no adapter."""
    ledger: Ledger = field(default_factory=Ledger)
    group: Group = ALONE
    """The processes that train together; each has all rows and takes its share of every step."""


class StageLoop:
    """Mixin: see the module. The attributes that it does not set come from ``transformers.Trainer``."""

    run: RunContext
    args: Any
    model: Any
    optimizer: Any
    lr_scheduler: Any
    accelerator: Any
    state: Any
    control: Any
    callback_handler: Any
    model_accepts_loss_kwargs: bool

    def start(self, run: RunContext) -> None:
        """Attach the run; call before ``train``."""
        self.run = run
        self.held_out_figures: dict[str, float] = {}
        self._step_loss: torch.Tensor | None = None
        self._rng_after_step: dict[str, Any] | None = None
        self._reported_step = -1
        self._clock = time.monotonic()
        self._pending_tokens = self._pending_positions = 0  # of a step that is not done yet
        self._batch: dict[str, Any] = {}  # its last micro-batch
        self._losses_at_start = len(run.ledger.losses)
        self._tokens_at_start = run.ledger.tokens
        self._seconds_at_start = run.ledger.seconds

    # ------------------------------------------------------------------------------------------------ data and steps

    def get_train_dataloader(self) -> Any:
        # its own generator: making an iterator draws a seed, and training's generators must not notice
        return DataLoader(
            self.run.rows,  # type: ignore[arg-type]
            batch_sampler=self.run.plan,  # type: ignore[arg-type]
            collate_fn=list,
            generator=torch.Generator().manual_seed(0),
        )

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        """The rows of the coming steps, and how many items they learn: each item of a step weighs the same."""
        steps = list(islice(epoch_iterator, num_batches))
        return steps, torch.tensor(sum(self.items_of(rows) for rows in steps), device=device)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """One optimizer step on the rows ``inputs``; out of memory, the whole step again in smaller micro-batches."""
        if self._rng_after_step is None:
            self._rng_after_step = rng.capture()
            self._evaluate_if_due(self.state.global_step)  # resumed: the attempt before was stopped while it evaluated
        while True:
            try:
                return self._train_on(model, inputs, num_items_in_batch)
            except (RuntimeError, MemoryError) as error:
                if not faults.is_out_of_memory(error):
                    raise
                self._reduce(error)
            # the whole step: the micro-batch that failed may have added to the gradients already
            faults.release()
            model.zero_grad()
            rng.restore(self._rng_after_step)
            self._step_loss = None
            self._pending_tokens = self._pending_positions = 0

    def _train_on(self, model: Any, rows: list[TokenRow], num_items_in_batch: Any) -> torch.Tensor:
        """Each micro-batch forward and backward, gradients exchanged with the last; returns the loss of the step."""
        batches = shares.micro_batches(rows, memory.smaller(self.run.layout, self.run.ledger.parts), self.run.group)
        for number, batch in enumerate(batches, 1):
            with sharding.exchanging(self.model, number == len(batches)):
                self.micro_step(model, batch, num_items_in_batch)
        assert self._step_loss is not None
        if self.run.group.size > 1:
            loss, tokens, positions = self.run.group.sums(float(self._step_loss), self._pending_tokens, self._pending_positions)
            self._step_loss = torch.full_like(self._step_loss, loss)
            self._pending_tokens, self._pending_positions = int(tokens), int(positions)
        return self._step_loss

    def micro_step(self, model: Any, batch: dict[str, Any], num_items_in_batch: Any) -> None:
        if self.run.stopped():
            self._preempt()
        self._batch = batch
        self._pending_positions += batch["input_ids"].numel()
        if shares.IDLE not in batch:
            self._pending_tokens += int(batch["attention_mask"].sum()) if "attention_mask" in batch else batch["input_ids"].numel()
        loss = super().training_step(model, batch, num_items_in_batch)  # type: ignore[misc]
        self._step_loss = loss if self._step_loss is None else self._step_loss + loss

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        """The share of a micro-batch in the loss of its step, also of a model that only knows the mean over its micro-batch."""
        idle = inputs.pop(shares.IDLE, False)
        learnt = self.items_in(inputs)
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)  # type: ignore[misc]
        if idle:
            return loss * 0.0
        return loss if self.model_accepts_loss_kwargs else loss * (learnt / num_items_in_batch)

    def items_of(self, rows: Sequence[TokenRow]) -> int:
        """How many items the loss of these rows is a mean over: the tokens that are learnt."""
        return sum(row.trained for row in rows)

    def items_in(self, batch: dict[str, Any]) -> Any:
        """The same of a micro-batch."""
        return (batch["labels"][:, 1:] != IGNORED).sum()

    def figures_of_step(self) -> dict[str, float]:
        """What a stage reports beside the loss, of the steps since the last call."""
        return {}

    def held_out_loss(self, model: Any, rows: Sequence[TokenRow], *, layout: Layout, hardware: Hardware) -> float:
        """As :func:`trainer.validation.mean_loss`; a stage that measures more keeps it in ``held_out_figures``."""
        return mean_loss(model, rows, layout=layout, hardware=hardware, stopped=self.run.stopped, group=self.run.group)

    def floating_point_ops(self, inputs: Any) -> int:
        return 0  # the library's count would read one batch, and nobody reads the count

    def _reduce(self, error: BaseException) -> None:
        """Train in micro-batches smaller than the one that failed from now on.

        Raises:
            OutOfMemory: it held one document already, or several processes train together, of which the others know nothing of this.
        """
        step, run = self.state.global_step + 1, self.run
        alone = run.group.size == 1
        if not alone or documents_in(self._batch) == 1:
            raise memory.out_of_memory(run.train, error, step=step if alone else None, full=run.full) from error
        run.ledger.parts *= 2
        while memory.smaller(run.layout, run.ledger.parts).max_tokens >= self._batch["input_ids"].numel():
            run.ledger.parts *= 2
        run.ledger.reductions.append({"step": step, "parts": run.ledger.parts})
        run.progress.event(
            f"out of memory at step {step}: micro-batches of at most {memory.smaller(run.layout, run.ledger.parts).max_tokens} tokens (or "
            "one document) from here on; the rows and the loss of a step stay what they were",
            level="warn",
            step=step,
            parts=run.ledger.parts,
        )

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> float:
        """Called right before the optimizer's step: nothing that is not finite may reach a weight."""
        norm = float(sharding.whole(super()._get_grad_norm(model, grad_norm=grad_norm)))  # type: ignore[misc]
        assert self._step_loss is not None
        loss, step = float(self._step_loss), self.state.global_step + 1
        if not math.isfinite(loss):
            raise Diverged(
                f"Step {step}: the loss is {loss}. Nothing of this step was kept; try a lower learning rate or another precision."
            )
        if math.isfinite(norm):
            self.run.ledger.overflows = 0
            return norm
        self.run.ledger.overflows += 1
        scaler = getattr(self.accelerator, "scaler", None)  # float16 only: it lowers the loss scale and skips the step
        if scaler is None or self.run.ledger.overflows > _MAX_SKIPPED_STEPS:
            raise Diverged(
                f"Step {step}: the gradient norm is {norm} (loss {loss:.4f}). Nothing of this step was kept; try a lower learning rate or "
                "another precision."
            )
        return norm

    def _maybe_log_save_evaluate(self, tr_loss: Any, grad_norm: Any, *args: Any, **kwargs: Any) -> None:
        """Called after each optimizer step, and once more at the end of the data."""
        step = self.state.global_step
        if step == self._reported_step or self._step_loss is None:
            return
        self._reported_step = step
        run, total = self.run, self.run.plan.steps
        run.ledger.losses.append(float(self._step_loss))
        run.ledger.tokens += self._pending_tokens
        run.ledger.positions += self._pending_positions
        self._pending_tokens = self._pending_positions = 0
        run.ledger.seconds = self._seconds_at_start + time.monotonic() - self._clock
        self._step_loss = None
        require_no_runaway(run.ledger.losses)
        last = step >= total
        if step % run.train.logging_steps == 0 or last:
            self._report(step, total, grad_norm=float(grad_norm), learning_rate=float(kwargs.get("learning_rate") or 0.0))
        self._rng_after_step = rng.capture()
        self._evaluate_if_due(step)
        if last or step % run.train.checkpoint_steps == 0 or step == run.ledger.best_step:
            self.save_now()

    def _report(self, step: int, total: int, *, grad_norm: float, learning_rate: float) -> None:
        ledger, window = self.run.ledger, self.run.ledger.losses[-self.run.train.logging_steps :]
        seconds = ledger.seconds - self._seconds_at_start
        done_here = len(ledger.losses) - self._losses_at_start
        rate = (ledger.tokens - self._tokens_at_start) / max(seconds, 1e-9)
        record = {
            "loss": sum(window) / len(window),
            "learning_rate": learning_rate,
            "grad_norm": grad_norm,
            "epoch": self.run.plan.epoch_at(step),
            "tokens": float(ledger.tokens),
            "tokens_per_s": rate,
            "eta_s": seconds / done_here * (total - step),
            **self.figures_of_step(),
            **self.run.speed.read(tokens_per_second=rate, seconds=ledger.seconds),
        }
        append_metrics(self.run.metrics_path, step, record)
        self.track(record)
        self.run.progress.step(step, total, **record)

    def track(self, record: dict[str, float]) -> None:
        """Tell the trackers of ``report_to``; the library's own logging is off, so they hear of nothing else."""
        if self.args.report_to:
            logs = {("eval_loss" if name == "validation_loss" else name): value for name, value in record.items()}
            self.callback_handler.on_log(self.args, self.state, self.control, logs)

    def _evaluate_if_due(self, step: int) -> None:
        """Validation loss on the way; asked to stop meanwhile, the run keeps the steps before it and evaluates when it goes on."""
        run = self.run
        due = run.train.eval_steps is not None and 0 < step < run.plan.steps and step % run.train.eval_steps == 0
        due = due or (step == run.plan.steps and bool(self.args.report_to))  # trackers end with the training
        if not due or str(step) in run.ledger.validation_after:
            return
        try:
            loss = run.validate(self.model)
        except Preempted:
            self._preempt()
        self.model.train()
        run.ledger.validation_after[str(step)] = loss
        measured = {"validation_loss": loss, **self.held_out_figures}
        append_metrics(run.metrics_path, step, measured)
        self.track(measured)
        run.progress.step(step, run.plan.steps, **measured)

    # --------------------------------------------------------------------------------------------------- checkpoints

    def _preempt(self) -> NoReturn:
        """Save the state after the last whole step (a begun one has changed no weight) and stop."""
        step = self.state.global_step
        if step:
            self.save_now()
        raise Preempted(f"Stopped at step {step} of {self.run.plan.steps} as asked" + ("; a checkpoint was written." if step else "."))

    def save_now(self) -> None:
        # whole tensors and all generators: each rank takes part, and the first one writes
        group = self.run.group
        adapter = trainable_tensors(self.model, keep=group.first)
        optimizer = sharding.whole_state(self.optimizer.state_dict(), keep=group.first)
        generators = group.gather(self._rng_after_step)
        if not group.first:
            return
        fsync_file(self.run.metrics_path)  # the curve up to a checkpoint lasts as long as the checkpoint
        write = partial(self._write_checkpoint, adapter=adapter, optimizer=optimizer, generators=generators)
        self.run.store.save(self.state.global_step, write, best=self.run.ledger.best_step)

    def _write_checkpoint(
        self, directory: Path, *, adapter: dict[str, torch.Tensor], optimizer: dict[str, Any], generators: list[dict[str, Any] | None]
    ) -> None:
        require_finite(adapter)
        save_tensors(adapter, directory / ADAPTER)
        scaler = getattr(self.accelerator, "scaler", None)
        tree, tensors = split_tensors(
            {
                "optimizer": optimizer,
                "scheduler": self.lr_scheduler.state_dict(),
                "rng": generators[0],
                **({"rng_of_others": generators[1:]} if len(generators) > 1 else {}),
                "scaler": None if scaler is None else scaler.state_dict(),
                "ledger": asdict(self.run.ledger),
            }
        )
        require_finite(tensors)
        save_tensors(tensors, directory / STATE_TENSORS)
        (directory / STATE).write_text(json.dumps(tree), encoding="utf-8")
        self.state.save_to_json(str(directory / LIBRARY_STATE))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.save_now()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_trainable(self.model if model is None else model, Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            state = read_state(Path(checkpoint))
            self.optimizer.load_state_dict(sharding.spread_state(state["optimizer"], self.optimizer))
            self.lr_scheduler.load_state_dict(state["scheduler"])

    def _load_scaler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and (state := read_state(Path(checkpoint))["scaler"]) is not None:
            self.accelerator.scaler.load_state_dict(state)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            state = read_state(Path(checkpoint))
            rng.restore(state["rng"] if self.run.group.first else state["rng_of_others"][self.run.group.rank - 1])


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Everything of a checkpoint but the adapter."""
    tree = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    return join_tensors(tree, load_file(str(checkpoint / STATE_TENSORS)))


def read_ledger(checkpoint: Path) -> Ledger:
    return Ledger(**read_state(checkpoint)["ledger"])


def trainable_tensors(model: Any, *, keep: bool = True) -> dict[str, torch.Tensor]:
    """Names and values of all trained parameters, whole and on the CPU; of a sharded model each rank has to ask, some to ``keep`` none."""
    sharding.settle(model)
    found = {name: sharding.on_cpu(parameter, keep=keep) for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def load_trainable(model: Any, checkpoint: Path) -> None:
    """Copy a checkpoint's values into the trained parameters, bit by bit.

    Raises:
        KeyError: the checkpoint belongs to other parameters (its key should have said so).
    """
    saved = load_file(str(checkpoint / ADAPTER))
    sharding.settle(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(sharding.like(saved.pop(name), parameter))
    if saved:
        raise KeyError(f"{checkpoint.name} holds parameters that the model lacks: {sorted(saved)[:3]}")


def append_metrics(path: Path, step: int, record: dict[str, float]) -> None:
    kept = {key: (value if math.isfinite(value) else None) for key, value in record.items()}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": step, **kept}) + "\n")


def truncate_metrics(path: Path, step: int, *, evaluated: Container[str]) -> None:
    """Forget what an earlier attempt measured after ``step``: those steps, and an evaluation not in ``evaluated``, run again."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    kept = []
    for line in lines:
        try:
            record = json.loads(line)
            again = record["step"] == step > 0 and "validation_loss" in record and str(step) not in evaluated
            if record["step"] <= step and not again:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue  # the half line of a killed process
    write_atomically(path, "".join(kept).encode())
