"""Causal attention over rows that lie end to end in one batch, each row apart from its neighbours.

Registered with transformers under :data:`NAME`. A batch that says where its rows end (``row_lengths``) is attended row by
row: by torch's variable-length flash kernel on a GPU in half precision, else by one call of the ordinary kernel per row, so
that no mask of tokens times tokens is ever built. Any other batch goes to transformers' own SDPA attention.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

NAME = "rows_apart"
_FIRST_CAPABILITY = (8, 0)
"""CUDA compute capability from which flash attention runs (Ampere)."""


def register() -> None:
    """Make :data:`NAME` known to transformers as an attention implementation; again is harmless."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, _mask)


def attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    row_lengths: tuple[int, ...] | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Attention as transformers calls it: ``query`` is ``(1, heads, tokens, size)``, ``key`` and ``value`` may have fewer heads.

    ``row_lengths`` sums to ``tokens``; ``cu_seq_lens_q`` holds the same as int32 borders, 0 first. Returns ``(1, tokens, heads, size)``.
    """
    if row_lengths is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others)
    if torch.is_autocast_enabled(query.device.type):  # weights in float32: what rotary positions leave in it, the kernels want in half
        half = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(half), key.to(half), value.to(half)
    if cu_seq_lens_q is not None and dropout == 0.0 and _has_varlen_kernel(query, key, value):
        return _varlen(query, key, value, borders=cu_seq_lens_q, longest=max(row_lengths), scaling=scaling), None
    rows = zip(query.split(row_lengths, 2), key.split(row_lengths, 2), value.split(row_lengths, 2), strict=True)
    attended = [
        scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scaling, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        for q, k, v in rows
    ]
    return torch.cat(attended, dim=2).transpose(1, 2).contiguous(), None


def _has_varlen_kernel(*tensors: torch.Tensor) -> bool:
    halves = (torch.float16, torch.bfloat16)
    if not all(tensor.is_cuda and tensor.dtype in halves and tensor.dtype == tensors[0].dtype for tensor in tensors):
        return False
    return tensors[0].shape[-1] <= 256 and torch.cuda.get_device_capability(tensors[0].device) >= _FIRST_CAPABILITY


def _varlen(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, borders: torch.Tensor, longest: int, scaling: float | None
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (tensor[0].transpose(0, 1).contiguous() for tensor in (query, key, value))  # (tokens, heads, size)
    # a window of everything to the left and nothing to the right is the causal mask
    causal = (-1, 0)
    attended = varlen_attn(
        q, k, v, borders, borders, longest, longest, scale=scaling, window_size=causal, enable_gqa=q.shape[1] != k.shape[1]
    )
    return attended.unsqueeze(0)  # type: ignore[union-attr]


def _mask(*args: Any, attention_mask: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor | None:
    """No mask where nothing is padded: a flat batch tells its rows by ``row_lengths``, a single row is causal as it is."""
    if attention_mask is None:
        return None
    from transformers.masking_utils import sdpa_mask

    return sdpa_mask(*args, attention_mask=attention_mask, **kwargs)
