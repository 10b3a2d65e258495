"""The model card, read back by the hub's own library."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from evaluator.card import model_card
from parampara.schemas.stages import EvaluateConfig, QaData, TextData
from tests.evaluator.test_report import ledger, result


def config(base: Path, **changes: object) -> EvaluateConfig:
    data = {"text": TextData(train=[base]), "qa": QaData(train=[base])}
    return EvaluateConfig.model_validate(
        {"base": base, "merged": base, "base_model": "meta-llama/Llama-3.1-8B-Instruct", **data, **changes}
    )


def test_the_hub_reads_base_results_and_licence(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: llama3.1\n---\n# Base\n")
    card = ModelCard(model_card(config(tmp_path), result(), ledger()))
    told = card.data.to_dict()
    assert (told["base_model"], told["library_name"], told["license"]) == ("meta-llama/Llama-3.1-8B-Instruct", "transformers", "llama3.1")
    results = {found.metric_type: found.metric_value for found in card.data.eval_results or []}
    assert results == {"exact_match": 0.8, "perplexity": 11.0}
    assert "| exact.quantized |  | 0.7 |  | no (hold) |" in card.text
    assert f"sha256:{'b' * 64}" in card.text


@pytest.mark.parametrize(
    ("full", "told", "tags"),
    [
        ([], "Domain-adaptive pretraining and supervised fine-tuning, both by LoRA, merged into the base.", ["lora", "merged"]),
        (
            ["dapt"],
            "Domain-adaptive pretraining of every weight and supervised fine-tuning by LoRA, merged into the base.",
            ["lora", "merged"],
        ),
        (["dapt", "sft"], "Domain-adaptive pretraining and supervised fine-tuning, both of every weight.", []),
    ],
)
def test_the_card_says_what_was_trained(tmp_path: Path, full: list[str], told: str, tags: list[str]) -> None:
    params = {f"{stage}_params": {"lora": None} for stage in full}
    card = ModelCard(model_card(config(tmp_path, **params), result(), ledger()))
    assert told in card.text
    assert card.data.to_dict()["tags"] == ["parampara", *tags]


def test_a_licence_that_nobody_names_is_left_out(tmp_path: Path) -> None:
    card = ModelCard(model_card(config(tmp_path, base_model=""), result(), ledger()))
    assert "license" not in card.data.to_dict()
    assert "base_model" not in card.data.to_dict()
