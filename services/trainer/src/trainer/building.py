"""From a stage's parameters to the model and the trainer of the libraries: which setting arrives where."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from parampara.errors import InvalidData
from parampara.schemas.stages import DaptConfig, DpoConfig, SftConfig
from trainer import full, sharding
from trainer.backends import Choice, LoadRequest
from trainer.loop import StageLoop
from trainer.methods import adapter_parameters, restore_adapter
from trainer.plan import Plan
from trainer.precision import Hardware
from trainer.preference_loop import PreferenceLoop
from trainer.ranks import ALONE, Group
from trainer.rows import StageData

Config = DaptConfig | SftConfig | DpoConfig


def load_model(config: Config, choice: Choice, hardware: Hardware, group: Group = ALONE) -> Any:
    """The base with a fresh adapter, spread over the ranks of ``group`` where there are several; without ``lora`` the base, to be
    trained itself.

    Raises:
        InvalidData: the libraries can not load it, it lacks the modules that LoRA is asked to adapt, or it could not be written again.
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
        raise InvalidData(f"{config.model}: can not be loaded for training ({str(error)[:300]}).", param="model") from error
    if request.lora is None:
        full.stored_as(model, config.model)
    if group.size > 1:
        sharding.shard(model, group=group, device=hardware.device)
    return model


def build_trainer(
    config: Config, *, choice: Choice, hardware: Hardware, model: Any, tokenizer: Any, data: StageData, plan: Plan, workdir: Path
) -> Any:
    from datasets import Dataset
    from transformers import PrinterCallback, set_seed
    from trl import DPOTrainer

    set_seed(config.seed)
    arguments = _arguments_of(config)(**training_arguments(config, hardware=hardware, steps=plan.steps, workdir=workdir))
    arguments._n_gpu = min(arguments.n_gpu, 1)  # else the library splits each batch over all visible cards (DataParallel)
    # the library asks for a Dataset and looks at its first row; StageLoop reads the rows themselves
    first = data.train[0]
    rows = Dataset.from_dict({"input_ids": [first.input_ids], "labels": [first.labels]})
    pairs = isinstance(config, DpoConfig)
    loop, base = (PreferenceLoop, DPOTrainer) if pairs else (StageLoop, choice.module.trainer_base())
    kind: Any = type("StageTrainer", (loop, base), {})
    adapter = adapter_parameters(model)
    trainer = kind(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer)
    if pairs and "ref" in model.peft_config:
        model.delete_adapter("ref")  # the library's copy of the adapter at its start, where it changes nothing: the base is the same
    restore_adapter(model, adapter)
    trainer.remove_callback(PrinterCallback)
    return trainer


def _arguments_of(config: Config) -> Any:
    from trl import DPOConfig, SFTConfig

    return DPOConfig if isinstance(config, DpoConfig) else SFTConfig


def run_name(config: Config, workdir: Path) -> str:
    """The same for each attempt of a job: trackers go on under it."""
    return f"{config.kind}-{workdir.name}"


def optimizer_taken(trainer: Any) -> str:
    """The optimizer that the library really uses: on a CPU Unsloth takes another than a paged one."""
    return str(getattr(trainer.args.optim, "value", trainer.args.optim))


def training_arguments(config: Config, *, hardware: Hardware, steps: int, workdir: Path) -> dict[str, Any]:
    """Keyword arguments of ``trl.SFTConfig``, for stage dpo of ``trl.DPOConfig``."""
    train = config.params.train
    loss: dict[str, Any] = {"loss_type": "nll", "dataset_kwargs": {"skip_prepare_dataset": True}}
    if isinstance(config, DpoConfig):
        loss = {name: getattr(config.params, name) for name in ("beta", "loss_type", "label_smoothing")}
        loss["disable_dropout"] = config.params.lora is None or not config.params.lora.lora_dropout  # that of the base too
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
        **loss,
        "seed": config.seed,
        # rows come tokenized, in a planned order and layout; StageLoop logs, validates and saves
        "max_length": None,
        "padding_free": False,
        "remove_unused_columns": False,
        "logging_strategy": "no",
        "eval_strategy": "no",
        "save_strategy": "no",
        "logging_nan_inf_filter": False,
        "report_to": list(config.tracking.report_to),
        "run_name": run_name(config, workdir),
        "disable_tqdm": True,
    }
