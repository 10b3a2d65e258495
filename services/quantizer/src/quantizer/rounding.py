"""From rows of weights to eight-bit codes with one scale per row: the arithmetic of the schemes, a chunk of rows at a time.

Symmetric uniform quantization: a weight w of a row becomes q = clamp(round(w / s), -128, 127) and stands for q * s. The scale s
is stored in the model's own type, and q is computed in float32 with the scale *as stored*, so that rounding the scale costs
nothing but a slightly other threshold.

**The threshold.** With s = t / 127, weights above t are clipped, and the others carry uniform noise of variance s^2 / 12 (Banner
et al. 2019, arXiv 1810.05723, who solve it for a Laplace prior; here the row's own values stand in). The row's error is

    E(t) = sum over |w| > t of (|w| - t)^2  +  n t^2 / (12 * 127^2)

and dE/dt = 0 where t (m + n / (12 * 127^2)) = a_1 + ... + a_m, a_1 >= a_2 >= ... the magnitudes and m the number above t. The
derivative's first term is the largest of its partial sums over m, so t is the largest of the quotients over m: no search. n is
some thousands and 12 * 127^2 = 193,548, so m is nearly always 1 to 3; rows whose maximum lies at the last one looked at are
solved over all their values.

**FP8** (E4M3, largest number 448) has relative precision, so clipping buys nothing: s = max|w| / 448.
"""

from __future__ import annotations

from typing import Literal

import torch

from parampara.errors import Diverged

Rounding = Literal["mse", "llm-compressor"]
"""``mse`` as above. ``llm-compressor``: its data-free arithmetic, bit for bit: s = max|w| / 127.5, everything in the weight's type."""
Code = Literal["int8", "packed", "fp8"]
"""How codes are stored: int8, four of them (plus 128) in an int32, or E4M3."""

INT8_MAX = 127
FP8 = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8).max
_NOISE = 12 * INT8_MAX**2
_TOP, _GROUP = 8, 32
_BITS = {torch.float16: (torch.int16, 0x7FFF), torch.bfloat16: (torch.int16, 0x7FFF), torch.float32: (torch.int32, 0x7FFFFFFF)}
"""Type of the same width to read a number's bits, and the mask that drops its sign."""


class RowRounder:
    """Rounds chunks of at most ``elements`` weights; its memory is made once, and each result lives until the next call."""

    def __init__(self, code: Code, rounding: Rounding = "mse", *, elements: int) -> None:
        self._code: Code = code
        self._exact = rounding == "mse"
        self._values = torch.empty(elements)
        self._bits = torch.empty(elements, dtype=torch.int32)
        self._codes = torch.empty(elements, dtype=torch.uint8)

    def __call__(self, rows: torch.Tensor, dtype: torch.dtype | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes and scales of ``rows`` (``[r, n]``, FP16, BF16 or FP32).

        Codes are ``[r, n]`` int8 or E4M3, or ``[r, ceil(n / 4)]`` int32; scales ``[r, 1]`` in ``dtype``, the model's, which may be
        narrower than that of ``rows`` (None: the same).

        Raises:
            Diverged: a weight is not finite; the message counts rows from the start of the chunk.
        """
        dtype = dtype or rows.dtype
        rows = rows if self._exact else rows.to(dtype)
        scales = self._scales(rows, dtype)
        codes = self._codes[: rows.numel()].view(FP8 if self._code == "fp8" else torch.int8).view(rows.shape)
        if self._exact:
            scaled = self._values[: rows.numel()].view(rows.shape).copy_(rows).mul_(scales.float().reciprocal())
        else:
            scaled = rows / scales
        if self._code == "fp8":
            codes.copy_(scaled.clamp_(-FP8_MAX, FP8_MAX))  # the cast would make NaN of what is beyond
        else:
            codes.copy_(scaled.round_().clamp_(-INT8_MAX - 1, INT8_MAX))
        return (pack(codes) if self._code == "packed" else codes), scales

    def _scales(self, rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        bits = magnitude_bits(rows, out=self._bits)
        searched = self._exact and self._code != "fp8"
        largest = largest_magnitudes(bits, _TOP if searched else 1, dtype=rows.dtype)
        check_finite(largest)
        if not self._exact:
            divisor = FP8_MAX if self._code == "fp8" else INT8_MAX + 0.5
            return _not_zero(largest[:, :1].to(rows.dtype) / divisor)
        if not searched:
            return _storable(largest[:, :1] / FP8_MAX, dtype)
        thresholds, settled = clip_thresholds(largest, rows.shape[1])
        if not settled.all():
            all_of_them = bits[~settled].view(rows.dtype).float().sort(1, descending=True).values
            thresholds[~settled] = clip_thresholds(all_of_them, rows.shape[1])[0]
        return _storable(thresholds[:, None] / INT8_MAX, dtype)


def clip_thresholds(largest: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The clipping threshold t of each row of ``width`` weights, from its ``[r, k]`` largest magnitudes in falling order.

    Also says of each row whether those k settle it: fewer than k of them lie above t.
    """
    count = largest.shape[1]
    quotients = largest.cumsum(1) / (torch.arange(1, count + 1) + width / _NOISE)
    thresholds, at = quotients.max(1)
    return thresholds, (at < count - 1) | (count == width)


def magnitude_bits(rows: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
    """The bits of ``|rows|`` as integers, which compare as the numbers do (IEEE 754) and are half as wide as float32.

    ``out`` lends int32 memory for at least as many numbers.
    """
    integer, mask = _BITS[rows.dtype]
    target = out.view(integer)[: rows.numel()].view(rows.shape)
    return torch.bitwise_and(rows.view(integer), mask, out=target)


def largest_magnitudes(bits: torch.Tensor, count: int, *, dtype: torch.dtype) -> torch.Tensor:
    """The ``count`` largest of each row of :func:`magnitude_bits` in falling order, as float32.

    They lie in those ``count`` groups of a row whose own maxima are the largest, so only these are sorted through.
    """
    rows, width = bits.shape
    groups = width // _GROUP
    if count == 1:
        top = bits.amax(1, keepdim=True)
    elif groups <= 2 * count:
        top = bits.topk(min(count, width), dim=1).values
    else:
        grouped = bits[:, : groups * _GROUP].unflatten(1, (_GROUP, groups))
        chosen = grouped.amax(1).topk(count, dim=1, sorted=False).indices
        candidates = grouped.gather(2, chosen[:, None].expand(rows, _GROUP, count)).flatten(1)
        top = torch.cat([candidates, bits[:, groups * _GROUP :]], 1).topk(count, dim=1).values
    return top.view(dtype).float()


def check_finite(largest: torch.Tensor) -> None:
    """Raises:
    Diverged: the largest magnitude of a row is infinite or not a number.
    """
    finite = largest[:, 0].isfinite()
    if not finite.all():
        row = int((~finite).nonzero()[0])
        raise Diverged(f"row {row} holds {float(largest[row, 0])}, which no eight-bit scheme can hold.", param="model")


def pack(codes: torch.Tensor) -> torch.Tensor:
    """int8 ``[r, n]`` as int32 ``[r, ceil(n / 4)]``: code + 128, the first in the lowest byte (compressed-tensors' pack-quantized)."""
    shifted = codes.view(torch.uint8).bitwise_xor_(0x80)
    padding = -codes.shape[1] % 4
    if padding:
        shifted = torch.nn.functional.pad(shifted, (0, padding))
    return shifted.view(torch.int32)


def _storable(scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Scales as they are stored; in FP16 one that would become zero is the smallest number instead, of which all weights are multiples."""
    stored = scales.to(dtype)
    if dtype == torch.float16:
        stored[(stored == 0) & (scales > 0)] = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    return _not_zero(stored)


def _not_zero(scales: torch.Tensor) -> torch.Tensor:
    """A row of zeros has any scale but zero; compressed-tensors writes the type's epsilon."""
    return scales.masked_fill_(scales == 0, torch.finfo(scales.dtype).eps)
