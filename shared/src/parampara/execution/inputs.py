"""From a claimed job's spec to the stage's configuration with local paths, and to the job's cache key.

In two steps, because hashing a model takes a minute and no transaction may be open meanwhile: :func:`gather` reads rows,
:func:`resolve` looks at files.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from pydantic import BaseModel, ValidationError
from sqlalchemy import select
from sqlalchemy.orm import Session

import parampara
from parampara import base_models, files, judges
from parampara.db.models import Alias, Deployment, File, Job, Model, Run, VectorStore
from parampara.errors import InvalidData, InvalidRequest, NotFound
from parampara.execution import hooks
from parampara.execution.leases import Claim, hold
from parampara.execution.runs import lock_run, settle
from parampara.manifest import sha256_file
from parampara.plan import STAGE_VERSIONS
from parampara.schemas.ingest import IngestConfig
from parampara.schemas.recipe import invalid
from parampara.schemas.stages import DaptConfig, DeployConfig, DpoConfig, EvaluateConfig, Kind, MergeConfig, QuantizeConfig, SftConfig
from parampara.settings import Settings
from parampara.storage import LocalStorage

CONFIGS: dict[Kind, type[BaseModel]] = {
    "dapt": DaptConfig,
    "sft": SftConfig,
    "dpo": DpoConfig,
    "merge": MergeConfig,
    "quantize": QuantizeConfig,
    "evaluate": EvaluateConfig,
    "deploy": DeployConfig,
    "ingest": IngestConfig,
}


@dataclass(frozen=True)
class FileRow:
    id: str
    filename: str
    sha256: str


@dataclass(frozen=True)
class Gathered:
    """What the database knows about a job's inputs."""

    kind: Kind
    spec: dict[str, Any]
    artifacts: dict[str, str] = field(default_factory=dict)
    """Name of a job of the run to its artifact id."""
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    files: dict[str, FileRow] = field(default_factory=dict)
    deployment: dict[str, Any] = field(default_factory=dict)
    embedding_model: str = ""
    champion: str | None = None
    """Report artifact of the model that the run's alias serves now."""


@dataclass(frozen=True)
class Resolved:
    config: BaseModel
    cache_key: str | None
    """None: the stage's product is never reused."""
    parents: list[str]
    """Artifact ids that go into the product's manifest."""
    secrets: dict[str, str] = field(default_factory=dict, repr=False)
    """Variables for the environment of the stage process, and for no file."""


@dataclass(frozen=True)
class _Input:
    path: Path
    content: str
    """What identifies the bytes: an artifact id or a hash."""
    artifact_id: str | None = None
    file: FileRow | None = None


def gather(session: Session, claim: Claim) -> Gathered | None:
    """Read what the spec refers to and mark the run as running; None when the claim no longer holds.

    Raises:
        NotFound: a file, model or vector store that the spec names was deleted.
    """
    if (job := hold(session, claim)) is None:
        return None
    run = lock_run(session, job.run_id)
    settle(session, run)
    references = [reference for group in job.spec["inputs"].values() for reference in group]
    others = session.scalars(select(Job).where(Job.run_id == job.run_id, Job.state == "succeeded")) if job.run_id else []
    done = {other.name: other for other in others}
    artifacts = {name: other.artifact_id for name, other in done.items() if other.artifact_id}
    for name in {reference["job"] for reference in references if "job" in reference} - set(artifacts):
        raise NotFound(f"Job {job.name} needs the artifact of {name}, which has none.", param=f"jobs.{name}")
    return Gathered(
        kind=claim.kind,
        spec=job.spec,
        artifacts=artifacts,
        results={name: other.result or {} for name, other in done.items()},
        files=_file_rows(session, [reference["file"] for reference in references if "file" in reference]),
        deployment=_deployment(session, job, run, artifacts) if job.kind == "deploy" else {},
        embedding_model=_embedding_model(session, job) if job.kind == "ingest" else "",
        champion=_champion(session, job, artifacts) if job.kind == "evaluate" else None,
    )


def resolve(gathered: Gathered, settings: Settings, storage: LocalStorage) -> Resolved:
    """Find and check every input on disk and make the stage's configuration.

    Raises:
        InvalidRequest: the base model is not here, or the spec makes no valid configuration.
        NotFound: bytes of an artifact or a file are not here.
        errors.ArtifactDamaged, InvalidData: they are, but differ from what was registered.
    """
    inputs = {
        name: [_locate(reference, gathered, settings, storage) for reference in group] for name, group in gathered.spec["inputs"].items()
    }
    if gathered.champion is not None:
        with suppress(NotFound):  # an old report may have been deleted: then there is nothing to compare with
            inputs["champion"] = [_locate({"artifact": gathered.champion}, gathered, settings, storage)]
    config_data = _ASSEMBLE[gathered.kind](gathered, inputs, settings)
    try:
        config = CONFIGS[gathered.kind].model_validate(config_data)
    except ValidationError as error:
        raise invalid(error, param="config") from None
    parents = [item.artifact_id for group in inputs.values() for item in group if item.artifact_id]
    parents = list(dict.fromkeys(parents))
    key = _cache_key(gathered, inputs, config_data.get("params"))
    return _with_what_is_here(config, parents, settings) if _asks_beyond_its_inputs(config) else Resolved(config, key, parents)


def find_twin(session: Session, claim: Claim, cache_key: str) -> Job | None:
    """Remember the job's cache key, and return a succeeded job with an equal one and an artifact, the newest first."""
    if (job := hold(session, claim)) is None:
        return None
    job.cache_key = cache_key
    if not job.spec.get("reuse"):
        return None
    twins = select(Job).where(Job.cache_key == cache_key, Job.state == "succeeded", Job.artifact_id.is_not(None), Job.id != job.id)
    return session.scalars(twins.order_by(Job.finished_at.desc()).limit(1)).one_or_none()


def _locate(reference: dict[str, str], gathered: Gathered, settings: Settings, storage: LocalStorage) -> _Input:
    if "base" in reference:
        path = base_models.resolve(settings, reference["base"])
        return _Input(path, base_models.fingerprint(path, cache=_fingerprints(settings)))
    if "file" in reference:
        row = gathered.files[reference["file"]]
        path = files.path_of(settings, row.id, row.filename)
        if not path.is_file():
            raise NotFound(f"The bytes of file {row.id} ({row.filename}) are gone from {path.parent}.", param=row.id, code="file_not_found")
        if sha256_file(path) != row.sha256:
            raise InvalidData(f"File {row.id} ({row.filename}) differs from what was uploaded: its sha256 is another.", param=row.id)
        # readers choose the format by the suffix: equal bytes under another name are another input
        return _Input(path, row.sha256 + files.suffix_of(row.filename), file=row)
    artifact_id = reference.get("artifact") or gathered.artifacts[reference["job"]]
    return _Input(storage.verify(artifact_id, cache=_fingerprints(settings)), artifact_id, artifact_id=artifact_id)


def _fingerprints(settings: Settings) -> Path:
    """Where it is kept which models were hashed already."""
    return settings.home.resolve() / "fingerprints"


def _cache_key(gathered: Gathered, inputs: dict[str, list[_Input]], params: Any) -> str | None:
    version = STAGE_VERSIONS.get(gathered.kind)
    if version is None:
        return None
    extra = {
        key: gathered.spec[key]
        for key in ("seed", "backend", "dapt_params", "sft_params", "dpo_params", "deploy_params", "base_model", "gates")
        if key in gathered.spec
    }
    content = {
        "kind": gathered.kind,
        "version": [parampara.__version__, version],
        "params": params,
        "inputs": {name: [item.content for item in group] for name, group in inputs.items()},
        **extra,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _train(gathered: Gathered, inputs: dict[str, list[_Input]], settings: Settings) -> dict[str, Any]:
    spec = gathered.spec
    data = {"train": _paths(inputs["train"]), "validation": _paths(inputs["validation"])}
    return {
        "model": inputs["model"][0].path,
        "data": data,
        **{name: spec[name] for name in ("params", "backend", "seed")},
        "tracking": spec.get("tracking", {}),
        "tracking_directory": settings.home.resolve() / "tracking",
        "machine": settings.worker.model_dump(include={"peak_flops", "price_per_hour", "processes"}),
    }


def _merge(gathered: Gathered, inputs: dict[str, list[_Input]], settings: Settings) -> dict[str, Any]:
    params = dict(gathered.spec["params"])
    if source := gathered.spec.get("dtype_of"):
        trained = gathered.results[source]
        # weights that were trained themselves are float32, whatever was computed in
        params["dtype"] = "float32" if trained.get("trained_in") == "float32" else trained["dtype"]
    return {"model": inputs["model"][0].path, "adapters": _paths(inputs["adapters"]), "params": params}


def _quantize(gathered: Gathered, inputs: dict[str, list[_Input]], settings: Settings) -> dict[str, Any]:
    spec = gathered.spec
    config = {"model": inputs["model"][0].path, "params": spec["params"]}
    if "text_train" not in inputs:  # a job from before the stage measured on held-out data
        return config
    return {**config, **_data(inputs), **{name: spec[name] for name in ("dapt_params", "sft_params", "seed")}}


def _evaluate(gathered: Gathered, inputs: dict[str, list[_Input]], settings: Settings) -> dict[str, Any]:
    models = ("base", "dapt_adapter", "dapt_merged", "sft_adapter", "merged", "quantized")
    copied = ("params", "dapt_params", "sft_params", "gates", "seed")
    return {
        **{name: inputs[name][0].path for name in models},
        **_data(inputs),
        **{name: gathered.spec[name] for name in copied},
        **(_after_dpo(gathered, inputs) if "dpo_adapter" in inputs else {}),
        "base_model": gathered.spec.get("base_model", ""),
        "deploy_params": gathered.spec.get("deploy_params"),
        "champion": inputs["champion"][0].path if "champion" in inputs else None,
    }


def _after_dpo(gathered: Gathered, inputs: dict[str, list[_Input]]) -> dict[str, Any]:
    """What an evaluation gets beside the rest where the line has stage dpo."""
    return {
        "sft_merged": inputs["sft_merged"][0].path,
        "dpo_adapter": inputs["dpo_adapter"][0].path,
        "preferences": _files(inputs, "preferences"),
        "dpo_params": gathered.spec["dpo_params"],
    }


def _asks_beyond_its_inputs(config: BaseModel) -> TypeGuard[EvaluateConfig]:
    return isinstance(config, EvaluateConfig) and (config.params.judge is not None or config.params.harness is not None)


def _with_what_is_here(config: EvaluateConfig, parents: list[str], settings: Settings) -> Resolved:
    """With the judge's endpoint and key and the tasks of this machine, and never reused: a judge may have been away, or be another model
    by now, and the tasks' files are no inputs of the job.

    Raises:
        InvalidRequest: no judge's endpoint is configured here.
    """
    endpoint = judges.endpoint(settings, config.params, param="params.judge")
    secrets = {judges.KEY_VARIABLE: settings.evaluator.judge_api_key.get_secret_value()} if endpoint is not None else {}
    tasks = settings.evaluator.harness_tasks.resolve() if config.params.harness is not None and settings.evaluator.harness_tasks else None
    return Resolved(config.model_copy(update={"judge_endpoint": endpoint, "harness_tasks": tasks}), None, parents, secrets)


def _deploy(gathered: Gathered, inputs: dict[str, list[_Input]], settings: Settings) -> dict[str, Any]:
    model = inputs["model"][0]
    return {
        "artifact_id": model.artifact_id,
        "model_path": model.path,
        "model_server_url": settings.model_server.url,
        "evaluation": inputs["evaluation"][0].path if inputs.get("evaluation") else None,
        "gates": gathered.spec.get("gates", []),
        "params": gathered.spec["params"],
        **gathered.deployment,
    }


def _ingest(gathered: Gathered, inputs: dict[str, list[_Input]], settings: Settings) -> dict[str, Any]:
    documents = [{"file_id": item.file.id, "filename": item.file.filename, "path": item.path} for item in inputs["documents"] if item.file]
    endpoint = settings.gateway.embedder_url
    return {
        "vector_store_id": gathered.spec["vector_store_id"],
        "documents": documents,
        "embedder_url": endpoint,
        "embedding_model": gathered.embedding_model,
        **gathered.spec["params"],
    }


_ASSEMBLE = {
    "dapt": _train,
    "sft": _train,
    "dpo": _train,
    "merge": _merge,
    "quantize": _quantize,
    "evaluate": _evaluate,
    "deploy": _deploy,
    "ingest": _ingest,
}


def _data(inputs: dict[str, list[_Input]]) -> dict[str, dict[str, list[Path]]]:
    return {name: _files(inputs, name) for name in ("text", "qa")}


def _files(inputs: dict[str, list[_Input]], name: str) -> dict[str, list[Path]]:
    return {"train": _paths(inputs[f"{name}_train"]), "validation": _paths(inputs[f"{name}_validation"])}


def _paths(items: list[_Input]) -> list[Path]:
    return [item.path for item in items]


def _file_rows(session: Session, file_ids: list[str]) -> dict[str, FileRow]:
    rows = session.scalars(select(File).where(File.id.in_(file_ids), File.deleted_at.is_(None)))
    found = {row.id: FileRow(row.id, row.filename, row.sha256) for row in rows}
    if missing := [file_id for file_id in file_ids if file_id not in found]:
        raise NotFound(f"File {missing[0]} was deleted after the job was made; upload it again.", param=missing[0], code="file_not_found")
    return found


def _deployment(session: Session, job: Job, run: Run | None, artifacts: dict[str, str]) -> dict[str, Any]:
    reference = job.spec["inputs"]["model"][0]
    artifact_id = reference.get("artifact") or artifacts[reference["job"]]
    model = job.spec.get("model") or (run.model if run else None)
    if model is None:
        raise InvalidRequest(f"Deploy job {job.id} names no model.", param="spec.model")
    deployment: Deployment = hooks.open_deployment(session, job, model=model, artifact_id=artifact_id)
    return {"model_name": deployment.model, "alias": deployment.alias, "generation": deployment.generation}


def _champion(session: Session, job: Job, artifacts: dict[str, str]) -> str | None:
    """What to compare with; None where nothing serves, what serves was not evaluated, or it is the very model under evaluation."""
    alias = session.get(Alias, (job.spec.get("deploy_params") or {}).get("alias", ""))
    model = session.get(Model, alias.model) if alias is not None and alias.model is not None else None
    if model is None or model.run_id is None or model.artifact_id in artifacts.values():
        return None
    reports = select(Job.artifact_id).where(Job.run_id == model.run_id, Job.kind == "evaluate", Job.state == "succeeded")
    return session.scalars(reports.order_by(Job.finished_at.desc()).limit(1)).one_or_none()


def _embedding_model(session: Session, job: Job) -> str:
    store = session.get(VectorStore, job.spec["vector_store_id"])
    if store is None or store.deleted_at is not None:
        raise NotFound(f"Vector store {job.spec['vector_store_id']} was deleted.", param="vector_store_id")
    return store.embedding_model
