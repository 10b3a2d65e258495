"""From a recipe and dataset files to the jobs of a run.

A job's ``spec`` is plain JSON: ``{"inputs": {name: [reference, ...]}, "params": {...}, ...}``. A reference is one of

- ``{"base": name}``: a base model of the catalogue,
- ``{"job": name}``: the artifact of another job of the same run,
- ``{"artifact": id}``: an artifact,
- ``{"file": id}``: an uploaded file.

:mod:`parampara.execution.inputs` turns it into a stage's configuration when a worker has claimed the job.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from parampara.errors import InvalidRequest
from parampara.schemas.metrics import is_live
from parampara.schemas.recipe import Recipe
from parampara.schemas.stages import ArtifactKind, DeployParams, Kind

QUEUES: dict[Kind, str] = {
    "dapt": "train",
    "sft": "train",
    "dpo": "train",
    "merge": "merge",
    "quantize": "quantize",
    "evaluate": "evaluate",
    "deploy": "deploy",
    "ingest": "ingest",
}
ARTIFACT_KINDS: dict[Kind, ArtifactKind | None] = {
    "dapt": "adapter",
    "sft": "adapter",
    "dpo": "adapter",
    "merge": "merged_model",
    "quantize": "quantized_model",
    "evaluate": "report",
    "deploy": None,
    "ingest": None,
}
STAGE_VERSIONS: dict[Kind, int] = {"dapt": 3, "sft": 3, "dpo": 1, "merge": 1, "quantize": 3, "evaluate": 4}
"""Raise one when its stage makes other bytes from equal inputs: earlier products are then not reused. Absent: never reused."""
DATASETS = ("books", "books_validation", "qa", "qa_validation", "preferences", "preferences_validation")

Reference = dict[str, str]


@dataclass(frozen=True)
class PlannedJob:
    name: str
    kind: Kind
    depends_on: tuple[str, ...]
    inputs: Mapping[str, Sequence[Reference]]
    params: Mapping[str, Any]
    extra: Mapping[str, Any] = field(default_factory=dict)

    def spec(self, *, reuse: bool) -> dict[str, Any]:
        inputs = {name: list(references) for name, references in self.inputs.items()}
        return {"inputs": inputs, "params": dict(self.params), "reuse": reuse, **self.extra}


def check_datasets(datasets: Mapping[str, Any], recipe: Recipe) -> dict[str, list[str]]:
    """File ids per dataset, with every known key present.

    Raises:
        InvalidRequest: unknown key, not a list of ids, the same file twice, no books or questions at all, or preferences where the
            recipe does not train on them, or none where it does.
    """
    for key, value in datasets.items():
        if key not in DATASETS:
            raise InvalidRequest(
                f"datasets.{key} is not a known key; known: {', '.join(DATASETS)}.", param=f"datasets.{key}", code="unknown_parameter"
            )
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise InvalidRequest(f"datasets.{key} is a list of file ids.", param=f"datasets.{key}")
    checked = {key: list(datasets.get(key, [])) for key in DATASETS}
    for key in ("books", "qa"):
        if not checked[key]:
            raise InvalidRequest(
                f"datasets.{key} is empty: give at least one file id.", param=f"datasets.{key}", code="missing_required_parameter"
            )
    _check_preferences(checked, recipe)
    seen: dict[str, str] = {}
    for key, ids in checked.items():
        for file_id in ids:
            if file_id in seen:
                raise InvalidRequest(f"File {file_id} is in datasets.{seen[file_id]} and again in datasets.{key}.", param=f"datasets.{key}")
            seen[file_id] = key
    return checked


def plan_run(recipe: Recipe, datasets: Mapping[str, list[str]]) -> list[PlannedJob]:
    """The jobs of a run in order: dapt, merge_dapt, sft, merge, quantize, evaluate and, unless the recipe says null, deploy.

    Where the recipe has stage dpo, merge_sft and dpo stand between sft and merge.
    """
    stages, base = recipe.stages, {"base": recipe.base_model}
    books = {"train": _files(datasets["books"]), "validation": _files(datasets["books_validation"])}
    qa = {"train": _files(datasets["qa"]), "validation": _files(datasets["qa_validation"])}
    training = {"seed": recipe.seed, "backend": recipe.backend, "tracking": recipe.tracking.model_dump(mode="json")}
    merge = stages.merge.model_dump(mode="json")
    planned = [
        PlannedJob("dapt", "dapt", (), {"model": [base], **books}, stages.dapt.model_dump(mode="json"), training),
        # SFT trains on this one, in the precision that DAPT trained in: nothing may be rounded away between the two
        PlannedJob("merge_dapt", "merge", ("dapt",), {"model": [base], "adapters": [{"job": "dapt"}]}, merge, {"dtype_of": "dapt"}),
        PlannedJob("sft", "sft", ("merge_dapt",), {"model": [{"job": "merge_dapt"}], **qa}, stages.sft.model_dump(mode="json"), training),
        *_last_training(recipe, base, _preferences(recipe, datasets), training),
        _quantize(recipe, books, qa),
        _evaluate(recipe, base, {**_data(books, qa), **_measured_preferences(recipe, datasets)}),
    ]
    if stages.deploy is not None:
        deploy = stages.deploy.model_dump(mode="json")
        inputs = {"model": [{"job": "quantize"}], "evaluation": [{"job": "evaluate"}]}
        planned.append(PlannedJob("deploy", "deploy", ("quantize", "evaluate"), inputs, deploy, {"gates": _gates(recipe, live=True)}))
    return planned


def deploy_spec(*, model: str, artifact_id: str, params: DeployParams) -> dict[str, Any]:
    """Spec of a deploy job outside a run: serve a registered model under ``params.alias``."""
    return {"inputs": {"model": [{"artifact": artifact_id}]}, "params": params.model_dump(mode="json"), "model": model, "reuse": False}


def ingest_spec(
    *, vector_store_id: str, file_ids: Sequence[str], chunk_tokens: int = 800, chunk_overlap_tokens: int = 400
) -> dict[str, Any]:
    """Spec of an ingest job: chunk and embed files into a vector store."""
    params = {"chunk_tokens": chunk_tokens, "chunk_overlap_tokens": chunk_overlap_tokens}
    return {"inputs": {"documents": _files(file_ids)}, "params": params, "vector_store_id": vector_store_id, "reuse": False}


def _check_preferences(checked: Mapping[str, list[str]], recipe: Recipe) -> None:
    if recipe.stages.dpo is None:
        for key in ("preferences", "preferences_validation"):
            if checked[key]:
                raise InvalidRequest(
                    f"datasets.{key} is given, and recipe.stages.dpo is null: no stage would read it. Add `dpo: {{}}` to the recipe's "
                    f"stages to train on preferences, or leave datasets.{key} out.",
                    param=f"datasets.{key}",
                )
    elif not checked["preferences"]:
        raise InvalidRequest(
            "datasets.preferences is empty, and recipe.stages.dpo trains on it: give at least one file id, or set stages.dpo to null.",
            param="datasets.preferences",
            code="missing_required_parameter",
        )


def _last_training(
    recipe: Recipe, base: Reference, preferences: Mapping[str, list[Reference]], training: Mapping[str, Any]
) -> list[PlannedJob]:
    """What follows sft up to the final merge, which applies every adapter to the base in one pass."""
    merge, adapters = recipe.stages.merge.model_dump(mode="json"), [{"job": "dapt"}, {"job": "sft"}]
    if recipe.stages.dpo is None:
        return [PlannedJob("merge", "merge", ("sft",), {"model": [base], "adapters": adapters}, merge)]
    final = [*adapters, {"job": "dpo"}]
    return [
        # as merge_dapt for SFT: DPO starts on unrounded weights, which are its reference too
        PlannedJob("merge_sft", "merge", ("sft",), {"model": [base], "adapters": adapters}, merge, {"dtype_of": "sft"}),
        PlannedJob("dpo", "dpo", ("merge_sft",), {"model": [{"job": "merge_sft"}], **preferences}, _dpo_params(recipe), training),
        PlannedJob("merge", "merge", ("dpo",), {"model": [base], "adapters": final}, merge),
    ]


def _dpo_params(recipe: Recipe) -> dict[str, Any]:
    """With the system prompt of SFT where DPO names none: preferences are learnt for the prompt that the questions are put with."""
    assert recipe.stages.dpo is not None
    params = recipe.stages.dpo.model_dump(mode="json")
    return {**params, "system_prompt": recipe.stages.sft.system_prompt} if params["system_prompt"] is None else params


def _preferences(recipe: Recipe, datasets: Mapping[str, list[str]]) -> dict[str, list[Reference]]:
    if recipe.stages.dpo is None:
        return {}
    return {"train": _files(datasets["preferences"]), "validation": _files(datasets.get("preferences_validation", []))}


def _measured_preferences(recipe: Recipe, datasets: Mapping[str, list[str]]) -> dict[str, list[Reference]]:
    return {f"preferences_{name}": files for name, files in _preferences(recipe, datasets).items()}


def _quantize(recipe: Recipe, books: Mapping[str, list[Reference]], qa: Mapping[str, list[Reference]]) -> PlannedJob:
    extra = {"seed": recipe.seed, **_training_params(recipe)}
    inputs = {"model": [{"job": "merge"}], **_data(books, qa)}
    return PlannedJob("quantize", "quantize", ("merge",), inputs, recipe.stages.quantize.model_dump(mode="json"), extra)


def _evaluate(recipe: Recipe, base: Reference, data: Mapping[str, list[Reference]]) -> PlannedJob:
    dpo = recipe.stages.dpo is not None
    inputs = {
        "base": [base],
        "dapt_adapter": [{"job": "dapt"}],
        "dapt_merged": [{"job": "merge_dapt"}],
        "sft_adapter": [{"job": "sft"}],
        **({"sft_merged": [{"job": "merge_sft"}], "dpo_adapter": [{"job": "dpo"}]} if dpo else {}),
        "merged": [{"job": "merge"}],
        "quantized": [{"job": "quantize"}],
        **data,
    }
    extra = {
        "seed": recipe.seed,
        "base_model": recipe.base_model,
        **_training_params(recipe),
        **({"dpo_params": _dpo_params(recipe)} if dpo else {}),
        "deploy_params": recipe.stages.deploy.model_dump(mode="json") if recipe.stages.deploy is not None else None,
        "gates": _gates(recipe, live=False),
    }
    return PlannedJob("evaluate", "evaluate", ("quantize",), inputs, recipe.stages.evaluate.model_dump(mode="json"), extra)


def _data(books: Mapping[str, list[Reference]], qa: Mapping[str, list[Reference]]) -> dict[str, list[Reference]]:
    """What the model was trained on, as inputs of a stage that measures on the part that was held out."""
    return {
        "text_train": books["train"],
        "text_validation": books["validation"],
        "qa_train": qa["train"],
        "qa_validation": qa["validation"],
    }


def _training_params(recipe: Recipe) -> dict[str, Any]:
    """What says which part of the data was held out."""
    return {"dapt_params": recipe.stages.dapt.model_dump(mode="json"), "sft_params": recipe.stages.sft.model_dump(mode="json")}


def _gates(recipe: Recipe, *, live: bool) -> list[dict[str, Any]]:
    """The recipe's gates on what a deployment measures, or on what the evaluation does."""
    return [gate.model_dump(mode="json") for gate in recipe.gates if is_live(gate.metric) == live]


def _files(file_ids: Sequence[str]) -> list[Reference]:
    return [{"file": file_id} for file_id in file_ids]
