"""Bodies of the control plane's HTTP API: what clients send and what they get back.

Objects follow OpenAI's conventions: ``object`` names the type, times are Unix seconds, lists are pages of
``{"object": "list", "data", "has_more", "first_id", "last_id"}`` walked with ``after=<last_id>``.
"""

from __future__ import annotations

import math
from datetime import datetime
from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from parampara.schemas.stages import ArtifactKind, DeployParams, GateResult, Kind

FilePurpose = Literal["assistants", "batch", "fine-tune", "vision", "user_data", "evals"]
Scope = Literal["admin", "jobs", "chat"]
Order = Literal["asc", "desc"]
State = Literal["waiting", "queued", "running", "succeeded", "failed", "cancelled"]
FileId = Annotated[str, Field(min_length=1, max_length=64, examples=["file-3f9c1a7be2d04c5f8a6b9e10"])]
Metadata = Annotated[
    dict[Annotated[str, Field(min_length=1, max_length=64)], Annotated[str, Field(max_length=512)]],
    Field(max_length=16, description="At most 16 pairs; keys up to 64 characters, values up to 512."),
]
Item = TypeVar("Item")
_MAX_DEPTH = 64


class Request(BaseModel):
    """A request body: unknown keys are refused, and so is text that no database column can hold."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _storable(cls, data: Any) -> Any:
        if (fault := unstorable(data)) is not None:
            raise ValueError(fault)
        return data


class Answer(BaseModel):
    model_config = ConfigDict(protected_namespaces=())


class Page(Answer, Generic[Item]):
    object: Literal["list"] = "list"
    data: list[Item]
    has_more: bool
    first_id: str | None = None
    last_id: str | None = None


class Deleted(Answer):
    id: str
    object: str
    deleted: Literal[True] = True


class ErrorDetail(Answer):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(Answer):
    """What every failed request answers, on every route and status."""

    error: ErrorDetail


class FileObject(Answer):
    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    filename: str
    purpose: FilePurpose
    status: Literal["uploaded", "processed", "error"] = "processed"
    expires_at: int | None = None
    status_details: str | None = None


# ------------------------------------------------------------------------------------------------------------- runs


class Datasets(Request):
    """Ids of uploaded files. Without validation files a share of the training data is held out. Preferences are for recipes with stage
    dpo, and for no other."""

    books: Annotated[list[FileId], Field(min_length=1, max_length=1000)]
    books_validation: Annotated[list[FileId], Field(max_length=1000)] = []
    qa: Annotated[list[FileId], Field(min_length=1, max_length=1000)]
    qa_validation: Annotated[list[FileId], Field(max_length=1000)] = []
    preferences: Annotated[list[FileId], Field(max_length=1000)] = []
    preferences_validation: Annotated[list[FileId], Field(max_length=1000)] = []


class RunCreate(Request):
    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "recipe": {"name": "kp-expert", "base_model": "llama-3.1-8b-instruct", "stages": {"deploy": {"alias": "kp"}}},
                    "datasets": {"books": ["file-3f9c1a7be2d04c5f8a6b9e10"], "qa": ["file-91d0c2b7a4e84f3d9c5b6a78"]},
                    "metadata": {"team": "research"},
                }
            ]
        }
    )

    recipe: dict[str, Any] | None = None
    """The recipe as a mapping; give this or ``recipe_yaml``."""
    recipe_yaml: Annotated[str, Field(min_length=1, max_length=65_536)] | None = None
    """The recipe as YAML text, exactly as it stands in a recipe file."""
    datasets: Datasets
    name: Annotated[str, Field(min_length=1, max_length=80, pattern=r"^[\w .-]+$")] | None = None
    """A label; the recipe's name by default."""
    metadata: Metadata = {}
    reuse: bool = True
    """Take products of earlier jobs that had equal parameters and inputs instead of making them again."""


class Progress(Answer):
    """Newest report of a stage."""

    phase: str | None = None
    step: int | None = None
    total: int | None = None
    metrics: dict[str, float | None] = {}


class JobObject(Answer):
    id: str
    object: Literal["job"] = "job"
    run_id: str | None
    name: str
    kind: Kind
    queue: str
    status: State
    depends_on: list[str]
    progress: Progress
    eta_seconds: float | None
    cancel_requested: bool
    crashes: int
    artifact_id: str | None
    reused_from: str | None
    result: dict[str, Any] | None
    error: dict[str, Any] | None
    created_at: int
    started_at: int | None
    finished_at: int | None


class AttemptObject(Answer):
    id: str
    object: Literal["job.attempt"] = "job.attempt"
    number: int
    status: str
    worker: str
    exit_code: int | None
    error: dict[str, Any] | None
    log_tail: str | None
    started_at: int
    finished_at: int | None


class JobDetail(JobObject):
    spec: dict[str, Any]
    attempts: list[AttemptObject]
    log_tail: str | None
    """Last lines of the newest attempt."""


class RunArtifact(Answer):
    id: str
    kind: ArtifactKind
    bytes: int
    job: str
    reused: bool


class RunSummary(Answer):
    id: str
    object: Literal["run"] = "run"
    name: str
    status: State
    gate: Literal["promote", "hold", "fail"] | None
    model: str | None
    """Immutable name of the model that came out; pass it, or the alias, as ``model`` in a chat."""
    alias: str | None
    error: dict[str, Any] | None
    metadata: dict[str, str]
    created_at: int
    started_at: int | None
    finished_at: int | None


class RunObject(RunSummary):
    datasets: dict[str, list[str]]
    recipe: dict[str, Any]
    stage: str | None
    """Name of the job that runs now."""
    progress: Annotated[float, Field(ge=0, le=1)]
    """Share of the jobs' work that is done."""
    eta_seconds: float | None
    """Time left of the running job, and of the waiting ones where earlier runs tell how long they take."""
    jobs: list[JobObject]
    gates: list[GateResult]
    artifacts: list[RunArtifact]


class EventObject(Answer):
    id: str
    object: Literal["event"] = "event"
    run_id: str | None
    job_id: str | None
    attempt: int | None
    type: str
    level: Literal["info", "warn", "error"]
    message: str
    data: dict[str, Any]
    created_at: int


class MetricPoint(Answer):
    step: int
    total: int | None = None
    phase: str | None = None
    t: float | None = None
    """Unix seconds."""
    metrics: dict[str, float | None]


class JobMetrics(Answer):
    object: Literal["job.metrics"] = "job.metrics"
    job_id: str
    source: Literal["progress", "events", "none"]
    data: list[MetricPoint]


# -------------------------------------------------------------------------------------------- artifacts, deployments


class ArtifactObject(Answer):
    id: str
    object: Literal["artifact"] = "artifact"
    kind: ArtifactKind
    bytes: int
    parents: list[str]
    job_id: str | None
    created_at: int


class ArtifactFile(Answer):
    path: str
    size: int
    sha256: str


class ArtifactDetail(ArtifactObject):
    files: list[ArtifactFile]
    config: dict[str, Any]
    versions: dict[str, str]
    parent_artifacts: list[ArtifactObject]


AliasName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$", examples=["kp"])]


class DeploymentCreate(Request):
    model_config = ConfigDict(
        json_schema_extra={"examples": [{"model": "ft:llama-3.1-8b-instruct:parampara:expert:3f9c1a7b", "alias": "kp"}]}
    )

    artifact_id: Annotated[str, Field(max_length=80)] | None = None
    """A merged or quantized model; give this or ``model``."""
    model: Annotated[str, Field(max_length=300)] | None = None
    alias: AliasName
    params: DeployParams | None = None
    """How vLLM is started; its ``alias`` and ``replace`` are taken from those of this body."""
    replace: bool = False
    """Take the model server from other aliases that serve another model; without it such a request is refused."""

    @model_validator(mode="after")
    def _one_source(self) -> DeploymentCreate:
        if (self.artifact_id is None) == (self.model is None):
            raise ValueError("give either artifact_id or model")
        return self


class LiveObject(Answer):
    """The last row of a model's ledger: from the evaluated model to the one that vLLM serves."""

    metrics: dict[str, float]
    """``parity.live.*`` and ``serving.*``."""
    gates: list[GateResult]
    decision: Literal["promote", "hold", "fail"]
    not_measured: str | None
    """Why there are no metrics."""


class DeploymentObject(Answer):
    id: str
    object: Literal["deployment"] = "deployment"
    alias: str
    model: str
    artifact_id: str
    generation: int
    status: str
    active: bool
    """True for the one deployment that its alias points to now."""
    live: LiveObject | None
    """What was measured on the live endpoint before the alias moved; null until then."""
    job_id: str | None
    url: str | None
    error: dict[str, Any] | None
    created_at: int
    ready_at: int | None


class AliasObject(Answer):
    id: str
    object: Literal["alias"] = "alias"
    model: str | None
    generation: int
    vector_store_id: str | None
    updated_at: int


class AliasUpdate(Request):
    model_config = ConfigDict(json_schema_extra={"examples": [{"vector_store_id": "vs_3f9c1a7be2d04c5f8a6b9e10"}]})

    vector_store_id: Annotated[str, Field(min_length=1, max_length=64)] | None
    """The knowledge base that answers for this alias draw on; null detaches it."""


# ------------------------------------------------------------------------------------------------------------- keys


class ApiKeyCreate(Request):
    model_config = ConfigDict(json_schema_extra={"examples": [{"name": "notebook", "scopes": ["jobs", "chat"]}]})

    name: Annotated[str, Field(min_length=1, max_length=80, pattern=r"^[\w .@-]+$")]
    scopes: Annotated[list[Scope], Field(min_length=1, max_length=3)]


class ApiKeyObject(Answer):
    id: str
    object: Literal["api_key"] = "api_key"
    name: str
    hint: str
    scopes: list[Scope]
    created_at: int
    revoked_at: int | None


class ApiKeyCreated(ApiKeyObject):
    key: str
    """The key itself: shown this once, stored nowhere."""


class Check(Answer):
    ok: bool
    required: bool
    detail: str


class Readiness(Answer):
    status: Literal["ready", "not_ready"]
    checks: dict[str, Check]


def unix(moment: datetime) -> int:
    return int(moment.timestamp())


def unix_or_none(moment: datetime | None) -> int | None:
    return None if moment is None else unix(moment)


def unstorable(value: Any) -> str | None:
    """What makes a JSON value impossible to store in PostgreSQL, or None."""
    pending: list[tuple[str, int, Any]] = [("the body", 0, value)]
    while pending:
        place, depth, item = pending.pop()
        if isinstance(item, str):
            if "\x00" in item or any("\ud800" <= character <= "\udfff" for character in item):
                return f"{ascii(place)[1:-1]} holds a NUL character or half of a surrogate pair; send plain Unicode text"
        elif isinstance(item, float):
            if not math.isfinite(item):
                return f"{ascii(place)[1:-1]} is {item}; JSON has finite numbers only"
        elif isinstance(item, dict | list):
            if depth == _MAX_DEPTH:
                return f"the body is nested deeper than {_MAX_DEPTH} levels"
            children = item.items() if isinstance(item, dict) else enumerate(item)
            for key, child in children:
                name = str(key) if depth == 0 else f"{place}.{key}"
                pending += [(name, depth + 1, str(key)), (name, depth + 1, child)]
    return None
