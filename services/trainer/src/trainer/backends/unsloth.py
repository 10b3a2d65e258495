"""Unsloth: its patched models and kernels on a GPU, its chunked loss on a CPU. ``trainer.backends.choose`` has imported it."""

from __future__ import annotations

from typing import Any

from trainer.backends import LoadRequest
from trainer.methods import adapter_arguments, check_modules


def load(request: LoadRequest) -> Any:
    """Load the base through Unsloth and put a fresh LoRA adapter on it; the adapter's start depends on the seed alone."""
    from unsloth import FastLanguageModel

    assert request.lora is not None  # trainer.backends.choose
    model, _ = FastLanguageModel.from_pretrained(
        str(request.model),
        max_seq_length=request.max_seq_length,
        dtype=request.dtype,
        load_in_4bit=request.load_in_4bit,  # NF4 with double quantization, as trainer.methods.four_bit_base
        local_files_only=True,
        trust_remote_code=False,
    )
    check_modules(model, request.lora)
    return FastLanguageModel.get_peft_model(
        model,
        **adapter_arguments(request.lora),
        use_gradient_checkpointing="unsloth" if request.gradient_checkpointing else False,
        random_state=request.seed,
        max_seq_length=request.max_seq_length,
    )


def trainer_base() -> type:
    from trl import SFTTrainer

    return SFTTrainer
