"""Small training runs for the tests: data, configurations, and processes of the stage's own command line."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

from parampara.schemas.stages import DaptConfig, DpoConfig, SftConfig

LORDS = ["Ketu", "Venus", "Sun", "Moon", "Mars", "Rahu", "Jupiter", "Saturn", "Mercury"]


def write_book(path: Path, *, paragraphs: int = 24, seed: int = 0) -> Path:
    chance = random.Random(seed)
    lines = [
        " ".join(
            f"The lord of house {chance.randint(1, 12)} is {chance.choice(LORDS)}, who rules {chance.randint(6, 20)} years."
            for _ in range(3)
        )
        for _ in range(paragraphs)
    ]
    path.write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_qa(path: Path, *, rows: int = 40, seed: int = 0) -> Path:
    chance = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for number in range(rows):
            lord = chance.choice(LORDS)
            extra = " and say why" * chance.randint(0, 4)
            file.write(json.dumps({"question": f"Who rules part {number}{extra}?", "answer": f"Answer: {lord}\nRule: the sub lord"}) + "\n")
    return path


def train_params(**changes: Any) -> dict[str, Any]:
    return {
        "epochs": 2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_seq_length": 96,
        "learning_rate": 5e-3,
        "gradient_checkpointing": False,
        "checkpoint_steps": 3,
        **changes,
    }


def dapt_config(model: Path, book: Path, *, backend: str = "trl", **train: Any) -> DaptConfig:
    return DaptConfig.model_validate(
        {
            "model": model,
            "data": {"train": [book]},
            "backend": backend,
            "params": {"chunk_tokens": 64, "validation_fraction": 0.1, "lora": {"r": 4, "lora_alpha": 8}, "train": train_params(**train)},
        }
    )


def sft_config(model: Path, qa: Path, *, backend: str = "trl", system_prompt: str | None = None, **train: Any) -> SftConfig:
    return SftConfig.model_validate(
        {
            "model": model,
            "data": {"train": [qa]},
            "backend": backend,
            "params": {
                "validation_fraction": 0.1,
                "system_prompt": system_prompt,
                "lora": {"r": 4, "lora_alpha": 8},
                "train": train_params(**{"packing": False, **train}),
            },
        }
    )


def start(
    config: DaptConfig | SftConfig | DpoConfig, workdir: Path, *, cwd: Path | None = None, path: str | None = None
) -> subprocess.Popen[bytes]:
    """``python -m trainer <kind>`` as a process of its own, its log in ``workdir/"log"``."""
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / "config.json").write_text(config.model_dump_json(), encoding="utf-8")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **({} if path is None else {"PATH": path})}
    command = [sys.executable, "-m", "trainer", config.kind, "--config", str(workdir / "config.json"), "--workdir", str(workdir)]
    with (workdir / "log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, cwd=cwd or workdir, env=environment)


def steps_reported(workdir: Path, *, since: int = 0) -> int:
    """Highest step in the progress file of a running process, from byte ``since`` on."""
    path = workdir / "progress.jsonl"
    data = path.read_bytes()[since:] if path.exists() else b""
    records = [json.loads(line) for line in data.split(b"\n")[:-1]]
    return max((record["step"] for record in records if record["type"] == "step"), default=0)


def losses(workdir: Path) -> dict[int, float]:
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {record["step"]: record["loss"] for record in records if "loss" in record}


def write_preferences(path: Path, *, rows: int = 40, seed: int = 0) -> Path:
    """Pairs that prefer the answer in the house's form."""
    chance = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for number in range(rows):
            lord = chance.choice(LORDS)
            extra = " and say why" * chance.randint(0, 4)
            better, worse = f"Answer: {lord}\nRule: the sub lord", "It may be " + " or ".join([lord] * chance.randint(1, 6))
            file.write(json.dumps({"question": f"Who rules part {number}{extra}?", "chosen": better, "rejected": worse}) + "\n")
    return path


def dpo_config(model: Path, preferences: Path, *, backend: str = "trl", loss_type: str = "sigmoid", **train: Any) -> DpoConfig:
    return DpoConfig.model_validate(
        {
            "model": model,
            "data": {"train": [preferences]},
            "backend": backend,
            "params": {
                "validation_fraction": 0.1,
                "loss_type": loss_type,
                "lora": {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0},
                "train": train_params(**{"packing": False, **train}),
            },
        }
    )
