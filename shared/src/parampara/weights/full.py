"""A model that was trained as a whole, as a change to its base: every tensor of the base, replaced.

The directory is what an adapter's is, with ``model.safetensors`` (the base's own tensor names) and ``full_weights.json`` in the place of
PEFT's two files. It is no model directory: config, and whatever the base has beside its weights, stay the base's.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

from parampara.errors import InvalidData
from parampara.manifest import sha256_file
from parampara.weights.adapters import check_companions, read_json, read_provenance
from parampara.weights.changes import Change, Replace
from parampara.weights.model_files import ModelFiles
from parampara.weights.tensor_files import TensorFile

WEIGHTS = "model.safetensors"
"""One file whatever its size: it is read by rows, and its sha256 is what later stages know it by, as they do an adapter's."""
DESCRIPTION = "full_weights.json"
_FORMAT = 1


def is_full(directory: Path) -> bool:
    """Whether a training stage left the whole model there, and not an adapter."""
    return (directory / DESCRIPTION).is_file()


def describe(directory: Path, *, base_sha256: str) -> None:
    """Write ``full_weights.json`` beside the weights."""
    record = {"format": _FORMAT, "weights": WEIGHTS, "base_sha256": base_sha256}
    (directory / DESCRIPTION).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def trained_on(directory: Path, name: str) -> str:
    """Fingerprint of the weights that training started from.

    Raises:
        InvalidData: ``full_weights.json`` can not be read or is of another format.
    """
    record = read_json(directory / DESCRIPTION, name)
    if record.get("format") != _FORMAT or record.get("weights") != WEIGHTS or not isinstance(record.get("base_sha256"), str):
        raise InvalidData(f"{name}: {DESCRIPTION} does not describe weights that are read here (format {_FORMAT}).", param=name)
    return record["base_sha256"]


class FullWeights:
    """Opened as :class:`parampara.weights.adapters.Adapter` is; tensors are read by rows as they are needed.

    Raises:
        InvalidData: a file is missing or damaged, or the files contradict each other.
    """

    def __init__(self, directory: Path, position: int) -> None:
        self.directory = directory
        self.name = f"adapters[{position}]"
        if (directory / "adapter_config.json").exists():
            raise InvalidData(f"{self.name}: {directory} holds {DESCRIPTION} and adapter_config.json; it can be one only.", param=self.name)
        self.provenance = read_provenance(directory, self.name)
        named = trained_on(directory, self.name)
        if named != self.provenance.base_sha256:
            raise InvalidData(
                f"{self.name}: {DESCRIPTION} names base {named[:16]}..., training.json {self.provenance.base_sha256[:16]}...",
                param=self.name,
            )
        path = directory / WEIGHTS
        if not path.is_file():
            raise InvalidData(f"{self.name}: {WEIGHTS} is missing in {directory}.", param=self.name)
        self._file = TensorFile(path)
        self.targets = {name for name, info in self._file.tensors.items() if info.dtype.is_floating_point}
        """Names of the base's tensors that are replaced: those that can be trained."""

    @property
    def sha256(self) -> str:
        """Of the weights' file; all of its bytes are read for it, once."""
        return self._digest

    @functools.cached_property
    def _digest(self) -> str:
        return sha256_file(self._file.path)

    def check_against(self, base: ModelFiles) -> None:
        """The weights must be those of the base, tensor by tensor, and its tokenizer the base's.

        Raises:
            InvalidData: names the tensor that is missing, too many, or of another shape or kind, or the tokenizer file that differs.
        """
        ours, theirs = base.tensors, self._file.tensors
        if missing := sorted(ours.keys() - theirs.keys()):
            raise InvalidData(
                f"{self.name}: tensor {missing[0]} of the base is missing ({len(missing)} in all); full weights hold every tensor.",
                param=self.name,
            )
        if extra := sorted(theirs.keys() - ours.keys()):
            raise InvalidData(f"{self.name}: the base has no tensor {extra[0]}; these are another model's weights.", param=self.name)
        for name, info in theirs.items():
            if info.shape != ours[name].shape:
                raise InvalidData(f"{self.name}: {name} has shape {info.shape}, in the base {ours[name].shape}.", param=self.name)
            floats = info.dtype.is_floating_point and ours[name].dtype.is_floating_point
            if not floats and info.dtype != ours[name].dtype:
                raise InvalidData(f"{self.name}: {name} is {info.dtype}, in the base {ours[name].dtype}.", param=self.name)
        check_companions(self.directory, base, self.name)

    def changes(self, target: str, base: ModelFiles) -> list[Change]:
        """One :class:`Replace` for each tensor of ``targets``."""
        return [Replace(self._file, target)] if target in self.targets else []

    def close(self) -> None:
        self._file.close()
