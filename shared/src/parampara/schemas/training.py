"""What goes into the stages that train (dapt, sft, dpo) and what comes out of them; conventions as in :mod:`parampara.schemas.stages`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from parampara.schemas.base import Dtype, Strict

LINEAR_PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

ModuleEnd = Annotated[str, Field(pattern=r"^[A-Za-z_]\w*(\.\w+)*$")]


class LoraParams(Strict):
    """Low-rank adaptation (Hu et al. 2021, arXiv 2106.09685): W + (alpha / r) B A."""

    r: Annotated[int, Field(ge=1, le=512)] = 16
    lora_alpha: Annotated[float, Field(gt=0, le=4096)] = 32
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.05
    target_modules: Annotated[list[ModuleEnd], Field(min_length=1)] = LINEAR_PROJECTIONS
    """Ends of module names, e.g. ``q_proj`` or ``self_attn.q_proj``."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(r) instead of alpha / r (Kalajdzievski 2023, arXiv 2312.03732); lets high ranks learn."""
    use_dora: bool = False
    """Train magnitude and direction of each weight apart (Liu et al. 2024, arXiv 2402.09353); slower, better at low ranks."""
    init_lora_weights: Literal[True, "gaussian", "orthogonal"] = True
    """How A and B start; of PEFT's ways those that leave the base's own weights as they are. ``True``: A random, B zero."""
    rank_pattern: dict[ModuleEnd, Annotated[int, Field(ge=1, le=512)]] = {}
    """Other ranks for some modules, e.g. ``{"layers.0.self_attn.q_proj": 32, "down_proj": 8}``; no module may fit two entries."""
    alpha_pattern: dict[ModuleEnd, Annotated[float, Field(gt=0, le=4096)]] = {}
    """Other ``lora_alpha`` for some modules, likewise."""

    @model_validator(mode="after")
    def _orthogonal_rows_come_in_pairs(self) -> LoraParams:
        odd = [rank for rank in (self.r, *self.rank_pattern.values()) if rank % 2]
        if self.init_lora_weights == "orthogonal" and odd:
            raise ValueError(f"init_lora_weights orthogonal needs even ranks, r or rank_pattern has {odd[0]}")
        return self


class TrainParams(Strict):
    """Optimizer and batch settings; names follow ``transformers.TrainingArguments``. The defaults are the seed's."""

    epochs: Annotated[float, Field(gt=0, le=1000)] = 1
    max_steps: Annotated[int, Field(ge=1)] | None = None
    per_device_train_batch_size: Annotated[int, Field(ge=1, le=1024)] = 4
    gradient_accumulation_steps: Annotated[int, Field(ge=1, le=1024)] = 4
    """Times the batch size: the rows of one optimizer step, whose learnt tokens weigh the same."""
    max_tokens_per_batch: Annotated[int, Field(ge=16, le=16_777_216)] | None = None
    """Positions that are computed at once. A step's rows are cut into as many micro-batches as that takes, longest first: memory and
    speed change with it, the training does not. None: batch size x ``max_seq_length``, and at most 2048 on a CPU."""
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 2e-4
    lr_scheduler_type: Literal["cosine", "linear", "constant", "constant_with_warmup"] = "cosine"
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.03
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 0.0
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    max_seq_length: Annotated[int, Field(ge=16, le=1_048_576)] = 2048
    optim: Literal["paged_adamw_32bit", "paged_adamw_8bit", "adamw_torch", "adamw_torch_fused", "adamw_8bit"] = "adamw_torch"
    precision: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    gradient_checkpointing: bool = True
    load_in_4bit: bool = False
    """QLoRA (Dettmers et al. 2023, arXiv 2305.14314): the frozen base in NF4 with double quantization, a quarter of its memory. The merge
    goes onto the unquantized base, so the merged model is not exactly the one that was trained; the parity gates tell how far off."""
    packing: bool = True
    eval_steps: Annotated[int, Field(ge=1)] | None = None
    checkpoint_steps: Annotated[int, Field(ge=1)] = 50
    keep_checkpoints: Annotated[int, Field(ge=2, le=100)] = 2
    """Newest ones kept; with ``eval_steps`` also the one of the lowest validation loss."""
    load_best: bool = False
    """The adapter is that of the evaluated step with the lowest validation loss, where that is lower than after the last step."""
    logging_steps: Annotated[int, Field(ge=1)] = 1

    @model_validator(mode="after")
    def _has_something_to_choose_from(self) -> TrainParams:
        if self.load_best and self.eval_steps is None:
            raise ValueError("load_best is true and eval_steps is null: set eval_steps, or there is nothing to choose from")
        return self


class AdapterParams(Strict):
    """What all training stages have: what is trained, and how."""

    lora: LoraParams | None = LoraParams()
    """None: no adapter, every weight of the model is trained (full fine-tuning), at 16 bytes of memory for each."""
    train: TrainParams = TrainParams()

    @model_validator(mode="after")
    def _four_bits_start_as_usual(self) -> AdapterParams:
        if self.lora is None and self.train.load_in_4bit:
            raise ValueError("lora is null and train.load_in_4bit is true: packed weights cannot be trained themselves; give lora or false")
        if self.train.load_in_4bit and self.lora is not None and self.lora.init_lora_weights == "orthogonal":
            raise ValueError("lora.init_lora_weights orthogonal does not work with train.load_in_4bit: PEFT draws it in the base's format")
        return self


class DaptParams(AdapterParams):
    """Domain-adaptive pretraining on plain text (Gururangan et al. 2020, arXiv 2004.10964)."""

    chunk_tokens: Annotated[int, Field(ge=16, le=1_048_576)] = 2048
    validation_fraction: Annotated[float, Field(gt=0, le=0.5)] = 0.05


class SftParams(AdapterParams):
    """Supervised fine-tuning on question and answer; the loss counts answer tokens only."""

    train: TrainParams = TrainParams(epochs=3, packing=False)
    validation_fraction: Annotated[float, Field(gt=0, le=0.5)] = 0.05
    system_prompt: Annotated[str, Field(max_length=8000)] | None = None


Preference = Literal["sigmoid", "hinge", "ipo", "robust", "apo_zero", "apo_down", "sigmoid_norm"]


class DpoParams(AdapterParams):
    """Direct preference optimization (Rafailov et al. 2023, arXiv 2305.18290) of a further adapter, on pairs of a better and a worse
    answer.

    The reference is the model without that adapter: the base with the DAPT and SFT adapters merged in.
    """

    lora: LoraParams | None = LoraParams(lora_dropout=0.0)
    """Without dropout, as TRL has it: the reference has none in its adapter, and what it adds would count as a preference."""
    train: TrainParams = TrainParams(learning_rate=1e-5, packing=False)
    beta: Annotated[float, Field(gt=0, le=100)] = 0.1
    """How much a distance from the reference costs: the smaller, the further the model may go."""
    loss_type: Preference = "sigmoid"
    """``sigmoid`` is the paper's; for the others see ``loss_type`` of ``trl.DPOConfig``."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Share of pairs that are taken to be the wrong way round; of ``robust`` alone."""
    validation_fraction: Annotated[float, Field(gt=0, le=0.5)] = 0.05
    system_prompt: Annotated[str, Field(max_length=8000)] | None = None
    """None: that of stage sft in a recipe."""

    @model_validator(mode="before")
    @classmethod
    def _keeps_its_defaults(cls, given: Any) -> Any:
        """``train: {epochs: 2}`` says nothing of the learning rate: it stays that of this stage, and is not that of all stages."""
        if not isinstance(given, dict):
            return given
        own = {"lora": {"lora_dropout": 0.0}, "train": {"learning_rate": 1e-5, "packing": False}}
        return {**given, **{key: {**own[key], **given[key]} for key in own if isinstance(given.get(key), dict)}}

    @model_validator(mode="after")
    def _has_a_reference(self) -> DpoParams:
        if self.lora is None:
            raise ValueError("lora is null: stage dpo trains an adapter, and holds it against the model without it; leave lora out")
        return self

    @model_validator(mode="after")
    def _smooths_what_can_be_smoothed(self) -> DpoParams:
        if self.label_smoothing and self.loss_type != "robust":
            raise ValueError(f"label_smoothing is for loss_type robust, and loss_type is {self.loss_type}: leave it 0")
        return self


class TextData(Strict):
    """Where a text-training stage reads: books (.txt .md .pdf .epub, or .jsonl rows ``{"text": ...}``)."""

    train: Annotated[list[Path], Field(min_length=1)]
    validation: list[Path] = []
    """Empty: ``validation_fraction`` of the chunks is held out by :func:`parampara.datasets.split`."""


class QaData(Strict):
    train: Annotated[list[Path], Field(min_length=1)]
    validation: list[Path] = []


class PreferenceData(Strict):
    """Pairs of answers (:mod:`parampara.datasets.preferences`)."""

    train: Annotated[list[Path], Field(min_length=1)]
    validation: list[Path] = []


Tracker = Literal["tensorboard", "wandb", "mlflow"]


class Tracking(Strict):
    """Where else the curves go; the run's own record (metrics.jsonl, events, checkpoints) is always there."""

    report_to: list[Tracker] = []
    """Each needs its library where the trainer runs: ``pip install tensorboardX``, ``wandb``, ``mlflow``."""
    project: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,79}$")] = "parampara"
    """Project of W&B, experiment of MLflow."""


class Machine(Strict):
    """What a run trains on, what its speed is measured against and what an hour of it costs; of the worker, and not of the recipe."""

    peak_flops: Annotated[float, Field(gt=0)] | None = None
    """FLOPS per second of the device in the format trained in; None: from a table of GPUs, and unknown elsewhere."""
    price_per_hour: Annotated[float, Field(ge=0)] | None = None
    processes: Annotated[int, Field(ge=1, le=64)] = 1
    """How many train one model together, a GPU each."""


class TrainingConfig(Strict):
    """What the configurations of all training stages have; ``kind``, ``data`` and ``params`` are each stage's own."""

    model: Path
    backend: Literal["auto", "unsloth", "trl"] = "auto"
    seed: int = 42
    tracking: Tracking = Tracking()
    tracking_directory: Path | None = None
    """None: ``workdir / "tracking"``."""
    machine: Machine = Machine()


class DaptConfig(TrainingConfig):
    kind: Literal["dapt"] = "dapt"
    data: TextData
    params: DaptParams = DaptParams()


class SftConfig(TrainingConfig):
    kind: Literal["sft"] = "sft"
    data: QaData
    params: SftParams = SftParams()


class DpoConfig(TrainingConfig):
    kind: Literal["dpo"] = "dpo"
    data: PreferenceData
    params: DpoParams = DpoParams()


class MicroBatchReduction(Strict):
    """Memory ran out at ``step``: from there on micro-batches hold the ``parts``-th part of the tokens, with the same rows in each step."""

    step: int
    parts: int


class TrainResult(Strict):
    """``output`` holds a PEFT adapter: adapter_model.safetensors, adapter_config.json, tokenizer files, training.json.

    Without ``lora`` it holds every weight: model.safetensors and full_weights.json (:mod:`parampara.weights.full`) in the place of the
    adapter's two files. What is said here of an adapter is said of them.
    """

    output: Path
    backend: Literal["unsloth", "trl"]
    backend_reason: str
    base_sha256: str
    """Fingerprint of the weights the adapter was trained on (:func:`parampara.storage.weights_fingerprint`)."""
    dtype: Dtype
    trained_in: str = ""
    """Number format of the base's weights: ``nf4`` under ``load_in_4bit``, ``float32`` where they themselves train, else ``dtype``."""
    optimizer: str = ""
    steps: int
    epochs: float
    trained_tokens: int
    tokens_per_second: float
    seconds: float
    train_loss_first: float
    """Mean over the first ten steps (or half of them, where there are fewer than twenty); ``last`` likewise."""
    train_loss_last: float
    validation_loss_before: float
    validation_loss_after: float
    perplexity_before: float | None = None
    """None of stage dpo, whose loss is not one of tokens."""
    perplexity_after: float | None = None
    reward_accuracy: float | None = None
    """dpo: share of held-out pairs whose better answer gained more likelihood against the reference than the worse one."""
    reward_margin: float | None = None
    """dpo: mean difference between the two gains, times ``beta``."""
    adapter_step: int | None = None
    """The step that the adapter is of: the last one, or with ``load_best`` the best one; ``validation_loss_after`` is its."""
    best_step: int | None = None
    """With ``eval_steps``: the step of the lowest validation loss, the last step included."""
    best_validation_loss: float | None = None
    resumed_from_step: int = 0
    packing_efficiency: float | None = None
    """Share of the computed positions that held a token and not padding."""
    peak_memory_bytes: int
    flops_per_token: int = 0
    """Of the model, in a training step; ``trainer.speed`` says how it is counted."""
    mfu: float | None = None
    """Share of the device's peak that the model's own operations make up (Chowdhery et al. 2022); None: the peak is not known."""
    cost: float | None = None
    """``seconds`` at the price of ``PARAMPARA_WORKER__PRICE_PER_HOUR``, in its currency; loading and validation are not in it."""
    processes: int = 1
    """That trained together, a GPU each; ``peak_memory_bytes`` is that of the first, ``mfu`` that of all."""
    micro_batch_reductions: list[MicroBatchReduction] = []
    library_versions: dict[str, str] = {}
