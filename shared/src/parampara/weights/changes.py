"""What an adapter does to one tensor of the base, a few rows at a time, in float32 (or in float64, where the base has it).

Each change works in place on rows ``start`` to ``start + n`` of the tensor as it is stored, shape ``[n, columns]``. The
arithmetic is PEFT's (peft.tuners.lora.layer and .variants); what differs is that nothing is rounded in between.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from parampara.weights.tensor_files import TensorFile


class Change(Protocol):
    def apply(self, rows: torch.Tensor, start: int) -> None:
        """Change ``rows``, the rows of the tensor from ``start`` on, in place."""
        ...


@dataclass(frozen=True)
class LowRank:
    """``W + left @ right``; left ``[rows, r]`` carries the scale, right is ``[r, columns]``."""

    left: torch.Tensor
    right: torch.Tensor

    def apply(self, rows: torch.Tensor, start: int) -> None:
        rows.addmm_(self.left[start : start + rows.shape[0]], self.right)

    def then(self, other: LowRank) -> LowRank:
        """Both at once, as one product of the summed rank."""
        return LowRank(torch.cat([self.left, other.left], dim=1), torch.cat([self.right, other.right], dim=0))


@dataclass(frozen=True)
class DoraRows:
    """``m * (W + delta) / |W + delta|`` with the norm of each row (DoRA, arXiv 2402.09353, eq. 5); ``m`` is ``[rows]``."""

    delta: LowRank
    magnitude: torch.Tensor

    def apply(self, rows: torch.Tensor, start: int) -> None:
        self.delta.apply(rows, start)
        norm = torch.linalg.vector_norm(rows, dim=1)
        rows.mul_((self.magnitude[start : start + rows.shape[0]] / norm)[:, None])


@dataclass
class DoraColumns:
    """DoRA where an output is a column of the stored tensor (embeddings, Conv1D); ``magnitude`` is ``[columns]``.

    A column's norm needs every row, so all rows have to be shown to :meth:`measure` before the first :meth:`apply`.
    """

    delta: LowRank
    magnitude: torch.Tensor
    squares: torch.Tensor | float = 0.0

    def measure(self, rows: torch.Tensor, start: int) -> None:
        self.delta.apply(rows, start)
        self.squares = self.squares + rows.double().square_().sum(dim=0)

    def apply(self, rows: torch.Tensor, start: int) -> None:
        self.delta.apply(rows, start)
        rows.mul_((self.magnitude / torch.as_tensor(self.squares).sqrt()).to(rows.dtype))


@dataclass(frozen=True)
class Replace:
    """A tensor that was trained as a whole (modules_to_save, biases), read from the adapter's file as it is needed."""

    file: TensorFile
    key: str

    def apply(self, rows: torch.Tensor, start: int) -> None:
        rows.copy_(self.file.read_rows(self.key, start, start + rows.shape[0]))


@dataclass(frozen=True)
class ReplaceRows:
    """Some rows trained on their own (trainable_token_indices): ``values[i]`` takes the place of row ``indices[i]``."""

    indices: list[int]
    values: torch.Tensor

    def apply(self, rows: torch.Tensor, start: int) -> None:
        for position, index in enumerate(self.indices):
            if start <= index < start + rows.shape[0]:
                rows[index - start] = self.values[position].to(rows.dtype)


@dataclass(frozen=True)
class Add:
    """A vector added to a bias (lora_bias), shape ``[rows]``."""

    vector: torch.Tensor

    def apply(self, rows: torch.Tensor, start: int) -> None:
        rows.add_(self.vector[start : start + rows.shape[0], None])
