"""The plateau of a validation curve: still falling, settled, rising, and too short to tell."""

from __future__ import annotations

import pytest

from evaluator import plateau


def curve(*losses: float) -> list[tuple[float, float]]:
    return [(100.0 * number, loss) for number, loss in enumerate(losses)]


def test_the_trend_of_a_straight_line_is_its_fall_over_the_last_third() -> None:
    assert plateau.trend(curve(*(4 - 0.1 * number for number in range(31)))) == pytest.approx(-1.0 / 2.0)


@pytest.mark.parametrize(
    ("losses", "low", "high"),
    [
        ([3.0, 2.0, 1.6, 1.4, 1.35, 1.33, 1.32, 1.32, 1.31], -0.02, 0.0),
        ([3.0, 2.8, 2.6, 2.4, 2.2, 2.0, 1.8, 1.6, 1.4], -0.4, -0.2),
        ([3.0, 2.0, 1.4, 1.3, 1.3, 1.32, 1.38, 1.45, 1.53], 0.05, 0.2),
        ([3.0, 2.0, 1.6, 1.4, 1.35, 1.32, 1.32, 9.9, 1.32, 1.32], -0.02, 0.02),
    ],
    ids=["settled", "falling", "rising", "settled but for one outlier"],
)
def test_a_curve_has_settled_or_not(losses: list[float], low: float, high: float) -> None:
    trend = plateau.trend(curve(*losses))
    assert trend is not None and low <= trend <= high


@pytest.mark.parametrize("losses", [[], [2.0], [3.0, 2.0], [3.0, 2.0, 1.5, 1.4]])
def test_a_short_curve_tells_nothing(losses: list[float]) -> None:
    assert plateau.trend(curve(*losses)) is None


def test_what_training_on_has_cost() -> None:
    metrics = plateau.metrics(curve(3.0, 1.2, 1.5))
    assert metrics == {"sft.validation_loss.above_best": pytest.approx(0.25)}
