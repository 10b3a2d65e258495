"""Gates: every bound, every action, and metrics that were not measured."""

from __future__ import annotations

import math

import pytest

from parampara.gates import apply, decide
from parampara.schemas.stages import Gate

METRICS = {"exact.sft": 0.8, "parity.merged.kl": 0.001, "perplexity.dapt": math.inf}


@pytest.mark.parametrize(
    ("bounds", "passed"),
    [
        ({"min": 0.8}, True),
        ({"min": 0.81}, False),
        ({"max": 0.8}, True),
        ({"max": 0.79}, False),
        ({"min": 0.7, "max": 0.9}, True),
        ({"min": 0.1, "max": 0.2}, False),
    ],
)
def test_bounds_are_inclusive(bounds: dict[str, float], passed: bool) -> None:
    (result,) = apply([Gate(metric="exact.sft", **bounds)], METRICS)
    assert (result.value, result.passed) == (0.8, passed)


@pytest.mark.parametrize("metric", ["exact.dapt", "perplexity.dapt"])
def test_a_metric_that_was_not_measured_or_is_not_finite_fails_its_gate(metric: str) -> None:
    (result,) = apply([Gate(metric=metric, min=-1e9)], METRICS)
    assert result.value is None
    assert not result.passed


def test_an_optional_gate_is_met_where_its_metric_was_not_measured_and_only_there() -> None:
    gate = Gate(metric="comparison.exact_low", min=-0.05, optional=True)
    assert [apply([gate], metrics)[0].passed for metrics in ({}, {gate.metric: -0.1}, {gate.metric: math.nan})] == [True, False, False]


@pytest.mark.parametrize(
    ("actions", "decision"),
    [
        ([], "promote"),
        (["promote"], "promote"),
        (["promote", "hold"], "hold"),
        (["hold", "fail", "promote"], "fail"),
    ],
)
def test_the_severest_missed_gate_decides(actions: list[str], decision: str) -> None:
    gates = [Gate(metric="exact.sft", min=0.99, action=action) for action in actions]  # type: ignore[arg-type]
    assert decide(apply(gates, METRICS)) == decision


def test_gates_that_are_met_decide_nothing() -> None:
    assert decide(apply([Gate(metric="exact.sft", min=0.5, action="fail")], METRICS)) == "promote"
