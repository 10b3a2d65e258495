"""The order of batches: complete, deterministic, longest first, little padding."""

from __future__ import annotations

import random
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.plan import plan_batches


@settings(max_examples=150, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 500), min_size=1, max_size=120),
    batch=st.integers(1, 5),
    accumulation=st.integers(1, 5),
    epochs=st.integers(1, 3),
)
def test_every_row_is_seen_once_per_epoch_in_full_steps(lengths: list[int], batch: int, accumulation: int, epochs: int) -> None:
    plan = plan_batches(lengths, batch_size=batch, accumulation=accumulation, epochs=epochs, max_steps=None, seed=1)
    assert Counter(row for rows in plan for row in rows) == Counter(dict.fromkeys(range(len(lengths)), epochs))
    full, last = list(plan)[: (plan.steps - 1) * accumulation], list(plan)[(plan.steps - 1) * accumulation :]
    assert all(len(rows) == batch for rows in full)
    assert 1 <= len(last) <= accumulation
    assert abs(plan.epoch_at(plan.steps) - epochs) < 1e-9
    if len(lengths) >= batch * accumulation:
        first = [row for rows in list(plan)[:accumulation] for row in rows]
        longest_full = max(lengths[row] for rows in (full or last) for row in rows)
        assert max(lengths[row] for row in first) >= longest_full


def test_plan_depends_on_lengths_and_seed_alone() -> None:
    lengths = [random.Random(i).randint(5, 90) for i in range(300)]
    arguments = {"batch_size": 4, "accumulation": 4, "epochs": 2.0, "max_steps": None}
    assert plan_batches(lengths, seed=1, **arguments).batches == plan_batches(lengths, seed=1, **arguments).batches
    assert plan_batches(lengths, seed=1, **arguments).batches != plan_batches(lengths, seed=2, **arguments).batches


def test_max_steps_overrides_epochs_and_repeats_data() -> None:
    plan = plan_batches([3, 4, 5], batch_size=2, accumulation=2, epochs=1, max_steps=7, seed=1)
    assert plan.steps == 7
    assert sum(len(rows) for rows in plan) == 28


def test_grouping_by_length_saves_padding() -> None:
    lengths = [random.Random(i).choice([20, 60, 200, 400]) for i in range(800)]
    plan = plan_batches(lengths, batch_size=4, accumulation=4, epochs=1, max_steps=None, seed=1)
    order = list(range(800))
    random.Random(0).shuffle(order)
    shuffled = [order[i : i + 4] for i in range(0, 800, 4)]
    padded = sum(4 * max(lengths[row] for row in rows) for rows in shuffled)
    assert plan.efficiency > 0.95 > sum(lengths) / padded + 0.2


def test_a_few_long_rows_among_many_short_ones_pad_little() -> None:
    """An eighth of the rows ten times as long as the rest: questions with retrieved passages among plain ones."""
    chance = random.Random(0)
    lengths = [chance.randint(80, 650) if chance.random() < 0.125 else chance.randint(25, 60) for _ in range(4000)]
    plan = plan_batches(lengths, batch_size=16, accumulation=1, epochs=2, max_steps=None, seed=1)
    assert plan.efficiency > 0.88


def test_rows_of_a_small_set_do_not_meet_their_own_repetitions() -> None:
    """Sorted over several epochs together, the copies of each row would fill its steps."""
    plan = plan_batches(list(range(10, 74)), batch_size=8, accumulation=1, epochs=8, max_steps=None, seed=1)
    assert all(len(set(rows)) == len(rows) for rows in plan)


def test_another_order_has_another_digest() -> None:
    arguments = {"batch_size": 2, "accumulation": 1, "epochs": 1.0, "max_steps": None}
    first, same, other = (plan_batches([5] * 40, seed=seed, **arguments) for seed in (1, 1, 2))
    assert first.sha256 == same.sha256 != other.sha256
