"""Builds the trainer of the KP recipe on a tiny model and describes what the libraries were given.

``python -m tests.trainer.built BACKEND MODEL BOOK QA`` prints the description of both stages as JSON: a process of its own for Unsloth,
which rebinds the libraries of the one it is imported into.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any, Literal

from parampara.schemas.recipe import load_recipe
from parampara.schemas.stages import DaptConfig, QaData, SftConfig, TextData

RECIPE = Path(__file__).parents[2] / "recipes" / "kp-llama-3.1-8b.yaml"
STEPS = 100


def configs(backend: Literal["unsloth", "trl"], model: Path, book: Path, qa: Path) -> dict[str, DaptConfig | SftConfig]:
    stages = load_recipe(RECIPE).stages
    return {
        "dapt": DaptConfig(model=model, data=TextData(train=[book]), params=stages.dapt, backend=backend),
        "sft": SftConfig(model=model, data=QaData(train=[qa]), params=stages.sft, backend=backend),
    }


def describe(config: DaptConfig | SftConfig, workdir: Path) -> dict[str, Any]:
    """Build it as the stage does, but in float32, since a CPU trains no float16; read the values back from the libraries' objects."""
    from trainer.backends import choose

    choice = choose(config.backend, cache=workdir / "unsloth")
    import torch

    from trainer import blocks, chat
    from trainer.building import build_trainer, load_model
    from trainer.engine import load_tokenizer
    from trainer.precision import Hardware
    from trainer.steps import fit_layout, plan_steps

    hardware = Hardware(torch.device("cpu"), "float32", config.params.train.optim)
    tokenizer = load_tokenizer(config.model)
    data = blocks.build_rows(config, tokenizer) if isinstance(config, DaptConfig) else chat.build_rows(config, tokenizer)
    model = load_model(config, choice, hardware)
    planned = config.model_copy(deep=True)
    planned.params.train.max_steps = STEPS
    layout = fit_layout(config, choice=choice, hardware=hardware, model=model, tokenizer=tokenizer)
    plan = plan_steps(planned, data, layout)
    trainer = build_trainer(
        config, choice=choice, hardware=hardware, model=model, tokenizer=tokenizer, data=data, plan=plan, workdir=workdir
    )
    rows = sorted({len(batch) for batch in plan})
    return {"backend": choice.name, "rows_of_a_step": rows, "layout": layout.kind, **_adapter(trainer.model), **_training(trainer)}


def _adapter(model: Any) -> dict[str, Any]:
    peft = model.peft_config["default"]
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}
    return {
        "r": sorted({layer.lora_A["default"].out_features for layer in layers.values()}),
        "scaling": sorted({layer.scaling["default"] for layer in layers.values()}),
        "dropout": sorted({layer.lora_dropout["default"].p for layer in layers.values()}),
        "projections": sorted({name.rpartition(".")[2] for name in layers}),
        "layers": len(layers) / model.config.num_hidden_layers,
        "lora_alpha": peft.lora_alpha,
        "trained": sorted({str(p.dtype) for p in model.parameters() if p.requires_grad}),
        "frozen": sorted({str(p.dtype) for p in model.parameters() if not p.requires_grad}),
    }


def _training(trainer: Any) -> dict[str, Any]:
    from trainer.building import optimizer_taken

    arguments = trainer.args
    trainer.create_optimizer_and_scheduler(STEPS)
    optimizer, rates = trainer.optimizer, []
    for _ in range(STEPS):
        rates.append(trainer.lr_scheduler.get_last_lr()[0])
        optimizer.step()
        trainer.lr_scheduler.step()
    return {
        "per_device_train_batch_size": arguments.per_device_train_batch_size,
        "gradient_checkpointing": bool(arguments.gradient_checkpointing),
        "optim": optimizer_taken(trainer),
        "optimizer": [type(optimizer).__module__.partition(".")[0], type(optimizer).__name__],
        "paged_bits": [optimizer.is_paged, optimizer.args.optim_bits] if hasattr(optimizer, "is_paged") else [],
        "weight_decay": optimizer.param_groups[0]["weight_decay"],
        "steps": arguments.max_steps,
        "rates": rates,
    }


if __name__ == "__main__":
    name, *paths = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        built = configs(name, *map(Path, paths))  # type: ignore[arg-type]
        print(json.dumps({kind: describe(config, Path(folder)) for kind, config in built.items()}))
