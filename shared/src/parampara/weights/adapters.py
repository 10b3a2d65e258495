"""LoRA adapters as changes to the tensors of a base: read from PEFT's files, refused by name where the merge would not be exact."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from parampara.errors import InvalidData
from parampara.manifest import sha256_file
from parampara.weights.changes import Add, Change, DoraColumns, DoraRows, LowRank, Replace, ReplaceRows
from parampara.weights.lora_settings import read_settings
from parampara.weights.model_files import ModelFiles
from parampara.weights.tensor_files import TensorFile

_PREFIX = "base_model.model."
# ends of the names under which PEFT stores what it trained in a module
_LINEAR = (".lora_A.weight", ".lora_B.weight")
_EMBEDDING = (".lora_embedding_A", ".lora_embedding_B")
_MAGNITUDE = ".lora_magnitude_vector"
_BIAS = ".lora_B.bias"
_TOKENS = ".token_adapter.trainable_tokens_delta"
_PARTS = (*_LINEAR, *_EMBEDDING, _MAGNITUDE, _BIAS, _TOKENS)
# a module that LoRA wraps keeps its own tensors one level deeper
_WRAPPED = ".base_layer."
# architectures made of transformers' Conv1D, which stores a weight as [in, out]
_CONV1D = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")


@dataclass(frozen=True)
class Provenance:
    """What the trainer recorded: the weights trained on, and how those came to be."""

    base_sha256: str
    line_base: str
    line_adapters: list[str]


class Trained(Protocol):
    """What a training stage left, opened: :class:`Adapter`, or :class:`parampara.weights.full.FullWeights`."""

    name: str
    """What errors call it."""
    provenance: Provenance

    @property
    def sha256(self) -> str:
        """Of its weights' file: what later stages know it by."""
        ...

    @property
    def targets(self) -> set[str]: ...

    def check_against(self, base: ModelFiles) -> None: ...

    def changes(self, target: str, base: ModelFiles) -> list[Change]: ...

    def close(self) -> None: ...


class Adapter:
    """One LoRA adapter, opened; its tensors are read as they are needed.

    Raises:
        InvalidData: a file is missing or damaged, or the adapter holds what the merge does not support.
    """

    def __init__(self, directory: Path, position: int) -> None:
        self.directory = directory
        self.name = f"adapters[{position}]"
        config = read_json(directory / "adapter_config.json", self.name)
        self.settings = read_settings(config, self.name)
        self.provenance = read_provenance(directory, self.name)
        weights = directory / "adapter_model.safetensors"
        if not weights.is_file():
            raise InvalidData(f"{self.name}: adapter_model.safetensors is missing in {directory}.", param=self.name)
        self.sha256 = sha256_file(weights)
        self._file = TensorFile(weights)
        try:
            self._parts, self._whole = self._sorted_keys()
        except BaseException:
            self.close()
            raise

    @property
    def targets(self) -> set[str]:
        """Names of the base's tensors that this adapter changes."""
        weights = {f"{module}.weight" for module in self._parts}
        biases = {f"{module}.bias" for module, parts in self._parts.items() if _BIAS in parts}
        return weights | biases | set(self._whole)

    def check_against(self, base: ModelFiles) -> None:
        """Everything the adapter holds must have its place in the base.

        Raises:
            InvalidData: names the module that is missing, tied, or of another shape, or the tokenizer file that differs.
        """
        for target in sorted(self.targets):
            module = target.rpartition(".")[0]
            trained_alone = set(self._parts.get(module, {})) == {_TOKENS} and target not in self._whole
            if base.tied and _is_tied(module) and not (trained_alone and not module.endswith("lm_head")):
                raise InvalidData(
                    f"{self.name}: LoRA on {module} or training it whole is not supported here: the base ties embedding and head, "
                    "so both would have to change.",
                    param=self.name,
                )
            if target not in base.tensors:
                missing = "the adapter is for another architecture" if target.endswith(".weight") else "lora_bias and bias need one"
                raise InvalidData(f"{self.name}: the base has no tensor {target}; {missing}.", param=self.name)
        for target, key in self._whole.items():
            self._check_whole(target, key, base)
        for module in self._parts:
            self._check_module(module, base)
        check_companions(self.directory, base, self.name)

    def changes(self, target: str, base: ModelFiles) -> list[Change]:
        """What the adapter does to the base's tensor ``target``, in order; empty where it leaves the tensor alone."""
        module, _, kind = target.rpartition(".")
        parts = self._parts.get(module, {})
        dtype = torch.promote_types(base.tensors[target].dtype, torch.float32)
        made: list[Change] = [Replace(self._file, self._whole[target])] if target in self._whole else []
        if kind == "bias":
            return made + ([Add(self._read(parts[_BIAS], dtype) * self.settings.scale(module))] if _BIAS in parts else [])
        if factors := _factors(parts):
            made.append(self._delta(module, factors, dtype, base))
        if _TOKENS in parts:
            made.append(ReplaceRows(self.settings.tokens_of(module), self._read(parts[_TOKENS], dtype)))
        return made

    def close(self) -> None:
        self._file.close()

    def _delta(self, module: str, factors: tuple[str, str], dtype: torch.dtype, base: ModelFiles) -> Change:
        a, b = (self._read(self._parts[module][factor], dtype) for factor in factors)
        by_columns = factors == _EMBEDDING or _is_conv1d(module, base)
        b *= self.settings.scale(module)
        # PEFT's delta is s B A, transposed where the stored weight is [in, out]
        delta = LowRank(a.t().contiguous(), b.t().contiguous()) if by_columns else LowRank(b, a)
        if _MAGNITUDE not in self._parts[module]:
            return delta
        magnitude = self._read(self._parts[module][_MAGNITUDE], dtype)
        return DoraColumns(delta, magnitude) if by_columns else DoraRows(delta, magnitude)

    def _read(self, key: str, dtype: torch.dtype) -> torch.Tensor:
        return self._file.read(key).to(dtype)

    def _sorted_keys(self) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
        """Module to its parts (end of name to key), and the tensors that were stored whole (name in the base to key)."""
        parts: dict[str, dict[str, str]] = {}
        whole: dict[str, str] = {}
        for key in self._file.tensors:
            if not key.startswith(_PREFIX):
                raise InvalidData(f"{self.name}: tensor {key} is not one of a PEFT adapter ({_PREFIX}...).", param=self.name)
            name = key.removeprefix(_PREFIX)
            part = next((part for part in _PARTS if name.endswith(part)), None)
            if part is not None:
                parts.setdefault(name.removesuffix(part), {})[part] = key
            elif "lora_" in name or not name.endswith((".weight", ".bias")):
                raise InvalidData(f"{self.name}: tensor {key} is nothing that the merge knows.", param=self.name)
            else:
                whole[name.replace(_WRAPPED, ".")] = key
        if not parts and not whole:
            raise InvalidData(f"{self.name}: the adapter holds no tensors.", param=self.name)
        return parts, whole

    def _check_whole(self, target: str, key: str, base: ModelFiles) -> None:
        theirs, ours = self._file.tensors[key], base.tensors[target]
        if theirs.shape != ours.shape:
            resized = " The vocabulary was resized, which is not supported by the merge." if _is_tied(target.rpartition(".")[0]) else ""
            raise InvalidData(f"{self.name}: {target} has shape {theirs.shape}, in the base {ours.shape}.{resized}", param=self.name)
        if not (theirs.dtype.is_floating_point and ours.dtype.is_floating_point):
            raise InvalidData(
                f"{self.name}: {target} is {theirs.dtype}, in the base {ours.dtype}; only floats are merged.", param=self.name
            )

    def _check_module(self, module: str, base: ModelFiles) -> None:
        parts, shape = self._parts[module], base.tensors[f"{module}.weight"].shape
        rows, columns = shape if len(shape) == 2 else (-1, -1)
        factors = _factors(parts)
        if factors is None and set(parts) == {_TOKENS}:
            self._check_tokens(module, rows, columns)
            return
        if factors is None or any(factor not in parts for factor in factors):
            raise InvalidData(f"{self.name}: {module} lacks one of its two LoRA factors.", param=self.name)
        if _TOKENS in parts:
            raise InvalidData(f"{self.name}: LoRA on {module} beside trainable_token_indices is not supported.", param=self.name)
        kind = base.config.get("model_type")
        if self.settings.fan_in_fan_out and kind not in _CONV1D:
            raise InvalidData(f"{self.name}: fan_in_fan_out is supported in {_CONV1D}, not in a {kind!r} model.", param=self.name)
        inputs, outputs = (rows, columns) if factors == _EMBEDDING or _is_conv1d(module, base) else (columns, rows)
        r = self.settings.rank(module)
        self._check_shapes(module, {factors[0]: (r, inputs), factors[1]: (outputs, r), _MAGNITUDE: (outputs,), _BIAS: (outputs,)})
        if self.settings.dora != (_MAGNITUDE in parts):
            has = "has no magnitude (lora_magnitude_vector)" if self.settings.dora else "has a magnitude"
            raise InvalidData(f"{self.name}: use_dora is {self.settings.dora}, and {module} {has}.", param=self.name)

    def _check_tokens(self, module: str, rows: int, columns: int) -> None:
        indices = self.settings.tokens_of(module)
        self._check_shapes(module, {_TOKENS: (len(indices), columns)})
        if max(indices, default=0) >= rows:
            raise InvalidData(
                f"{self.name}: trainable_token_indices holds {max(indices)}, {module} has {rows} rows (resized vocabulary?).",
                param=self.name,
            )

    def _check_shapes(self, module: str, expected: dict[str, tuple[int, ...]]) -> None:
        present = {part: self._file.tensors[key].shape for part, key in self._parts[module].items() if part in expected}
        fitting = {part: expected[part] for part in present}
        if present != fitting:
            raise InvalidData(f"{self.name}: {module} has factors {present}; {fitting} would fit the base.", param=self.name)


def check_companions(directory: Path, base: ModelFiles, name: str) -> None:
    """What was trained must have the base's tokenizer and chat template, where both have one.

    Raises:
        InvalidData: names the file that differs.
    """
    for file in ("tokenizer.json", "chat_template.jinja"):
        theirs, ours = directory / file, base.directory / file
        if theirs.is_file() and ours.is_file() and theirs.read_bytes() != ours.read_bytes():
            raise InvalidData(f"{name}: its {file} is not the base's; it was trained with another one.", param=name)


def check_lineage(adapters: Sequence[Trained], base_sha256: str) -> None:
    """Each adapter must have been trained on exactly the weights that the base and the adapters before it make.

    The first was trained on the base itself. A later one was trained on a merged model, whose ``merge.json`` named the base
    and the adapters in it; the trainer copied that line into the adapter's ``training.json``.

    Raises:
        InvalidData: names the adapter and what it was trained on.
    """
    for position, adapter in enumerate(adapters):
        made_on, before = adapter.provenance, [earlier.sha256 for earlier in adapters[:position]]
        if position == 0 and made_on.base_sha256 != base_sha256:
            raise InvalidData(
                f"{adapter.name} was trained on weights {made_on.base_sha256[:16]}..., the base given here is {base_sha256[:16]}...: "
                "merging would make a model that nobody trained. Give the base it was trained on.",
                param=adapter.name,
            )
        if position and (made_on.line_base, made_on.line_adapters) != (base_sha256, before):
            raise InvalidData(
                f"{adapter.name} was trained on base {made_on.line_base[:16]}... with adapters {_short(made_on.line_adapters)}, "
                f"here it would follow base {base_sha256[:16]}... with {_short(before)}. Give the same base and order.",
                param=adapter.name,
            )


def _short(digests: list[str]) -> list[str]:
    return [digest[:16] for digest in digests]


def _factors(parts: dict[str, str]) -> tuple[str, str] | None:
    return next((pair for pair in (_LINEAR, _EMBEDDING) if pair[0] in parts or pair[1] in parts), None)


def _is_tied(module: str) -> bool:
    """Whether ``module`` is, by its name, an end of the model that a tied head shares."""
    return "embed" in module or module.rpartition(".")[2] in ("lm_head", "wte")


def _is_conv1d(module: str, base: ModelFiles) -> bool:
    return base.config.get("model_type") in _CONV1D and not _is_tied(module)


def read_provenance(directory: Path, name: str) -> Provenance:
    """From ``training.json``.

    Raises:
        InvalidData: it can not be read or does not say.
    """
    record = read_json(directory / "training.json", name)
    try:
        lineage = record["lineage"]
        return Provenance(str(record["base_sha256"]), str(lineage["base_sha256"]), [str(sha) for sha in lineage["adapters"]])
    except (KeyError, TypeError) as error:
        raise InvalidData(f"{name}: training.json does not say what it was trained on ({error} is missing).", param=name) from None


def read_json(path: Path, name: str) -> dict[str, Any]:
    """A file of the directory that errors call ``name``.

    Raises:
        InvalidData: it can not be read or is no JSON object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidData(f"{name}: {path.name} can not be read ({error}).", param=name) from None
    if not isinstance(data, dict):
        raise InvalidData(f"{name}: {path.name} is not a JSON object.", param=name)
    return data
