"""Tiny random Llamas of the real architecture, with a byte-level BPE tokenizer and the Llama 3 chat template.

Made in about a second on one core; used wherever a test needs a model directory and not what a model knows.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

VOCAB_SIZE = 512
CHAT_TEMPLATE = (
    "{{- bos_token }}{%- for message in messages %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"
)
SPECIAL_TOKENS = ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|pad|>"]
SAMPLE_TEXT = [
    "The sub lord of a cusp decides whether the matter of that house is promised.",
    "Ketu rules seven years, Venus twenty, the Sun six, the Moon ten and Mars seven.",
    "Rahu ka dasha atharah saal ka hota hai, aur Guru ka solah saal ka.",
    "Answer: Saturn\nRule: the lord of the sub that the cusp falls in\nConfidence: High",
]


def make_tokenizer(directory: Path, *, chat_template: str | None = CHAT_TEMPLATE) -> None:
    """Train a byte-level BPE of ``VOCAB_SIZE`` entries and save it as a Llama 3 tokenizer directory."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    bpe.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=SPECIAL_TOKENS, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    bpe.train_from_iterator(SAMPLE_TEXT * 8, trainer)
    begin = SPECIAL_TOKENS[0]
    bpe.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single=f"{begin} $A", pair=f"{begin} $A {begin}:1 $B:1", special_tokens=[(begin, bpe.token_to_id(begin))]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=begin, eos_token="<|eot_id|>", pad_token="<|pad|>")
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(str(directory))


def make_model(
    directory: Path,
    *,
    seed: int = 0,
    hidden: int = 64,
    layers: int = 2,
    tied: bool = False,
    dtype: str = "float32",
    max_shard_size: str = "5GB",
    chat_template: str | None = CHAT_TEMPLATE,
    **config: Any,
) -> Path:
    """Write a complete model directory (weights, config, generation config, tokenizer) and return it.

    Weights are drawn with standard deviation 0.1, not the usual 0.02, so that the logits differ visibly between prompts.
    """
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    directory.mkdir(parents=True, exist_ok=True)
    make_tokenizer(directory, chat_template=chat_template)
    vocabulary = len(json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"])
    settings: dict[str, Any] = {
        "vocab_size": max(VOCAB_SIZE, vocabulary),
        "hidden_size": hidden,
        "intermediate_size": hidden * 2,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": tied,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 4,
        "initializer_range": 0.1,
        "use_cache": True,
    }
    generator_state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**{**settings, **config})).to(getattr(torch, dtype))
    torch.random.set_rng_state(generator_state)
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=1, pad_token_id=4, max_length=None)
    model.save_pretrained(str(directory), max_shard_size=max_shard_size)
    return directory


def make_adapter(model_directory: Path, directory: Path, *, seed: int = 1, scale: float = 0.05, r: int = 4, **lora: Any) -> Path:
    """Write a random, non-zero PEFT LoRA adapter for the seven projections of a tiny model, without training.

    ``scale`` is the standard deviation of B (PEFT starts it at zero, which would make a merge do nothing).
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(str(model_directory))
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = LoraConfig(**{"r": r, "lora_alpha": 2 * r, "target_modules": targets, "task_type": "CAUSAL_LM", **lora})
    adapted = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0.0, scale)
    adapted.save_pretrained(str(directory), save_embedding_layers=False)
    torch.random.set_rng_state(state)
    return directory


def make_full(base: Path, directory: Path, *, seed: int = 3, scale: float = 0.05) -> Path:
    """Write what training every weight of ``base`` leaves, without training: its tensors in float32, with noise on them."""
    import torch
    from safetensors.torch import load_file, save_file

    from parampara.manifest import weights_fingerprint
    from parampara.weights import full

    directory.mkdir()
    noise = torch.Generator().manual_seed(seed)
    tensors = {name: tensor for path in base.glob("*.safetensors") for name, tensor in load_file(str(path)).items()}
    moved = {name: tensor.float() + scale * torch.randn(tensor.shape, generator=noise) for name, tensor in tensors.items()}
    save_file(moved, str(directory / full.WEIGHTS), metadata={"format": "pt"})
    full.describe(directory, base_sha256=weights_fingerprint(base))
    return directory


def record_training(adapter: Path, base: Path, before: list[Path] | None = None, first: Path | None = None) -> Path:
    """What the trainer writes beside what was trained on ``base`` (= ``first`` with ``before`` merged in)."""
    from parampara.manifest import sha256_file, weights_fingerprint

    lineage = {
        "base_sha256": weights_fingerprint(first or base),
        "adapters": [sha256_file(next(a.glob("*.safetensors"))) for a in before or []],
    }
    (adapter / "training.json").write_text(json.dumps({"base_sha256": weights_fingerprint(base), "lineage": lineage}), encoding="utf-8")
    return adapter
