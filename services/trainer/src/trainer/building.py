"""From a stage's parameters to the model and the trainer of the libraries: which setting arrives where."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from parampara.errors import InvalidData
from parampara.schemas.stages import DaptConfig, SftConfig
from trainer import sharding
from trainer.backends import Choice, LoadRequest
from trainer.loop import StageLoop
from trainer.methods import adapter_parameters, restore_adapter
from trainer.plan import Plan
from trainer.precision import Hardware
from trainer.ranks import ALONE, Group
from trainer.rows import StageData

Config = DaptConfig | SftConfig


def load_model(config: Config, choice: Choice, hardware: Hardware, group: Group = ALONE) -> Any:
    """The base with a fresh adapter; spread over the ranks of ``group`` where there are several.

    Raises:
        InvalidData: the libraries can not load it, or it lacks the modules that LoRA is asked to adapt.
    """
    train = config.params.train
    request = LoadRequest(
        model=config.model,
        lora=config.params.lora,
        dtype=hardware.torch_dtype,
        max_seq_length=train.max_seq_length,
        gradient_checkpointing=train.gradient_checkpointing,
        load_in_4bit=train.load_in_4bit,
        seed=config.seed,
        sharded=group.size > 1,
    )
    try:
        model = choice.module.load(request)
    except InvalidData:
        raise
    except (OSError, ValueError, KeyError) as error:
        raise InvalidData(f"{config.model}: can not be loaded for LoRA training ({str(error)[:300]}).", param="model") from error
    if group.size > 1:
        sharding.shard(model, group=group, device=hardware.device)
    return model


def build_trainer(
    config: Config, *, choice: Choice, hardware: Hardware, model: Any, tokenizer: Any, data: StageData, plan: Plan, workdir: Path
) -> Any:
    from datasets import Dataset
    from transformers import PrinterCallback, set_seed
    from trl import SFTConfig

    set_seed(config.seed)
    arguments = SFTConfig(**training_arguments(config, hardware=hardware, steps=plan.steps, workdir=workdir))
    arguments._n_gpu = min(arguments.n_gpu, 1)  # else the library splits each batch over all visible cards (DataParallel)
    # the library asks for a Dataset and looks at its first row; StageLoop reads the rows themselves
    first = data.train[0]
    rows = Dataset.from_dict({"input_ids": [first.input_ids], "labels": [first.labels]})
    kind: Any = type("StageTrainer", (StageLoop, choice.module.trainer_base()), {})
    adapter = adapter_parameters(model)
    trainer = kind(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer)
    restore_adapter(model, adapter)
    trainer.remove_callback(PrinterCallback)
    return trainer


def run_name(config: Config, workdir: Path) -> str:
    """The same for each attempt of a job: trackers go on under it."""
    return f"{config.kind}-{workdir.name}"


def optimizer_taken(trainer: Any) -> str:
    """The optimizer that the library really uses: on a CPU Unsloth takes another than a paged one."""
    return str(getattr(trainer.args.optim, "value", trainer.args.optim))


def training_arguments(config: Config, *, hardware: Hardware, steps: int, workdir: Path) -> dict[str, Any]:
    """Keyword arguments of ``trl.SFTConfig``."""
    train = config.params.train
    return {
        "output_dir": str(workdir / "trainer"),
        "max_steps": steps,
        "per_device_train_batch_size": train.per_device_train_batch_size,
        "gradient_accumulation_steps": 1,  # StageLoop cuts each effective batch into micro-batches itself
        "learning_rate": train.learning_rate,
        "lr_scheduler_type": train.lr_scheduler_type,
        "warmup_steps": math.ceil(train.warmup_ratio * steps),
        "weight_decay": train.weight_decay,
        "max_grad_norm": train.max_grad_norm,
        "optim": hardware.optimizer,
        "bf16": hardware.dtype == "bfloat16",
        "fp16": hardware.dtype == "float16",
        "use_cpu": hardware.device.type == "cpu",
        "gradient_checkpointing": train.gradient_checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False} if train.gradient_checkpointing else None,
        "loss_type": "nll",
        "seed": config.seed,
        # rows come tokenized, in a planned order and layout; StageLoop logs, validates and saves
        "max_length": None,
        "padding_free": False,
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "remove_unused_columns": False,
        "logging_strategy": "no",
        "eval_strategy": "no",
        "save_strategy": "no",
        "logging_nan_inf_filter": False,
        "report_to": list(config.tracking.report_to),
        "run_name": run_name(config, workdir),
        "disable_tqdm": True,
    }
