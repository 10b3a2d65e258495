"""compressed-tensors checkpoints, written in one pass whose memory does not grow with the model.

Every linear layer but the output head is rounded by :mod:`quantizer.rounding`, a chunk of rows at a time; everything else is
copied. What adapters change arrives merged in float32 and is rounded from there; the rest is read in the type that the base stores,
which is also that of the scales and of all that is not rounded to eight bits.

The format is that of the compressed-tensors library (https://github.com/vllm-project/compressed-tensors), which vLLM and
transformers load:

- ``w8a8``: ``weight`` int8 [out, in], ``weight_scale`` [out, 1]; vLLM rounds activations to int8 per token as they come.
- ``fp8``: the same with ``weight`` in E4M3 and activations in E4M3.
- ``w8a16``: ``weight_packed`` int32 [out, ceil(in / 4)], ``weight_scale``, ``weight_shape``; activations stay in 16 bits.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from parampara.errors import Diverged, InvalidData
from parampara.progress import Progress
from parampara.schemas.stages import StreamedScheme
from parampara.weights.merged import MergedModel
from parampara.weights.sharding import shards, write_index
from parampara.weights.tensor_files import Planned, ShardWriter, TensorInfo
from quantizer.backends import SchemeUnavailable, check_stop
from quantizer.checkpoint import copy_companions, directory_of, faults_as, read_config
from quantizer.rounding import FP8, Code, Rounding, RowRounder, check_finite, largest_magnitudes, magnitude_bits

CHUNK_ELEMENTS = 1 << 19
"""Weights in one chunk: large enough that calls cost little, small enough that its float32 copy stays in the cache."""
MAX_SHARD_BYTES = 5_000_000_000
_CODES: dict[StreamedScheme, Code] = {"w8a8": "int8", "w8a16": "packed", "fp8": "fp8"}
_ROUNDED = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Layers:
    """Linear layers of an architecture by module name; ``heads`` give the logits and stay as they are."""

    shapes: dict[str, tuple[int, int]]
    heads: list[str]


def write(
    model: Path | MergedModel,
    output: Path,
    *,
    scheme: StreamedScheme,
    progress: Progress,
    rounding: Rounding = "mse",
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write ``model`` in ``scheme`` to the new directory ``output``, in files of ``max_shard_bytes`` or one tensor.

    Raises:
        InvalidData: a shard is missing or damaged, config.json describes other shapes, or the adapters change nothing.
        Diverged: a weight is infinite, not a number, or too large for the base's type once merged.
        SchemeUnavailable: the architecture stores its linear layers under other names or in another type.
        Preempted: asked to stop.
    """
    directory = directory_of(model)
    config = read_config(directory)
    layers = linear_layers(directory)
    with MergedModel(model) if isinstance(model, Path) else nullcontext(model) as source:
        _check(layers, source.tensors)
        output.mkdir(parents=True)
        _write_tensors(source, output, layers=layers, code=_CODES[scheme], rounding=rounding, limit=max_shard_bytes, progress=progress)
        if source.adapters and not source.max_abs_delta:
            raise InvalidData("The adapters would change nothing: every delta is zero. Were they trained?", param="adapters")
    config["quantization_config"] = quantization_config(scheme, ignore=layers.heads)
    (output / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    copy_companions(directory, output)


def linear_layers(model: Path) -> Layers:
    """The linear layers that ``config.json`` describes; the model is built without memory for its weights.

    Raises:
        InvalidData: transformers knows no causal language model of this config.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    with faults_as(lambda fault: InvalidData(f"{model} cannot be loaded ({fault}).", param="model")), torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model, local_files_only=True))
    head = skeleton.get_output_embeddings()
    linear = {name: module for name, module in skeleton.named_modules() if isinstance(module, torch.nn.Linear)}
    return Layers(
        shapes={name: (module.out_features, module.in_features) for name, module in linear.items() if module is not head},
        heads=[name for name, module in linear.items() if module is head],
    )


def quantization_config(scheme: StreamedScheme, *, ignore: list[str]) -> dict[str, Any]:
    """``quantization_config`` of config.json, as compressed-tensors' own classes write it."""
    from compressed_tensors.config import CompressionFormat
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme, QuantizationStatus

    kind = "float" if scheme == "fp8" else "int"
    weights = QuantizationArgs.model_validate({"num_bits": 8, "type": kind, "strategy": "channel"})
    activations = QuantizationArgs.model_validate({"num_bits": 8, "type": kind, "strategy": "token", "dynamic": True})
    stored = {
        "w8a8": CompressionFormat.int_quantized,
        "w8a16": CompressionFormat.pack_quantized,
        "fp8": CompressionFormat.float_quantized,
    }[scheme]
    group = QuantizationScheme(
        targets=["Linear"], weights=weights, input_activations=None if scheme == "w8a16" else activations, format=stored
    )
    written = QuantizationConfig(
        config_groups={"group_0": group}, format=stored.value, quantization_status=QuantizationStatus.COMPRESSED, ignore=ignore
    )
    return written.model_dump(mode="json", exclude_none=True)


def _check(layers: Layers, tensors: dict[str, TensorInfo]) -> None:
    if not layers.shapes:
        raise SchemeUnavailable("This architecture has no linear layer besides its head: nothing would be in eight bits.")
    for name, shape in layers.shapes.items():
        info = tensors.get(f"{name}.weight")
        if info is None:
            raise SchemeUnavailable(f"The model's files hold no tensor {name}.weight: this architecture stores its layers otherwise.")
        if info.shape != shape:
            raise InvalidData(f"{name}.weight has shape {info.shape}; config.json describes {shape}.", param="model")
        if info.dtype not in _ROUNDED:
            raise SchemeUnavailable(f"{name}.weight is stored as {info.dtype}; FP16, BF16 and FP32 are rounded.")


def _write_tensors(
    model: MergedModel, output: Path, *, layers: Layers, code: Code, rounding: Rounding, limit: int, progress: Progress
) -> None:
    rounded = {f"{name}.weight" for name in layers.shapes}
    planned = shards({name: _planned(info, code if name in rounded else None) for name, info in model.tensors.items()}, limit)
    copy = _RowCopier(model, code=code, rounding=rounding)
    done = 0
    for file, groups in planned.items():
        with ShardWriter(output / file, [tensor for group in groups.values() for tensor in group]) as writer:
            for name in groups:
                copy(name, writer, rounded=name in rounded)
                done += 1
                progress.step(done, len(model.tensors))
    write_index(output, planned)


def _planned(info: TensorInfo, code: Code | None) -> list[Planned]:
    """What is written for one tensor of the parent; without a code it stays as it is."""
    if code is None:
        return [Planned(info.name, info.dtype, info.shape)]
    rows, width = info.shape
    scale = Planned(f"{info.name}_scale", info.dtype, (rows, 1))
    if code == "packed":
        packed = Planned(f"{info.name}_packed", torch.int32, (rows, -(-width // 4)))
        return [packed, scale, Planned(f"{info.name}_shape", torch.int64, (2,))]
    return [Planned(info.name, FP8 if code == "fp8" else torch.int8, info.shape), scale]


class _RowCopier:
    """Copies tensors from the parent to a shard, rounding where asked. Its memory is made once and holds one chunk of rows."""

    def __init__(self, model: MergedModel, *, code: Code, rounding: Rounding) -> None:
        elements = max(CHUNK_ELEMENTS, *(info.row_elements for info in model.tensors.values()))
        self._model = model
        self._code = code
        self._round = RowRounder(code, rounding, elements=elements)
        self._elements = elements
        self._raw = torch.empty(elements, dtype=torch.float64)
        self._bits = torch.empty(elements, dtype=torch.int32)

    def __call__(self, name: str, writer: ShardWriter, *, rounded: bool) -> None:
        info = self._model.tensors[name]
        scales: list[torch.Tensor] = []
        start = 0
        for rows in self._merged(info) if name in self._model.changed else self._stored(info):
            check_stop()
            try:
                writer.write(self._rounded(rows, info, scales) if rounded else self._finite(rows, info))
            except Diverged as fault:
                raise Diverged(f"{name}, from row {start} on: {fault.message}", param="model") from None
            start += rows.shape[0]
        if rounded:
            writer.write(torch.cat(scales))
        if rounded and self._code == "packed":
            writer.write(torch.tensor(info.shape))

    def _merged(self, info: TensorInfo) -> Iterator[torch.Tensor]:
        """Merged chunks are small, and rounding has a price per call: gathered to chunks as large as stored ones."""
        step, wide = self._step(info), torch.promote_types(info.dtype, torch.float32)
        gathered = self._raw.view(wide)[: step * info.row_elements].view(step, info.row_elements)
        filled = 0
        try:
            for rows in self._model.rows(info.name, limit=info.dtype):
                if filled + rows.shape[0] > step:
                    yield gathered[:filled]
                    filled = 0
                gathered[filled : filled + rows.shape[0]] = rows
                filled += rows.shape[0]
        except Diverged as fault:
            raise Diverged(fault.message, param="model") from None
        yield gathered[:filled]

    def _stored(self, info: TensorInfo) -> Iterator[torch.Tensor]:
        file, step = self._model.base.home[info.name], self._step(info)
        for start in range(0, info.rows, step):
            yield file.read_rows(info.name, start, min(start + step, info.rows), into=self._raw.view(info.dtype))

    def _step(self, info: TensorInfo) -> int:
        return max(1, self._elements // max(1, info.row_elements))

    def _rounded(self, rows: torch.Tensor, info: TensorInfo, scales: list[torch.Tensor]) -> torch.Tensor:
        codes, scale = self._round(rows, info.dtype)
        scales.append(scale)
        return codes

    def _finite(self, rows: torch.Tensor, info: TensorInfo) -> torch.Tensor:
        stored = rows.to(info.dtype)
        if info.dtype in _ROUNDED and stored.numel():
            check_finite(largest_magnitudes(magnitude_bits(stored, out=self._bits), 1, dtype=info.dtype))
        return stored
