"""Micro-batches of any cut give the loss and the gradient of each document alone, and waste little."""

from __future__ import annotations

import random
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer import attention
from trainer.binning import best_fit, by_length
from trainer.layout import Kind, Layout, choose_layout, keeps_rows_apart, sees_less_than_all
from trainer.rows import IGNORED, TokenRow


def realistic(count: int, *, seed: int = 0) -> list[int]:
    """Lengths of questions with answers: mean about 350, longest 2048."""
    chance = random.Random(seed)
    return [min(2048, max(16, int(chance.lognormvariate(5.6, 0.75)))) for _ in range(count)]


@settings(max_examples=150, deadline=None)
@given(lengths=st.lists(st.integers(1, 40), max_size=60), capacity=st.integers(1, 50))
def test_groups_hold_every_item_once_within_the_capacity(lengths: list[int], capacity: int) -> None:
    for groups, size in ((best_fit(lengths, capacity), sum), (by_length(lengths, capacity), lambda group: len(group) * max(group))):
        assert sorted(item for group in groups for item in group) == list(range(len(lengths)))
        for group in groups:
            assert len(group) == 1 or size([lengths[item] for item in group]) <= capacity
        if lengths:
            assert max(lengths[item] for item in groups[0]) == max(lengths)
    if lengths and max(lengths) <= capacity:
        assert len(best_fit(lengths, capacity)) <= 11 * -(-sum(lengths) // capacity) / 9 + 1 + len(lengths) / 2


def test_blocks_of_realistic_documents_are_full() -> None:
    lengths = realistic(2000)
    blocks = best_fit(lengths, 2048)
    assert sum(lengths) / (2048 * len(blocks)) >= 0.97


@pytest.mark.parametrize(("kind", "least"), [("flat", 1.0), ("padded", 0.97)])
def test_steps_of_realistic_rows_waste_little(kind: Kind, least: float) -> None:
    """Sixteen rows drawn at random, as any loader draws them; padded to the longest of four each, half would be padding."""
    layout = Layout(kind, "", 2048, 0)
    steps = [realistic(16, seed=seed) for seed in range(50)]
    tokens = sum(map(sum, steps))
    assert tokens / sum(sum(layout.positions(step)) for step in steps) >= least
    fours = sum(4 * max(step[start : start + 4]) for step in steps for start in range(0, 16, 4))
    assert tokens / fours < 0.6


@pytest.fixture(scope="module")
def model(base: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(str(base), attn_implementation="sdpa")


def rows() -> list[TokenRow]:
    chance = random.Random(1)
    result = []
    for length in (40, 3, 17, 90, 8, 25):
        ids = [chance.randrange(512) for _ in range(length)]
        learnt = chance.randrange(1, length)
        result.append(TokenRow(ids, [IGNORED] * learnt + ids[learnt:]))
    block = [chance.randrange(512) for _ in range(30)]
    return [*result, TokenRow(block, block, parts=(12, 5, 13))]


def gradient(model: Any, batches: list[dict[str, Any]], learnt: int) -> tuple[float, list[torch.Tensor]]:
    model.zero_grad()
    total = 0.0
    for batch in batches:
        loss = model(**batch, num_items_in_batch=torch.tensor(learnt), use_cache=False).loss
        loss.backward()
        total += float(loss.detach())
    return total, [parameter.grad.clone() for parameter in model.parameters()]


def test_every_layout_gives_the_gradient_of_each_document_alone(model: Any) -> None:
    learnt = sum(row.trained for row in rows())
    alone = [{"input_ids": torch.tensor([part.input_ids]), "labels": torch.tensor([part.labels])} for row in rows() for part in row.split()]
    loss, expected = gradient(model, alone, learnt)
    for backend in ("trl", "unsloth"):  # with logits where something is learnt, and with all
        for limit in (16, 64, 1000):
            flat = choose_layout(model, backend=backend, max_tokens=limit, longest=96, pad_token_id=4, autocast=nullcontext)
            assert (flat.kind, flat.learnt_only) == ("flat", backend == "trl")
            for layout in (flat, Layout("padded", "", limit, 4)):
                batches = layout.collate(rows())
                assert len(batches) > 1 or limit == 1000
                again, got = gradient(model, batches, learnt)
                assert again == pytest.approx(loss, abs=1e-5)
                for one, other in zip(got, expected, strict=True):
                    torch.testing.assert_close(one, other, atol=2e-6, rtol=1e-4)


def test_an_attention_that_sees_the_row_before_is_found_and_not_used(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AttentionInterface

    def leaky(*args: Any, row_lengths: Any = None, **kwargs: Any) -> Any:
        return attention.attend(*args, row_lengths=None, **kwargs)

    flat = choose_layout(model, backend="trl", max_tokens=64, longest=96, pad_token_id=4, autocast=nullcontext)
    assert keeps_rows_apart(model, flat, autocast=nullcontext) is None
    monkeypatch.setattr(attention, "register", lambda: AttentionInterface.register(attention.NAME, leaky))
    model.set_attn_implementation("sdpa")
    found = choose_layout(model, backend="trl", max_tokens=64, longest=96, pad_token_id=4, autocast=nullcontext)
    monkeypatch.undo()
    attention.register()
    assert found.kind == "padded"
    assert "LlamaForCausalLM: a row changes the one behind it" in found.reason
    assert model.config._attn_implementation == "sdpa"


def test_a_model_whose_attention_is_its_own_is_padded(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(model), "_supports_attention_backend", False)
    assert choose_layout(model, backend="trl", max_tokens=64, longest=96, pad_token_id=4, autocast=nullcontext).kind == "padded"


def test_a_batch_that_is_no_flat_one_is_attended_as_ever(model: Any) -> None:
    """Padded on either side, and generated from: the registered attention must not change what the model answers."""
    prompts = torch.tensor([[4, 4, 7, 9, 30], [5, 6, 7, 8, 9]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    answers = []
    for implementation in ("sdpa", attention.NAME):
        attention.register()
        model.set_attn_implementation(implementation)
        answers.append(model.generate(input_ids=prompts, attention_mask=mask, max_new_tokens=4, do_sample=False))
    assert torch.equal(*answers)


@pytest.mark.parametrize(("window", "kind"), [(8, "padded"), (4096, "flat"), (None, "flat")])
def test_a_window_that_a_document_may_outgrow_keeps_the_models_own_attention(window: int | None, kind: Kind) -> None:
    from transformers import MistralConfig, MistralForCausalLM

    small = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    model: Any = MistralForCausalLM(MistralConfig(**small, num_key_value_heads=1, sliding_window=window))
    found = choose_layout(model, backend="trl", max_tokens=64, longest=96, pad_token_id=0, autocast=nullcontext)
    assert found.kind == kind
    assert kind == "flat" or "its attention sees 8 tokens, and a document may have 96" in found.reason


def test_layers_of_another_kind_are_padded() -> None:
    assert sees_less_than_all(SimpleNamespace(layer_types=["full_attention", "linear_attention"]), 96) is not None
    assert sees_less_than_all(SimpleNamespace(layer_types=["full_attention"], sliding_window=8), 96) is None
    assert sees_less_than_all(SimpleNamespace(layer_types=["full_attention", "sliding_attention"], sliding_window=8), 96) is not None
    assert sees_less_than_all(SimpleNamespace(), 96) is None


def test_out_of_memory_in_the_trial_is_not_taken_for_a_fault_of_the_model(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(*args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(model, "forward", forward)
    with pytest.raises(torch.OutOfMemoryError):
        choose_layout(model, backend="trl", max_tokens=64, longest=96, pad_token_id=4, autocast=nullcontext)


def test_a_model_that_does_not_heed_which_logits_are_wanted_computes_them_all(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    original = model.forward

    def forward(*args: Any, logits_to_keep: Any = 0, shift_labels: Any = None, **kwargs: Any) -> Any:
        return original(*args, logits_to_keep=logits_to_keep, **kwargs)  # pairs the logits that are left with all labels

    monkeypatch.setattr(model, "forward", forward)
    found = choose_layout(model, backend="trl", max_tokens=64, longest=96, pad_token_id=4, autocast=nullcontext)
    assert (found.kind, found.learnt_only) == ("flat", False)
