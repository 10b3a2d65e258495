"""Stage merge: one or several stacked LoRA adapters into full weights, in one pass whose memory does not grow with the model.

Each tensor comes merged in float32, a few rows at a time, and is cast once to the target dtype: no rounding between adapters,
as merging them one after the other would have.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from parampara.errors import InvalidData, Preempted
from parampara.execution import stop
from parampara.manifest import fingerprint_of_shards
from parampara.progress import Progress
from parampara.schemas.stages import MergeConfig, MergeResult
from parampara.storage import fsync_directory, fsync_tree
from parampara.weights.merged import MergedModel
from parampara.weights.sharding import shards, write_index
from parampara.weights.tensor_files import Planned, ShardWriter, TensorInfo

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
    progress.phase("check")
    with _one_thread(), MergedModel(config.model, config.adapters) as model:
        return _merge(config, model=model, workdir=workdir.resolve(), progress=progress, started=started)


def _merge(config: MergeConfig, *, model: MergedModel, workdir: Path, progress: Progress, started: float) -> MergeResult:
    progress.phase("merge")
    final, stage = workdir / "output", workdir / f".output-{uuid.uuid4().hex}"
    for leftover in workdir.glob(".output-*"):  # of an attempt that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    stage.mkdir(parents=True)
    try:
        written = _Writer(model, _DTYPES[config.params.dtype], progress)
        weights_sha256 = written.write(stage, config.params.max_shard_bytes)
        if not written.differs:
            raise InvalidData(
                f"The merge would change nothing: the largest delta is {model.max_abs_delta:g}, and in {config.params.dtype} every weight "
                "stays as it was. Was the adapter trained?",
                param="adapters",
            )
        model.base.write_side_files(stage, config.params.dtype)
        record = {
            "base_sha256": model.base_sha256,
            "adapters": [adapter.sha256 for adapter in model.adapters],
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
        tensors=len(model.tensors),
        merged_tensors=len(model.changed),
        bytes=size,
        seconds=time.monotonic() - started,
        max_abs_delta=model.max_abs_delta,
        weights_sha256=weights_sha256,
        peak_memory_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )


@contextmanager
def _one_thread() -> Iterator[None]:
    """Arithmetic in this thread alone: a chunk takes less than a millisecond, and to share it among threads costs more than it saves.

    The processor's other cores hash and write what is done (:class:`parampara.weights.tensor_files.ShardWriter`).
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Writer:
    """The merged model as sharded safetensors; ``differs`` tells whether any weight, after the cast, is not the base's own cast."""

    def __init__(self, model: MergedModel, dtype: torch.dtype, progress: Progress) -> None:
        self.differs = False
        self._model, self._dtype, self._progress = model, dtype, progress

    def write(self, stage: Path, max_shard_bytes: int) -> str:
        """Write all shards in the base's own order, so that it is read front to back; returns their fingerprint."""
        planned = shards({info.name: [self._planned(info)] for info in self._model.tensors.values()}, max_shard_bytes)
        digests: dict[str, str] = {}
        done = 0
        for name, groups in planned.items():
            tensors = [tensor for group in groups.values() for tensor in group]
            with ShardWriter(stage / name, tensors, hashed=True, behind=True) as writer:
                for tensor in tensors:
                    if stop.requested():
                        raise Preempted("Stopped while merging, as asked; the merge starts again from its beginning.")
                    self._write_tensor(writer, tensor)
                    done += 1
                    self._progress.step(done, len(self._model.tensors))
            digests[name] = writer.sha256
        write_index(stage, planned)
        return fingerprint_of_shards(digests)

    def _planned(self, info: TensorInfo) -> Planned:
        return Planned(info.name, self._dtype if info.dtype.is_floating_point else info.dtype, info.shape)

    def _write_tensor(self, writer: ShardWriter, planned: Planned) -> None:
        start = 0
        for rows in self._model.rows(planned.name, limit=self._dtype):
            out = torch.empty(rows.shape, dtype=planned.dtype).copy_(rows)  # new memory: the writer keeps it for a while
            if not self.differs and planned.name in self._model.changed:
                base = self._model.base.home[planned.name].read_rows(planned.name, start, start + rows.shape[0])
                self.differs = not torch.equal(out, base.to(planned.dtype))
            writer.write(out)
            start += rows.shape[0]
