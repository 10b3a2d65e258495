"""A recipe: the YAML file that declares a whole run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from parampara.errors import InvalidRequest
from parampara.plain_yaml import read_yaml
from parampara.schemas.metrics import METRICS, harness_task, is_live, is_of_dpo, is_reported
from parampara.schemas.stages import (
    DaptParams,
    DeployParams,
    DpoParams,
    EvaluateParams,
    Gate,
    MergeParams,
    QuantizeParams,
    SftParams,
    Strict,
    Tracking,
)


class Stages(Strict):
    """The line. ``dpo: null`` trains on no preferences; ``deploy: null`` ends the run after evaluation."""

    dapt: DaptParams = DaptParams()
    sft: SftParams = SftParams()
    dpo: DpoParams | None = None
    merge: MergeParams = MergeParams()
    quantize: QuantizeParams = QuantizeParams()
    evaluate: EvaluateParams = EvaluateParams()
    deploy: DeployParams | None = DeployParams()


class Recipe(Strict):
    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,79}$")]
    description: Annotated[str, Field(max_length=2000)] = ""
    base_model: Annotated[str, Field(min_length=1, max_length=200)]
    """A name in the model catalogue (``PARAMPARA_BASE_MODELS``) or a hub id that is already on this machine."""
    suffix: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,63}$")] = "expert"
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] = 42
    backend: Literal["auto", "unsloth", "trl"] = "auto"
    tracking: Tracking = Tracking()
    stages: Stages = Stages()
    gates: list[Gate] = []


def parse_recipe(data: Any, *, param: str = "recipe") -> Recipe:
    """Validate a recipe given as a mapping.

    Raises:
        InvalidRequest: names the path of the first key at fault, e.g. ``recipe.stages.dapt.lora.r``.
    """
    if not isinstance(data, dict):
        raise InvalidRequest(f"A recipe is a mapping of keys, not {type(data).__name__}.", param=param)
    try:
        recipe = Recipe.model_validate(data, strict=True)  # "16" and true are not numbers
    except ValidationError as error:
        raise invalid(error, param=param) from None
    _check_gates(recipe, param)
    return recipe


def _check_gates(recipe: Recipe, param: str) -> None:
    """A gate on a metric that nobody measures can never pass."""
    for position, gate in enumerate(recipe.gates):
        if (fault := _unmeasured(gate, recipe, param=param)) is not None:
            place = f"{param}.gates.{position}.metric"
            raise InvalidRequest(f"{place}: {fault}", param=place)


def _unmeasured(gate: Gate, recipe: Recipe, *, param: str) -> str | None:
    """Why a run of this recipe cannot measure the gate's metric; None where it can."""
    metric, stages, path = gate.metric, recipe.stages, f"{param}.stages"
    formats = stages.evaluate.formats
    if not is_reported(metric, formats=formats):
        return (
            f"neither evaluation nor deployment reports {metric!r}. Known: {', '.join(METRICS)}; <name> is a key of "
            f"{path}.evaluate.formats ({', '.join(formats) or 'none'})."
        )
    if metric.startswith("judge.") and stages.evaluate.judge is None:
        return f"{metric} is a judge's, and {path}.evaluate names none under judge."
    if metric.startswith("harness.") and metric.split(".")[1] not in _harness_tasks(recipe):
        return f"{metric} is of no task in {path}.evaluate.harness ({', '.join(_harness_tasks(recipe)) or 'none'})."
    if is_of_dpo(metric) and stages.dpo is None:
        return f"{metric} is measured where preferences are trained on, and {path}.dpo is null. Add `dpo: {{}}` there, or drop the gate."
    if is_live(metric) and stages.deploy is None:
        return f"{metric} is measured when a model is deployed, and {path}.deploy is null."
    return None


def _harness_tasks(recipe: Recipe) -> list[str]:
    harness = recipe.stages.evaluate.harness
    return [harness_task(task) for task in harness.tasks] if harness is not None else []


def load_recipe(path: Path) -> Recipe:
    """Read and validate a YAML recipe.

    Raises:
        InvalidRequest: not readable, not YAML, or not a recipe.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"Cannot read the recipe {path}: {error}", param="recipe") from None
    return parse_recipe(read_yaml(text, param="recipe"))


def invalid(error: ValidationError, *, param: str | None) -> InvalidRequest:
    """Turn pydantic's report into one message that names path, value and limit of each fault."""
    faults = []
    for fault in error.errors(include_url=False):
        path = ".".join(str(part) for part in ([param] if param else []) + list(fault["loc"]))
        got = "" if fault["type"] in ("missing", "extra_forbidden") else f" (got {_shown(fault.get('input'))})"
        known = " is not a known key" if fault["type"] == "extra_forbidden" else f": {fault['msg']}"
        faults.append((path, f"{path}{known}{got}"))
    first = faults[0][0] or None
    code = "unknown_parameter" if error.errors()[0]["type"] == "extra_forbidden" else "invalid_value"
    return InvalidRequest("; ".join(text for _, text in faults[:5]), param=first, code=code)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
