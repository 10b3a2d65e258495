"""What goes into a stage and what comes out of it.

A stage is a plain function over local paths: ``run(config, *, workdir, progress) -> result``. The classes here are those
configs and results; the same JSON is the ``--config`` file of ``python -m <service> <kind>``.

Conventions: every path is local and absolute; ``workdir`` is private to the job and survives its attempts (checkpoints
live in it); the product is written to ``workdir / "output"`` aside and renamed into place; lengths count tokens. The training
stages' are in :mod:`parampara.schemas.training`; all names can be had from here.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import AfterValidator, ConfigDict, Field, model_validator

from parampara.schemas.base import Dtype, Strict
from parampara.schemas.metrics import harness_task
from parampara.schemas.training import (
    DaptConfig,
    DaptParams,
    DpoConfig,
    DpoParams,
    LoraParams,
    Machine,
    MicroBatchReduction,
    PreferenceData,
    QaData,
    SftConfig,
    SftParams,
    TextData,
    Tracker,
    Tracking,
    TrainParams,
    TrainResult,
)

__all__ = [
    "ArtifactKind",
    "DaptConfig",
    "DaptParams",
    "DeployConfig",
    "DeployParams",
    "DeployResult",
    "DpoConfig",
    "DpoParams",
    "Dtype",
    "EvaluateConfig",
    "EvaluateParams",
    "EvaluateResult",
    "Gate",
    "GateResult",
    "HarnessParams",
    "JudgeEndpoint",
    "JudgeParams",
    "Kind",
    "LiveParams",
    "LoraParams",
    "Machine",
    "MergeConfig",
    "MergeParams",
    "MergeResult",
    "MicroBatchReduction",
    "OnePassMerge",
    "PreferenceData",
    "QaData",
    "QuantizeConfig",
    "QuantizeParams",
    "QuantizeResult",
    "Sample",
    "Scheme",
    "SchemeAttempt",
    "SftConfig",
    "SftParams",
    "StreamedScheme",
    "Strict",
    "TextData",
    "Tracker",
    "Tracking",
    "TrainParams",
    "TrainResult",
]

Kind = Literal["dapt", "sft", "dpo", "merge", "quantize", "evaluate", "deploy", "ingest"]
ArtifactKind = Literal["dataset", "adapter", "merged_model", "quantized_model", "report"]


def _regular_expression(text: str) -> str:
    try:
        re.compile(text, re.MULTILINE)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"not a regular expression: {error}") from None
    return text


class MergeParams(Strict):
    dtype: Dtype = "float16"
    max_shard_bytes: Annotated[int, Field(ge=1_000_000)] = 5_000_000_000


Scheme = Literal["unsloth", "bitsandbytes", "w8a8", "w8a16", "fp8", "gptq", "smoothquant"]
StreamedScheme = Literal["w8a8", "w8a16", "fp8"]
"""Those of this project's own writer, which reads the model a few rows at a time."""


class QuantizeParams(Strict):
    """Ways to eight bits, tried in order, so the fastest to serve comes first: the first that can run here and degrades the model by
    less than ``max_degradation`` is kept; the result records the figures of every one that was tried, or why it could not run.

    ``w8a8``, ``w8a16`` and ``fp8`` are this project's own writer of compressed-tensors checkpoints, ``gptq`` and ``smoothquant``
    are W8A8 by llm-compressor, calibrated on the training rows, ``unsloth`` is its eight-bit export, ``bitsandbytes`` is LLM.int8.
    docs/quantization.md says when to take which.
    """

    schemes: Annotated[list[Scheme], Field(min_length=1)] = ["unsloth", "bitsandbytes"]
    unsloth_save_method: Literal["int8", "w8a8", "w8a16", "fp8"] = "w8a8"
    max_degradation: Annotated[float, Field(gt=0, le=1)] = 0.01
    """Largest relative increase of the perplexity of held-out text, and of held-out answers, that a scheme may cost."""
    max_chunks: Annotated[int, Field(ge=1)] = 64
    max_questions: Annotated[int, Field(ge=1)] = 200
    """Bounds on what the increases are measured on; equal to those of ``evaluate``, both measure the same items."""
    calibration_rows: Annotated[int, Field(ge=1, le=100_000)] = 256
    """Training rows that ``gptq`` and ``smoothquant`` calibrate on."""


class JudgeParams(Strict):
    """A language model grades the answers. Where it is reached is a setting of the server, never part of a recipe."""

    model: Annotated[str, Field(max_length=200, pattern=r"^[A-Za-z0-9][\w.:/@+-]*$")]
    """As the endpoint names it."""
    max_questions: Annotated[int, Field(ge=1, le=100_000)] = 100
    """Held-out questions whose answers are judged, drawn with the recipe's seed."""
    scale: Annotated[int, Field(ge=2, le=10)] = 5
    """Grades are the whole numbers from 1 to this one; metrics and items hold (grade - 1) / (scale - 1)."""
    rubric: Annotated[str, Field(min_length=1, max_length=8000)] = (
        "Grade whether the answer says what the reference answer says. Facts, names and numbers have to agree; wording, order and length "
        "do not matter. Give the highest grade to an answer that is correct and complete, a middle one where a part is missing or where a "
        "statement beside the correct one contradicts the reference, and the lowest where the answer is wrong, empty or off the question."
    )


class HarnessParams(Strict):
    """Tasks of lm-evaluation-harness. Where further ones lie is a setting of the server, never part of a recipe."""

    tasks: Annotated[list[Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,99}$")]], Field(min_length=1, max_length=50)]
    """Names of tasks or groups."""
    limit: Annotated[int, Field(ge=1)] | None = None
    """Examples of each task; None: all."""
    num_fewshot: Annotated[int, Field(ge=0, le=100)] | None = None
    """Solved examples before each question; None: as the task says."""
    batch_size: Annotated[int, Field(ge=1, le=1024)] = 8
    apply_chat_template: bool = False
    """Put each example to the model as a conversation."""

    @model_validator(mode="after")
    def _told_apart(self) -> HarnessParams:
        names = [harness_task(task) for task in self.tasks]
        if twice := next((task for task, name in zip(self.tasks, names, strict=True) if names.count(name) > 1), None):
            raise ValueError(
                f"tasks: {twice} is there twice, or differs from another by case or hyphens only; metrics could not tell them apart"
            )
        return self


class EvaluateParams(Strict):
    max_new_tokens: Annotated[int, Field(ge=1, le=4096)] = 96
    max_questions: Annotated[int, Field(ge=1)] = 200
    max_chunks: Annotated[int, Field(ge=1)] = 64
    parity_prompts: Annotated[int, Field(ge=1)] = 16
    formats: dict[
        Annotated[str, Field(pattern=r"^[a-z0-9_]{1,64}$")], Annotated[str, Field(max_length=1000), AfterValidator(_regular_expression)]
    ] = {}
    """Name to regular expression; the rate of answers that match is reported as ``format.<name>``."""
    judge: JudgeParams | None = None
    """None: answers are not judged."""
    harness: HarnessParams | None = None
    """None: lm-evaluation-harness is not run."""


class Gate(Strict):
    """A bound on one metric of the evaluation report. ``action`` says what a miss means for the run."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    metric: Annotated[str, Field(pattern=r"^[a-z0-9_.]+$")]
    min: float | None = None
    max: float | None = None
    action: Literal["promote", "hold", "fail"] = "hold"
    """What happens when the bound is missed: ``promote`` only warns, ``hold`` keeps the alias where it is, ``fail`` fails the run."""
    optional: bool = False
    """Whether a metric that was not measured meets the bound: for what not every run can measure, as a comparison with the model
    that serves now where none does."""

    @model_validator(mode="after")
    def _has_a_bound(self) -> Gate:
        if self.min is None and self.max is None:
            raise ValueError("a gate needs min, max or both")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"min {self.min} is above max {self.max}: no value can pass")
        return self


# ---------------------------------------------------------------------------------------------------- stage configs


class MergeConfig(Strict):
    """``adapters`` are applied in order to ``model``; each must have been trained on the result of the ones before it."""

    kind: Literal["merge"] = "merge"
    model: Path
    adapters: Annotated[list[Path], Field(min_length=1)]
    params: MergeParams = MergeParams()


class MergeResult(Strict):
    """``output`` holds a complete model directory: sharded safetensors, config, tokenizer, chat template, generation config."""

    output: Path
    dtype: Dtype
    tensors: int
    merged_tensors: int
    bytes: int
    seconds: float
    max_abs_delta: float
    """Largest change of any weight against the base: zero means that the merge did nothing."""
    weights_sha256: str
    peak_memory_bytes: int


class QuantizeConfig(Strict):
    """``text`` and ``qa`` are what the model was trained on, with the parameters and seed that say which part was held out. Without
    them degradation is not measured.

    ``adapters`` are merged into ``model`` in the same pass, in order and as by stage merge; only the streamed schemes can."""

    kind: Literal["quantize"] = "quantize"
    model: Path
    adapters: list[Path] = []
    measure: bool = True
    """False: nothing is loaded, so that the memory is that of writing; the streamed schemes only, and the record says that nothing
    was measured."""
    text: TextData | None = None
    qa: QaData | None = None
    dapt_params: DaptParams = DaptParams()
    sft_params: SftParams = SftParams()
    params: QuantizeParams = QuantizeParams()
    seed: int = 42

    @model_validator(mode="after")
    def _what_only_the_streamed_schemes_can(self) -> QuantizeConfig:
        others = [scheme for scheme in self.params.schemes if scheme not in get_args(StreamedScheme)]
        if others and (self.adapters or not self.measure):
            asked = "adapters are merged on the way" if self.adapters else "measure may be false"
            raise ValueError(f"{asked} only with {', '.join(get_args(StreamedScheme))}: params.schemes holds {others[0]}")
        if not self.measure and (self.text or self.qa):
            raise ValueError("text and qa are what is measured on, and measure is false: leave out one or the other")
        return self


class SchemeAttempt(Strict):
    """One scheme that was tried. Figures are against the parent, and None where the scheme could not run, where there was no data, or
    where the value is not finite."""

    scheme: Scheme
    ok: bool
    reason: str
    perplexity_increase: float | None = None
    """Relative, of held-out text: 0.01 is one per cent."""
    answer_perplexity_increase: float | None = None
    """Relative, of the answers to held-out questions."""
    kl: float | None = None
    """Nats per token on random probes."""
    top1: float | None = None
    bytes: int | None = None
    seconds: float | None = None
    """Writing and measuring."""


class OnePassMerge(Strict):
    """Adapters that were merged on the way into eight bits: no merged model was written."""

    base_sha256: str
    adapters: list[str]
    """sha256 of each adapter_model.safetensors (or of the model.safetensors of full weights), in order."""
    merged_tensors: int
    max_abs_delta: float
    """Largest change of any weight against the base."""


class QuantizeResult(Strict):
    """``output`` holds a complete model directory and quantize.json (this object without paths, times and memory)."""

    output: Path
    scheme: Scheme
    merge: OnePassMerge | None = None
    """None: the model was quantized as it lay there."""
    attempts: list[SchemeAttempt]
    held_out_text_tokens: int = 0
    held_out_answer_tokens: int = 0
    """How many tokens the increases were measured on; zero: not at all."""
    bytes: int
    parent_bytes: int
    quantized_modules: int
    seconds: float
    peak_memory_bytes: int


class JudgeEndpoint(Strict):
    """Where a judge is reached. Its key is in no configuration: the stage gets it apart, and only where it judges."""

    base_url: str
    """Of an OpenAI-compatible API, up to and with ``/v1``."""
    timeout_seconds: Annotated[float, Field(gt=0)] = 60
    concurrency: Annotated[int, Field(ge=1)] = 4


class EvaluateConfig(Strict):
    """The models of one line, oldest first. Paths to adapters are applied on the model each was trained on."""

    kind: Literal["evaluate"] = "evaluate"
    base: Path
    base_model: Annotated[str, Field(max_length=200)] = ""
    """Name of the base, for the model card."""
    dapt_adapter: Path | None = None
    dapt_merged: Path | None = None
    sft_adapter: Path | None = None
    sft_merged: Path | None = None
    """Of a line with DPO, together with ``dpo_adapter``; without it the model after SFT is ``merged``."""
    dpo_adapter: Path | None = None
    merged: Path
    """The final merged model."""
    quantized: Path | None = None
    text: TextData
    qa: QaData
    preferences: PreferenceData | None = None
    """What DPO trained on: held-out questions that are asked in it are told."""
    dapt_params: DaptParams = DaptParams()
    sft_params: SftParams = SftParams()
    dpo_params: DpoParams = DpoParams()
    params: EvaluateParams = EvaluateParams()
    deploy_params: DeployParams | None = None
    """How the model is to be served, for the estimate of the memory that it will need; None: not to be served."""
    champion: Path | None = None
    """Evaluation artifact of the model that serves now: its ``items.jsonl`` is compared with this evaluation's."""
    judge_endpoint: JudgeEndpoint | None = None
    """Where ``params.judge`` is reached."""
    harness_tasks: Path | None = None
    """Directory with further tasks for ``params.harness``."""
    gates: list[Gate] = []
    seed: int = 42


class GateResult(Strict):
    metric: str
    value: float | None
    min: float | None
    max: float | None
    action: Literal["promote", "hold", "fail"]
    passed: bool


class Sample(Strict):
    question: str
    language: str = ""
    expected: str
    answers: dict[str, str]
    """Model name, one of :data:`parampara.schemas.metrics.MODELS`, to its answer."""


class EvaluateResult(Strict):
    """``output`` holds report.json (this object), report.html, ledger.json, items.jsonl, README.md (a model card), with a champion
    comparison.json and, where it was asked for, harness.json."""

    output: Path
    metrics: dict[str, float]
    """By flat names, those of :data:`parampara.schemas.metrics.METRICS`."""
    gates: list[GateResult]
    decision: Literal["promote", "hold", "fail"]
    samples: list[Sample] = []
    schemes: list[SchemeAttempt] = []
    """What the quantizer tried, as it recorded it."""
    seconds: float


class DeployConfig(Strict):
    kind: Literal["deploy"] = "deploy"
    artifact_id: str
    model_path: Path
    model_name: str
    """Immutable id that vLLM serves under, ``ft:<base>:<org>:<suffix>:<id>``."""
    alias: str
    generation: int
    """Fence of the alias: a slower, older deployer can not flip back."""
    model_server_url: str
    evaluation: Path | None = None
    """Artifact of the evaluation of this very model; without it the live endpoint is not measured and no gate applies."""
    gates: list[Gate] = []
    """Those on metrics of the live endpoint."""
    params: DeployParams


class LiveParams(Strict):
    """Bounds on the live endpoint that hold without a gate in the recipe; a gate on the same metric takes their place."""

    min_top1: Annotated[float, Field(ge=0, le=1)] | None = 0.97
    """``parity.live.top1``: share of probe tokens where vLLM and the evaluation name the same likeliest one. None: no bound."""
    same_prompts: bool = True
    """``parity.live.chat_template``: vLLM renders every probe to the tokens that the model was trained on."""
    action: Literal["hold", "fail"] = "hold"

    def gates(self) -> list[Gate]:
        bounds = {"parity.live.top1": self.min_top1, "parity.live.chat_template": 1.0 if self.same_prompts else None}
        return [Gate(metric=metric, min=bound, action=self.action) for metric, bound in bounds.items() if bound is not None]


class DeployParams(Strict):
    """How ``vllm serve`` is started; None leaves the choice to the model server's settings."""

    alias: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")] = "default"
    max_model_len: Annotated[int, Field(ge=64, le=1_048_576)] | None = None
    max_num_seqs: Annotated[int, Field(ge=1, le=4096)] | None = None
    dtype: Literal["auto", "float16", "bfloat16", "float32"] = "auto"
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.9
    quantization: Literal["bitsandbytes", "compressed-tensors"] | None = None
    """None: read from the checkpoint's own ``quantization_config``."""
    ready_timeout_seconds: Annotated[int, Field(ge=10, le=7200)] = 900
    replace: bool = False
    """Take the model server from other aliases that serve another model: it holds one, so they are served no more."""
    live: LiveParams = LiveParams()


class DeployResult(Strict):
    model_name: str
    alias: str
    url: str
    generation: int
    ready_seconds: float
    first_answer: str
    metrics: dict[str, float] = {}
    """``parity.live.*`` and ``serving.*``: the last row of the model's ledger."""
    gates: list[GateResult] = []
    decision: Literal["promote", "hold", "fail"] = "promote"
    """Anything but ``promote`` leaves the alias where it was; the model server has gone back to the model before."""
    not_measured: str | None = None
    """Why there are no metrics."""


DeployConfig.model_rebuild()
EvaluateConfig.model_rebuild()
