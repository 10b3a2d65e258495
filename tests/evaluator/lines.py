"""A whole line of tiny models, made without training: base, adapters, merged models, quantized model, and held-out data."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parampara.manifest import weights_fingerprint
from parampara.schemas.stages import DaptParams, EvaluateConfig, EvaluateParams, PreferenceData, QaData, SftParams, TextData, TrainParams
from tests.tiny_models import make_adapter, make_model

COMPANIONS = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"]
FORMATS = {"cites_rule": r"^Rule: \S", "gives_confidence": r"^Confidence: (High|Medium|Low)$"}
PLANETS = ["Ketu", "Venus", "Sun", "Moon", "Mars", "Rahu", "Jupiter", "Saturn", "Mercury"]


@dataclass(frozen=True)
class Line:
    root: Path

    def config(self, **changes: Any) -> EvaluateConfig:
        """The line's configuration; small enough that an evaluation takes seconds."""
        settings: dict[str, Any] = {
            "base": self.root / "base",
            "dapt_adapter": self.root / "dapt_adapter",
            "dapt_merged": self.root / "dapt_merged",
            "sft_adapter": self.root / "sft_adapter",
            "merged": self.root / "merged",
            "quantized": self.root / "quantized",
            "text": TextData(train=[self.root / "book.txt"]),
            "qa": QaData(train=[self.root / "qa.jsonl"], validation=[self.root / "qa.jsonl"]),
            "dapt_params": DaptParams(chunk_tokens=48, validation_fraction=0.3),
            "sft_params": SftParams(train=TrainParams(max_seq_length=256)),
            "params": EvaluateParams(max_new_tokens=6, max_questions=8, max_chunks=4, parity_prompts=3, formats=FORMATS),
        }
        return EvaluateConfig(**{**settings, **changes})

    def dpo_config(self, **changes: Any) -> EvaluateConfig:
        """That of the line of :func:`add_dpo`: what is the final merged model elsewhere is here the one that DPO starts on."""
        settings: dict[str, Any] = {
            "sft_merged": self.root / "merged",
            "dpo_adapter": self.root / "dpo_adapter",
            "merged": self.root / "dpo_merged",
            "quantized": self.root / "dpo_quantized",
            "preferences": PreferenceData(train=[self.root / "pairs.jsonl"]),
        }
        return self.config(**{**settings, **changes})

    def copy(self, name: str, target: Path) -> Path:
        shutil.copytree(self.root / name, target)
        return target


def make_line(root: Path) -> Line:
    """Write every model of a line below ``root``."""
    base = make_model(root / "base", seed=0, dtype="float16", hidden=48)
    merge(base, make_adapter(base, root / "dapt_adapter", seed=1), root / "dapt_merged", dtype="float32")
    merge(root / "dapt_merged", make_adapter(root / "dapt_merged", root / "sft_adapter", seed=2), root / "merged", dtype="float16")
    for adapter, trained_on in (("dapt_adapter", base), ("sft_adapter", root / "dapt_merged")):
        for name in COMPANIONS[:3]:
            shutil.copyfile(base / name, root / adapter / name)
        name_base(root / adapter, trained_on)
    quantize(root / "merged", root / "quantized")
    (root / "book.txt").write_text("\n\n".join(f"The dasha of {planet} follows the star that {planet} rules. " * 6 for planet in PLANETS))
    write_rows(root / "qa.jsonl", rows())
    return Line(root)


LEARNT = {"validation_loss_before": 0.693, "validation_loss_after": 0.42, "reward_accuracy": 0.875, "reward_margin": 1.25}
"""What stage dpo would have measured, as it writes it beside the adapter."""


def add_dpo(line: Line) -> None:
    """Write what a line with DPO has beside the models of ``line``."""
    trained_on, adapter = line.root / "merged", line.root / "dpo_adapter"
    make_adapter(trained_on, adapter, seed=3)
    for name in COMPANIONS[:3]:
        shutil.copyfile(trained_on / name, adapter / name)
    name_base(adapter, trained_on)
    (adapter / "training.json").write_text(json.dumps({**LEARNT, "backend": "trl", "steps": 2}))
    write_rows(adapter / "metrics.jsonl", [{"step": 1, "loss": 0.69}, {"step": 2, "loss": 0.5}])
    merge(trained_on, adapter, line.root / "dpo_merged", dtype="float16")
    quantize(line.root / "dpo_merged", line.root / "dpo_quantized")
    pairs = [{"question": f"Which planet is number {n}?", "chosen": "Venus", "rejected": "The Sun"} for n in range(4)]
    write_rows(line.root / "pairs.jsonl", pairs)


def name_base(adapter: Path, model: Path) -> None:
    """Write into an adapter what it was trained on, as the trainer does."""
    path = adapter / "adapter_config.json"
    described = {**json.loads(path.read_text()), "base_model_name_or_path": f"sha256:{weights_fingerprint(model)}"}
    path.write_text(json.dumps(described))


def merge(model: Path, adapter: Path, output: Path, *, dtype: str, scale: float = 1.0, transposed: bool = False) -> Path:
    """Merge with PEFT; ``scale`` other than 1 makes the mistake of a wrong LoRA scale, ``transposed`` that of adding (BA)^T to the
    matrices that are square, where nothing fails by shape."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    adapted: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), str(adapter))
    if transposed:
        _transpose_square_deltas(adapted)
    for module in adapted.modules():
        if isinstance(getattr(module, "scaling", None), dict):
            module.scaling = {name: value * scale for name, value in module.scaling.items()}
    adapted.merge_and_unload().to(getattr(torch, dtype)).save_pretrained(output)
    for name in COMPANIONS:
        shutil.copyfile(model / name, output / name)
    return output


def _transpose_square_deltas(adapted: Any) -> None:
    """(BA)^T = A^T B^T: the factors change places."""
    import torch

    for module in adapted.modules():
        if not hasattr(module, "lora_A") or module.in_features != module.out_features:
            continue
        for name in module.lora_A:
            down, up = module.lora_A[name].weight.data.clone(), module.lora_B[name].weight.data.clone()
            module.lora_A[name].weight.data, module.lora_B[name].weight.data = torch.clone(up.T), torch.clone(down.T)


def quantize(model: Path, output: Path) -> None:
    """LLM.int8 as the quantizer writes it; services do not import each other, and neither do their tests."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    plan = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["lm_head"])
    AutoModelForCausalLM.from_pretrained(model, dtype=torch.float16, device_map={"": "cpu"}, quantization_config=plan).save_pretrained(
        output
    )
    for name in COMPANIONS:
        shutil.copyfile(model / name, output / name)


def rows() -> list[dict[str, Any]]:
    """Questions in English and Hinglish about the lord of a star."""
    found = []
    for number, planet in enumerate(PLANETS):
        hinglish = number % 3 == 0
        question = f"Star {number} ka lord kaun hai?" if hinglish else f"Who is the lord of star {number}?"
        answer = f"Answer: {planet}\nRule: stars take their lords in dasha order\nConfidence: High"
        metadata = {"kind": "star_lord" if number < 5 else "year", "language": "hinglish" if hinglish else "english", "expected": planet}
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        found.append({"messages": messages, "metadata": metadata})
    return found


def write_rows(path: Path, items: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
