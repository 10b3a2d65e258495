"""The order of rows: complete, deterministic, the heaviest step first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.plan import Plan, plan_batches


def planned(lengths: Sequence[int], *, seed: int = 1, **changes: Any) -> Plan:
    def cost(rows: Sequence[int]) -> tuple[int, int]:
        return sum(lengths[row] for row in rows), max(lengths[row] for row in rows)

    return plan_batches(len(lengths), seed=seed, cost=cost, **{"per_step": 4, "epochs": 1.0, "max_steps": None, **changes})


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(1, 500), min_size=1, max_size=120), per_step=st.integers(1, 20), epochs=st.integers(1, 3))
def test_every_row_is_seen_once_per_epoch_in_full_steps(lengths: list[int], per_step: int, epochs: int) -> None:
    plan = planned(lengths, per_step=per_step, epochs=epochs)
    assert Counter(row for rows in plan for row in rows) == Counter(dict.fromkeys(range(len(lengths)), epochs))
    assert all(len(rows) == per_step for rows in list(plan)[:-1])
    assert 1 <= len(plan.batches[-1]) <= per_step
    assert abs(plan.epoch_at(plan.steps) - epochs) < 1e-9
    full = [sum(lengths[row] for row in rows) for rows in plan if len(rows) == per_step]
    if full:
        assert sum(lengths[row] for row in plan.batches[0]) == max(full)


def test_plan_depends_on_rows_and_seed_alone() -> None:
    first, same, other = (planned(range(5, 305), seed=seed) for seed in (1, 1, 2))
    assert first.batches == same.batches != other.batches
    assert first.sha256 == same.sha256 != other.sha256


def test_max_steps_overrides_epochs_and_repeats_data() -> None:
    plan = planned([3, 4, 5], max_steps=7)
    assert plan.steps == 7
    assert sum(len(rows) for rows in plan) == 28


def test_rows_of_a_step_are_not_chosen_by_length() -> None:
    """Steps of equal lengths would weigh a token of a short row more than one of a long row."""
    plan = planned([10] * 200 + [1000] * 200, per_step=16)
    assert all(2 < sum(row < 200 for row in rows) < 14 for rows in list(plan)[:-1])
