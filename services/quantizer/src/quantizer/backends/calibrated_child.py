"""Runs in llm-compressor's own environment, which has none of this project's packages: ``python -I calibrated_child.py REQUEST``.

REQUEST is a JSON file: ``model`` and ``output`` directories, ``dtype``, ``smooth`` (SmoothQuant before GPTQ) and ``rows`` (lists of
token ids to calibrate on).
"""

from __future__ import annotations

import ctypes
import importlib
import json
import signal
import sys
from pathlib import Path
from typing import Any

SMOOTHING_STRENGTH = 0.8
"""How much of the activations' range moves into the weights; llm-compressor's own value for W8A8 of Llama."""


def main(request: dict[str, Any]) -> None:
    torch, transformers, datasets, llmcompressor = map(importlib.import_module, ("torch", "transformers", "datasets", "llmcompressor"))
    modifiers = importlib.import_module("llmcompressor.modifiers.quantization")
    recipe = [modifiers.GPTQModifier(targets="Linear", scheme="W8A8", ignore=["lm_head"])]
    if request["smooth"]:
        smoothing = importlib.import_module("llmcompressor.modifiers.transform.smoothquant")
        recipe.insert(0, smoothing.SmoothQuantModifier(smoothing_strength=SMOOTHING_STRENGTH))
    rows: list[list[int]] = request["rows"]
    model = transformers.AutoModelForCausalLM.from_pretrained(
        request["model"], dtype=getattr(torch, request["dtype"]), local_files_only=True
    )
    llmcompressor.oneshot(
        model=model,
        tokenizer=transformers.AutoTokenizer.from_pretrained(request["model"], local_files_only=True),
        dataset=datasets.Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]}),
        recipe=recipe,
        max_seq_length=max(map(len, rows)),
        num_calibration_samples=len(rows),
        shuffle_calibration_samples=False,
    )
    model.save_pretrained(request["output"], save_compressed=True)


if __name__ == "__main__":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: never outlives the stage
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
