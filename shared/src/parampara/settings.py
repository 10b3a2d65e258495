"""Settings of every service: environment variables ``PARAMPARA_*``, nested with ``__``; ``.env.example`` lists them all."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

Port = Annotated[int, Field(ge=1, le=65535)]


class ControlPlaneSettings(BaseModel):
    host: str = "127.0.0.1"
    port: Port = 8001
    metrics_port: Port | None = None
    """Port for ``/metrics`` without a key, for a Prometheus inside; None: only on ``port``, with a key."""
    metrics_host: str = "127.0.0.1"


class DatabaseSettings(BaseModel):
    url: str = "postgresql+psycopg://parampara@127.0.0.1:5432/parampara"
    pool_size: Annotated[int, Field(ge=1, le=200)] = 5


class RedisSettings(BaseModel):
    url: str = "redis://127.0.0.1:6379/0"


class WorkerSettings(BaseModel):
    lease_seconds: Annotated[float, Field(ge=1)] = 30
    heartbeat_seconds: Annotated[float, Field(gt=0)] = 7
    poll_seconds: Annotated[float, Field(gt=0)] = 1.5
    max_crashes: Annotated[int, Field(ge=1)] = 3
    stop_grace_seconds: Annotated[float, Field(ge=0)] = 10
    """From SIGTERM to SIGKILL of a stage process that is cancelled or preempted."""
    stall_seconds: Annotated[float, Field(ge=10)] = 1800
    """A stage process that reports nothing for this long is stopped and counted as a crash."""
    preload: Literal["none", "trl", "unsloth"] = "none"
    """Training worker: keep a process with this backend's libraries imported and fork stages from it. Costs about 0.6 GB while idle."""
    metrics_port: Port | None = None
    metrics_host: str = "127.0.0.1"
    price_per_hour: Annotated[float, Field(ge=0)] | None = None
    """What an hour of this machine costs, in the currency you like; None: training reports no cost."""
    peak_flops: Annotated[float, Field(gt=0)] | None = None
    """Peak of this worker's device, FLOPS per second; None: from a table of GPUs, and no MFU elsewhere."""
    processes: Annotated[int, Field(ge=1, le=64)] = 1
    """How many processes train one model together, a GPU each."""

    @model_validator(mode="after")
    def _beats_often_enough(self) -> WorkerSettings:
        if self.heartbeat_seconds > self.lease_seconds / 3:
            raise ValueError(
                f"heartbeat_seconds {self.heartbeat_seconds:g} is above a third of lease_seconds {self.lease_seconds:g}: one "
                "late heartbeat would lose the job; make the heartbeat shorter or the lease longer"
            )
        return self


class GatewaySettings(BaseModel):
    host: str = "127.0.0.1"
    port: Port = 8000
    metrics_port: Port | None = None
    """Port for ``/metrics`` without a key, for a Prometheus inside; None: only on ``port``, with a key."""
    metrics_host: str = "127.0.0.1"
    control_plane_url: str = "http://127.0.0.1:8001"
    model_url: str = "http://127.0.0.1:8002"
    embedder_url: str = "http://127.0.0.1:8003"
    max_body_bytes: Annotated[int, Field(ge=1024)] = 1_048_576
    refresh_seconds: Annotated[float, Field(gt=0)] = 1.0
    """How old the gateway's copy of keys, aliases and attachments may get."""
    max_stale_seconds: Annotated[float, Field(gt=0)] = 60
    """While the database is away, requests are served from the last copy for this long; then they get 503."""
    public_url: str | None = None
    """Base of the links in citations; empty: the address that the client called."""
    max_messages: Annotated[int, Field(ge=1)] = 64
    max_inflight: Annotated[int, Field(ge=1)] = 256
    """Requests on the token path at one time, over all keys; one more gets 429."""
    max_inflight_per_key: Annotated[int, Field(ge=1)] = 64
    connect_seconds: Annotated[float, Field(gt=0)] = 2
    first_token_seconds: Annotated[float, Field(gt=0)] = 120
    """From sending a streamed request to its first event."""
    inter_token_seconds: Annotated[float, Field(gt=0)] = 60
    total_seconds: Annotated[float, Field(gt=0)] = 600
    structured_outputs: bool = False
    """Allow ``response_format`` with a JSON schema and forced tool calls: each compiles a grammar inside the engine."""
    isolate_prompt_cache: bool = True
    """Salt the engine's prefix cache by API key, so that timing never tells one key what another has asked."""
    max_passages: Annotated[int, Field(ge=1, le=50)] = 6
    """Passages retrieved for an answer when the request does not say ``max_num_results``."""
    answer_tokens: Annotated[int, Field(ge=1)] = 512
    """Room kept for an answer when the request does not say ``max_tokens``; never more than a quarter of the model's window."""


class ModelServerSettings(BaseModel):
    host: str = "127.0.0.1"
    port: Port = 8004
    """The supervisor's own port; vLLM listens on ``vllm_port``."""
    url: str = "http://127.0.0.1:8004"
    vllm_host: str = "127.0.0.1"
    vllm_port: Port = 8002
    vllm_command: list[str] = ["vllm", "serve"]
    """How vLLM is started; the standalone stack uses ``<its environment>/bin/python -m vllm.entrypoints.openai.api_server --model``."""
    vllm_extra_args: list[str] = []
    cpu: bool = False
    """vLLM's CPU build: small KV cache, eager mode, explicit thread binding."""


class EmbedderSettings(BaseModel):
    host: str = "127.0.0.1"
    port: Port = 8003
    model: str = "all-minilm-l6-v2"
    dimensions: int = 384


class EvaluatorSettings(BaseModel):
    judge_base_url: str | None = None
    """An OpenAI-compatible endpoint up to and with its ``/v1``, for recipes with ``stages.evaluate.judge``; None: such a recipe is refused.
    A setting and not part of a recipe: whoever may start a run must not choose what this machine calls."""
    judge_api_key: SecretStr = SecretStr("")
    """Sent to it as a bearer token; empty: no such header."""
    judge_timeout_seconds: Annotated[float, Field(gt=0, le=600)] = 60
    """For one request; one that fails is sent five times."""
    judge_concurrency: Annotated[int, Field(ge=1, le=64)] = 4
    """Requests at one time."""
    harness_tasks: Path | None = None
    """Directory with tasks of lm-evaluation-harness, which recipes name under ``stages.evaluate.harness``; None: its own tasks only.
    A task may hold code: whoever may start a run must not choose where tasks come from."""

    @field_validator("judge_base_url")
    @classmethod
    def _plain_address(cls, url: str | None) -> str | None:
        if not url:
            return None
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.password or parts.query or parts.fragment:
            raise ValueError("judge_base_url is http(s)://HOST/v1, without a user, a query or a fragment; the key is judge_api_key")
        return url.rstrip("/")


class Settings(BaseSettings):
    model_config = SettingsConfigDict(env_prefix="PARAMPARA_", env_nested_delimiter="__", extra="ignore")

    home: Path = Path(".parampara")
    organization: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,40}$")] = "parampara"
    key_pepper: SecretStr = SecretStr("")
    """Secret under which API keys are hashed; empty: ``<home>/key-pepper`` is made at first start."""
    base_models: dict[str, str] = {}
    """Name to local directory of each base model that a recipe may name."""
    log_format: str = "json"
    log_level: str = "INFO"

    database: DatabaseSettings = DatabaseSettings()
    redis: RedisSettings = RedisSettings()
    worker: WorkerSettings = WorkerSettings()
    control_plane: ControlPlaneSettings = ControlPlaneSettings()
    gateway: GatewaySettings = GatewaySettings()
    model_server: ModelServerSettings = ModelServerSettings()
    embedder: EmbedderSettings = EmbedderSettings()
    evaluator: EvaluatorSettings = EvaluatorSettings()
    max_upload_bytes: Annotated[int, Field(ge=1)] = 209_715_200

    @property
    def artifacts_dir(self) -> Path:
        return self.home.resolve() / "artifacts"

    @property
    def files_dir(self) -> Path:
        return self.home.resolve() / "files"

    @property
    def work_dir(self) -> Path:
        """Private directories of jobs: ``work/<job id>``."""
        return self.home.resolve() / "work"


@lru_cache
def get_settings() -> Settings:
    return Settings()
