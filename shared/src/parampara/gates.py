"""Gates: bounds on metrics, and what a run does when one is missed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

from parampara.schemas.stages import Gate, GateResult

Decision = Literal["promote", "hold", "fail"]
_SEVERITY: dict[Decision, int] = {"promote": 0, "hold": 1, "fail": 2}


def apply(gates: Sequence[Gate], metrics: Mapping[str, float]) -> list[GateResult]:
    """Hold each gate against its metric. A metric that was not measured, or is not finite, fails its gate with value None,

    unless the gate is ``optional`` and the metric was not measured."""
    return [_apply(gate, metrics.get(gate.metric)) for gate in gates]


def decide(results: Sequence[GateResult]) -> Decision:
    """The severest action of the gates that were missed; promote when there is none."""
    missed: list[Decision] = ["promote", *(result.action for result in results if not result.passed)]
    return max(missed, key=lambda action: _SEVERITY[action])


def _apply(gate: Gate, value: float | None) -> GateResult:
    if value is None and gate.optional:
        return GateResult(metric=gate.metric, value=None, min=gate.min, max=gate.max, action=gate.action, passed=True)
    known = value if value is not None and math.isfinite(value) else None
    passed = known is not None and (gate.min is None or known >= gate.min) and (gate.max is None or known <= gate.max)
    return GateResult(metric=gate.metric, value=known, min=gate.min, max=gate.max, action=gate.action, passed=passed)
