"""Useful tokens per CPU-second (per second on a GPU) of training: this project, TRL as people write it, and TRL packed.

    python bench/train.py [--rounds 3] [--steps 64] [--scale 0.25] [--arms ours trl trl-packed]

Every arm trains the same LoRA on the same tiny Llama from the same start, on the same rows, each once, 16 in an optimizer step (packing
makes its own), in a process of its own; rounds are interleaved. TRL gets the rows in the order of our steps, a random one, so that the
losses of each step can be compared. Row lengths are drawn from a log-normal distribution with a mean of about 350 tokens and at most
2048, times ``--scale``; a useful token is one that is no padding. What is measured is ``train()``: loading and importing are left out.
The loss is that of held-out rows after training, so that a faster arm that learns less is seen. Where CUDA is there, a padded and a
packed arm with Liger kernels run too, and the rate is set beside what plain matrix products reach in the same run.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from datasets import Dataset
from torch.utils.data import SequentialSampler
from trl import SFTConfig, SFTTrainer

from parampara.progress import SilentProgress
from parampara.schemas.stages import SftConfig
from tests.tiny_models import make_model
from trainer.backends import choose
from trainer.building import build_trainer, load_model
from trainer.checkpoints import CheckpointStore
from trainer.engine import library_versions, load_tokenizer
from trainer.layout import Layout
from trainer.loop import RunContext
from trainer.plan import Plan
from trainer.precision import choose_hardware
from trainer.rows import IGNORED, StageData, TokenRow
from trainer.speed import Speedometer
from trainer.steps import fit_layout, plan_steps
from trainer.validation import mean_loss

BATCH, ACCUMULATION = 4, 4
VOCABULARY = 4096


def main() -> None:
    options = arguments()
    if options.arm:
        print(json.dumps(ARMS[options.arm](options)))
        return
    names = options.arms or ["ours", "trl", "trl-packed", *(["trl-liger", "trl-liger-packed"] if torch.cuda.is_available() else [])]
    with tempfile.TemporaryDirectory() as folder:
        make_base(Path(folder) / "base", options)
        results: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
        for number in range(options.rounds):
            for name in names[number % len(names) :] + names[: number % len(names)]:
                results[name].append(run_apart(name, Path(folder), options))
    report(results, options)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--held-out", type=int, default=32)
    parser.add_argument("--scale", type=float, default=0.25)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--arms", nargs="*", choices=list(ARMS))
    parser.add_argument("--arm", choices=list(ARMS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def run_apart(name: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    passed = [f"--{key}={getattr(options, key)}" for key in ("steps", "scale", "hidden", "layers", "seed")]
    passed += [f"--held-out={options.held_out}"]
    command = [sys.executable, __file__, f"--arm={name}", f"--folder={folder}", *passed]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def report(results: dict[str, list[dict[str, Any]]], options: argparse.Namespace) -> None:
    print(f"{platform.platform()}, {platform.processor() or platform.machine()}; {json.dumps(library_versions())}")
    print(f"{json.dumps({key: value for key, value in vars(options).items() if key not in ('arm', 'folder')})}")
    unit = results[next(iter(results))][0]["unit"]
    print(
        f"\n| arm | useful tokens per {unit}, median (all rounds) | share of positions that are tokens | held-out loss |\n|---|---|---|---|"
    )
    for name, runs in results.items():
        rates = [run["tokens"] / run["seconds"] for run in runs]
        spread = ", ".join(f"{rate:,.0f}" for rate in sorted(rates))
        print(f"| {name} | {statistics.median(rates):,.0f} ({spread}) | {runs[0]['efficiency']:.3f} | {runs[0]['loss']:.4f} |")
    if {"ours", "trl"} <= set(results):
        ours, plain = (statistics.median(run["tokens"] / run["seconds"] for run in results[name]) for name in ("ours", "trl"))
        pairs = zip(results["ours"][0]["losses"], results["trl"][0]["losses"], strict=True)
        print(f"\nours / trl: {ours / plain:.2f}x; greatest difference of the loss of a step: {max(abs(a - b) for a, b in pairs):.1e}")
    if unit == "second":
        print(f"matrix products in bfloat16: {matmul_rate() / 1e12:.1f} TFLOP/s; a token costs about 6 x parameters FLOP here")


# ------------------------------------------------------------------------------------------------------- the common start


def make_base(directory: Path, options: argparse.Namespace) -> None:
    longest = int(2048 * options.scale)
    make_model(
        directory,
        hidden=options.hidden,
        layers=options.layers,
        vocab_size=VOCABULARY,
        intermediate_size=options.hidden * 4,
        max_position_embeddings=longest,
        initializer_range=0.02,
    )


def make_rows(options: argparse.Namespace) -> list[Any]:
    """``TokenRow`` each: the first half of it a question, the loss on the rest."""
    chance = random.Random(options.seed)
    rows = []
    for _ in range(options.steps * BATCH * ACCUMULATION + options.held_out):
        length = max(8, min(2048, int(chance.lognormvariate(5.6, 0.75))) * options.scale)
        # half of the tokens follow from the one before, so that there is something to learn
        ids = [chance.randrange(5, VOCABULARY)]
        while len(ids) < int(length):
            ids.append((ids[-1] * 31 + 7) % (VOCABULARY - 5) + 5 if chance.random() < 0.5 else chance.randrange(5, VOCABULARY))
        asked = len(ids) // 2
        rows.append(TokenRow(ids, [IGNORED] * asked + ids[asked:]))
    return rows


def configuration(options: argparse.Namespace) -> Any:
    train = {
        "per_device_train_batch_size": BATCH,
        "gradient_accumulation_steps": ACCUMULATION,
        "max_seq_length": int(2048 * options.scale),
        "max_steps": options.steps,
        "gradient_checkpointing": False,
        "learning_rate": 1e-3,
        "checkpoint_steps": 1000,
    }
    params = {"lora": {"lora_dropout": 0.0}, "train": train}
    data = {"train": [options.folder / "unused.jsonl"]}
    return SftConfig.model_validate(
        {"model": options.folder / "base", "data": data, "backend": "trl", "params": params, "seed": options.seed}
    )


@dataclass(frozen=True)
class Start:
    """What every arm begins with."""

    config: SftConfig
    choice: Any
    hardware: Any
    model: Any
    tokenizer: Any
    data: StageData
    layout: Layout
    plan: Plan

    def validation_loss(self, model: Any) -> float:
        padded = replace(self.layout, kind="padded", learnt_only=False)  # which every arm's attention reads alike
        return mean_loss(model, self.data.validation, layout=padded, hardware=self.hardware, stopped=lambda: False)


def prepare(options: argparse.Namespace) -> Start:
    config = configuration(options)
    choice = choose("trl", cache=options.folder)
    hardware = choose_hardware("auto", "adamw_torch")
    model, tokenizer = load_model(config, choice, hardware), load_tokenizer(config.model)
    rows = make_rows(options)
    data = StageData(train=rows[: -options.held_out], validation=rows[-options.held_out :], facts={})
    layout = fit_layout(config, choice=choice, hardware=hardware, model=model, tokenizer=tokenizer)
    return Start(config, choice, hardware, model, tokenizer, data, layout, plan_steps(config, data, layout))


# ---------------------------------------------------------------------------------------------------------------- the arms


def ours(options: argparse.Namespace) -> dict[str, Any]:
    """The stage's own plan, layout and loop."""
    begun = prepare(options)
    with tempfile.TemporaryDirectory() as folder:
        workdir = Path(folder)
        trainer = build_trainer(
            begun.config,
            choice=begun.choice,
            hardware=begun.hardware,
            model=begun.model,
            tokenizer=begun.tokenizer,
            data=begun.data,
            plan=begun.plan,
            workdir=workdir,
        )
        run = RunContext(
            plan=begun.plan,
            rows=begun.data.train,
            layout=begun.layout,
            store=CheckpointStore(workdir / "checkpoints", facts={}, keep=2),
            progress=SilentProgress(),
            metrics_path=workdir / "metrics.jsonl",
            stopped=lambda: False,
            validate=begun.validation_loss,
            train=begun.config.params.train,
            speed=Speedometer.of(begun.model, hardware=begun.hardware, machine=begun.config.machine),
        )
        trainer.start(run)
        measured = measure(trainer.train)
        after = run.validate(trainer.model)
    ledger = run.ledger
    return {**measured, "tokens": ledger.tokens, "efficiency": ledger.tokens / ledger.positions, "losses": ledger.losses, "loss": after}


def trl(options: argparse.Namespace, *, packed: bool = False, liger: bool = False) -> dict[str, Any]:
    """SFTTrainer as its documentation shows it: its collator, its loop, its attention; the rows in the order of our steps."""
    begun = prepare(options)
    begun.model.get_base_model().set_attn_implementation("sdpa")
    train = begun.config.params.train
    rows = [begun.data.train[row] for step in begun.plan for row in step]
    tokens = sum(len(row.input_ids) for row in rows)
    blocks_per_step = max(1, round(tokens / options.steps / train.max_seq_length))
    settings = SFTConfig(
        output_dir=str(options.folder / "trl"),
        per_device_train_batch_size=1 if packed else BATCH,
        gradient_accumulation_steps=blocks_per_step if packed else ACCUMULATION,
        num_train_epochs=1,
        learning_rate=train.learning_rate,
        lr_scheduler_type=train.lr_scheduler_type,
        warmup_steps=math.ceil(train.warmup_ratio * options.steps),
        max_length=train.max_seq_length,
        packing=packed,
        bf16=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
        use_liger_kernel=liger,
        gradient_checkpointing=False,  # as in our arm
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=options.seed,
    )

    class InOrder(SFTTrainer):
        positions = 0

        def _get_train_sampler(self, *args: Any) -> Any:
            return SequentialSampler(self.train_dataset)

        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            self.positions += inputs["input_ids"].numel()
            return super().training_step(model, inputs, *args, **kwargs)

    table = Dataset.from_list([{"input_ids": row.input_ids, "labels": row.labels} for row in rows])
    trainer = InOrder(model=begun.model, args=settings, train_dataset=table, processing_class=begun.tokenizer)
    measured = measure(trainer.train)
    losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    after = begun.validation_loss(trainer.model)
    return {**measured, "tokens": tokens, "efficiency": tokens / trainer.positions, "losses": losses, "loss": after}


ARMS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "ours": ours,
    "trl": trl,
    "trl-packed": lambda options: trl(options, packed=True),
    "trl-liger": lambda options: trl(options, liger=True),
    "trl-liger-packed": lambda options: trl(options, packed=True, liger=True),
}


def measure(train: Callable[[], Any]) -> dict[str, Any]:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        start = time.perf_counter()
        train()
        torch.cuda.synchronize()
        return {"seconds": time.perf_counter() - start, "unit": "second"}
    start = time.process_time()
    train()
    return {"seconds": time.process_time() - start, "unit": "CPU-second"}


def matmul_rate(size: int = 8192, times: int = 20) -> float:
    """FLOP per second of square bfloat16 products on the GPU."""
    left, right = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        left @ right
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(times):
        left @ right
    torch.cuda.synchronize()
    return 2 * size**3 * times / (time.perf_counter() - start)


if __name__ == "__main__":
    main()
