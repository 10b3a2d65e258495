"""The judge that a recipe may ask for: its address and key come from the settings of this machine, never from the recipe."""

from __future__ import annotations

from parampara.errors import InvalidRequest
from parampara.schemas.stages import EvaluateParams, JudgeEndpoint
from parampara.settings import Settings

KEY_VARIABLE = "PARAMPARA_EVALUATOR__JUDGE_API_KEY"
"""How the key reaches the stage process: in its environment, and only where it is to judge."""


def endpoint(settings: Settings, params: EvaluateParams, *, param: str = "recipe.stages.evaluate.judge") -> JudgeEndpoint | None:
    """Where ``params.judge`` is reached; None where the recipe asks for no judge.

    Raises:
        InvalidRequest: it asks for one and this machine knows no endpoint; code ``judge_not_configured``.
    """
    if params.judge is None:
        return None
    configured = settings.evaluator
    if configured.judge_base_url is None:
        raise InvalidRequest(
            f"{param} asks for the judge {params.judge.model!r}, and no endpoint is configured: set PARAMPARA_EVALUATOR__JUDGE_BASE_URL "
            f"for the control plane and the evaluator (and {KEY_VARIABLE} for the evaluator), or take judge out of the recipe.",
            param=param,
            code="judge_not_configured",
        )
    return JudgeEndpoint(
        base_url=configured.judge_base_url, timeout_seconds=configured.judge_timeout_seconds, concurrency=configured.judge_concurrency
    )
