"""Champion against candidate: flips, intervals against known theory, and items that cannot be compared."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from evaluator.comparison import compare, paired_bootstrap, read_items
from evaluator.items import as_lines
from parampara.errors import InvalidData
from parampara.schemas.comparison import Item, ItemAnswer


def item(number: int, *, exact: bool, loss: float | None = 1.0, model: str = "quantized") -> Item:
    served = ItemAnswer(answer="Ketu" if exact else "Venus", exact=exact, loss=loss)
    earlier = ItemAnswer(answer="?", exact=False, loss=9.0)
    return Item(id=f"{number:064x}", question=f"Star {number}?", expected="Ketu", models={"base": earlier, model: served})


def test_flips_and_differences_are_counted() -> None:
    champion = [item(1, exact=True), item(2, exact=False), item(3, exact=False, loss=2.0), item(4, exact=True), item(8, exact=True)]
    candidate = [item(1, exact=False), item(2, exact=True), item(3, exact=True, loss=1.5), item(4, exact=True), item(9, exact=False)]
    told = compare(champion, candidate, seed=1)
    assert told is not None
    assert (told.items, told.won, told.lost) == (4, 2, 1), "questions 8 and 9 were put to one of the two only"
    assert [(flip.id[-1], flip.to, flip.champion, flip.candidate) for flip in told.flips] == [
        ("1", "lost", "Ketu", "Venus"), ("2", "won", "Venus", "Ketu"), ("3", "won", "Venus", "Ketu"),
    ]  # fmt: skip
    assert told.exact.value == pytest.approx(1 / 4)
    assert told.loss is not None
    assert told.loss.value == pytest.approx(-0.5 / 4)
    assert told.exact.low <= told.exact.value <= told.exact.high


def test_the_served_model_of_each_line_is_compared() -> None:
    told = compare([item(1, exact=True, model="sft")], [item(1, exact=True, model="quantized")], seed=1)
    assert told is not None and told.won == told.lost == 0


def test_nothing_in_common_is_no_comparison() -> None:
    assert compare([item(1, exact=True)], [item(2, exact=True)], seed=1) is None
    assert compare([item(1, exact=True, model="dapt")], [item(1, exact=True)], seed=1) is None


def test_a_loss_that_one_side_lacks_does_not_count() -> None:
    told = compare([item(1, exact=True, loss=None)], [item(1, exact=True)], seed=1)
    assert told is not None and told.loss is None
    assert "comparison.loss_difference" not in told.metrics()


def test_the_interval_is_that_of_the_normal_law_for_many_items() -> None:
    differences = np.random.default_rng(0).normal(0.2, 1.0, size=400)
    told = paired_bootstrap(list(differences), seed=7)
    half = 1.96 * differences.std() / math.sqrt(400)
    assert told.value == pytest.approx(differences.mean())
    assert (told.low, told.high) == (pytest.approx(told.value - half, abs=0.01), pytest.approx(told.value + half, abs=0.01))
    assert paired_bootstrap(list(differences), seed=7) == told
    assert paired_bootstrap(list(differences), seed=8) != told


def test_about_95_of_100_intervals_hold_the_truth() -> None:
    generator = np.random.default_rng(3)
    held = 0
    for trial in range(200):
        told = paired_bootstrap(list(generator.choice([-1.0, 0.0, 1.0], size=120, p=[0.1, 0.7, 0.2])), seed=trial, resamples=500)
        held += told.low <= 0.1 <= told.high
    assert 180 <= held <= 199


def test_no_item_is_no_interval() -> None:
    with pytest.raises(ValueError, match="no difference"):
        paired_bootstrap([], seed=1)


def test_items_are_read_as_they_were_written(tmp_path: Path) -> None:
    items = [item(1, exact=True), item(2, exact=False, loss=None)]
    (tmp_path / "items.jsonl").write_text(as_lines(items))
    assert read_items(tmp_path) == items
    assert read_items(tmp_path / "earlier version") is None
    (tmp_path / "items.jsonl").write_text(as_lines(items) + '{"id": "x"}\n')
    with pytest.raises(InvalidData, match="line 3: id"):
        read_items(tmp_path)
