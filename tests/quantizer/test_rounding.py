"""The rounding of rows: its threshold against a search, its speed-ups against the plain way, its other mode against compressed-tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from hypothesis import given, settings
from hypothesis import strategies as st

from parampara.errors import Diverged
from quantizer.backends.compressed import StreamedScheme, quantization_config
from quantizer.rounding import Code, RowRounder, clip_thresholds, largest_magnitudes, magnitude_bits, pack

TYPES = [torch.float16, torch.bfloat16, torch.float32]


def rows_like(kind: str, rows: int, width: int, seed: int) -> torch.Tensor:
    """float32 rows of a distribution: trained weights look like the first, the others are what else a row may be."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(rows, width, generator=generator)
    if kind == "normal":
        return 0.02 * normal
    if kind == "uniform":
        return 0.1 * torch.rand(rows, width, generator=generator) - 0.05
    if kind == "outliers":
        return 0.02 * normal * torch.where(torch.rand(rows, width, generator=generator) < 0.002, 20.0, 1.0)
    if kind == "heavy tails":
        return 0.02 * normal / torch.randn(rows, width, generator=generator).abs().clamp(min=0.05)
    return 0.05 * normal.sign()  # two values only


def error(rows: torch.Tensor, thresholds: torch.Tensor) -> torch.Tensor:
    """Squared error of each row when it is rounded with that threshold, in float64."""
    scales = thresholds.double()[:, None] / 127
    values = rows.double()
    return ((values / scales).round().clamp(-128, 127) * scales - values).square().sum(1)


@settings(max_examples=25, deadline=None)
@given(
    kind=st.sampled_from(["normal", "uniform", "outliers", "heavy tails", "two values"]),
    width=st.integers(1, 3000),
    seed=st.integers(0, 2**31),
)
def test_the_threshold_is_the_best_of_a_search(kind: str, width: int, seed: int) -> None:
    rows = rows_like(kind, 3, width, seed)
    largest = rows.abs().sort(1, descending=True).values
    found, settled = clip_thresholds(largest, width)
    assert settled.all()
    fractions = [*torch.linspace(0.2, 1, 161).tolist()]
    searched = torch.stack([modelled(largest, fraction * largest[:, 0]) for fraction in fractions]).amin(0)
    assert (modelled(largest, found) <= searched * (1 + 1e-6)).all()


def modelled(magnitudes: torch.Tensor, thresholds: torch.Tensor) -> torch.Tensor:
    """E(t) of the module's text, in float64."""
    a, t = magnitudes.double(), thresholds.double()[:, None]
    return (a - t).clamp(min=0).square().sum(1) + a.shape[1] * t[:, 0].square() / (12 * 127**2)


@pytest.mark.parametrize("kind", ["normal", "outliers", "heavy tails"])
def test_no_searched_threshold_rounds_better_by_more_than_two_hundredths_and_the_maximum_rounds_worse(kind: str) -> None:
    rows = rows_like(kind, 64, 4096, seed=0)
    largest = rows.abs().amax(1)
    found = clip_thresholds(rows.abs().topk(8, 1).values, 4096)[0]
    searched = torch.stack([error(rows, fraction * largest) for fraction in torch.linspace(0.7, 1, 31).tolist()]).amin(0)
    assert error(rows, found).sum() <= 1.02 * searched.sum()  # a search per row also picks the luckiest rounding
    assert error(rows, found).sum() < 0.985 * error(rows, largest).sum()


@settings(max_examples=40, deadline=None)
@given(
    dtype=st.sampled_from(TYPES),
    rows=st.integers(1, 4),
    width=st.sampled_from([1, 2, 7, 8, 31, 64, 511, 544, 1000, 1024, 1027]),
    count=st.sampled_from([1, 3, 8]),
    few_values=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_the_largest_of_a_row_are_found_group_by_group(
    dtype: torch.dtype, rows: int, width: int, count: int, few_values: bool, seed: int
) -> None:
    values = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    values = (values.round() if few_values else values).to(dtype)
    bits = magnitude_bits(values, out=torch.empty(values.numel() + 5, dtype=torch.int32))
    assert torch.equal(largest_magnitudes(bits, count, dtype=dtype), values.abs().float().topk(min(count, width), 1).values)


@pytest.mark.parametrize("dtype", TYPES)
def test_codes_are_the_nearest_to_the_scale_as_stored(dtype: torch.dtype) -> None:
    rows = rows_like("normal", 6, 700, seed=1).to(dtype)
    codes, scales = RowRounder("int8", elements=rows.numel())(rows)
    assert (codes.dtype, scales.dtype, scales.shape) == (torch.int8, dtype, (6, 1))
    exact = rows.double() / scales.double()
    inside = exact.abs() < 127
    assert inside.float().mean() > 0.99
    assert ((exact - codes).abs()[inside] <= 0.5 + 1e-4).all()  # float32 against float64
    assert (codes[~inside].float().abs() >= 127).all()


def test_a_row_of_two_values_keeps_them() -> None:
    """Its eight largest do not settle the threshold: all of its weights are as large."""
    rows = rows_like("two values", 4, 2048, seed=3)
    codes, scales = RowRounder("int8", elements=rows.numel())(rows)
    assert torch.allclose(codes * scales, rows, rtol=1e-4)


def test_rows_of_zeros_and_of_the_smallest_numbers_come_back_exactly() -> None:
    smallest = 2.0**-24
    rows = torch.tensor([[0.0] * 9, [smallest] * 9, [3 * smallest, -100 * smallest] + [0.0] * 7], dtype=torch.float16)
    codes, scales = RowRounder("int8", elements=rows.numel())(rows)
    assert torch.equal(codes.float() * scales.float(), rows.float())
    assert (scales > 0).all()
    codes, scales = RowRounder("fp8", elements=rows.numel())(rows[:1])
    assert not codes.float().any() and scales.isfinite().all()


def test_the_largest_weight_of_a_row_is_no_nan_in_fp8() -> None:
    """A BF16 scale may be rounded down, and the cast makes NaN of what lies beyond 448."""
    rows = rows_like("normal", 64, 512, seed=5).bfloat16()
    codes, scales = RowRounder("fp8", elements=rows.numel())(rows)
    restored = codes.float() * scales.float()
    assert (restored - rows.float()).abs().max() < rows.float().abs().max() / 16
    assert (codes.float().abs().amax(1) > 416).all()


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("code", ["int8", "packed", "fp8"])
def test_a_weight_that_is_no_number_is_named_by_its_row(code: Code, dtype: torch.dtype, bad: float) -> None:
    rows = torch.ones(3, 600, dtype=dtype)
    rows[1, 77] = bad
    with pytest.raises(Diverged, match=r"row 1 holds (nan|inf)"):
        RowRounder(code, elements=rows.numel())(rows)


@pytest.mark.parametrize("width", [1, 3, 4, 33, 64])
def test_packing_is_compressed_tensors_own(width: int) -> None:
    codes = torch.randint(-128, 128, (5, width), dtype=torch.int8, generator=torch.Generator().manual_seed(width))
    expected = pack_to_int32(codes, 8)
    assert torch.equal(pack(codes), expected)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("scheme", "code"), [("w8a8", "int8"), ("w8a16", "packed"), ("fp8", "fp8")])
def test_the_other_mode_is_compressed_tensors_arithmetic_bit_for_bit(scheme: StreamedScheme, code: Code, dtype: torch.dtype) -> None:
    rows = torch.cat([rows_like(kind, 8, 1000, seed=9) for kind in ("normal", "outliers", "two values")]).to(dtype)
    rows[5] = 0
    codes, scales = RowRounder(code, "llm-compressor", elements=rows.numel())(rows)
    expected = compressed_by_the_library(rows, scheme)
    assert torch.equal(scales, expected["weight_scale"])
    key = "weight_packed" if code == "packed" else "weight"
    assert torch.equal(codes.view(torch.uint8), expected[key].contiguous().view(torch.uint8))


def compressed_by_the_library(rows: torch.Tensor, scheme: StreamedScheme) -> dict[str, torch.Tensor]:
    written: dict[str, Any] = quantization_config(scheme, ignore=[])
    group = QuantizationScheme.model_validate(written["config_groups"]["group_0"])
    assert group.weights is not None
    low, high = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
    scales, zeros = calculate_qparams(low, high, group.weights)
    compressor: Any = BaseCompressor.get_value_from_registry(written["format"])
    return compressor.compress({"weight": rows, "weight_scale": scales, "weight_zero_point": zeros}, group)
