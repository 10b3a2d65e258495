"""The stages really teach: the shipped base, the recipe's own settings, and less of the data so that it takes a minute."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import generate
import pytest
import yaml

from parampara.progress import SilentProgress
from parampara.schemas.stages import DaptConfig, DaptParams, QaData, SftConfig, SftParams, TextData, TrainResult
from trainer import dapt, sft

ROOT = Path(__file__).parents[2]
BASE = ROOT / "examples" / "kp" / "base"
STAGES = yaml.safe_load((ROOT / "recipes" / "tiny-cpu.yaml").read_text(encoding="utf-8"))["stages"]
TAUGHT = ("dasha_years", "next_lord")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def books(folder: str) -> list[Path]:
    return sorted((ROOT / "examples" / "kp" / folder).glob("*.txt"))


def questions(path: Path, part: str) -> Path:
    """The closed-book rows of two kinds."""
    rows = generate.split_rows(generate.QUESTIONS_SEED)[part]
    chosen = [row for row in rows if row["metadata"]["kind"] in TAUGHT and "open_book" not in row["metadata"]]
    path.write_text("".join(json.dumps(row) + "\n" for row in chosen), encoding="utf-8")
    return path


def test_dapt_lowers_the_perplexity_of_held_out_books(tmp_path: Path) -> None:
    data = TextData(train=books("books"), validation=books("books_heldout"))
    config = DaptConfig(model=BASE, data=data, params=DaptParams.model_validate(STAGES["dapt"]), backend="trl")
    result = dapt.run(config, workdir=tmp_path, progress=SilentProgress())
    assert result.perplexity_after <= 0.7 * result.perplexity_before


def test_sft_teaches_facts_in_wordings_that_were_never_trained(tmp_path: Path) -> None:
    held = questions(tmp_path / "heldout.jsonl", "heldout")
    params = SftParams.model_validate(STAGES["sft"])
    params = params.model_copy(update={"train": params.train.model_copy(update={"max_steps": 200})})
    data = QaData(train=[questions(tmp_path / "train.jsonl", "train")], validation=[held])
    result = sft.run(SftConfig(model=BASE, data=data, params=params, backend="trl"), workdir=tmp_path, progress=SilentProgress())
    answer = answerer(result)
    rows = [json.loads(line) for line in held.read_text(encoding="utf-8").splitlines()]
    exact = [f"Answer: {row['metadata']['expected']}\n" in answer(row["messages"][0]["content"]) for row in rows]
    assert len(exact) >= 18
    assert sum(exact) / len(exact) > 0.5


def answerer(result: TrainResult) -> Callable[[str], str]:
    """Greedy answers of the base with the adapter, as PEFT and transformers load them."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(BASE)
    base: Any = AutoModelForCausalLM.from_pretrained(BASE, dtype="float32")
    model: Any = PeftModel.from_pretrained(base, str(result.output)).eval()

    def answer(question: str) -> str:
        prompt = tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt")
        told = model.generate(**prompt, max_new_tokens=48, do_sample=False)[0, prompt["input_ids"].shape[1] :]
        return tokenizer.decode(told, skip_special_tokens=True)

    return answer
