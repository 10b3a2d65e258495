"""A base and the adapters stacked on it, read as one model: each tensor arrives a few rows at a time, merged, in float32.

Nothing is written and nothing is kept, so a reader (the merge, a quantizer that merges on the way) has the whole model in the
memory of one chunk.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType

import torch

from parampara.errors import Diverged
from parampara.manifest import weights_fingerprint
from parampara.weights.adapters import Adapter, Trained, check_lineage
from parampara.weights.changes import Change, DoraColumns, LowRank, Replace
from parampara.weights.full import FullWeights, is_full
from parampara.weights.model_files import ModelFiles
from parampara.weights.tensor_files import TensorInfo

CHUNK_BYTES = 1024 * 1024
"""Size of one row chunk in float32: small enough that the steps on a chunk find it in the processor's cache."""


class MergedModel:
    """``model`` with ``adapters`` applied in order, opened and checked as a whole before the first row is read.

    ``tensors`` maps each name to its shape and to the dtype that the base stores it in. With no adapters this is the base itself.

    Raises:
        InvalidData: base and adapters do not belong together, a file is damaged, or a feature is not supported.
    """

    def __init__(self, model: Path, adapters: Sequence[Path] = ()) -> None:
        self.adapters: list[Trained] = []
        self.max_abs_delta = 0.0
        """Largest change of any weight against the base, over the rows read so far."""
        self.base = ModelFiles(model)
        try:
            for position, path in enumerate(adapters):
                self.adapters.append(FullWeights(path, position) if is_full(path) else Adapter(path, position))
                self.adapters[-1].check_against(self.base)
            if self.adapters:
                check_lineage(self.adapters, self.base_sha256)
        except BaseException:
            self.close()
            raise
        self.tensors = self.base.tensors
        self.changed: set[str] = set().union(*(adapter.targets for adapter in self.adapters))
        """Names of the tensors that an adapter changes."""

    @functools.cached_property
    def base_sha256(self) -> str:
        """Fingerprint of the base's weights. All of its bytes are read for it: without adapters only when asked for."""
        return weights_fingerprint(self.base.directory)

    def rows(self, name: str, *, limit: torch.dtype = torch.float32) -> Iterator[torch.Tensor]:
        """The merged tensor from its first row to its last, as chunks of whole rows, shape ``[n, row_elements]``.

        Floats arrive in float32 (float64 where the base has float64), other dtypes as they are stored. A chunk is valid until
        the next one is asked for: its memory is used again.

        Raises:
            Diverged: a value is not finite, or above what ``limit`` can hold.
            InvalidData: a file is shorter than its header says.
        """
        info = self.tensors[name]
        if not info.dtype.is_floating_point:
            yield from self._stored(info)
            return
        changes = self._changes(name)
        for position, change in enumerate(changes):
            if isinstance(change, DoraColumns):
                for start, rows in self._floats(info):
                    for earlier in changes[:position]:
                        earlier.apply(rows, start)
                    change.measure(rows, start)
        before: torch.Tensor | None = None
        for start, rows in self._floats(info):
            if changes:
                before = rows.clone() if before is None else before[: rows.shape[0]].copy_(rows)
                for change in changes:
                    change.apply(rows, start)
                self.max_abs_delta = max(self.max_abs_delta, _largest(before.sub_(rows), f"the delta of {name}", torch.float32))
            _largest(rows, name, limit)
            yield rows

    def close(self) -> None:
        self.base.close()
        for adapter in self.adapters:
            adapter.close()

    def __enter__(self) -> MergedModel:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _changes(self, name: str) -> list[Change]:
        """All adapters' changes in order; low-rank ones that follow each other are one product: [s1 B1, s2 B2] [A1; A2].

        What comes before a whole tensor is not computed.
        """
        made: list[Change] = []
        for adapter in self.adapters:
            for change in adapter.changes(name, self.base):
                if isinstance(change, Replace):
                    made = [change]
                elif made and isinstance(change, LowRank) and isinstance(made[-1], LowRank):
                    made[-1] = made[-1].then(change)
                else:
                    made.append(change)
        return made

    def _stored(self, info: TensorInfo) -> Iterator[torch.Tensor]:
        step = max(1, CHUNK_BYTES // max(1, info.row_elements * 4))
        buffer = torch.empty(min(step, info.rows) * info.row_elements, dtype=info.dtype)
        for start in range(0, info.rows, step):
            yield self.base.home[info.name].read_rows(info.name, start, min(start + step, info.rows), into=buffer)

    def _floats(self, info: TensorInfo) -> Iterator[tuple[int, torch.Tensor]]:
        start, buffer = 0, None
        for stored in self._stored(info):
            if buffer is None:
                buffer = torch.empty(stored.shape, dtype=torch.promote_types(info.dtype, torch.float32))
            yield start, buffer[: stored.shape[0]].copy_(stored)
            start += stored.shape[0]


def _largest(values: torch.Tensor, name: str, limit: torch.dtype) -> float:
    """Largest magnitude, after checking that ``limit`` can hold it.

    Raises:
        Diverged: not finite, or above what ``limit`` holds.
    """
    if values.numel() == 0:
        return 0.0
    low, high = torch.aminmax(values)  # a NaN anywhere makes both NaN
    largest = max(-float(low), float(high))
    if not largest <= torch.finfo(limit).max:
        raise Diverged(
            f"{name} holds {largest:g}, which {str(limit).removeprefix('torch.')} can not hold; nothing was written.", param="params.dtype"
        )
    return largest
