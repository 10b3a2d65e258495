"""A tiny model that has learnt its data (rounding an untrained one costs nothing), and that data."""

from __future__ import annotations

import json
from pathlib import Path

from parampara.schemas.stages import DaptParams, QaData, QuantizeConfig, QuantizeParams, SftParams, TextData, TrainParams
from quantizer.gate import read_held_out
from tests.tiny_models import make_model

PLANETS = ["Ketu", "Venus", "Sun", "Moon", "Mars", "Rahu", "Jupiter", "Saturn", "Mercury"]
STEPS = 20


def make_trained(root: Path) -> QuantizeConfig:
    """What stage quantize is given for it; the model learns the held-out side, which is the side that is measured."""
    (root / "book.txt").write_text("\n\n".join(f"The dasha of {planet} follows the star that {planet} rules. " * 6 for planet in PLANETS))
    rows = [{"question": f"Who is lord {number}?", "answer": f"Answer: {planet}"} for number, planet in enumerate(PLANETS)]
    (root / "qa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = QuantizeConfig(
        model=make_model(root / "model"),
        text=TextData(train=[root / "book.txt"]),
        qa=QaData(train=[root / "qa.jsonl"]),
        dapt_params=DaptParams(chunk_tokens=48, validation_fraction=0.4),
        sft_params=SftParams(validation_fraction=0.4, train=TrainParams(max_seq_length=128)),
        params=QuantizeParams(schemes=["unsloth", "bitsandbytes"], max_chunks=4, max_questions=3),
    )
    held_out = read_held_out(config)
    _train(config.model, [sequence.ids for sequence in (*held_out.texts, *held_out.answers)])
    return config


def _train(model: Path, rows: list[list[int]]) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    longest = max(map(len, rows))
    ids = torch.tensor([row + [4] * (longest - len(row)) for row in rows])
    optimizer = torch.optim.AdamW(loaded.parameters(), lr=3e-3)
    for _ in range(STEPS):
        loaded(ids, labels=torch.where(ids == 4, -100, ids)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    loaded.half().save_pretrained(model)
