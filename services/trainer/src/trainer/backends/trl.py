"""TRL's SFTTrainer on transformers and PEFT, as their authors publish them."""

from __future__ import annotations

from typing import Any

import torch

from trainer.backends import LoadRequest
from trainer.methods import adapter_arguments, check_modules, four_bit_base


def load(request: LoadRequest) -> Any:
    """Load the base and put a fresh LoRA adapter on it; the adapter's start depends on the seed alone.

    Without ``lora`` the base itself, in float32 whatever is computed in: steps smaller than a half-precision weight's last bit count.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    quantized = {"quantization_config": four_bit_base(request.dtype), "device_map": {"": device}} if request.load_in_4bit else {}
    dtype = torch.float32 if request.lora is None else request.dtype
    model: Any = AutoModelForCausalLM.from_pretrained(
        str(request.model), dtype=dtype, attn_implementation="sdpa", trust_remote_code=False, local_files_only=True, **quantized
    )
    if not request.load_in_4bit and not request.sharded:  # quantized weights are made on their device
        model.to(device)
    if request.lora is None:
        return model.train().requires_grad_(True)
    check_modules(model, request.lora)
    if request.gradient_checkpointing:
        model.enable_input_require_grads()
    torch.manual_seed(request.seed)
    return get_peft_model(model, LoraConfig(**adapter_arguments(request.lora), task_type="CAUSAL_LM"))


def trainer_base() -> type:
    from transformers import Trainer
    from trl import SFTTrainer

    class PlainSFTTrainer(SFTTrainer):
        """Leaves out TRL's per-step entropy and accuracy: they cost a softmax over the vocabulary and a device sync each."""

        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
            inputs["use_cache"] = False
            return Trainer.compute_loss(self, model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch)

    return PlainSFTTrainer
