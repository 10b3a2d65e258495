"""Stage merge: one or several stacked LoRA adapters into full weights, in one pass whose memory does not grow with the model.

Each weight is read in row chunks, the deltas of all adapters are added in float32, and the sum is cast once to the target
dtype: no rounding between adapters, as merging them one after the other would have.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

import torch

from merger.adapters import Adapter, check_lineage
from merger.base import INDEX, BaseModelFiles
from parampara.errors import Diverged, InvalidData, Preempted
from parampara.execution import stop
from parampara.manifest import weights_fingerprint
from parampara.progress import Progress
from parampara.schemas.stages import MergeConfig, MergeResult
from parampara.storage import fsync_directory, fsync_tree
from parampara.weights.tensor_files import Planned, ShardWriter, TensorInfo

CHUNK_BYTES = 64 * 1024 * 1024
"""Size of one row chunk in float32."""
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def run(config: MergeConfig, *, workdir: Path, progress: Progress) -> MergeResult:
    """Merge ``config.adapters`` in order into ``config.model`` and leave a complete model in ``workdir/"output"``.

    Everything that can be refused is refused before a byte is written; the output appears whole or not at all.

    Raises:
        InvalidData: base and adapters do not belong together, a file is damaged, a feature is not supported, or the merge
            would change nothing.
        Diverged: a merged weight is not finite, or too large for the target dtype.
        Preempted: a stop was asked for; a merge starts again from its beginning.
    """
    started = time.monotonic()
    workdir = workdir.resolve()
    progress.phase("check")
    base = BaseModelFiles(config.model)
    adapters: list[Adapter] = []
    try:
        for position, path in enumerate(config.adapters):
            adapters.append(Adapter(path, position))
            adapters[-1].check_against(base.tensors, tied=base.tied)
        base_sha256 = weights_fingerprint(config.model)
        check_lineage(adapters, base_sha256)
        _check_tokenizers(config)
        return _merge(config, base=base, adapters=adapters, base_sha256=base_sha256, workdir=workdir, progress=progress, started=started)
    finally:
        base.close()
        for adapter in adapters:
            adapter.close()


def _merge(
    config: MergeConfig,
    *,
    base: BaseModelFiles,
    adapters: list[Adapter],
    base_sha256: str,
    workdir: Path,
    progress: Progress,
    started: float,
) -> MergeResult:
    progress.phase("merge")
    final, stage = workdir / "output", workdir / f".output-{uuid.uuid4().hex}"
    for leftover in workdir.glob(".output-*"):  # of an attempt that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    stage.mkdir(parents=True)
    try:
        counts = _write_weights(stage, base=base, adapters=adapters, config=config, progress=progress)
        if not counts.changed:
            raise InvalidData(
                f"The merge would change nothing: the largest delta is {counts.max_abs_delta:g}, and in {config.params.dtype} every weight "
                "stays as it was. Was the adapter trained?",
                param="adapters",
            )
        base.write_side_files(stage, config.params.dtype)
        progress.phase("fingerprint")
        weights_sha256 = weights_fingerprint(stage)
        record = {
            "base_sha256": base_sha256,
            "adapters": [adapter.sha256 for adapter in adapters],
            "weights_sha256": weights_sha256,
            "dtype": config.params.dtype,
        }
        (stage / "merge.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        size = sum(path.stat().st_size for path in stage.iterdir())
        fsync_tree(stage)
        shutil.rmtree(final, ignore_errors=True)
        os.rename(stage, final)
        fsync_directory(workdir)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
    return MergeResult(
        output=final,
        dtype=config.params.dtype,
        tensors=len(base.tensors),
        merged_tensors=counts.merged,
        bytes=size,
        seconds=time.monotonic() - started,
        max_abs_delta=counts.max_abs_delta,
        weights_sha256=weights_sha256,
        peak_memory_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )


@dataclass
class _Counts:
    merged: int = 0
    max_abs_delta: float = 0.0
    changed: bool = False
    """Whether any weight differs, after the cast, from the base's own cast."""


def _write_weights(stage: Path, *, base: BaseModelFiles, adapters: list[Adapter], config: MergeConfig, progress: Progress) -> _Counts:
    dtype = _DTYPES[config.params.dtype]
    shards = _plan_shards(base, dtype, config.params.max_shard_bytes)
    names = (
        ["model.safetensors"]
        if len(shards) == 1
        else [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    )
    counts, done, total = _Counts(), 0, len(base.tensors)
    for name, shard in zip(names, shards, strict=True):
        with ShardWriter(stage / name, shard) as writer:
            for planned in shard:
                if stop.requested():
                    raise Preempted("Stopped while merging, as asked; the merge starts again from its beginning.")
                _write_tensor(writer, base=base, adapters=adapters, planned=planned, counts=counts)
                done += 1
                progress.step(done, total)
    if len(shards) > 1:
        weight_map = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        size = sum(tensor.bytes for shard in shards for tensor in shard)
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (stage / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return counts


def _plan_shards(base: BaseModelFiles, dtype: torch.dtype, limit: int) -> list[list[Planned]]:
    """Tensors in the base's own order, so that it is read front to back; a tensor above ``limit`` has a shard of its own."""
    shards: list[list[Planned]] = [[]]
    size = 0
    for info in base.tensors.values():
        planned = Planned(info.name, dtype if info.dtype.is_floating_point else info.dtype, info.shape)
        if shards[-1] and size + planned.bytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(planned)
        size += planned.bytes
    return shards


def _write_tensor(writer: ShardWriter, *, base: BaseModelFiles, adapters: list[Adapter], planned: Planned, counts: _Counts) -> None:
    info, file = base.tensors[planned.name], base.home[planned.name]
    factors = [pair for adapter in adapters if (pair := adapter.factors(planned.name)) is not None]
    # all adapters in one product: [s1 B1, s2 B2] [A1; A2]
    left = torch.cat([b for b, _ in factors], dim=1) if factors else None
    right = torch.cat([a for _, a in factors], dim=0) if factors else None
    counts.merged += bool(factors)
    for start, stop_row in _row_chunks(info):
        rows = file.read_rows(info.name, start, stop_row)
        if not info.dtype.is_floating_point:
            writer.write(rows)
            continue
        before = rows.float() if info.dtype != torch.float64 else rows
        if left is None or right is None:
            after = before
        else:
            delta = left[start:stop_row] @ right
            counts.max_abs_delta = max(counts.max_abs_delta, _largest(delta, f"the delta of {info.name}", torch.float32))
            after = before + delta
        _largest(after, info.name, planned.dtype)
        cast = after.to(planned.dtype)
        if left is not None and not counts.changed:
            counts.changed = not torch.equal(cast, before.to(planned.dtype))
        writer.write(cast)


def _row_chunks(info: TensorInfo) -> list[tuple[int, int]]:
    step = max(1, CHUNK_BYTES // max(1, info.row_elements * 4))
    return [(start, min(start + step, info.rows)) for start in range(0, info.rows, step)]


def _largest(values: torch.Tensor, name: str, dtype: torch.dtype) -> float:
    """Largest magnitude, after checking that ``dtype`` can hold it.

    Raises:
        Diverged: not finite, or above what ``dtype`` holds.
    """
    if values.numel() == 0:
        return 0.0
    low, high = torch.aminmax(values)  # a NaN anywhere makes both NaN
    largest = max(-float(low), float(high))
    if not largest <= torch.finfo(dtype).max:
        raise Diverged(
            f"{name} holds {largest:g}, which {str(dtype).removeprefix('torch.')} can not hold; nothing was written.", param="params.dtype"
        )
    return largest


def _check_tokenizers(config: MergeConfig) -> None:
    """An adapter whose tokenizer is not the base's was trained on other tokens (or a resized vocabulary)."""
    for position, adapter in enumerate(config.adapters):
        for name in ("tokenizer.json", "chat_template.jinja"):
            theirs, ours = adapter / name, config.model / name
            if theirs.is_file() and ours.is_file() and theirs.read_bytes() != ours.read_bytes():
                raise InvalidData(
                    f"adapters[{position}]: its {name} is not the base's; it was trained with another one.", param=f"adapters[{position}]"
                )
