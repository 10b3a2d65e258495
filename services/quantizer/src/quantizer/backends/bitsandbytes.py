"""LLM.int8 with bitsandbytes (Dettmers et al. 2022, arXiv 2208.07339): int8 weights per output row, outlier columns in FP16.

Runs on CPU and GPU. vLLM serves the result through ``vllm-bnb-plugin``.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from quantizer.backends import SchemeUnavailable
from quantizer.checkpoint import copy_companions, read_config, stored_dtype


def write(model: Path, output: Path) -> None:
    """Quantize every linear layer but the output head of ``model`` and save a complete model directory in ``output``.

    What is not quantized is stored in FP16 (BF16 if the parent is), the type that LLM.int8 computes in.

    Raises:
        SchemeUnavailable: bitsandbytes is not installed, or found no layer to quantize.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise SchemeUnavailable("bitsandbytes is not installed in this environment; pip install bitsandbytes.")
    import torch
    from bitsandbytes.nn.modules import Linear8bitLt
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantized = AutoModelForCausalLM.from_pretrained(
        model,
        dtype=torch.bfloat16 if stored_dtype(read_config(model)) == "bfloat16" else torch.float16,
        device_map={"": 0 if torch.cuda.is_available() else "cpu"},
        quantization_config=BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["lm_head"]),
        local_files_only=True,
    )
    layers = [name for name, module in quantized.named_modules() if isinstance(module, Linear8bitLt)]
    if not layers:
        raise SchemeUnavailable("bitsandbytes replaced no linear layer of this model: nothing would be in eight bits.")
    quantized.save_pretrained(output)
    copy_companions(model, output)
